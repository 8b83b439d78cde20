"""Scoring a model on mteb tasks, resumably: one file per task, each score with what made it.

1. `evaltasks.choose` says which tasks, those that tell most in little time first.
2. Every task runs through mteb's own runner; embeddings come from a cache on disk that tasks share.
3. ``OUT/<task>.json`` appears whole when a task is done (or has failed), and is not run again when done.

Several processes may work on one folder: each takes the next task that no other has locked.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import mteb
import yaml
from filelock import FileLock, Timeout
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from tqdm.auto import tqdm

from lusifer.embedcache import EmbeddingCache
from lusifer.embedders import ALONE, backbone_name, language_profile, load_embedder
from lusifer.errors import LusiferError
from lusifer.evaltasks import cost, mteb_task
from lusifer.intervals import Recorder
from lusifer.prompts import with_instruction
from lusifer.released import files_hash
from lusifer.starter import cache_dir, resolve_backbone
from lusifer.suite import Task

PROFILE = "languages.json"


def load_prompts(path: Path | None = None) -> dict[str, str]:
    """Instructions by task name or mteb type, for queries and for symmetric tasks' texts.

    Args:
        path: YAML file, ``name: instruction``; the bundled one when None.

    Raises:
        LusiferError: If it cannot be read or is no such mapping.
    """
    where = path or (files("lusifer") / "resources" / "prompts.yaml")
    try:
        found = yaml.safe_load(where.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise LusiferError(f"cannot read instructions from {where}: {str(error).splitlines()[0]}") from None
    if not isinstance(found, dict) or not all(isinstance(v, str) and v.strip() for v in found.values()):
        raise LusiferError(f"{where} must map task names or types to instructions, each a line of text")
    return {str(key): value for key, value in found.items()}


def model_hash(model: str) -> str:
    """Hash of a model's files, or of its name where it is not a local folder; 16 hex digits."""
    folder = Path(resolve_backbone(backbone_name(model)))
    if not folder.is_dir():
        return hashlib.sha256(model.encode()).hexdigest()[:16]
    return files_hash(folder, next((prefix for prefix in ALONE if model.startswith(prefix)), ""))


class CachedModel(AbsEncoder):
    """A model as mteb wants it, with our instructions and the cache of embeddings.

    Args:
        cache: Embeds texts.
        prompts: Instructions by task name or type; empty for none.
        name: What results call it.
    """

    def __init__(self, cache: EmbeddingCache, prompts: dict[str, str], name: str) -> None:
        self.cache = cache
        self.prompts = prompts
        self.mteb_model_meta = ModelMeta.create_empty(overwrites={"name": name, "revision": "local"})

    def instruction(self, task: Any, role: str | None) -> str | None:
        """What stands in front of a text: nothing for documents."""
        return None if role == "document" else self.prompts.get(task.name) or self.prompts.get(task.type)

    def encode(self, inputs: Any, *, task_metadata: Any, prompt_type: Any = None, **kwargs: Any) -> Any:
        """(n, dim) float32 of mteb's batches of texts."""
        told = self.instruction(task_metadata, getattr(prompt_type, "value", prompt_type))
        texts = [with_instruction(told, text) for batch in inputs for text in batch["text"]]
        return self.cache(texts)


def run(
    model: str,
    tasks: Sequence[Task],
    out: Path,
    *,
    data: Path | None = None,
    prompts: dict[str, str] | None = None,
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
        prompts: Instructions; none when None.
        device: Torch device.
        batch_size: Texts per forward pass.
        progress: Whether to show a bar.

    Returns:
        Every task's record: those done before too; ``status`` is ``done`` or ``failed``.

    Raises:
        LusiferError: If the model cannot be loaded, or ``out`` holds another model's results.
    """
    digest = model_hash(_resolved(model))
    settings = {
        "model": model,
        "model_hash": digest,
        "prompts": hashlib.sha256(repr(prompts).encode()).hexdigest()[:16],
    }
    _claim(out, settings)
    left = [task for task in tasks if not _done(out, task)]
    if left or not (out / PROFILE).is_file():
        loaded = load_embedder(model, device=device, batch_size=batch_size)
        bar = tqdm(
            total=sum(cost(task) for task in left), unit="text", unit_scale=True, disable=not progress, smoothing=0.05
        )
        cache = EmbeddingCache(cache_dir() / "embeddings" / f"{digest}.sqlite", loaded.embed)
        wrapped = CachedModel(cache, prompts or {}, "local/" + model.strip("./").replace("/", "-").replace(":", "-"))
        facts = {
            **settings,
            "max_seq_length": loaded.max_seq_length,
            "batch_size": batch_size,
            "versions": {name: version(name) for name in ("mteb", "torch", "transformers", "sentence-transformers")},
        }
        if not (out / PROFILE).is_file():
            _write(out / PROFILE, {**facts, **language_profile(cache, loaded.tokenizers)})
        for task in left:
            bar.set_description(task.name)
            _run_locked(wrapped, task, out, data, facts)
            bar.update(cost(task))
        bar.close()
    records = {task.name: _read(out / f"{task.name}.json") for task in tasks}
    return {name: record for name, record in records.items() if record is not None}


def _resolved(model: str) -> str:
    from lusifer.released import resolve_model

    return model if model.startswith(ALONE) else resolve_model(model)


def _claim(out: Path, settings: dict[str, str]) -> None:
    """Writes what a folder is about, or refuses one about something else."""
    path = out / "run.json"
    out.mkdir(parents=True, exist_ok=True)
    known = _read(path)
    if known is None:
        _write(path, settings)
    elif changed := [key for key in settings if known.get(key) != settings[key]]:
        raise LusiferError(
            f"{out} holds results of another run ({changed[0]} is {known.get(changed[0])!r} there and "
            f"{settings[changed[0]]!r} now); choose another --out"
        )


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write(path: Path, value: dict[str, Any]) -> None:
    staging = path.with_name(f".{path.name}-{os.getpid()}")
    staging.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(staging, path)


def _done(out: Path, task: Task) -> bool:
    """Whether all of a task's subsets and splits are scored."""
    record = _read(out / f"{task.name}.json")
    if record is None or record.get("status") != "done":
        return False
    return all(set(task.subsets) <= set(record["main_scores"].get(split, {})) for split in task.splits)


def _run_locked(model: CachedModel, task: Task, out: Path, data: Path | None, facts: dict[str, Any]) -> None:
    lock = FileLock(out / f".{task.name}.lock")
    try:
        with lock.acquire(blocking=False):
            if not _done(out, task):
                for attempt in range(2):  # A hub that stumbles once is no failure.
                    record = _score(model, task, data, facts)
                    if record["status"] == "done" or attempt:
                        break
                _write(out / f"{task.name}.json", record)
    except Timeout:  # Another process is at it.
        return


def _score(model: CachedModel, task: Task, data: Path | None, facts: dict[str, Any]) -> dict[str, Any]:
    """A task's record, also of a failure."""
    started, computed = time.monotonic(), model.cache.computed
    record: dict[str, Any] = {"task": task.name, "type": task.type, "group": task.group, "revision": task.revision}
    try:
        made = mteb_task(task, data)
        recorder = Recorder(made)
        result = mteb.evaluate(
            model,
            made,
            cache=None,
            co2_tracker=False,
            show_progress_bar=False,
            prediction_folder=Path(os.devnull),  # The recorder takes them, nothing is written.
            encode_kwargs={"batch_size": facts["batch_size"], "show_progress_bar": False},
        ).task_results[0]
        scores = {
            split: {row["hf_subset"]: row for row in rows if row["hf_subset"] in task.subsets}
            for split, rows in result.scores.items()
        }
        main = {split: {key: float(row["main_score"]) for key, row in rows.items()} for split, rows in scores.items()}
        told = {role: model.instruction(made.metadata, role) for role in ("query", "document")}
        record |= {"status": "done", "main_scores": main, "standard_errors": recorder.errors(scores)}
        record |= {"scores": result.to_dict()["scores"], "instructions": told}
    except Exception as error:  # Whatever a data set or a metric throws, the other tasks go on.
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:500]
        record |= {"status": "failed", "error": reason, "traceback": traceback.format_exc()}
    return {
        **record,
        "languages": {key: list(codes) for key, codes in task.subsets.items()},
        "seconds": round(time.monotonic() - started, 2),
        "embedded": model.cache.computed - computed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **facts,
    }


def main_scores(records: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Task to subset to main score, splits averaged, of what is done."""
    found: dict[str, dict[str, float]] = {}
    for name, record in records.items():
        if record["status"] == "done":
            splits = list(record["main_scores"].values())
            found[name] = {
                subset: sum(split[subset] for split in splits) / len(splits)
                for subset in set.intersection(*(set(split) for split in splits))
            }
    return found
