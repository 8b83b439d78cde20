"""Result files of an evaluation: read and checked, put together, written whole. Imports neither torch nor mteb."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lusifer.errors import LusiferError
from lusifer.evaluation.benchmarks import Task


def read(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def read_record(out: Path, name: str) -> dict[str, Any] | None:
    """A task's record; None where there is none, or it is damaged or of a version that wrote others."""
    found = read(out / f"{name}.json")
    if found is None or found.get("status") not in ("done", "failed"):
        return None
    scores = found.setdefault("main_scores", {})
    if not isinstance(scores, dict) or found["status"] == "done" and not scores:
        return None
    rows = list(scores.values())
    values = [value for row in rows if isinstance(row, dict) for value in row.values()]
    whole = all(isinstance(row, dict) for row in rows) and all(isinstance(value, float | int) for value in values)
    return found if whole and all(map(math.isfinite, values)) else None


def write(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON object, whole or not at all."""
    staging = path.with_name(f".{path.name}-{os.getpid()}")
    staging.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(staging, path)


def lacking(task: Task, record: dict[str, Any] | None) -> Task:
    """The task with those subsets alone that a record has not scored in all of its splits."""
    scores = {} if record is None else record["main_scores"]
    done = {key for key in task.subsets if all(key in scores.get(split, {}) for split in task.splits)}
    return replace(task, subsets={key: codes for key, codes in task.subsets.items() if key not in done})


def merged(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """A record with what was scored before and what was scored now; a failure takes nothing away."""
    if old is None:
        return new
    found = {**old, **new}
    for key in ("main_scores", "standard_errors"):
        before, now = old.get(key) or {}, new.get(key) or {}
        found[key] = {split: {**before.get(split, {}), **now.get(split, {})} for split in [*before, *now]}
    before, now = old.get("scores") or {}, new.get("scores") or {}
    fresh = {split: {row["hf_subset"] for row in rows} for split, rows in now.items()}
    found["scores"] = {
        split: [row for row in before.get(split, []) if row["hf_subset"] not in fresh.get(split, set())]
        + now.get(split, [])
        for split in [*before, *now]
    }
    found["languages"] = {**(old.get("languages") or {}), **new["languages"]}
    for key in ("seconds", "embedded"):
        found[key] = round((old.get(key) or 0) + new[key], 2)
    if new["status"] == "done":
        for key in ("error", "traceback"):
            found.pop(key, None)
    return found


def check_claim(out: Path, settings: dict[str, str]) -> None:
    """Refuses a folder that holds something else's results.

    Args:
        out: The folder; may be missing.
        settings: ``model``, its ``model_hash`` and the hash of the ``prompts``; only the name may have changed.

    Raises:
        LusiferError: If it does.
    """
    known = read(out / "run.json")
    if known is None:
        return
    for key in ("model_hash", "prompts"):
        if known.get(key) != settings[key]:
            raise LusiferError(
                f"{out} holds results of another run ({key} is {known.get(key)!r} there and {settings[key]!r} now); "
                "choose another --out"
            )


def claim(out: Path, settings: dict[str, str], tasks: Sequence[Task]) -> None:
    """Writes what a folder is about and what it shall hold: ``plan`` joins what is asked for now and was before.

    Raises:
        LusiferError: If the folder cannot be written.
    """
    known = read(out / "run.json") or {}
    plan: dict[str, Any] = dict(known.get("plan") or {})
    for task in tasks:
        before = plan.get(task.name) or {"splits": [], "subsets": {}}
        subsets = {**before["subsets"], **{key: list(codes) for key, codes in task.subsets.items()}}
        plan[task.name] = {"splits": list(dict.fromkeys([*before["splits"], *task.splits])), "subsets": subsets}
    try:
        out.mkdir(parents=True, exist_ok=True)
        write(out / "run.json", {**known, **settings, "plan": plan})
    except OSError as error:
        raise LusiferError(f"cannot write into {str(out)!r}: {error.strerror or error}") from error


def fingerprint(folder: Path, entry: dict[str, Any]) -> str:
    """Hash of an offline task: its entry in ``tasks.json``, and paths, sizes and times of its files.

    Raises:
        LusiferError: If the folder is not there.
    """
    if not folder.is_dir():
        raise LusiferError(f"tasks.json: {entry['name']} is said to be in {str(folder)!r}, which is no folder")
    digest = hashlib.sha256(json.dumps(entry, sort_keys=True).encode())
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        facts = path.stat()
        digest.update(f"{path.relative_to(folder)} {facts.st_size} {facts.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def main_scores(records: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Task to subset to main score, splits averaged, of what is done."""
    found: dict[str, dict[str, float]] = {}
    for name, record in records.items():
        splits = list((record.get("main_scores") or {}).values())
        if splits:
            found[name] = {
                subset: sum(split[subset] for split in splits) / len(splits)
                for subset in set.intersection(*(set(split) for split in splits))
            }
    return found
