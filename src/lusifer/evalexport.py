"""Writes the data of benchmark tasks into a folder that scores without a network.

Each task's data set becomes ``OUT/<task>/``: one Parquet file per configuration and split, and a ``README.md`` whose
header names the configurations, so that ``datasets.load_dataset(folder, configuration)`` gives what the hub gives.
``OUT/tasks.json`` lists the tasks that are complete; it is written anew, whole, after each.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import mteb
import yaml
from tqdm.auto import tqdm

from lusifer.errors import LusiferError
from lusifer.suite import Task


def export(tasks: Sequence[Task], out: Path, *, progress: bool = True) -> dict[str, str]:
    """Downloads tasks and writes them; goes on where ``out`` already holds some.

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
        entry = _entry(task)
        if entry in listed:
            continue
        try:
            _write_task(task, out)
        except OSError as error:
            if error.filename is not None and str(error.filename).startswith(str(out)):
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


def _listed(out: Path) -> list[dict[str, Any]]:
    path = out / "tasks.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        found = json.loads(path.read_text(encoding="utf-8"))
        return [dict(entry) for entry in found if entry["name"]]
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


def needed(configurations: Sequence[str], subsets: Sequence[str]) -> list[str]:
    """The configurations some subsets live in: their own (``es``), their parts (``es-corpus``), or all there are."""
    chosen = []
    for subset in subsets:
        own = [name for name in configurations if name == subset or name.startswith(f"{subset}-")]
        if not own:  # A data set of another shape: its task knows which parts it reads.
            return list(configurations)
        chosen += own
    return list(dict.fromkeys(chosen))


def _write_task(task: Task, out: Path) -> None:
    path, revision = source(task)
    options = {"revision": revision} if revision else {}
    header = []
    with tempfile.TemporaryDirectory(dir=out, prefix=f".{task.name}-") as scratch:
        staging = Path(scratch) / task.name
        for name in needed(datasets.get_dataset_config_names(path, **options), list(task.subsets)):
            files = []
            for split, rows in datasets.load_dataset(path, name, **options).items():
                file = Path(name.replace("/", "_")) / f"{split}.parquet"
                (staging / file.parent).mkdir(parents=True, exist_ok=True)
                rows.to_parquet(staging / file)
                files.append({"split": str(split), "path": file.as_posix()})
            header.append({"config_name": name, "data_files": files})
        front = yaml.safe_dump({"configs": header}, allow_unicode=True, sort_keys=False)
        told = (
            f"Data of the mteb task {task.name}: {path}, revision {revision or 'main'}. Its licence is the source's.\n"
        )
        (staging / "README.md").write_text(f"---\n{front}---\n\n{told}", encoding="utf-8")
        shutil.rmtree(out / task.name, ignore_errors=True)
        os.replace(staging, out / task.name)
