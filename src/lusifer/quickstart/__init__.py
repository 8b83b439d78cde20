"""``lusifer quickstart``: from nothing to a trained model and its scores on a laptop.

`run` fetches the starter backbones, trains all stages on English text and scores three systems in 23 languages: the
encoder alone, the English LLM alone, and LUSIFER. `report` turns that into Markdown and a plot, without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lusifer.lazy import lazy

if TYPE_CHECKING:
    from lusifer.quickstart.run import quickstart

__all__ = ["quickstart"]

__getattr__ = lazy(__name__, {"quickstart": "run"})
