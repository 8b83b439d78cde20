"""What we use of ``mteb`` that it does not promise to keep."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mteb.benchmarks.benchmarks as known_benchmarks
from mteb.benchmarks import get_benchmark
from mteb.languages import ISO_TO_LANGUAGE, ISO_TO_SCRIPT, iso_mappings

from lusifer.errors import LusiferError

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


class DrawsAlone:
    """For a clustering task: the draws of a subset do not depend on which others were scored before, or in which call.

    Touches ``_evaluate_subset`` and the attribute ``rng_state`` that it draws from.
    """

    seed: int
    rng_state: random.Random

    def _evaluate_subset(self, *args: Any, **kwargs: Any) -> Any:
        self.rng_state = random.Random(self.seed)
        return super()._evaluate_subset(*args, **kwargs)  # type: ignore[misc]


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


def language_script(code: str) -> tuple[str, str]:
    """A language's shortest code and mteb's own, e.g. ``de`` and ``deu-Latn``; touches mteb's tables of languages.

    Args:
        code: Two or three letters, perhaps with a script: ``de``, ``deu``, ``zh-Hant``.

    Raises:
        LusiferError: If there is no such language or script, or mteb knows no script of it.
    """
    language, _, script = code.partition("-")
    longer = iso_mappings._get_iso1_to_iso3()
    three = longer.get(language, language) if len(language) == 2 else language
    if three not in ISO_TO_LANGUAGE:
        raise LusiferError(f"there is no language {language!r}; write its ISO 639 code, e.g. en or swa")
    script = script or iso_mappings._get_iso3_to_default_script().get(three, "")
    if script not in ISO_TO_SCRIPT:
        remedy = f"write it, e.g. {language}-Latn" if not script else "write its ISO 15924 code, e.g. Latn or Cyrl"
        raise LusiferError(f"the script of {code!r} is not known; {remedy}")
    short = {value: key for key, value in longer.items()}.get(three, three)
    return short, f"{three}-{script}"
