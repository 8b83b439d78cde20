"""mteb's task objects for the benchmarks of `lusifer.evaluation.benchmarks`, from a hub or from a local folder.

Importing this module imports mteb (seconds) and makes the benchmarks known to ``mteb.get_benchmark``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mteb
from mteb.abstasks import AbsTask

from lusifer.errors import LusiferError, first_line
from lusifer.evaluation import benchmarks as suite
from lusifer.evaluation.benchmarks import Task
from lusifer.evaluation.own.tasks import build
from lusifer.hooks.mteb import add_benchmark, restrict

_DESCRIPTIONS = {
    suite.MAIN: "The 14-language benchmark of LUSIFER (arXiv 2501.00874, Figure 2).",
    suite.CROSS_LINGUAL: "Cross-lingual tasks of LUSIFER (arXiv 2501.00874, Table 2): all pairs of two languages.",
    suite.QUICK: "A small part of the LUSIFER benchmark, for a first look.",
    suite.BITEXT: "Bitext mining of more than 100 languages into English, and pairs without English.",
}


def benchmark(name: str) -> mteb.Benchmark:
    """One of `suite.BENCHMARKS` as mteb knows it; nothing is downloaded."""
    tasks, reference = [mteb_task(task) for task in suite.tasks(name)], "https://arxiv.org/abs/2501.00874"
    return mteb.Benchmark(name=name, tasks=tasks, description=_DESCRIPTIONS[name], reference=reference)


def mteb_task(task: Task, data: Path | None = None) -> AbsTask:
    """The task as mteb runs it, with our splits and subsets alone.

    Args:
        task: The task.
        data: Folder with a ``tasks.json``; None loads from the hub.

    Raises:
        LusiferError: If the folder does not hold the task.
    """
    if task.own is not None:
        return build(task.own, task.subsets)
    if data is None:
        prepared = mteb.get_task(task.name, eval_splits=list(task.splits), hf_subsets=list(task.subsets))
        # What was pinned, also where a later mteb names another.
        pinned = {**prepared.metadata.dataset, "revision": task.revision}
        prepared.metadata = prepared.metadata.model_copy(update={"dataset": pinned})
        return prepared
    entry = _entry(data, task.name)
    prepared = mteb.get_task(task.name)
    local = {"path": str((data / entry["dir"]).resolve()), "revision": data_revision(task, data)}
    changes: dict[str, Any] = {"dataset": {**prepared.metadata.dataset, **local}}
    if entry.get("more_subsets"):
        languages: Any = prepared.metadata.eval_langs
        changes["eval_langs"] = {**languages, **entry["more_subsets"]}
    prepared.metadata = prepared.metadata.model_copy(update=changes)
    restrict(prepared, splits=task.splits, subsets=list(task.subsets))
    return prepared


def data_revision(task: Task, data: Path | None) -> str:
    """What a result's data are known by: the hub's commit, a hash of own data, or of files' paths, sizes and times.

    Args:
        task: The task.
        data: Folder with a ``tasks.json``, or None.

    Raises:
        LusiferError: If the folder does not hold the task, or its files are not there.
    """
    if data is None or task.own is not None:
        return task.revision
    entry = _entry(data, task.name)
    folder = data / entry["dir"]
    if not folder.is_dir():
        raise LusiferError(f"{data / 'tasks.json'}: {task.name} should be in {str(folder)!r}, which is not a folder")
    digest = hashlib.sha256(json.dumps(entry, sort_keys=True).encode())
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


_FIELDS: dict[str, type] = {"name": str, "dir": str, "eval_splits": list, "subsets": dict}


def _entry(data: Path, name: str) -> dict[str, Any]:
    entry = next((entry for entry in _entries(data) if entry["name"] == name), None)
    if entry is None:
        raise LusiferError(f"{data / 'tasks.json'} lists no task {name!r}")
    return entry


def _entries(data: Path) -> list[dict[str, Any]]:
    path = data / "tasks.json"
    hint = "docs/evaluation.md says what --data needs"
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LusiferError(f"{path} is not a list of tasks ({first_line(error)}); {hint}") from None
    if not isinstance(entries, list):
        raise LusiferError(f"{path} is not a list of tasks; {hint}")
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise LusiferError(f"{path}: entry {number} is no object; {hint}")
        for field, kind in _FIELDS.items():
            if not isinstance(entry.get(field), kind) or not entry[field]:
                name = entry.get("name", number)
                raise LusiferError(f"{path}: entry {name!r} needs a {field!r} that is a {kind.__name__}; {hint}")
        if wrong := [key for key, value in entry["subsets"].items() if not isinstance(value, str | list) or not value]:
            raise LusiferError(f"{path}: entry {entry['name']!r}: subset {wrong[0]!r} needs a language; {hint}")
    return entries


def _tasks_in(data: Path) -> list[Task]:
    """The tasks a folder holds; subsets in two languages carry both."""
    groups = {task.name: task.group for task in suite.tasks(suite.MAIN)}
    tasks = []
    for entry in _entries(data):
        name = entry["name"]
        try:
            metadata = mteb.get_task(name).metadata
        except KeyError:
            raise LusiferError(f"{data / 'tasks.json'}: mteb {mteb.__version__} has no task {name!r}") from None
        sides: Any = metadata.eval_langs if isinstance(metadata.eval_langs, dict) else {}
        subsets = {key: _both(codes, sides.get(key)) for key, codes in entry["subsets"].items()}
        splits, kind = tuple(entry["eval_splits"]), str(metadata.type)
        tasks.append(Task(name, name, groups.get(name, kind), kind, "local", splits, subsets))
    return tasks


def _both(listed: str | list[str], sides: list[str] | None) -> tuple[str, ...]:
    """Languages of a subset: a pair of two may not count as one of them (``es`` of Tatoeba's ``spa-eng``)."""
    codes = (listed,) if isinstance(listed, str) else tuple(listed)
    names = [side.split("-")[0] for side in sides or []]
    if len(codes) > 1 or len(set(names)) < 2:
        return codes
    other = "en" if "eng" in names and codes != ("en",) else names[-1]
    return (*codes, other)


def choose(
    name: str | None,
    data: Path | None,
    *,
    languages: Sequence[str] | None = None,
    types: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    own: Sequence[Task] = (),
) -> tuple[list[Task], list[Task]]:
    """The tasks of a run, those that tell most in little time first, and what a folder lacks of what was asked for.

    Args:
        name: Benchmark; None for everything the folder holds, and nothing without one.
        data: Folder of an offline run, or None.
        languages: Only subsets in these languages.
        types: Only these types or groups.
        names: Only these tasks.
        own: Tasks of the user's own data, beside those of benchmark or folder.

    Raises:
        LusiferError: If the benchmark, a language, a type or a task does not exist, or nothing is left.
    """
    if name is not None and name not in suite.BENCHMARKS:
        raise LusiferError(f"there is no benchmark {name!r}; there are {', '.join(suite.BENCHMARKS)}")
    if name is None and data is None and not own:
        raise LusiferError("say which --benchmark, which --data folder or which --task")
    held = {task.name: task for task in _tasks_in(data)} if data is not None else {}
    wanted = [*(held.values() if name is None else suite.tasks(name)), *own]
    for asked, present, word in (
        (languages, {code for task in wanted for codes in task.subsets.values() for code in codes}, "language"),
        (types, {kind for task in wanted for kind in (task.type, task.group)}, "type"),
        (names, {task.name for task in wanted}, "task"),
    ):
        if unknown := sorted(set(asked or ()) - present):
            raise LusiferError(f"no {word} {unknown[0]!r} here; there are {', '.join(sorted(present))}")
    if types:
        wanted = [task for task in wanted if {task.type, task.group} & set(types)]
    if names:
        wanted = [task for task in wanted if task.name in names]
    if languages:
        wanted = [replace(task, subsets=_spoken(task, set(languages))) for task in wanted]
    wanted = [task for task in wanted if task.subsets]
    chosen, absent = wanted, list[Task]()
    if name is not None and data is not None:
        # The folder may hold fewer tasks, subsets and splits than the benchmark asks for.
        chosen = []
        for task in wanted:
            got = task if task.own else held.get(task.name)
            inside = {key: codes for key, codes in task.subsets.items() if got and key in got.subsets}
            outside = {key: codes for key, codes in task.subsets.items() if key not in inside}
            if got and inside:
                chosen.append(replace(task, subsets=inside, splits=got.splits, revision=got.revision))
            if outside:
                absent.append(replace(task, subsets=outside))
    if not chosen:
        raise LusiferError("no task is left; ask for fewer restrictions")
    return sorted(chosen, key=lambda task: cost(task) / len(task.subsets)), absent


def _spoken(task: Task, languages: set[str]) -> dict[str, tuple[str, ...]]:
    # English is the other side of many pairs, and goes without saying.
    return {
        key: codes
        for key, codes in task.subsets.items()
        if set(codes) <= languages or (len(codes) > 1 and set(codes) - {"en"} <= languages)
    }


def cost(task: Task) -> int:
    """Samples to embed: of own data counted, else by mteb's own statistics, 10,000 where it has none."""
    if task.own is not None:
        return task.own.size(task.subsets)
    try:
        statistics: Any = mteb.get_task(task.name).metadata.descriptive_stats or {}
    except KeyError:
        return 10_000
    parts = []
    for whole in (statistics.get(split, {}) for split in task.splits):
        by_subset = whole.get("hf_subset_descriptive_stats") or {}
        parts += [by_subset[subset] for subset in task.subsets if subset in by_subset] or [whole]
    return sum(int(part.get("num_samples") or 0) for part in parts) or 10_000


for _name in suite.BENCHMARKS:
    add_benchmark(_name, benchmark(_name))
