"""``lusifer quickstart``: from nothing to a trained model and its scores on a laptop.

`run` fetches the starter backbones, trains all stages on English text and scores three systems zero-shot in 23
languages: the multilingual encoder alone, the English LLM alone, and LUSIFER. `report` turns that into Markdown and a
plot, without torch. Both go on where an interrupted run was.
"""

from __future__ import annotations

from typing import Any

__all__ = ["quickstart"]


def __getattr__(name: str) -> Any:
    """Loads `quickstart` at its first use, so that the report alone needs no torch."""
    if name != "quickstart":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lusifer.quickstart.run import quickstart

    return quickstart
