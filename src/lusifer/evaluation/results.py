"""The folder of results of one model, which mteb's own tools read too.

* ``OUT/results/MODEL/HASH/TASK.json`` is mteb's result of a task, where `mteb.ResultCache` looks for it, with keys of
  ours that mteb passes over: standard errors, prompts, and what the model ran with.
* ``OUT/failures/TASK.json`` says why a task failed; ``OUT/run.json`` which model the folder is about, and the plan.
"""

from __future__ import annotations

import json
import logging
import math
import traceback
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mteb import ResultCache, TaskResult
from mteb.models import ModelMeta
from pydantic import ValidationError

from lusifer.errors import LusiferError, first_line
from lusifer.evaluation.benchmarks import Task
from lusifer.evaluation.intervals import Recorder
from lusifer.locks import alone_at
from lusifer.publishing import make_folder, sweep, write_json
from lusifer.terminal import without_secrets

_RUN = "run.json"

logger = logging.getLogger(__name__)


class Results(ResultCache):
    """mteb's cache of results over one model's folder; `mteb.evaluate` reads it to resume, and writes to it.

    mteb's own writes files in place (a kill leaves half a file), rounds scores to six places, and shares two files
    between tasks without a lock. Here a task's file is written whole, unrounded, and by nobody else.

    Args:
        out: The folder.
        settings: What is recorded with each result; ``model``, ``model_hash`` and ``prompts`` are among it.
        revisions: Task name to the revision of its data now. A result of another revision is scored again.

    Attributes:
        model: mteb's description of the model; its name and revision say where results lie.
        recorder: Listens to the task that `mteb.evaluate` runs.
        details: Keys of that task's file besides mteb's own; ``languages`` joins what the file has.

    Raises:
        LusiferError: If the folder holds another model's results, or those of other prompts.
    """

    def __init__(self, out: Path, settings: dict[str, Any], revisions: Mapping[str, str]) -> None:
        self.cache_path = out  # mteb's own constructor makes the folder, before anybody knows that the model loads.
        _refuse_other(out, settings)
        name = "local/" + settings["model"].strip("./").replace("/", "-").replace(":", "-")
        self.model: Any = ModelMeta.create_empty(overwrites={"name": name, "revision": settings["model_hash"]})
        self.settings, self.revisions = settings, revisions
        self.recorder: Recorder | None = None
        self.details: dict[str, Any] = {}

    def record(self, name: str) -> dict[str, Any] | None:
        """A task's file; None where there is none, it cannot be read, or its data have changed since."""
        record = read_object(self.get_task_result_path(name, self.model))
        try:
            scores = TaskResult.model_validate(record).scores
        except ValidationError:
            return None
        values = [row["main_score"] for rows in scores.values() for row in rows]
        if record is None or not all(isinstance(value, float | int) and math.isfinite(value) for value in values):
            return None
        if record["dataset_revision"] != self.revisions[name]:
            logger.warning("%s: the data have changed since it was scored; it is scored again", name)
            return None
        return record

    def load_task_result(self, task_name: str, model_name: Any, *args: Any, **kwargs: Any) -> TaskResult | None:
        """What `mteb.evaluate` need not score again."""
        record = self.record(task_name)
        return None if record is None else TaskResult.model_validate(record)

    def is_complete(self, task: Any) -> bool:
        """Whether all splits and subsets of an mteb task are scored."""
        result = self.load_task_result(task.metadata.name, self.model)
        return result is not None and not result.get_missing_evaluations(task)

    def save_to_cache(self, task_result: TaskResult, model_name: Any, *args: Any, **kwargs: Any) -> None:
        """Writes a task's file; mteb calls it after every subset.

        Raises:
            ValueError: If a main score is NaN.
        """
        for split, rows in task_result.scores.items():
            if broken := sorted(row["hf_subset"] for row in rows if not math.isfinite(row["main_score"])):
                raise ValueError(f"the main score of {broken[0]} ({split}) is NaN; are all embeddings the same?")
        before = self.record(task_result.task_name) or {}
        errors: dict[str, dict[str, float]] = before.get("standard_errors") or {}
        assert self.recorder is not None
        for split, fresh in self.recorder.errors(task_result.scores).items():
            errors[split] = {**errors.get(split, {}), **fresh}
        languages = {**(before.get("languages") or {}), **self.details["languages"]}
        extra = {**self.details, "languages": languages, "standard_errors": errors, **self.settings}
        result = json.loads(task_result.model_dump_json())  # Null for NaN and infinity, which JSON has no names for.
        write_json(self.get_task_result_path(task_result.task_name, self.model), {**result, **extra})

    def fail(self, name: str, error: Exception) -> None:
        """Records why a task failed; what it had scored before stays."""
        reason = f"{type(error).__name__}: {first_line(error)}"[:500]
        date = datetime.now(UTC).isoformat(timespec="seconds")
        failure = {"task": name, "status": "failed", "error": reason, "date": date}
        write_json(self._failure(name), {**failure, "traceback": without_secrets(traceback.format_exc())})

    def succeed(self, name: str) -> None:
        """Forgets that a task had failed."""
        self._failure(name).unlink(missing_ok=True)

    def sweep(self, name: str) -> None:
        """Removes what a killed process left of a task's file.

        Raises:
            OSError: If the folder cannot be read.
        """
        sweep(self.get_task_result_path(name, self.model))

    def outcome(self, name: str) -> dict[str, Any] | None:
        """A task's file, and of a failure its ``error``; ``status`` is ``done`` or ``failed``; None of neither."""
        record, failure = self.record(name), read_object(self._failure(name))
        if record is None and failure is None:
            return None
        return {"scores": {}, **(record or {}), "status": "done", **(failure or {})}

    def _failure(self, name: str) -> Path:
        return Path(self.cache_path) / "failures" / f"{name}.json"

    def claim(self, tasks: Sequence[Task]) -> None:
        """Writes what the folder is about, and adds tasks to what it shall hold.

        Raises:
            LusiferError: If the folder cannot be written, or another process has made it another model's meanwhile.
        """
        with alone_at(Path(self.cache_path) / _RUN, wait=True):
            self._claim(tasks, _refuse_other(Path(self.cache_path), self.settings))

    def _claim(self, tasks: Sequence[Task], before: dict[str, Any]) -> None:
        out = Path(self.cache_path)
        plan: dict[str, Any] = dict(before.get("plan") or {})
        for task in tasks:
            planned = plan.get(task.name) or {"splits": [], "subsets": {}}
            if task.own is not None and planned.get("revision") != task.revision:
                planned = {"splits": [], "subsets": {}}  # What an earlier content asked for is no gap.
            subsets = {**planned["subsets"], **{key: list(codes) for key, codes in task.subsets.items()}}
            splits = list(dict.fromkeys([*planned["splits"], *task.splits]))
            plan[task.name] = {"splits": splits, "subsets": subsets}
            if task.own is not None:
                plan[task.name]["revision"] = task.revision
        folder = self.get_task_result_path("any", self.model).parent
        try:
            for path in (folder, out / "failures"):
                make_folder(path)
            write_json(folder / "model_meta.json", json.loads(json.dumps(self.model.to_dict(), default=str)))
            about = {key: self.settings[key] for key in ("model", "model_hash", "prompts")}
            last = {task.name: list(task.subsets) for task in tasks}
            write_json(out / _RUN, {**before, **about, "plan": plan, "asked": last})
        except OSError as error:
            raise LusiferError(f"cannot write into {str(out)!r}: {first_line(error)}") from error


def _refuse_other(out: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What ``run.json`` holds, nothing where there is none; refuses that of another model or of other prompts."""
    known = read_object(out / _RUN)
    for key in ("model_hash", "prompts"):
        now, there = settings[key], settings[key] if known is None else known.get(key)
        if now != there:
            difference = f"{key} is {there!r} there and {now!r} now"
            raise LusiferError(f"{out} holds results of another run ({difference}); choose another --out")
    return known or {}


def read_object(path: Path) -> dict[str, Any] | None:
    """A file's JSON object; None where there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def main_scores(records: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Task to subset to main score, averaged over splits, of subsets that all splits have.

    Args:
        records: Task name to its record, as `Results.outcome` gives it.
    """
    scores = {}
    for name, record in records.items():
        splits = [{row["hf_subset"]: float(row["main_score"]) for row in rows} for rows in record["scores"].values()]
        if splits:
            shared = set.intersection(*map(set, splits))
            scores[name] = {key: sum(split[key] for split in splits) / len(splits) for key in shared}
    return scores
