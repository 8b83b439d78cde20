"""Hard negatives from a teacher's embeddings, in bounded memory.

Positive-aware (NV-Retriever, arXiv 2407.15831, section 3): a passage counts as a negative only if the teacher scores
it clearly below the query's positive. Embeddings live in float16 files beside the output; scores are made blockwise.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lusifer.data.pairs import Problem, Texts, read_problem
from lusifer.data.prompts import Role
from lusifer.data.records import Records, open_records
from lusifer.errors import LusiferError, first_line
from lusifer.locks import alone_at, tidy
from lusifer.progress import bar, track
from lusifer.publishing import publish_file, sweep, write_json
from lusifer.recipes.schema import DataRecipe
from lusifer.terminal import without_secrets

Embed = Callable[[list[str]], np.ndarray]

_PLAN = "plan.json"
_CHUNK = 8_192  # Texts embedded between two writes to the cache.
_QUERIES, _PASSAGES = 1_024, 32_768  # A block of scores: 128 MB of float32.


@dataclass
class Settings:
    """How negatives are chosen.

    Attributes:
        negatives: At most so many for a row.
        relative_margin: By which share of its size a score must be below that of the row's weakest positive.
        range_min: Best-ranked passages skipped, after the row's own texts are taken out.
        range_max: Passages looked at, from rank 0.
    """

    negatives: int = 7
    relative_margin: float = 0.05
    range_min: int = 0
    range_max: int = 100

    def __post_init__(self) -> None:
        ranks = self.range_max - self.range_min
        if not 0 <= self.range_min < self.range_max:
            raise LusiferError(f"range_min ({self.range_min}) must be at least 0, below range_max ({self.range_max})")
        if not 1 <= self.negatives <= ranks:
            raise LusiferError(f"{self.negatives} negatives from {ranks} ranks: raise range_max or lower negatives")
        if not 0 <= self.relative_margin < 1:
            raise LusiferError(f"relative_margin must be at least 0 and below 1, not {self.relative_margin}")


def embed_to_file(embed: Embed, texts: Sequence[str], path: Path, *, progress: str | None) -> np.ndarray:
    """Embeds texts into a float16 file, going on after the last whole chunk of an interrupted call.

    Args:
        embed: Maps texts to (texts, dim) embeddings.
        texts: The texts.
        path: The file; what it holds already is kept, so its name must depend on texts and model.
        progress: What the progress bar says, or None for no bar.

    Returns:
        (texts, dim) float16, unit length, mapped from the file.
    """
    stored = path.stat().st_size if path.exists() else 0
    dimension = embed([texts[0]]).shape[1]
    width = 2 * dimension
    done = stored // (width * _CHUNK) * _CHUNK if stored < width * len(texts) else len(texts)
    shown = bar(len(texts), progress or "", "text", done=done, show=progress is not None)
    with shown, path.open("ab") as file:
        file.truncate(done * width)
        for start in range(done, len(texts), _CHUNK):
            chunk = list(texts[start : start + _CHUNK])
            vectors = np.asarray(embed(chunk), dtype=np.float32)
            norms = np.linalg.norm(vectors, axis=1, keepdims=True)
            if not np.isfinite(norms).all():
                raise LusiferError("the model returns NaN or infinite embeddings; use another one")
            file.write((vectors / np.maximum(norms, 1e-12)).astype(np.float16).tobytes())
            file.flush()
            os.fsync(file.fileno())  # What is there counts as done.
            shown.update(len(chunk))
    return np.memmap(path, dtype=np.float16, mode="r", shape=(len(texts), dimension))


def nearest(
    queries: np.ndarray, passages: np.ndarray, k: int, device: str = "cpu"
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The ``k`` passages of highest score for every query, block by block.

    Args:
        queries: (queries, dim) float16, unit length.
        passages: (passages, dim) float16, unit length.
        k: How many.
        device: Where the scores are made.

    Yields:
        First query of the block; scores (block, k) float32, falling; passages (block, k) int64.
    """
    for start in range(0, len(queries), _QUERIES):
        block = torch.from_numpy(queries[start : start + _QUERIES].astype(np.float32)).to(device)
        best = torch.empty(len(block), 0, device=device)
        where = torch.empty(len(block), 0, dtype=torch.int64, device=device)
        for first in range(0, len(passages), _PASSAGES):
            part = torch.from_numpy(passages[first : first + _PASSAGES].astype(np.float32)).to(device)
            scores = block @ part.T
            top, index = scores.topk(min(k, scores.shape[1]), dim=1)
            best, where = torch.cat([best, top], dim=1), torch.cat([where, index + first], dim=1)
            best, order = best.topk(min(k, best.shape[1]), dim=1)
            where = where.gather(1, order)
        yield start, best.cpu(), where.cpu()


def choose(
    scores: np.ndarray, candidates: np.ndarray, own: np.ndarray, positive: float, settings: Settings
) -> tuple[list[int], list[float]]:
    """The negatives of one row, hardest first.

    Args:
        scores: (k,) scores of the nearest passages, falling.
        candidates: (k,) the passages.
        own: (k,) bool, passages that are the query or a positive of it, or equal to one.
        positive: Score of the row's weakest positive.
        settings: How to choose.

    Returns:
        Passages and their scores.
    """
    ranked = np.flatnonzero(~own)[settings.range_min : settings.range_max]
    limit = positive - settings.relative_margin * abs(positive)
    kept = ranked[scores[ranked] < limit][: settings.negatives]
    return candidates[kept].tolist(), scores[kept].tolist()


def check_output(output: Path) -> None:
    """Refuses what cannot become the output, before any model is loaded.

    Raises:
        LusiferError: If the name tells no format that is written here, or the file exists and its call has ended.
    """
    if not output.name.endswith((".jsonl", ".jsonl.gz")):
        raise LusiferError(f"cannot write {str(output)!r}: name it .jsonl or .jsonl.gz")
    if output.exists() and not (_folder(output) / _PLAN).is_file():
        tidy(output)
        with suppress(OSError):
            _folder(output).rmdir()  # A call that was killed had emptied it.
        raise _exists(output)


def _exists(output: Path) -> LusiferError:
    return LusiferError(f"{str(output)!r} already exists; choose another name, or remove it")


def _folder(output: Path) -> Path:
    return output.with_name(f"{output.name}.embeddings")


def mine(
    item: DataRecipe,
    output: Path,
    embed: Embed,
    *,
    teacher: str,
    teacher_hash: str,
    settings: Settings,
    corpus: DataRecipe | None = None,
    device: str = "cpu",
    embed_query: Embed | None = None,
    prompts: Mapping[Role, str] | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Writes a copy of a pair set whose ``negative`` are mined, hardest first; an interrupted call is taken up again.

    Args:
        item: The set of pairs; its own negatives are replaced.
        output: The new ``.jsonl`` or ``.jsonl.gz`` file; ``<output>.mining.json`` tells how it was made.
        embed: The teacher for passages.
        teacher: Its name, for the summary.
        teacher_hash: Hash of its content: what an interrupted call has embedded is another's where it differs.
        settings: How to choose.
        corpus: Texts to choose from besides all positives.
        device: Where scores are made.
        embed_query: The teacher for queries, if it treats them otherwise.
        prompts: What both put in front of a ``query`` and a ``document``, for the summary and the cache.
        progress: Whether to show progress bars.

    Returns:
        The summary: ``teacher``, settings, counts, mean scores, ``rows_short`` (fewer negatives than asked for).

    Raises:
        LusiferError: If data cannot be read, the output exists or cannot be written, or another process is at work
            on it.
    """
    check_output(output)
    with alone_at(output):
        check_output(output)  # The other process may have ended meanwhile.
        task = _Task(item, corpus, output, teacher, teacher_hash, prompts, settings)
        try:
            return _mine(task, embed, embed_query or embed, device, progress)
        except OSError as error:
            raise LusiferError(f"cannot write {str(output)!r}: {first_line(error)}") from error


class _Task(NamedTuple):
    """What is asked for."""

    item: DataRecipe
    corpus: DataRecipe | None
    output: Path
    teacher: str
    teacher_hash: str
    prompts: Mapping[Role, str] | None
    settings: Settings


def _mine(task: _Task, embed: Embed, embed_query: Embed, device: str, progress: bool) -> dict[str, Any]:
    output, settings, folder = task.output, task.settings, _folder(task.output)
    records = open_records(task.item.model_copy(update={"task": "contrast", "hard_negatives": 0}))
    pool = None if task.corpus is None else open_records(task.corpus.model_copy(update={"task": "reconstruct"}))
    problem = read_problem(records, pool, progress)
    summary = output.with_name(f"{output.name}.mining.json")
    if done := _begin(task, problem, folder, summary):
        return done
    made_by = json.dumps([task.teacher_hash, task.prompts])
    queries = _embedded(problem.queries, embed_query, folder, f"{made_by} queries", progress)
    passages = _embedded(problem.passages, embed, folder, f"{made_by} passages", progress)
    chosen, figures = _choose_all(problem, queries, passages, settings, device, progress)
    _write_rows(output, records, problem, chosen, progress)
    facts: dict[str, Any] = {"teacher": task.teacher, "teacher_hash": task.teacher_hash, "prompts": task.prompts}
    corpus = without_secrets(task.corpus.source) if task.corpus else None
    facts |= {"source": without_secrets(task.item.source), "corpus": corpus}
    facts |= {"rows": len(records), "passages": len(problem.passages.number), **asdict(settings), **figures}
    write_json(summary, facts)
    _remove(folder)
    return facts


def _begin(task: _Task, problem: Problem, folder: Path, summary: Path) -> dict[str, Any] | None:
    """Writes down what the call is about; the summary, if one like it was killed when all was written."""
    folder.mkdir(exist_ok=True)
    plan = {
        "teacher_hash": task.teacher_hash,
        "prompts": task.prompts,
        "texts": [problem.queries.digest(), problem.passages.digest()],
        "rows": hashlib.sha256(repr(problem.rows).encode()).hexdigest()[:16],
        "settings": asdict(task.settings),
    }
    known = _read(folder / _PLAN)
    if task.output.exists():
        if known != plan:
            raise _exists(task.output)
        if done := _read(summary):
            for path in (task.output, summary):
                sweep(path)
            _remove(folder)
            return done
    else:
        summary.unlink(missing_ok=True)  # Of an output that was removed.
    write_json(folder / _PLAN, plan)
    return None


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != _PLAN:
            path.unlink()
    shutil.rmtree(folder)  # The plan goes last: a call that is killed before is taken up by it.


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _embedded(texts: Texts, embed: Embed, folder: Path, name: str, progress: bool) -> np.ndarray:
    digest = hashlib.sha256(f"{name} {texts.digest()}".encode()).hexdigest()[:16]
    shown = f"embedding {name.rsplit(' ', 1)[1]}" if progress else None
    return embed_to_file(embed, list(texts.number), folder / f"{digest}.f16", progress=shown)


def _choose_all(
    problem: Problem, queries: np.ndarray, passages: np.ndarray, settings: Settings, device: str, progress: bool
) -> tuple[list[list[int]], dict[str, Any]]:
    kinds = np.array(problem.passages.kind, dtype=np.int64)
    rows_of: list[list[int]] = [[] for _ in range(len(queries))]
    for row, (query, _) in enumerate(problem.rows):
        rows_of[query].append(row)
    # Own texts may fill the first ranks, each with a few copies that differ in case or punctuation.
    k = min(settings.range_max + 2 * max(map(len, problem.own)), len(passages))
    chosen: list[list[int]] = [[] for _ in problem.rows]
    positive_sum, negative_scores = 0.0, []
    with bar(len(queries), "searching", "query", show=progress) as shown:
        for start, scores, index in nearest(queries, passages, k, device):
            for query, best, candidates in zip(range(start, len(queries)), scores.numpy(), index.numpy(), strict=False):
                own = np.isin(kinds[candidates], list(problem.own[query]))
                vector = queries[query].astype(np.float32)
                for row in rows_of[query]:
                    positive = float((passages[problem.rows[row][1]].astype(np.float32) @ vector).min())
                    chosen[row], kept = choose(best, candidates, own, positive, settings)
                    positive_sum += positive
                    negative_scores.append((len(kept), sum(kept)))
            shown.update(len(scores))
    counts = np.array([count for count, _ in negative_scores])
    total = counts.sum()
    return chosen, {
        "mean_positive_score": positive_sum / len(problem.rows),
        "mean_negative_score": float(sum(score for _, score in negative_scores) / total) if total else None,
        "mean_negatives": float(counts.mean()),
        "rows_short": int((counts < settings.negatives).sum()),
        "rows_without": int((counts == 0).sum()),
    }


def _write_rows(output: Path, records: Records, problem: Problem, chosen: list[list[int]], progress: bool) -> None:
    texts = list(problem.passages.number)
    labels = [(name, records.column(name)) for name in ("id", "cluster")]
    with ExitStack() as stack:
        file: Any = stack.enter_context(stack.enter_context(publish_file(output)).open("wb"))
        if output.suffix == ".gz":  # The name and the time would make equal outputs differ.
            file = stack.enter_context(gzip.GzipFile("", "wb", fileobj=file, mtime=0))
        for row in track(range(len(records)), "writing", "row", show=progress):
            kept = {name: value for name, column in labels if (value := column[row].as_py()) is not None}
            record = {**kept, **records[row], "negative": [texts[number] for number in chosen[row]]}
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
