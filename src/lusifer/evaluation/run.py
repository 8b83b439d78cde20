"""Scoring a model on mteb tasks, resumably: one file per task, each score with what made it.

1. `evaltasks.choose` says which tasks, those that tell most in little time first.
2. Every task runs through mteb's own runner; embeddings come from a cache on disk that tasks share.
3. ``OUT/<task>.json`` appears whole when a task is done (or has failed), and is not run again when done.

Several processes may work on one folder: each takes the next task that no other has locked.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import time
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import mteb
from filelock import FileLock, Timeout
from mteb.types import PromptType
from tqdm.auto import tqdm

from lusifer.data.prompts import prompt_for
from lusifer.evaluation.benchmarks import Task
from lusifer.evaluation.cache import EmbeddingCache
from lusifer.evaluation.instructions import Prompts, load_prompts
from lusifer.evaluation.intervals import Recorder
from lusifer.evaluation.mteb_model import CachedModel
from lusifer.evaluation.result_files import check_claim, claim, lacking, main_scores, merged, read_record, write
from lusifer.evaluation.systems import (
    Embedder,
    _resolved,
    language_profile,
    load_embedder,
    model_hash,
)
from lusifer.evaluation.tasks import cost, mteb_task, task_fingerprint
from lusifer.starter.fetch import cache_dir

__all__ = ["CachedModel", "load_prompts", "main_scores", "model_hash", "run"]

logger = logging.getLogger(__name__)

PROFILE = "languages.json"
_PACKAGES = (
    "lusifer", "mteb", "torch", "transformers", "sentence-transformers", "datasets", "numpy", "scikit-learn",
)  # fmt: skip


def run(
    model: str,
    tasks: Sequence[Task],
    out: Path,
    *,
    data: Path | None = None,
    prompts: Prompts | None = None,
    prompt: str | None = None,
    prompt_name: str | None = None,
    absent: Sequence[Task] = (),
    device: str | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Scores a model on tasks and goes on where ``out`` already holds results.

    Args:
        model: See `load_embedder`.
        tasks: Tasks in order.
        out: Folder of results.
        data: Folder of an offline run.
        prompts: Instructions; the model's own prompts when None or empty.
        prompt: What stands in front of every text, whatever the task and the side.
        prompt_name: Name of the model's prompt to use so instead.
        absent: What was asked for too and cannot be scored here, for the plan in ``run.json``.
        device: Torch device.
        batch_size: Texts per forward pass.
        progress: Whether to show a bar.

    Returns:
        Every task's record: those done before too; ``status`` is ``done`` or ``failed``.

    Raises:
        LusiferError: If the model cannot be loaded, or ``out`` holds another model's results.
    """
    digest = model_hash(_resolved(model))
    told = prompts or {}
    everywhere = {name: text for name, text in (("prompt", prompt), ("prompt_name", prompt_name)) if text is not None}
    asked = [*sorted(told.items()), *everywhere.items()]
    hashed = hashlib.sha256(repr(asked).encode()).hexdigest()[:16] if asked else "own"
    settings = {"model": model, "model_hash": digest, "prompts": hashed}
    check_claim(out, settings)
    prints = {task.name: task_fingerprint(task, data) for task in tasks}
    left = [task for task in tasks if lacking(task, _current(out, task, prints)).subsets]
    if left or not (out / PROFILE).is_file():
        loaded = load_embedder(model, device=device, batch_size=batch_size)
        chosen = prompt_for(loaded, None, **everywhere) if everywhere else None
        claim(out, settings, [*tasks, *absent])
        total = sum(cost(task) for task in left)
        with tqdm(total=total, unit="text", unit_scale=True, disable=not progress, smoothing=0.05) as bar:
            cache = EmbeddingCache(cache_dir() / "embeddings" / f"{digest}.sqlite", loaded.embed)
            cache.progress = lambda count: bar.set_postfix_str(f"{cache.computed:,} embedded")
            name = "local/" + model.strip("./").replace("/", "-").replace(":", "-")
            wrapped = CachedModel(cache, told, name, loaded, prompt=chosen)
            facts = {
                **settings,
                "max_seq_length": loaded.max_seq_length,
                "device": loaded.device,
                "dtype": loaded.dtype,
                "batch_size": batch_size,
                "versions": {package: version(package) for package in _PACKAGES},
            }
            if not (out / PROFILE).is_file():
                write(out / PROFILE, {**facts, **_profile(cache, loaded)})
            for task in left:
                bar.set_description(task.name)
                _run_locked(wrapped, task, out, data, facts, prints)
                bar.update(cost(task))
    else:
        claim(out, settings, [*tasks, *absent])
    records = {task.name: _current(out, task, prints) for task in tasks}
    return {name: record for name, record in records.items() if record is not None}


def _current(out: Path, task: Task, prints: dict[str, str | None]) -> dict[str, Any] | None:
    """A task's record, unless its data have changed since."""
    record = read_record(out, task.name)
    known = None if record is None else record.get("fingerprint")
    if known is not None and prints[task.name] not in (None, known):
        logger.warning("%s: the data have changed since it was scored; it is scored again", task.name)
        return None
    return record


def _profile(cache: EmbeddingCache, loaded: Embedder) -> dict[str, Any]:
    """Facts about languages, which no score depends on: a model that cannot give them is scored all the same."""
    try:
        return language_profile(cache, loaded.tokenizers)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}


def _run_locked(
    model: CachedModel, task: Task, out: Path, data: Path | None, facts: dict[str, Any], prints: dict[str, str | None]
) -> None:
    lock = FileLock(out / f".{task.name}.lock")
    try:
        with lock.acquire(blocking=False):
            before = _current(out, task, prints)
            left = lacking(task, before)
            if not left.subsets:
                return
            for attempt in range(2):  # A hub that stumbles once is no failure.
                record = _score(model, left, data, {**facts, "fingerprint": prints[task.name]})
                if record["status"] == "done" or attempt:
                    break
            write(out / f"{task.name}.json", merged(before, record))
    except Timeout:  # Another process is at it.
        return


def _score(model: CachedModel, task: Task, data: Path | None, facts: dict[str, Any]) -> dict[str, Any]:
    """A record of some of a task's subsets, also of a failure."""
    started, computed = time.monotonic(), model.cache.computed
    record: dict[str, Any] = {"task": task.name, "type": task.type, "group": task.group, "revision": task.revision}
    arrow = datasets.config.HF_DATASETS_CACHE
    try:
        if facts["fingerprint"] is not None:  # Else changed files would be answered from what was read of them before.
            datasets.config.HF_DATASETS_CACHE = cache_dir() / "datasets" / facts["fingerprint"]
        made = mteb_task(task, data)
        record |= _mteb_scores(model, made, task, facts["batch_size"])
    except Exception as error:  # Whatever a data set or a metric throws, the other tasks go on.
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:500]
        record |= {"status": "failed", "error": reason, "traceback": traceback.format_exc()}
    finally:
        datasets.config.HF_DATASETS_CACHE = arrow
    return {
        **record,
        "languages": {key: list(codes) for key, codes in task.subsets.items()},
        "seconds": round(time.monotonic() - started, 2),
        "embedded": model.cache.computed - computed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **facts,
    }


def _mteb_scores(model: CachedModel, made: Any, task: Task, batch_size: int) -> dict[str, Any]:
    recorder = Recorder(made)
    result = mteb.evaluate(
        model,
        made,
        cache=None,
        co2_tracker=False,
        show_progress_bar=False,
        prediction_folder=Path(os.devnull),  # The recorder takes them, nothing is written.
        encode_kwargs={"batch_size": batch_size, "show_progress_bar": False},
    ).task_results[0]
    scores = {
        split: {row["hf_subset"]: row for row in rows if row["hf_subset"] in task.subsets}
        for split, rows in result.scores.items()
    }
    main = {split: {key: float(row["main_score"]) for key, row in rows.items()} for split, rows in scores.items()}
    for rows in main.values():
        if wrong := sorted(key for key, value in rows.items() if not math.isfinite(value)):
            raise ValueError(f"the main score of {wrong[0]} is no number; are all embeddings the same?")
    roles = {"query": PromptType.query, "document": PromptType.document, "symmetric": None}
    prefixes = None
    if model.loaded.native is None:
        prefixes = {role: model.prefix(made.metadata, kind) for role, kind in roles.items()}
    return {
        "status": "done",
        "main_scores": main,
        "standard_errors": recorder.errors(scores),
        "scores": _finite(result.to_dict()["scores"]),
        "prefixes": prefixes,
        "seed": made.seed,
    }


def _finite(value: Any) -> Any:
    """The same without infinite numbers, which JSON has no names for."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
