"""Adds languages to an English embedder and keeps its index: a multilingual encoder learns to hit its vectors.

`run` goes through the steps: `sources` gives English texts (`texts`) and vectors of them, by a `teacher` or from a
table; `student` is the encoder, `tokens` the texts as it reads them, `switching` their code-switched copies; `collect`
computes the `closed_form`; `fit` trains an MLP beside it and the encoder's upper half for the `loss`; `report` measures
and `saving` writes the model, whose class is in `modeling` and `configuration`. `work` holds what is unfinished.
Multilingual distillation (arXiv 2004.09813) needs parallel sentences; this needs English text alone, or an index.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lusifer.lazy import lazy

if TYPE_CHECKING:
    from lusifer.adapt.run import Options, adapt

__all__ = ["Options", "adapt"]

__getattr__ = lazy(__name__, {"Options": "run", "adapt": "run"})
