"""LUSIFER: give an English-centric LLM embedder every language its encoder knows (arXiv 2501.00874)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lusifer.errors import LusiferError
from lusifer.lazy import lazy
from lusifer.registration import register

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from lusifer.model.configuration import LusiferConfig
    from lusifer.model.modeling import LusiferModel

__version__ = "0.1.0"
__all__ = ["LusiferConfig", "LusiferError", "LusiferModel", "__version__", "load", "path"]

__getattr__ = lazy(__name__, {"LusiferConfig": "model.configuration", "LusiferModel": "model.modeling"})


def load(path: str, **kwargs: Any) -> SentenceTransformer:
    """Loads a LUSIFER checkpoint as a Sentence Transformers model.

    Args:
        path: Checkpoint folder, hub id, or ``starter``, the released model (after ``lusifer fetch``).
        **kwargs: As for ``sentence_transformers.SentenceTransformer``.

    Raises:
        LusiferError: If there is no readable checkpoint at ``path``.
    """
    from lusifer.loading import load_checkpoint

    return load_checkpoint(path, **kwargs)


def path(model: str) -> str:
    """The folder of a model, for frameworks that take a path and call ``SentenceTransformer`` themselves.

    Args:
        model: Checkpoint folder, hub id, or ``starter``; everything else comes back unchanged.

    Raises:
        LusiferError: If it is the starter and its backbones are not fetched.
    """
    from lusifer.loading import resolve

    return resolve(model)


register()
