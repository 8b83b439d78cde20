"""Writes the data of benchmark tasks into a folder that scores without a network.

Each task's data set becomes ``OUT/<task>/``: one Parquet file per configuration and split, and a ``README.md`` whose
header names the configurations, so that ``datasets.load_dataset(folder, configuration)`` gives what the hub gives.
``OUT/tasks.json`` lists the tasks that are complete; it is written anew, whole, after each. A task is complete when
mteb has loaded it from what was written: a part that is missing shows here, not on the machine without a network.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import mteb
import yaml
from tqdm.auto import tqdm

from lusifer.errors import LusiferError
from lusifer.evaluation.benchmarks import Task
from lusifer.evaluation.tasks import mteb_task

# Parts of a retrieval data set without subsets, as mteb's loader names them; those of a subset have its name in front.
_PARTS = ("corpus", "queries", "query", "qrels", "top_ranked", "instruction")


def export(tasks: Sequence[Task], out: Path, *, progress: bool = True) -> dict[str, str]:
    """Downloads tasks and writes them; goes on where ``out`` already holds some, and adds subsets to these.

    Args:
        tasks: The tasks; only their subsets are kept, where the data set has a configuration for each.
        out: Folder to write.
        progress: Whether to show a bar.

    Returns:
        Task to what went wrong, of those that could not be written.

    Raises:
        LusiferError: If ``out`` cannot be written, or its ``tasks.json`` is damaged.
    """
    listed = _listed(out)
    failed = {}
    for task in tqdm(tasks, desc="exporting", unit="task", disable=not progress):
        known = next((other for other in listed if other["name"] == task.name), None)
        whole = task if known is None else _united(task, known)
        entry = _entry(whole)
        if known is not None and all(entry[key] == known[key] for key in ("eval_splits", "subsets")):
            continue
        try:
            _write_task(whole, out)
        except OSError as error:
            if error.filename is not None and str(error.filename).startswith(str(out)) and error.errno != errno.ENOENT:
                raise LusiferError(f"cannot write {error.filename}: {error.strerror}") from error
            failed[task.name] = _reason(error)
        except Exception as error:  # Whatever a hub or a script-only data set throws, the other tasks go on.
            failed[task.name] = _reason(error)
        else:
            listed = [*[other for other in listed if other["name"] != task.name], entry]
            _write_list(out, listed)
    return failed


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _entry(task: Task) -> dict[str, Any]:
    subsets = {name: codes[0] if len(codes) == 1 else list(codes) for name, codes in sorted(task.subsets.items())}
    return {"name": task.name, "dir": task.name, "eval_splits": list(task.splits), "subsets": subsets}


def _united(task: Task, known: dict[str, Any]) -> Task:
    """A task with the subsets and splits that are there already: what is asked for next deletes nothing."""
    there = {key: (value,) if isinstance(value, str) else tuple(value) for key, value in known["subsets"].items()}
    splits = tuple(dict.fromkeys([*known["eval_splits"], *task.splits]))
    return replace(task, subsets={**there, **task.subsets}, splits=splits)


def _listed(out: Path) -> list[dict[str, Any]]:
    path = out / "tasks.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        found = json.loads(path.read_text(encoding="utf-8"))
        fields = ("name", "dir", "eval_splits", "subsets")
        return [{**entry, **{key: entry[key] for key in fields}} for entry in found]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise LusiferError(f"cannot write into {str(out)!r}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise LusiferError(f"{path} is damaged; remove it, and what is complete is downloaded again") from error


def _write_list(out: Path, listed: list[dict[str, Any]]) -> None:
    staging = out / f".tasks-{os.getpid()}.json"
    staging.write_text(json.dumps(listed, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(staging, out / "tasks.json")


def source(task: Task) -> tuple[str, str | None]:
    """Hub id of a task's data set and the revision mteb pins."""
    found: Any = mteb.get_task(task.name).metadata.dataset
    return str(found["path"]), found.get("revision")


def needed(
    configurations: Sequence[str], subsets: Sequence[str], *, default: str | None = None, only: str | None = None
) -> list[str]:
    """The configurations a task reads.

    A subset lives in its own (``es``), in its parts (``es-corpus``), or, without a name, in parts without one
    (``corpus``, ``queries``, with the relevance in ``default`` or ``qrels``). Where one has none of these, the task
    knows which parts it reads, and all are kept.

    Args:
        configurations: All there are.
        subsets: Subsets of the task.
        default: The configuration that loads where none is named.
        only: The one configuration that the task names, or loads for all its subsets at once.
    """
    if only is not None and only in configurations:
        return [only]
    chosen = []
    for subset in subsets:
        own = [name for name in configurations if name == subset or name.startswith(f"{subset}-")]
        if subset == "default":
            own += [name for name in configurations if name in (*_PARTS, default)]
        if not own:
            return list(configurations)
        chosen += own
    # mteb prefers a "query" without a subset's name to "es-queries".
    chosen += [name for name in configurations if name == "query"]
    return list(dict.fromkeys(chosen))


def _write_task(task: Task, out: Path) -> None:
    path, revision = source(task)
    options = {"revision": revision} if revision else {}
    made: Any = mteb.get_task(task.name)
    configurations = datasets.get_dataset_config_names(path, **options)
    default = _default(path, options)
    only = default if made.fast_loading else made.metadata.dataset.get("name")
    chosen = needed(configurations, list(task.subsets), default=default, only=only)
    with tempfile.TemporaryDirectory(dir=out, prefix=f".{task.name}-") as scratch:
        staging = Path(scratch) / task.name
        header = _download(path, options, chosen, staging)
        _describe(staging, header, default, f"{task.name}: {path}, revision {revision or 'main'}")
        try:
            _check(task, Path(scratch))
        except Exception:  # The task reads more than its subsets' names tell.
            if not (rest := [name for name in configurations if name not in chosen]):
                raise
            header += _download(path, options, rest, staging)
            _describe(staging, header, default, f"{task.name}: {path}, revision {revision or 'main'}")
            _check(task, Path(scratch))
        # Put aside before it goes: an interruption loses the listed task only between two renames.
        if (out / task.name).exists():
            os.replace(out / task.name, Path(scratch) / "old")
        os.replace(staging, out / task.name)


def _default(path: str, options: dict[str, str]) -> str | None:
    """The configuration ``load_dataset(path)`` gives; None where it wants a name."""
    try:
        return str(datasets.load_dataset_builder(path, **options).config.name)
    except ValueError:
        return None


def _download(path: str, options: dict[str, str], names: Sequence[str], staging: Path) -> list[dict[str, Any]]:
    """Writes configurations; returns what the header says of them."""
    header = []
    for name in names:
        files = []
        for split, rows in datasets.load_dataset(path, name, **options).items():
            file = Path(name.replace("/", "_")) / f"{split}.parquet"
            (staging / file.parent).mkdir(parents=True, exist_ok=True)
            rows.to_parquet(staging / file)
            files.append({"split": str(split), "path": file.as_posix()})
        header.append({"config_name": name, "data_files": files})
    return header


def _describe(staging: Path, header: list[dict[str, Any]], default: str | None, told: str) -> None:
    configurations = [{**row, "default": True} if row["config_name"] == default else row for row in header]
    front = yaml.safe_dump({"configs": configurations}, allow_unicode=True, sort_keys=False)
    text = f"---\n{front}---\n\nData of the mteb task {told}. Its licence is the source's.\n"
    (staging / "README.md").write_text(text, encoding="utf-8")


def _check(task: Task, folder: Path) -> None:
    """Loads a task from a folder as an evaluation will.

    Raises:
        LusiferError: If a subset or split is not there; other errors are mteb's own.
    """
    _write_list(folder, [_entry(task)])
    made: Any = mteb_task(task, folder)
    with _cache_in(folder / "cache"):
        made.load_data()
    held = made.dataset
    if held is None or not (made.fast_loading or set(task.subsets) & set(held)):
        return  # A task with a form of its own; it has loaded.
    for subset in task.subsets:
        if lacking := [split for split in task.splits if split not in held.get(subset, {})]:
            raise LusiferError(f"the data set has no split {lacking[0]!r} of {subset!r}")


@contextmanager
def _cache_in(folder: Path) -> Iterator[None]:
    """Lets ``datasets`` convert into a folder that goes again: the check must not fill the user's cache."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = str(folder)
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = before
