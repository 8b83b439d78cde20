"""Training data: one record format, from files or a hub data set, checked before any work starts.

A pair record has ``query``, ``positive`` (a text or a list) and, optionally, ``negative`` (none, a text or a list)
and ``cluster``; a text record has ``text``; both may have an ``id``. A set is read once, in blocks, into an Arrow
file of the cache, which later runs and all ranks map into memory.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lusifer.data.reading import hub_blocks, load_hub_set, read_blocks
from lusifer.data.sources import files_of_recipe, unit_of
from lusifer.data.validation import MAX_CHARACTERS, canonical, repeated_id
from lusifer.errors import LusiferError, first_line
from lusifer.hooks.datasets import fingerprint
from lusifer.locks import alone_at, tidy
from lusifer.progress import bar
from lusifer.publishing import make_folder, publish_file
from lusifer.recipes.schema import DataRecipe
from lusifer.starter.fetch import cache_dir
from lusifer.terminal import without_secrets

# Part of the cache's key: another layout or another check makes another file.
_LAYOUT = 3
_PAIR, _TEXT = ("query", "positive", "negative"), ("text",)
_WHERE = {"subset", "split", "revision", "columns", "streaming", "cap"}

_log = logging.getLogger(__name__)


def _holds_texts(item: DataRecipe) -> bool:
    """Whether a set is read as texts (else as pairs)."""
    return item.task == "reconstruct"


def _columns(item: DataRecipe) -> tuple[str, ...]:
    return _TEXT if _holds_texts(item) else _PAIR


def look_up(item: DataRecipe) -> tuple[list[str], list[Any]]:
    """What a set consists of, without reading it: names of its files, and a key that changes with their content.

    Raises:
        LusiferError: If there is no such file or hub data set.
    """
    files = files_of_recipe(item)
    if files is None:
        records = load_hub_set(item, streaming=False)
        return [item.source], [item.source, fingerprint(records), len(records)]
    return [file.url for file in files], [(file.url, file.size, file.version) for file in files]


def _batches(item: DataRecipe) -> Iterator[pa.RecordBatch]:
    files = files_of_recipe(item)
    names = [item.columns.get(name, name) for name in (*_TEXT, *_PAIR, "cluster", "id")]  # type: ignore[call-overload]
    for block in hub_blocks(item) if files is None else read_blocks(files, names, text=names[0]):
        block.names_of = item.columns
        yield canonical(block, texts=_holds_texts(item))


@dataclass
class Records:
    """An opened, fully checked set, mapped from disk.

    Attributes:
        item: The set's recipe.
        path: The Arrow file.
        files: Names of the files it was made of.
        chosen: Rows kept, or None for all.
        left_out: Rows without the hard negatives that the recipe asks for.
    """

    item: DataRecipe
    path: Path
    files: list[str]
    chosen: np.ndarray | None = None
    left_out: int = 0
    table: pa.Table = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.table = pa.ipc.open_file(pa.memory_map(str(self.path))).read_all()

    def __reduce__(self) -> Any:  # Other processes map the file themselves.
        return Records, (self.item, self.path, self.files, self.chosen, self.left_out)

    def __len__(self) -> int:
        return self.table.num_rows if self.chosen is None else len(self.chosen)

    @property
    def copies(self) -> int:
        """How many negatives are left out because they are the query or a positive of their row."""
        return 0 if _holds_texts(self.item) else int(pc.sum(self.table["copies"]).as_py())

    def _row(self, row: int) -> int:
        return row if self.chosen is None else int(self.chosen[row])

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: self.table[name][self._row(row)].as_py() for name in _columns(self.item)}

    def column(self, name: str) -> pa.ChunkedArray:
        """A column, of the rows kept."""
        return self.table[name] if self.chosen is None else self.table[name].take(pa.array(self.chosen))

    def where(self, row: int) -> str:
        """File and line (or row) of a row, for messages."""
        row = self._row(row)
        file = self.files[self.table["file"][row].as_py()]
        return f"{file}, {unit_of(file)} {self.table['number'][row].as_py()}"

    def clusters(self) -> dict[str, np.ndarray] | None:
        """Rows (int64, increasing) of every cluster, or None for a set without clusters."""
        if _holds_texts(self.item) or self.table["cluster"].null_count:
            return None
        encoded = self.column("cluster").combine_chunks().dictionary_encode()
        codes = encoded.indices.to_numpy()
        order = np.argsort(codes, kind="stable")
        names = encoded.dictionary.to_pylist()
        return dict(zip(names, np.split(order, np.cumsum(np.bincount(codes))[:-1]), strict=True))


def open_records(item: DataRecipe, *, seed: int = 0) -> Records:
    """Reads and checks a set, or maps what an earlier call has read.

    Rows without a hard negative are left out where the recipe asks for some, and counted.

    Args:
        item: The set; ``streaming`` is ignored.
        seed: Seed of the rows that ``cap`` keeps.

    Raises:
        LusiferError: If it cannot be read, a record is not usable, no row has the hard negatives asked for, an id
            occurs twice, or a row is alone.
    """
    files, version = look_up(item)
    key = [_LAYOUT, MAX_CHARACTERS, _holds_texts(item), sorted(item.columns.items()), *version]
    path = cache_dir() / "data" / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.arrow"
    if path.is_file():  # Who may only read a cache can use what is there.
        tidy(path)
    else:
        try:
            make_folder(path.parent)
            with alone_at(path, wait=True):
                if not path.is_file():
                    _write(item, path)
        except OSError as error:
            raise LusiferError(f"cannot write the data cache {str(path.parent)!r}: {first_line(error)}") from error
    records = Records(item, path, files)
    _check_set(records)
    _choose_rows(records, seed)
    return records


def _write(item: DataRecipe, path: Path) -> None:
    reading = bar(None, f"reading {without_secrets(item.source)}", "row", keep=False)
    with publish_file(path) as staging, staging.open("wb") as file, reading:
        batches = _batches(item)
        if (first := next(batches, None)) is None:
            raise LusiferError(f"the dataset {item.source!r} is empty")
        with pa.ipc.new_file(file, first.schema) as writer:
            for batch in chain([first], batches):
                writer.write_batch(batch)
                reading.update(batch.num_rows)


def _check_set(records: Records) -> None:
    ids = records.table["id"]
    counts = ids.drop_null().value_counts()
    if len(counts) and (index := pc.greater(counts.field("counts"), 1).index(True).as_py()) >= 0:
        value = counts.field("values")[index]
        first, second = np.flatnonzero(pc.fill_null(pc.equal(ids, value), False).to_numpy())[:2]
        raise repeated_id(value.as_py(), records.where(int(second)), records.where(int(first)))
    if not _holds_texts(records.item):
        clusters = records.table["cluster"]
        if 0 < clusters.null_count < len(clusters):
            row = records.where(clusters.is_null().index(True).as_py())
            raise LusiferError(f"{row}: no 'cluster', but other records have one; give it one, or drop the column")
    if len(records) < 2:
        raise LusiferError(f"{records.where(0)}: the only record of its dataset; a dataset needs at least 2")


def _choose_rows(records: Records, seed: int) -> None:
    """Leaves out rows that lack hard negatives, then what exceeds the cap."""
    item = records.item
    if item.hard_negatives and not _holds_texts(item):
        if records.copies:
            _log.warning("%s: %s", item.source, copies_left_out(records.copies))
        usable = np.flatnonzero(pc.list_value_length(records.table["negative"]).to_numpy())
        records.left_out = len(records) - len(usable)
        if len(usable) < 2:
            problem = f"{len(usable)} rows have a 'negative', but hard_negatives is {item.hard_negatives}"
            raise LusiferError(f"{item.source!r}: {problem}; mine some (lusifer data mine) or set it to 0")
        if records.left_out:
            records.chosen = usable
            _log.warning("%s: %s", item.source, left_out(records.left_out, item.hard_negatives))
    if item.cap is not None and item.cap < len(records):
        generator = np.random.default_rng([seed, *item.source.encode()])
        kept = np.sort(generator.choice(len(records), item.cap, replace=False))
        records.chosen = kept if records.chosen is None else records.chosen[kept]


def left_out(count: int, hard_negatives: int) -> str:
    """One line on rows that are not trained on.

    Args:
        count: How many.
        hard_negatives: What the recipe asks for.
    """
    return f"{count:,} rows have no 'negative' and are left out (hard_negatives is {hard_negatives})"


def copies_left_out(count: int) -> str:
    """One line on negatives that are not trained on.

    Args:
        count: How many.
    """
    return f"{count:,} texts of 'negative' are the query or a positive of their own row and are left out"


class StreamedRecords:
    """The first ``cap`` rows of a set, read in order with one block in memory; going back starts again.

    ``copies`` is as for `Records`, of the blocks read so far.

    Raises:
        LusiferError: From reading, if a record is not usable or the set holds fewer than ``cap`` rows (that have a
            hard negative, where the recipe asks for some).
    """

    def __init__(self, item: DataRecipe) -> None:
        assert item.cap is not None
        self.item, self._cap = item, item.cap
        self._rewind()
        self._load(0)

    def _rewind(self) -> None:
        self._batches = _batches(self.item)
        self._start = self.copies = 0
        self._batch: pa.RecordBatch | None = None

    def __reduce__(self) -> Any:  # Other processes read the set themselves.
        return StreamedRecords, (self.item,)

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
            if (batch := next(self._batches, None)) is None:
                have = f"holds only {self._start} rows, fewer than its cap of {self._cap}"
                raise LusiferError(f"{self.item.source!r} {have}; lower the cap")
            if "cluster" in batch.schema.names and not batch["cluster"].null_count:
                raise LusiferError(f"{self.item.source!r} has clusters, which need streaming: false")
            if not _holds_texts(self.item):
                self.copies += pc.sum(batch["copies"]).as_py() or 0
            if self.item.hard_negatives and not _holds_texts(self.item):
                batch = batch.filter(pc.greater(pc.list_value_length(batch["negative"]), 0))
            self._batch = batch
        return self._batch

    def __getitem__(self, row: int) -> dict[str, Any]:
        batch = self._load(row)
        return {name: batch[name][row - self._start].as_py() for name in _columns(self.item)}


Rows = Records | StreamedRecords  # So many rows, each ``{"query", "positive", "negative"}`` or ``{"text"}``.


def open_set(item: DataRecipe, *, seed: int = 0) -> Rows:
    """Opens a set the way its recipe says: streamed, or read and checked in full.

    Args:
        item: The set.
        seed: Seed of the rows that ``cap`` keeps.

    Raises:
        LusiferError: See `open_records` and `StreamedRecords`.
    """
    return StreamedRecords(item) if item.streaming else open_records(item, seed=seed)


def as_texts(item: DataRecipe) -> DataRecipe:
    """A set of texts or pairs, to be read as texts."""
    return DataRecipe(source=item.source, **item.model_dump(include=_WHERE), task="reconstruct")


def read_texts(item: DataRecipe, limit: int) -> list[str]:
    """The first texts of a set: its ``text`` column, or queries and positives of pair records.

    Args:
        item: The set.
        limit: How many at most.

    Raises:
        LusiferError: If it cannot be read.
    """
    records = open_set(as_texts(item))
    return [records[row]["text"] for row in range(min(limit, len(records)))]
