"""The teacher: an English embedder, or the vectors that it left behind, as unit vectors of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from lusifer.data.prompts import prompt_for
from lusifer.errors import LusiferError
from lusifer.loading import load_checkpoint
from lusifer.model.fingerprint import weights_hash
from lusifer.model.text_encoder import TextEncoder

_ALIKE = 1e-4  # Standard deviation of unit vectors' values below which they are all the same.


class Teacher:
    """A Sentence Transformers model as a function from English texts to unit vectors.

    Args:
        name: Folder or hub id of the model; a starter name.
        device: Torch device; the best there is when None.

    Attributes:
        prompts: What the model puts in front of queries and of documents.
        dimension: Length of a vector.
        hash: Hash of its weights.
        window: Most tokens that it reads of a text.

    Raises:
        LusiferError: If the model cannot be loaded.
    """

    def __init__(self, name: str, *, device: str | None = None) -> None:
        self.name = name
        self.model: Any = load_checkpoint(name, device=device)
        self.prompts = {role: prompt_for(self.model, role) for role in ("query", "document")}
        self._encoder = TextEncoder(self.model)
        self.dimension = int(self.model.truncate_dim or self._encoder.dimension)
        self.hash = weights_hash(self.model)
        self.window = self._encoder.max_seq_length

    @property
    def asymmetric(self) -> bool:
        """Whether queries and documents have prompts of their own."""
        return self.prompts["query"] != self.prompts["document"]

    @property
    def truncated(self) -> int:
        """How many texts so far were longer than its window."""
        return self._encoder.cut

    def encode(self, texts: Sequence[str], roles: Sequence[str]) -> np.ndarray:
        """(n, dimension) float32 unit vectors of texts, each a ``query`` or a ``document``."""
        with_prompts = [self.prompts[role] + text for text, role in zip(texts, roles, strict=True)]
        vectors = torch.from_numpy(self._encoder.encode(with_prompts))[:, : self.dimension]
        return normalize(vectors, dim=1).numpy()


def check_vectors(vectors: np.ndarray, what: str) -> None:
    """Refuses vectors nobody can learn from.

    Args:
        vectors: (n, dim) float32.
        what: Whose they are, for the message.

    Raises:
        LusiferError: If one is NaN, infinite or zero, or all are the same.
    """
    bad = ~np.isfinite(vectors).all(axis=1) | (np.abs(vectors).max(axis=1, initial=0) == 0)
    if bad.any():
        raise LusiferError(f"{what}: the vector of text {int(bad.argmax()) + 1} is NaN, infinite or zero")
    if len(vectors) > 1 and float(vectors.std(axis=0).max()) < _ALIKE:
        raise LusiferError(f"{what}: the vectors of all {len(vectors)} texts are the same; it does not embed text")
