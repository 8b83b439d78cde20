"""May a model query an index that another one made? Said by a file, or measured on the index's own texts.

The model embeds texts of the index; `lusifer.data.vectors.agreement` compares its vectors with the stored ones.
"""

from __future__ import annotations

import numpy as np

from lusifer.data.prompts import prompt_for
from lusifer.data.vectors.agreement import Agreement, compare
from lusifer.errors import LusiferError
from lusifer.loading import adapted_from, resolve
from lusifer.model.fingerprint import weights_hash
from lusifer.model.text_encoder import TextEncoder
from lusifer.search.store import Store

_QUICK_SAMPLE = 64


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
        raise LusiferError("the model's vectors of these texts contain NaN or infinite values; load it in float32")
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
        facts = adapted_from(resolve(name))
    except LusiferError:
        return None  # Then it is measured.
    return str(facts["teacher_hash"]) if facts and facts.get("dimension") == dimension else None


def _check_dimension(store: Store, encoder: TextEncoder, name: str = "") -> None:
    if encoder.dimension != store.info.dimension:
        whose = f" of {store.info.model!r}" if store.info.model else ""
        raise LusiferError(
            f"the index {store.location!r} holds vectors{whose} of {store.info.dimension} dimensions, which cannot be "
            f"compared with the {encoder.dimension} of {name or 'the model'!r}; use the model that made it"
        )
