"""Scoring a model on mteb tasks, resumably.

1. `lusifer.evaluation.tasks.choose` says which tasks, those that tell most in little time first.
2. Every task runs through `mteb.evaluate`; embeddings come from a cache on disk that tasks share.
3. `lusifer.evaluation.results` keeps what is scored after every subset, and is asked what is left.

Several processes may work on one folder: each takes the next task that no other has locked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import mteb
from mteb.types import PromptType

from lusifer.data.prompts import prompt_for
from lusifer.errors import LusiferError, first_line
from lusifer.evaluation.benchmarks import Task
from lusifer.evaluation.cache import EmbeddingCache
from lusifer.evaluation.intervals import Recorder
from lusifer.evaluation.mteb_model import CachedModel, Prompts
from lusifer.evaluation.results import Results
from lusifer.evaluation.systems import Embedder, language_profile, load_embedder, model_hash
from lusifer.evaluation.tasks import cost, data_revision, mteb_task
from lusifer.hooks.datasets import arrow_cache
from lusifer.hooks.mteb import PREDICTIONS_TAKEN
from lusifer.locks import BusyError, alone_at, tidy
from lusifer.progress import bar
from lusifer.publishing import write_json
from lusifer.quiet import quiet_libraries
from lusifer.starter.fetch import cache_dir

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
        data: Folder with a ``tasks.json``; None takes data from the hub, or its cache.
        prompts: Instructions; the model's own prompts when None or empty.
        prompt: Put before every text, whatever the task and the side.
        prompt_name: Name of the model's prompt to use so instead.
        absent: What was asked for too and cannot be scored here, for the plan in ``run.json``.
        device: Torch device; several, between commas, share the tasks, a process each.
        batch_size: Texts per forward pass.
        progress: Whether to show a bar.

    Returns:
        Every task's record, see `Results.outcome`: those scored before too.

    Raises:
        LusiferError: If the model cannot be loaded, or ``out`` holds another model's results.
    """
    everywhere = {name: text for name, text in (("prompt", prompt), ("prompt_name", prompt_name)) if text is not None}
    results = _open(model, tasks, out, data, {**(prompts or {}), **everywhere}, batch_size)
    left = [task for task in tasks if not results.is_complete(mteb_task(task, data))]
    for task in tasks:
        if task not in left:
            tidy(out / task.name, partial(results.sweep, task.name))
    devices = [part.strip() for part in (device or "").split(",") if part.strip()]
    if left and len(devices) > 1:
        options = {"data": data, "prompts": prompts, "absent": absent, "batch_size": batch_size, **everywhere}
        _run_on_devices(devices, model, tasks, out, progress=progress, **options)
    elif left or not (out / PROFILE).is_file():
        # Before anything is written: a model that cannot be loaded leaves no folder.
        loaded = load_embedder(model, device=devices[0] if devices else None, batch_size=batch_size)
        everyone = prompt_for(loaded, None, **everywhere) if everywhere else None
        results.claim([*tasks, *absent])
        _run_here(results, left, loaded, prompts or {}, everyone, data, progress=progress)
    else:
        results.claim([*tasks, *absent])
    outcomes = {task.name: results.outcome(task.name) for task in tasks}
    return {name: outcome for name, outcome in outcomes.items() if outcome is not None}


def _open(
    model: str, tasks: Sequence[Task], out: Path, data: Path | None, prompts: Prompts, batch_size: int
) -> Results:
    """The results of a model, once it is sure that the folder is not another's."""
    hashed = hashlib.sha256(repr(sorted(prompts.items())).encode()).hexdigest()[:16] if prompts else "own"
    settings = {"model": model, "model_hash": model_hash(model), "prompts": hashed, "batch_size": batch_size}
    return Results(out, settings, {task.name: data_revision(task, data) for task in tasks})


def _run_on_devices(devices: Sequence[str], *arguments: Any, progress: bool, **options: Any) -> None:
    """Runs `run` in a process per device; these take tasks from one list."""
    with ProcessPoolExecutor(len(devices), get_context("spawn"), quiet_libraries, (True,)) as pool:
        jobs = [
            # One bar is enough.
            pool.submit(run, *arguments, device=device, progress=progress and not number, **options)
            for number, device in enumerate(devices)
        ]
        try:
            for job in jobs:
                job.result()
        except BrokenProcessPool as error:
            raise LusiferError(
                f"a process of --device {','.join(devices)} was killed; is there enough memory?"
            ) from error


def _run_here(
    results: Results, left: Sequence[Task], loaded: Embedder, prompts: Prompts, prompt: str | None, data: Path | None,
    *, progress: bool,
) -> None:  # fmt: skip
    out, settings = Path(results.cache_path), results.settings
    settings |= {key: getattr(loaded, key) for key in ("max_seq_length", "device", "dtype")}
    settings["versions"] = {package: version(package) for package in _PACKAGES}
    cache = EmbeddingCache(cache_dir() / "embeddings" / f"{settings['model_hash']}.sqlite", loaded.embed)
    if not (out / PROFILE).is_file():
        try:
            profile = language_profile(
                cache, loaded.tokenizers, loaded.prompts.get(loaded.default_prompt_name or "", "")
            )
        except Exception as error:  # No score depends on it: a model that cannot give it is scored all the same.
            profile = {"error": f"{type(error).__name__}: {first_line(error)}"[:300]}
        write_json(out / PROFILE, {**settings, **profile})
    model = CachedModel(cache, prompts, results.model, loaded, prompt=prompt)
    model.own = {task.name: task.own.instruction for task in left if task.own and task.own.instruction}
    total = sum(map(cost, left))
    with bar(total, "evaluating", "text", show=progress) as shown:
        cache.progress = lambda: shown.note(f"embeddings: {cache.given:,} given, {cache.computed:,} computed")
        for task in left:
            shown.set_description_str(task.name)
            _score_locked(model, task, data, results)
            shown.update(cost(task))


def _score_locked(model: CachedModel, task: Task, data: Path | None, results: Results) -> None:
    """Scores what is left of a task, unless another process is at it."""
    with suppress(BusyError), alone_at(Path(results.cache_path) / task.name):
        for last in (False, True):  # A hub that stumbles once is no failure.
            try:
                if not results.is_complete(mteb_task(task, data)):
                    _score(model, task, data, results)
                results.succeed(task.name)
                return
            except Exception as error:  # Whatever a data set or a metric throws, the other tasks go on.
                if last:
                    results.fail(task.name, error)


def _score(model: CachedModel, task: Task, data: Path | None, results: Results) -> None:
    prepared = mteb_task(task, data)
    prefixes = None
    if model.loaded.native is None:
        roles = {"query": PromptType.query, "document": PromptType.document, "symmetric": None}
        prefixes = {role: model.prefix(prepared.metadata, kind) for role, kind in roles.items()}
    languages = {key: list(codes) for key, codes in task.subsets.items()}
    details = {"type": task.type, "group": task.group, "languages": languages}
    if task.own is not None:
        own = task.own
        details["own_data"] = {"file": own.source, "description": own.description, "metric": own.metric}
    results.recorder = Recorder(prepared)
    results.details = {**details, "prefixes": prefixes, "seed": prepared.seed}
    with arrow_cache(None if data is None else cache_dir() / "datasets" / results.revisions[task.name]):
        mteb.evaluate(
            model, prepared, cache=results, overwrite_strategy="only-missing", prediction_folder=PREDICTIONS_TAKEN,
            encode_kwargs={"batch_size": results.settings["batch_size"], "show_progress_bar": False},
            co2_tracker=False, show_progress_bar=False,
        )  # fmt: skip
