"""Training data: one record format, read from JSONL, Parquet or a hub data set, checked before any work starts.

A pair record has ``query``, ``positive`` (a text or a list) and, optionally, ``negative`` (none, a text or a list)
and ``cluster``; a text record has ``text``; both may have an ``id``. A set is read once, in blocks, into an Arrow
file of the cache, which later runs and all ranks map into memory.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock
from tqdm.auto import tqdm

from lusifer.data.reading import Block, fingerprint, read_blocks, unit
from lusifer.data.validation import MAX_CHARACTERS, canonical
from lusifer.errors import LusiferError
from lusifer.recipes.schema import DataRecipe
from lusifer.starter.fetch import cache_dir

# Part of the cache's key: another layout or another check makes another file.
_LAYOUT = 1
_WHERE = {"subset", "split", "revision", "columns", "streaming", "cap"}


class Rows(Protocol):
    """What a mixture reads: so many rows, each ``{"query", "positive", "negative"}`` or ``{"text"}``."""

    item: DataRecipe

    def __len__(self) -> int: ...
    def __getitem__(self, row: int) -> dict[str, Any]: ...
    def where(self, row: int) -> str:
        """File and line (or row) of a row, for messages."""


def holds_texts(item: DataRecipe) -> bool:
    """Whether a set is read as texts (else as pairs)."""
    return item.task == "reconstruct"


@dataclass
class Records:
    """An opened, fully checked set, mapped from disk.

    Attributes:
        item: The set's recipe.
        path: The Arrow file.
        files: Names of the files it was made of.
        chosen: Rows kept by the recipe's cap, or None for all.
    """

    item: DataRecipe
    path: Path
    files: list[str]
    chosen: np.ndarray | None = None
    table: pa.Table = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.table = pa.ipc.open_file(pa.memory_map(str(self.path))).read_all()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "table"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    def __len__(self) -> int:
        return self.table.num_rows if self.chosen is None else len(self.chosen)

    def _row(self, row: int) -> int:
        return row if self.chosen is None else int(self.chosen[row])

    def __getitem__(self, row: int) -> dict[str, Any]:
        names = ("text",) if holds_texts(self.item) else ("query", "positive", "negative")
        return {name: self.table[name][self._row(row)].as_py() for name in names}

    def column(self, name: str) -> pa.ChunkedArray:
        """A column, of the rows kept."""
        return self.table[name] if self.chosen is None else self.table[name].take(pa.array(self.chosen))

    def where(self, row: int) -> str:
        """File and line (or row) of a row, for messages."""
        row = self._row(row)
        file = self.files[self.table["file"][row].as_py()]
        return f"{file}, {unit(file)} {self.table['number'][row].as_py()}"

    def clusters(self) -> dict[str, np.ndarray] | None:
        """Rows (int64, increasing) of every cluster, or None for a set without clusters."""
        if holds_texts(self.item) or self.table["cluster"].null_count:
            return None
        encoded = self.column("cluster").combine_chunks().dictionary_encode()
        codes = encoded.indices.to_numpy()
        order = np.argsort(codes, kind="stable")
        names = encoded.dictionary.to_pylist()
        return dict(zip(names, np.split(order, np.cumsum(np.bincount(codes))[:-1]), strict=True))


def open_records(item: DataRecipe, *, seed: int = 0) -> Records:
    """Reads and checks a set, or maps what an earlier call has read.

    Args:
        item: The set; ``streaming`` is ignored.
        seed: Seed of the rows that ``cap`` keeps.

    Raises:
        LusiferError: If it cannot be read, a record is not usable or lacks the hard negatives asked for, an id
            occurs twice, or a row is alone.
    """
    key = [_LAYOUT, MAX_CHARACTERS, holds_texts(item), sorted(item.columns.items()), *(found := fingerprint(item)).key]
    name = hashlib.sha256(repr(key).encode()).hexdigest()[:32]
    path = cache_dir() / "data" / f"{name}.arrow"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.is_file():
                _write(item, path)
    except OSError as error:
        raise LusiferError(f"cannot write the data cache {str(path.parent)!r}: {error.strerror or error}") from error
    records = Records(item, path, found.files)
    if item.cap is not None and item.cap < len(records):
        generator = np.random.default_rng([seed, *item.source.encode()])
        records.chosen = np.sort(generator.choice(len(records), item.cap, replace=False))
    _check_set(records)
    return records


def _write(item: DataRecipe, path: Path) -> None:
    handle, staging = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-")
    try:
        with (
            open(handle, "wb") as file,
            tqdm(desc=f"reading {item.source}", unit=" rows", disable=None, delay=2, leave=False) as bar,
        ):
            writer = None
            for block in read_blocks(item):
                batch = canonical(block, texts=holds_texts(item))
                writer = writer or pa.ipc.new_file(file, batch.schema)
                writer.write_batch(batch)
                bar.update(batch.num_rows)
            if writer is None:
                raise LusiferError(f"the data set {item.source!r} is empty")
            writer.close()
        os.replace(staging, path)
    finally:
        Path(staging).unlink(missing_ok=True)


def _check_set(records: Records) -> None:
    full = Records(records.item, records.path, records.files)
    counts = records.table["id"].drop_null().value_counts()
    if len(counts) and (index := pc.greater(counts.field("counts"), 1).index(True).as_py()) >= 0:
        value = counts.field("values")[index]
        first, second = np.flatnonzero(pc.fill_null(pc.equal(records.table["id"], value), False).to_numpy())[:2]
        problem = f"the id {value.as_py()!r} is that of {full.where(int(first))} already"
        raise LusiferError(f"{full.where(int(second))}: {problem}; give every record its own id, or remove one")
    if not holds_texts(records.item):
        clusters = records.table["cluster"]
        if 0 < clusters.null_count < len(clusters):
            row = full.where(clusters.is_null().index(True).as_py())
            raise LusiferError(f"{row}: no 'cluster', but other records have one; give it one, or drop the column")
    if len(records) < 2:
        raise LusiferError(f"{records.where(0)}: the only record of its set; a set needs at least 2")
    if records.item.hard_negatives and not holds_texts(records.item):
        none = pc.equal(pc.list_value_length(records.column("negative")), 0)
        if (index := none.index(True).as_py()) >= 0:
            problem = f"no 'negative', but hard_negatives is {records.item.hard_negatives}"
            raise LusiferError(f"{records.where(index)}: {problem}; mine some (lusifer data mine) or set it to 0")


def open_set(item: DataRecipe, *, seed: int = 0) -> Rows:
    """Opens a set the way its recipe says: streamed, or read and checked in full.

    Raises:
        LusiferError: See `open_records` and `StreamedRecords`.
    """
    return StreamedRecords(item) if item.streaming else open_records(item, seed=seed)


def read_texts(item: DataRecipe, limit: int) -> list[str]:
    """The first texts of a set: its ``text`` column, or queries and positives of pair records.

    Raises:
        LusiferError: If it cannot be read.
    """
    plain = DataRecipe(source=item.source, **item.model_dump(include=_WHERE), task="reconstruct")
    records = open_set(plain)
    return [records[row]["text"] for row in range(min(limit, len(records)))]


class StreamedRecords:
    """The first ``cap`` rows of a set, read in order with one block in memory; going back starts again.

    Raises:
        LusiferError: From reading, if a record is not usable or the set holds fewer than ``cap`` rows.
    """

    def __init__(self, item: DataRecipe) -> None:
        assert item.cap is not None
        self.item, self._cap = item, item.cap
        self._rewind()
        self._load(0)

    def _rewind(self) -> None:
        self._blocks: Iterator[Block] = read_blocks(self.item)
        self._start = 0
        self._batch: pa.RecordBatch | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"item": self.item, "_cap": self._cap}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._rewind()

    def __len__(self) -> int:
        return self._cap

    def where(self, row: int) -> str:
        """Set and row, for messages."""
        return f"{self.item.source}, row {row + 1}"

    def _load(self, row: int) -> pa.RecordBatch:
        if row < self._start:
            self._rewind()
        while self._batch is None or row >= self._start + self._batch.num_rows:
            self._start += 0 if self._batch is None else self._batch.num_rows
            block = next(self._blocks, None)
            if block is None:
                have = f"holds only {self._start} rows, fewer than its cap of {self._cap}"
                raise LusiferError(f"{self.item.source!r} {have}; lower the cap")
            batch = self._batch = canonical(block, texts=holds_texts(self.item))
            if "cluster" in batch.schema.names and not batch["cluster"].null_count:
                raise LusiferError(f"{self.item.source!r} has clusters, which need streaming: false")
        return self._batch

    def __getitem__(self, row: int) -> dict[str, Any]:
        batch = self._load(row)
        names = ("text",) if holds_texts(self.item) else ("query", "positive", "negative")
        found = {name: batch[name][row - self._start].as_py() for name in names}
        if self.item.hard_negatives and not found.get("negative", True):
            raise LusiferError(f"{self.where(row)}: no 'negative', but hard_negatives is {self.item.hard_negatives}")
        return found
