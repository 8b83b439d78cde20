"""Training data: one record format, read from JSONL, Parquet or a hub dataset, into batches of tokens.

A pair record has ``query``, ``positive`` (a text or a list) and, optionally, ``negative`` (a list);
a text record has ``text``.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from transformers import PreTrainedTokenizerBase

from lusifer.errors import LusiferError
from lusifer.prompts import with_instruction
from lusifer.starter_text import resolve_data

_SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def read_records(source: str) -> Dataset:
    """Reads a data set.

    Args:
        source: A JSONL (also gzipped) or Parquet file, a starter name, or a hub id (its ``train`` split).

    Raises:
        LusiferError: If it cannot be read or is empty.
    """
    path = Path(resolve_data(source))
    suffixes = [suffix for suffix in path.suffixes if suffix in _SUFFIXES]
    try:
        if path.is_file() or suffixes:
            if not path.is_file():
                raise LusiferError(f"no such data file: {source!r}")
            if not suffixes:
                raise LusiferError(f"cannot tell the format of {source!r}: name it .jsonl, .jsonl.gz or .parquet")
            records = load_dataset(_SUFFIXES[suffixes[-1]], data_files=str(path), split="train")
        else:
            records = load_dataset(source, split="train")
    except StopIteration:  # What datasets raises for a JSON file without a line.
        raise LusiferError(f"the data set {source!r} is empty") from None
    except (OSError, ValueError, EOFError, zlib.error, DatasetGenerationError) as error:
        cause = error.__cause__ or error
        reason = next(iter(str(cause).splitlines()), type(cause).__name__)
        raise LusiferError(f"cannot read the data set {source!r}: {reason}") from error
    if len(records) == 0:
        raise LusiferError(f"the data set {source!r} is empty")
    return records


def _text(source: str, row: int, column: str, value: Any) -> str:
    if not isinstance(value, str):
        raise LusiferError(f"{source}, row {row + 1}: {column!r} must be text, not {type(value).__name__}")
    if not value.strip():
        raise LusiferError(f"{source}, row {row + 1}: {column!r} is empty; remove the row")
    return value


def _texts(source: str, row: int, column: str, value: Any) -> list[str]:
    if value is not None and not isinstance(value, list):
        raise LusiferError(f"{source}, row {row + 1}: {column!r} must be a list of texts, not {type(value).__name__}")
    return [_text(source, row, column, text) for text in value or []]


def _column(records: Dataset, source: str, column: str) -> list[Any]:
    if column not in records.column_names:
        raise LusiferError(f"{source!r} has no column {column!r}; it has {', '.join(records.column_names)}")
    try:
        return list(records[column])
    except UnicodeDecodeError as error:
        raise LusiferError(f"{source!r}: {column!r} is not valid UTF-8 ({error.reason})") from error


def read_texts(source: str) -> list[str]:
    """Texts of a data set: its ``text`` column, or the queries and positives of pair records.

    Raises:
        LusiferError: If it cannot be read or a text is missing or empty.
    """
    records = read_records(source)
    if "text" in records.column_names:
        return [_text(source, row, "text", value) for row, value in enumerate(_column(records, source, "text"))]
    return [text for query, positives, _ in read_pairs(source) for text in (query, *positives)]


def read_pairs(source: str) -> list[tuple[str, list[str], list[str]]]:
    """Pair records as (query, positives, negatives).

    Raises:
        LusiferError: If it cannot be read, a column is missing, or a text is missing or empty.
    """
    records = read_records(source)
    queries = _column(records, source, "query")
    positives = _column(records, source, "positive")
    negatives = _column(records, source, "negative") if "negative" in records.column_names else [None] * len(records)
    pairs = []
    for row, (query, positive, negative) in enumerate(zip(queries, positives, negatives, strict=True)):
        several = _texts(source, row, "positive", [positive] if isinstance(positive, str) else positive)
        if not several:
            raise LusiferError(f"{source}, row {row + 1}: 'positive' is empty; remove the row")
        pairs.append((_text(source, row, "query", query), several, _texts(source, row, "negative", negative)))
    return pairs


def alignment_dataset(
    reconstruct: str | None, complete: str | None, *, completion_ratio: float, rows: int, seed: int
) -> Dataset:
    """Builds stage 1's records: columns ``source`` and ``target``.

    Reconstruction takes a text as both; completion a query as source and a positive as target
    (LUSIFER, section 3.1).

    Args:
        reconstruct: Data set of texts, or None.
        complete: Data set of pairs, or None.
        completion_ratio: Share of completion records where both are given.
        rows: How many records; small sets repeat, each pass in a new order.
        seed: Seed of the order.

    Raises:
        LusiferError: If data cannot be read.
    """
    generator = random.Random(seed)
    texts = [(text, text) for text in read_texts(reconstruct)] if reconstruct else []
    pairs = [(query, positives) for query, positives, _ in read_pairs(complete)] if complete else []
    ratio = 0.0 if not pairs else completion_ratio if texts else 1.0
    completions = round(rows * ratio)
    chosen = list(_cycle(texts, rows - completions, generator)) if texts else []
    chosen += [(query, generator.choice(several)) for query, several in _cycle(pairs, completions, generator)]
    generator.shuffle(chosen)
    return Dataset.from_dict({"source": [s for s, _ in chosen], "target": [t for _, t in chosen]})


def _cycle(items: Sequence[Any], count: int, generator: random.Random) -> Iterable[Any]:
    done = 0
    while done < count:
        order = generator.sample(range(len(items)), len(items))
        for index in order[: count - done]:
            yield items[index]
        done += len(order)


def contrastive_dataset(source: str, *, instruction: str | None, hard_negatives: int, seed: int) -> Dataset:
    """Builds stage 2's records: columns ``query``, ``positive`` and ``negative_1`` ... ``negative_k``.

    Args:
        source: Data set of pairs.
        instruction: Task instruction in front of every query, or None.
        hard_negatives: Negatives per row; a row with fewer repeats them.
        seed: Seed of the choice among several positives and negatives.

    Raises:
        LusiferError: If data cannot be read, or a row has no negative where some are asked for.
    """
    generator = random.Random(seed)
    columns: dict[str, list[str]] = {"query": [], "positive": []}
    columns |= {f"negative_{k + 1}": [] for k in range(hard_negatives)}
    for row, (query, positives, negatives) in enumerate(read_pairs(source)):
        if hard_negatives and not negatives:
            raise LusiferError(f"{source}, row {row + 1}: no negatives, but hard_negatives is {hard_negatives}")
        columns["query"].append(with_instruction(instruction, query))
        columns["positive"].append(generator.choice(positives))
        chosen = generator.sample(negatives, min(hard_negatives, len(negatives)))
        for k in range(hard_negatives):
            columns[f"negative_{k + 1}"].append(chosen[k % len(chosen)])
    return Dataset.from_dict(columns)


def llm_preprocess(tokenizer: PreTrainedTokenizerBase, max_length: int) -> Callable[[list[str]], dict[str, Any]]:
    """A function that tokenises targets with the LLM's tokenizer, without special tokens, padded on the right."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token

    def preprocess(texts: list[str]) -> dict[str, Any]:
        encoded = tokenizer(
            texts,
            add_special_tokens=False,
            truncation=True,
            max_length=max_length,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}

    return preprocess


@dataclass
class AlignmentCollator(SentenceTransformerDataCollator):
    """Tokenises ``source`` for the encoder and ``target`` for the LLM."""

    target_preprocess: Callable[[list[str]], dict[str, Any]] | None = None

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Turns rows into ``source_*`` and ``target_*`` token tensors, each (batch, seq)."""
        assert self.target_preprocess is not None
        batch = super().__call__([{"source": row["source"]} for row in features])
        for name, value in self.target_preprocess([row["target"] for row in features]).items():
            batch[f"target_{name}"] = value
        return batch
