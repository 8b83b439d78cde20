"""How well a model's vectors of texts agree with vectors that another model made of the same texts.

Where both models share a space, a text finds its own stored vector among all of the sample; where they do not, it
finds it by chance. So this share decides, not the cosine: models whose vectors all lie in a narrow cone have high
cosines with everything, and one that was adapted to another may lie at 0.6 of it and still find every text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

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
            return f"{model!r} may query {index!r}: its vectors share the index's space ({self.measured})"
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
