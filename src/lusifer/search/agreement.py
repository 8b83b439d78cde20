"""May a model query an index that another one made? Said by a file, or measured on the index's own texts.

The model embeds texts of the index, and each of its vectors is compared with the stored ones. Where both models share a
space, a text finds its own stored vector among all of the sample; where they do not, it finds it by chance. So this
share decides, not the cosine: models whose vectors all lie in a narrow cone have high cosines with everything, and one
that was adapted to another may lie at 0.6 of it and still find every text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lusifer.data.prompts import prompt_for
from lusifer.errors import LusiferError
from lusifer.hooks.transformers import cached_or_none
from lusifer.loading import resolve
from lusifer.model.fingerprint import weights_hash
from lusifer.model.text_encoder import TextEncoder
from lusifer.search.store import Store

ADAPTED = "adapted.json"  # In a model's folder: the hash of the model that it was adapted to.
_QUICK_SAMPLE = 64
# The same model in another precision or library, or on another device, stays within a hundredth; no model trained
# apart comes there.
SAME_COSINE = 0.99
# Found by nine in ten of the texts themselves: a query, which says less than its text, will find them too.
ENOUGH_FOUND = 0.9
# With fewer texts, finding them all may be luck (one in 8^8 with eight); only the same model is recognised then.
_LEAST_TEXTS = 8
_TIE = 1e-5  # Cosines nearer than float32 can tell apart, as of texts that stand there twice.


@dataclass(frozen=True)
class Agreement:
    """How well a model's vectors of texts agree with stored ones.

    Attributes:
        texts: Texts compared, every text once.
        mean_cosine: Mean cosine between the model's vector of a text and the stored one.
        low_cosine: 5th percentile of these.
        found: Share of texts whose own stored vector is the nearest of all to the model's.
        mean_rank: Mean rank of it, from 1.
        median_rank: Median of these.
    """

    texts: int
    mean_cosine: float
    low_cosine: float
    found: float
    mean_rank: float
    median_rank: float

    @property
    def verdict(self) -> str:
        """``same``, ``agrees`` (may query, too) or ``differs``."""
        if self.low_cosine >= SAME_COSINE:
            return "same"
        return "agrees" if self.texts >= _LEAST_TEXTS and self.found >= ENOUGH_FOUND else "differs"

    @property
    def may_query(self) -> bool:
        """Whether the model may query the index."""
        return self.verdict != "differs"

    @property
    def measured(self) -> str:
        """The figures that decide, in words."""
        chance = f"{1 / self.texts:.1%}" if self.texts > 1 else "certain"
        return (
            f"{self.found:.0%} of {self.texts} texts find their own stored vector (by chance {chance}), "
            f"mean cosine {self.mean_cosine:.2f}"
        )

    def sentence(self, model: str, index: str) -> str:
        """Whether the model may query the index, and why, in one sentence."""
        if self.verdict == "same":
            return f"{model!r} may query {index!r}: its vectors are those of the index ({self.measured})"
        if self.verdict == "agrees":
            return f"{model!r} may query {index!r}: its vectors lie in the space of the index ({self.measured})"
        few = f", and {self.texts} texts are too few to tell" if self.texts < _LEAST_TEXTS else ""
        return f"{model!r} may not query {index!r}: its vectors do not agree with the index ({self.measured}){few}"

    def to_dict(self) -> dict[str, Any]:
        """The figures for JSON."""
        figures = ("mean_cosine", "low_cosine", "found", "mean_rank", "median_rank")
        rounded = {name: round(float(getattr(self, name)), 4) for name in figures}
        return {"texts": self.texts, **rounded, "verdict": self.verdict, "may_query": self.may_query}


def compare(made: np.ndarray, stored: np.ndarray) -> Agreement:
    """Compares a model's vectors of texts with the stored ones.

    Args:
        made: (n, dim) vectors of the model.
        stored: (n, dim) vectors of the index, of the same texts.
    """
    cosines = unit(made) @ unit(stored).T
    own = np.diagonal(cosines)
    ranks = 1 + (cosines > own[:, None] + _TIE).sum(axis=1)
    low = float(np.percentile(own, 5))
    return Agreement(
        len(own), float(own.mean()), low, float((ranks == 1).mean()), float(ranks.mean()), float(np.median(ranks))
    )


def unit(vectors: np.ndarray) -> np.ndarray:
    """(n, dim) vectors as float32 of length 1; those of length 0 stay as they are."""
    rows = np.asarray(vectors, dtype=np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def measure(store: Store, encoder: TextEncoder, *, sample: int = 256, prompt: str | None = None) -> Agreement:
    """Embeds texts of an index with a model and compares.

    Args:
        store: The index.
        encoder: The model.
        sample: Most texts to compare.
        prompt: Put before every text; when None, that of the index if the model made it, else the model's own for
            documents.

    Raises:
        LusiferError: If the index is empty, or of other dimensions than the model.
    """
    _check_dimension(store, encoder)
    if prompt is None:
        made_it = store.info.model_hash == weights_hash(encoder.model)
        prompt = (store.info.prompt or "") if made_it else prompt_for(encoder.model, "document")
    entries, vectors = store.sample(sample)
    if not entries:
        raise LusiferError(f"the index {store.location!r} is empty")
    first: dict[str, int] = {}
    for row, entry in enumerate(entries):
        first.setdefault(entry.text, row)
    made = encoder.encode([prompt + text for text in first])
    if not np.isfinite(made).all():
        raise LusiferError("the model's vectors of these texts hold NaN or infinity; load it in float32")
    return compare(made, vectors[list(first.values())])


def admit(store: Store, encoder: TextEncoder, name: str) -> str | None:
    """Refuses a model that may not query an index.

    A model may if it made the index; if its folder says that it was adapted to the model that did; else if it agrees
    on a small sample.

    Args:
        store: The index.
        encoder: The model.
        name: What the model is called: a name as `lusifer.loading.resolve` takes it.

    Returns:
        What was measured, in a sentence; None where nothing had to be.

    Raises:
        LusiferError: If it may not.
    """
    _check_dimension(store, encoder, name)
    made_by = store.info.model_hash
    if made_by and made_by in (weights_hash(encoder.model), adapted_to(name, encoder.dimension)):
        return None
    agreement = measure(store, encoder, sample=_QUICK_SAMPLE)
    if agreement.may_query:
        return agreement.sentence(name, store.location)
    whose = f"of {store.info.model!r}" if store.info.model else "of an unknown model"
    raise LusiferError(
        f"the index {store.location!r} holds vectors {whose}, which cannot be compared with those of {name!r}: "
        f"{agreement.measured}; use the model that made it, or one adapted to that"
    )


def adapted_to(name: str, dimension: int) -> str | None:
    """`weights_hash` of the model that a model says it was adapted to; None where it says nothing.

    Args:
        name: A name as `lusifer.loading.resolve` takes it.
        dimension: Numbers of the model's vectors; what is written for another model does not count.
    """
    try:
        where = resolve(name)
        path = str(Path(where) / ADAPTED) if Path(where).is_dir() else cached_or_none(where, ADAPTED)
        facts = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
        return str(facts["teacher_hash"]) if facts["dimension"] == dimension else None
    except (OSError, ValueError, KeyError, TypeError, LusiferError):
        return None  # Then it is measured.


def _check_dimension(store: Store, encoder: TextEncoder, name: str = "") -> None:
    if encoder.dimension != store.info.dimension:
        whose = f" of {store.info.model!r}" if store.info.model else ""
        raise LusiferError(
            f"the index {store.location!r} holds vectors{whose} of {store.info.dimension} dimensions, which cannot be "
            f"compared with the {encoder.dimension} of {name or 'the model'!r}; use the model that made it"
        )
