"""``lusifer quickstart``: from nothing to an English index that answers in other languages, and a trained model.

`adapted` fills an index with an English embedder and asks it in other languages; `run` does that first, then trains
LUSIFER by the paper's stages, and scores five systems in 23 languages: the encoder, the English LLM and the English
embedder alone, the adapted model, and LUSIFER. `report` turns that into Markdown and a plot, without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lusifer.lazy import lazy

if TYPE_CHECKING:
    from lusifer.quickstart.run import quickstart

__all__ = ["quickstart"]

__getattr__ = lazy(__name__, {"quickstart": "run"})
