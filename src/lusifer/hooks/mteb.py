"""What we use of ``mteb`` that it does not promise to keep."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mteb.benchmarks.benchmarks as known_benchmarks
from mteb.benchmarks import get_benchmark

# mteb computes predictions only if it is told where to write them; `listen` takes them, so nothing is written.
PREDICTIONS_TAKEN = Path(os.devnull)


def listen(task: Any, predictions: Callable[..., None], query_scores: Callable[..., None]) -> None:
    """Has a task give what it predicts and scores to us, instead of writing it.

    Touches ``_save_task_predictions`` (replaced) and ``task_specific_scores`` of retrieval tasks (wrapped).

    Args:
        task: An mteb task object; no other one changes.
        predictions: Called as ``_save_task_predictions``: predictions, model, folder, ``hf_split``, ``hf_subset``.
        query_scores: Called with the scores of every query, ``hf_split`` and ``hf_subset``.
    """
    task._save_task_predictions = predictions
    own = getattr(task, "task_specific_scores", None)
    if own is None:
        return

    def specific_scores(scores: Any, *args: Any, **kwargs: Any) -> Any:
        query_scores(scores, kwargs["hf_split"], kwargs["hf_subset"])
        return own(scores, *args, **kwargs)

    task.task_specific_scores = specific_scores


def restrict(task: Any, *, splits: Sequence[str], subsets: Sequence[str]) -> None:
    """Leaves a task with some of its splits and subsets, also ones that mteb does not list; touches ``_eval_splits``.

    Args:
        task: An mteb task object.
        splits: The splits.
        subsets: The subsets.
    """
    task.hf_subsets, task._eval_splits = list(subsets), list(splits)


def add_benchmark(name: str, benchmark: Any) -> None:
    """Makes a benchmark known to ``mteb.get_benchmark``, which reads a module's variables once.

    Touches ``mteb.benchmarks.benchmarks`` (a variable added) and ``_build_registry`` (its cache emptied).

    Args:
        name: The benchmark's name.
        benchmark: An mteb benchmark.
    """
    setattr(known_benchmarks, name.replace("-", "_").upper(), benchmark)
    registry: Any = getattr(__import__(get_benchmark.__module__, fromlist=["_build_registry"]), "_build_registry", None)
    if registry is not None:
        registry.cache_clear()
