"""The one reader of data: records of every format, block by block in bounded memory.

Each record keeps its file and its line (or row), and the position behind it, from where reading can begin later.
What is wrong with a single record is noted at the record; what makes a whole file unreadable is raised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from lusifer.data.expansion import Expansion
from lusifer.data.sources import InputFile, unit_of
from lusifer.data.text_files import MAX_RECORD, Lines, not_utf8, records_of, refuse_repeated
from lusifer.errors import LusiferError, first_line
from lusifer.hooks.huggingface_hub import settle_hub, why_not_loaded
from lusifer.recipes.schema import DataRecipe
from lusifer.storage import is_remote, open_file, storage_errors

BLOCK_ROWS = 4096


@dataclass
class Block:
    """Consecutive records of one file.

    Attributes:
        file: What to call the file.
        file_number: Its number among the files of the set.
        numbers: Line (or row, see `unit_of`) of every record, from 1, counted from where reading began.
        data: The records, as mappings or as a table.
        header: All columns of the file, where it has the same for every record.
        problems: What is wrong with a record, by its index; such a record is empty.
        begin: Position of the first record: byte of the unpacked file, or row of a Parquet file.
        ends: Position behind every record.
        bytes_read: Bytes of the file read so far, as it is stored.
        names_of: Our column name -> theirs, where they differ.
        schema: Types of all columns of a Parquet file, those that are not read included.
    """

    file: str
    file_number: int
    numbers: Sequence[int]
    data: list[dict[str, Any]] | pa.RecordBatch | pa.Table
    header: list[str] | None = None
    problems: dict[int, str] = field(default_factory=dict)
    begin: int = 0
    ends: Sequence[int] = ()
    bytes_read: int = 0
    names_of: Mapping[Any, str] = field(default_factory=dict)
    schema: pa.Schema | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    def where(self, index: int) -> str:
        """File and line (or row) of a record."""
        return f"{self.file}, {unit_of(self.file)} {self.numbers[int(index)]}"

    def error(self, index: int, problem: str) -> LusiferError:
        """The error for what is wrong with the record at ``index``."""
        return LusiferError(f"{self.where(index)}: {problem}")

    def names(self) -> list[str]:
        """Columns of the file, or of the block's records."""
        if self.header is not None:
            return self.header
        assert isinstance(self.data, list)
        return list(dict.fromkeys(name for record in self.data for name in record))

    def has(self, name: str, index: int) -> bool:
        """Whether the record at ``index`` has our column ``name``, be it null."""
        theirs = self.names_of.get(name, name)
        return theirs in (self.data[index] if isinstance(self.data, list) else self.data.schema.names)

    def column(self, name: str) -> list[Any] | pa.Array | None:
        """Our column ``name``, as Python values or one Arrow array; None where file or block have no such column."""
        theirs = self.names_of.get(name, name)
        if isinstance(self.data, list):
            known = theirs in self.header if self.header is not None else any(theirs in one for one in self.data)
            return [record.get(theirs) for record in self.data] if known else None
        if theirs not in self.data.schema.names:
            return None
        column = self.data[theirs]
        return pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) else column

    def values(self, name: str) -> list[Any]:
        """Our column ``name`` as Python values; None where a record has none. Notes what is not valid UTF-8."""
        column = self.column(name)
        if column is None or isinstance(column, list):
            return column or [None] * len(self)
        try:
            return column.to_pylist()
        except UnicodeDecodeError:
            return [self._value(index, scalar) for index, scalar in enumerate(column)]

    def _value(self, index: int, scalar: pa.Scalar) -> Any:
        try:
            return scalar.as_py()
        except UnicodeDecodeError as error:
            self.problems[index] = not_utf8(error)
            return None

    def refuse_problems(self) -> None:
        """Raises what is wrong with the first broken record.

        Raises:
            LusiferError: If there is one.
        """
        if self.problems:
            index = min(self.problems)
            raise self.error(index, self.problems[index])


def read_blocks(
    files: Sequence[InputFile],
    columns: Sequence[str] | None = None,
    *,
    text: str = "text",
    start: tuple[int, int] = (0, 0),
) -> Iterator[Block]:
    """The records of files in their order, at most `BLOCK_ROWS` or about 64 MB at a time.

    Args:
        files: The files.
        columns: The columns needed, which spares reading others of Parquet; all when None.
        text: What to call the only column of a ``.txt`` file.
        start: Number of the file to begin with, and a position in it: 0 or one of a block's ``ends``.

    Raises:
        LusiferError: If a file is missing, broken, not what its name says, or has a column twice.
    """
    for number in range(start[0], len(files)):
        file, offset = files[number], start[1] if number == start[0] else 0
        with storage_errors(file.url), open_file(file.url) as raw:
            if file.format.kind == ".parquet":
                yield from _parquet_blocks(file, raw, number, offset, columns)
            else:
                yield from _text_blocks(file, raw, number, offset, text)


def _parquet_blocks(
    file: InputFile, raw: Any, number: int, offset: int, columns: Sequence[str] | None
) -> Iterator[Block]:
    done = 0
    try:
        # From a disk a little at a time, or a whole row group, often a million rows, would stand in memory; over a
        # network Arrow fetches it at once.
        little: dict[str, Any] = {} if is_remote(file.url) else {"pre_buffer": False, "buffer_size": 1 << 20}
        table = parquet.ParquetFile(raw, **little)
        header = table.schema_arrow.names
        refuse_repeated(file.url, header)
        wanted = None if columns is None else [name for name in dict.fromkeys(columns) if name in header]
        total = max(table.metadata.num_rows, 1)
        expansion = Expansion(file.url, raw, table, wanted or None, remote=is_remote(file.url))
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if done + rows <= offset:
                done += rows
                continue
            # Group by group: asked for several, Arrow fetches all of them ahead.
            most = expansion.rows(group, BLOCK_ROWS)
            for batch in table.iter_batches(most, row_groups=[group], columns=wanted or None):
                skipped = max(0, min(batch.num_rows, offset - done))
                begin, done = done + skipped, done + batch.num_rows
                if begin < done:
                    ends = range(begin + 1, done + 1)
                    read = file.size * done // total
                    data = batch.slice(skipped)
                    yield Block(file.url, number, ends, data, header, {}, begin, ends, read, schema=table.schema_arrow)
    except pa.ArrowException as error:
        problem = f"broken Parquet after row {done} ({first_line(error)})"
        raise LusiferError(f"{file.url}: {problem}; fetch or write it again") from error


def _text_blocks(file: InputFile, raw: Any, number: int, offset: int, text: str) -> Iterator[Block]:
    lines = Lines(file, raw)
    header, records = records_of(lines, offset, text)

    def block() -> Block:
        return Block(file.url, number, numbers, data, header, problems, begin, ends, lines.bytes_read(ends[-1]))

    begin, numbers, ends, problems = offset, list[int](), list[int](), dict[int, str]()
    data: list[dict[str, Any]] = []
    for line, end, record, problem in records:
        if problem is not None:
            problems[len(data)] = problem
        numbers.append(line)
        ends.append(end)
        data.append(record)
        if len(data) == BLOCK_ROWS or end - begin > MAX_RECORD:
            yield block()
            begin, numbers, ends, data, problems = end, [], [], [], {}
    if data:
        yield block()


def load_hub_set(item: DataRecipe, *, streaming: bool) -> Any:
    """A split of a data set as `datasets` gives it: one of the hub, or a folder in its layout.

    Args:
        item: The set.
        streaming: Whether to read it over the network as it is asked for.

    Raises:
        LusiferError: If there is no such data set, subset or split, or it cannot be fetched.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    if not Path(item.source).exists():
        settle_hub()
    try:
        return load_dataset(item.source, item.subset, split=item.split, revision=item.revision, streaming=streaming)
    except (OSError, ValueError, DatasetGenerationError) as error:
        reason = why_not_loaded(item.source, error.__cause__ or error)
        raise LusiferError(f"cannot read the dataset {item.source!r}: {reason}") from error


def hub_blocks(item: DataRecipe) -> Iterator[Block]:
    """The records of a set that `datasets` reads, in their order.

    Raises:
        LusiferError: If they cannot be read.
    """
    records = load_hub_set(item, streaming=item.streaming)
    done = 0
    try:
        for table in records.with_format("arrow").iter(batch_size=BLOCK_ROWS):
            yield Block(item.source, 0, range(done + 1, done + len(table) + 1), table, table.column_names)
            done += len(table)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise LusiferError(f"{item.source}: reading failed after row {done} ({first_line(error)})") from error
