"""LUSIFER: give an English-centric LLM embedder every language its encoder knows (arXiv 2501.00874)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel

from lusifer.configuration import LusiferConfig
from lusifer.errors import LusiferError
from lusifer.modeling import LusiferModel

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

__version__ = "0.1.0"
__all__ = ["LusiferConfig", "LusiferError", "LusiferModel", "__version__", "load"]

AutoConfig.register("lusifer", LusiferConfig, exist_ok=True)
AutoModel.register(LusiferConfig, LusiferModel, exist_ok=True)


def load(path: str, **kwargs: Any) -> SentenceTransformer:
    """Loads a LUSIFER checkpoint as a Sentence Transformers model.

    Args:
        path: Checkpoint folder, hub id, or ``starter``, the released model (after ``lusifer fetch``).
        **kwargs: As for ``sentence_transformers.SentenceTransformer``.

    Raises:
        LusiferError: If there is no readable checkpoint at ``path``.
    """
    from lusifer.encoding import load_checkpoint

    return load_checkpoint(path, **kwargs)
