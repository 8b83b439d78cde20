"""Training: from a recipe to a checkpoint, in three stages (LUSIFER, arXiv 2501.00874, and a stage 0 of our own).

`run` goes through the `stages`. Stage 0 (`warm_start`) starts the connector in closed form; stage 1 (`alignment`)
teaches it to write soft tokens that the frozen LLM can read; stage 2 (`contrastive`, with `distillation` from a guide)
trains the embedding. Stages 1 and 2 run through the `trainer`; batches of any size fit by `gradient_cache`. `planning`
says what a recipe would cost, and `llm_baseline` trains the LLM without an encoder to compare with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lusifer.lazy import lazy

if TYPE_CHECKING:
    from lusifer.training.run import train

__all__ = ["train"]

__getattr__ = lazy(__name__, {"train": "run"})
