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
from difflib import get_close_matches
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import datasets
import mteb
import yaml
from filelock import FileLock, Timeout
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder, get_prompt_name
from mteb.types import PromptType
from sentence_transformers import SimilarityFunction
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.utils import cached_file

from lusifer.embedcache import EmbeddingCache
from lusifer.embedders import ALONE, Embedder, backbone_name, language_profile, load_embedder
from lusifer.errors import LusiferError
from lusifer.evaltasks import cost, mteb_task, task_fingerprint
from lusifer.intervals import Recorder
from lusifer.prompts import with_instruction
from lusifer.records import check_claim, claim, lacking, main_scores, merged, read_record, write
from lusifer.released import files_hash
from lusifer.starter import cache_dir, resolve_backbone
from lusifer.suite import Task

__all__ = ["CachedModel", "load_prompts", "main_scores", "model_hash", "run"]

logger = logging.getLogger(__name__)

Prompts = dict[str, str | dict[str, str]]
PROFILE = "languages.json"
_PACKAGES = (
    "lusifer", "mteb", "torch", "transformers", "sentence-transformers", "datasets", "numpy", "scikit-learn",
)  # fmt: skip
_DOCUMENT_PROMPTS = ("document", "passage", "corpus")  # As Sentence Transformers looks for them.


def load_prompts(path: Path | None = None) -> Prompts:
    """What stands in front of texts, by task name or mteb type.

    Args:
        path: YAML file, the bundled one when None. A text is an instruction, put before queries and before both sides
            of symmetric tasks; a mapping gives what stands before a ``query`` and a ``document``, to the letter.

    Raises:
        LusiferError: If it cannot be read, is no such mapping, or names a task or type that does not exist.
    """
    where = path or (files("lusifer") / "resources" / "prompts.yaml")
    try:
        found = yaml.safe_load(where.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise LusiferError(f"cannot read instructions from {where}: {str(error).splitlines()[0]}") from None
    if not isinstance(found, dict) or not all(_is_prompt(value) for value in found.values()):
        raise LusiferError(
            f"{where} must map task names or types to instructions, each a line of text or 'query' and 'document'"
        )
    tasks = mteb.get_tasks(exclude_superseded=False, exclude_private=False, exclude_beta=False)
    known = {kind for task in tasks for kind in (task.metadata.name, task.metadata.type)}
    for key in found:
        if str(key) not in known:
            close = get_close_matches(str(key), known, 1)
            raise LusiferError(f"{where}: mteb has no task or type {key!r}" + (f"; {close[0]}?" if close else ""))
    return {str(key): value for key, value in found.items()}


def _is_prompt(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value) and set(value) <= {"query", "document"} and all(isinstance(v, str) for v in value.values())
    return isinstance(value, str) and bool(value.strip())


def model_hash(model: str) -> str:
    """Hash of a model's files, or of its name and commit where it is on the hub; 16 hex digits."""
    folder = Path(resolve_backbone(backbone_name(model)))
    if not folder.is_dir():
        return hashlib.sha256(f"{model} {_commit(model)}".encode()).hexdigest()[:16]
    return files_hash(folder, next((prefix for prefix in ALONE if model.startswith(prefix)), ""))


def _commit(model: str) -> str:
    """The hub commit of a model; nothing where that cannot be told."""
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    try:
        found = cached_file(backbone_name(model), "config.json", **quiet)
    except (OSError, ValueError):
        return ""
    return Path(found).parent.name if found else ""


class CachedModel(AbsEncoder):
    """A model as mteb wants it, with prompts and the cache of embeddings.

    Args:
        cache: Embeds texts.
        prompts: Instructions by task name or type; the model's own prompts hold where there are none.
        name: What results call it.
        model: The model.
    """

    def __init__(self, cache: EmbeddingCache, prompts: Prompts, name: str, model: Embedder) -> None:
        self.cache = cache
        self.prompts = prompts
        self.loaded = model
        self.mteb_model_meta = ModelMeta.create_empty(overwrites={"name": name, "revision": "local"})

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """(n, m) similarities, by the model's own function where it has one."""
        if self.loaded.native is not None:
            return self.loaded.native.similarity(embeddings1, embeddings2)
        if self.loaded.similarity is None:
            return super().similarity(embeddings1, embeddings2)
        return SimilarityFunction.to_similarity_fn(self.loaded.similarity)(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """(n,) similarities of rows at the same place."""
        if self.loaded.native is not None:
            return self.loaded.native.similarity_pairwise(embeddings1, embeddings2)
        if self.loaded.similarity is None:
            return super().similarity_pairwise(embeddings1, embeddings2)
        return SimilarityFunction.to_similarity_pairwise_fn(self.loaded.similarity)(embeddings1, embeddings2)

    def prefix(self, task: Any, role: Any) -> str:
        """What stands in front of a text, to the letter.

        Args:
            task: mteb's metadata of the task.
            role: mteb's prompt type; None on both sides of symmetric tasks.
        """
        side = getattr(role, "value", role)
        if self.prompts:
            told = self.prompts.get(task.name) or self.prompts.get(task.type) or ""
            if isinstance(told, dict):
                return told.get(side or "query", "")
            return with_instruction(told, "") if told and side != "document" else ""
        own = self.loaded.prompts
        name = get_prompt_name(own, task, role)
        if name is None:
            asked = {"query": ("query",), "document": _DOCUMENT_PROMPTS}.get(side or "", ())
            name = next((key for key in asked if key in own), None)
        return self.loaded.default_prompt if name is None else own[name]

    def encode(self, inputs: Any, *, task_metadata: Any, prompt_type: Any = None, **kwargs: Any) -> Any:
        """(n, dim) float32 of mteb's batches of texts."""
        texts = [text for batch in inputs for text in batch["text"]]
        if self.loaded.native is None:
            told = self.prefix(task_metadata, prompt_type)
            return self.cache([told + text for text in texts])
        # What it puts in front of a text is its own affair, and may depend on task and side.
        mark = f"{task_metadata.name}\0{getattr(prompt_type, 'value', prompt_type)}\0"
        native, options = self.loaded.native, {"task_metadata": task_metadata, "prompt_type": prompt_type, **kwargs}

        def embed(marked: list[str]) -> Any:
            rows = datasets.Dataset.from_dict({"text": [text.removeprefix(mark) for text in marked]})
            return native.encode(DataLoader(rows, batch_size=32), **options)

        self.cache.embed = embed
        return self.cache([mark + text for text in texts])


def run(
    model: str,
    tasks: Sequence[Task],
    out: Path,
    *,
    data: Path | None = None,
    prompts: Prompts | None = None,
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
    hashed = hashlib.sha256(repr(sorted(told.items())).encode()).hexdigest()[:16] if told else "own"
    settings = {"model": model, "model_hash": digest, "prompts": hashed}
    check_claim(out, settings)
    prints = {task.name: task_fingerprint(task, data) for task in tasks}
    left = [task for task in tasks if lacking(task, _current(out, task, prints)).subsets]
    if left or not (out / PROFILE).is_file():
        loaded = load_embedder(model, device=device, batch_size=batch_size)
        claim(out, settings, [*tasks, *absent])
        total = sum(cost(task) for task in left)
        with tqdm(total=total, unit="text", unit_scale=True, disable=not progress, smoothing=0.05) as bar:
            cache = EmbeddingCache(cache_dir() / "embeddings" / f"{digest}.sqlite", loaded.embed)
            cache.progress = lambda count: bar.set_postfix_str(f"{cache.computed:,} embedded")
            name = "local/" + model.strip("./").replace("/", "-").replace(":", "-")
            wrapped = CachedModel(cache, told, name, loaded)
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


def _resolved(model: str) -> str:
    from lusifer.released import resolve_model

    return model if model.startswith(ALONE) else resolve_model(model)


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
