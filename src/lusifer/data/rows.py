"""Texts to encode with their ids, from any position of the input on.

Reading happens twice: `lusifer.bulk.plan.make_plan` checks and counts everything, so that mistakes show before a model
is loaded, and notes where each shard begins; there `RowReader` begins to read.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from lusifer.data.reading import Block, read_blocks
from lusifer.data.sources import InputFile
from lusifer.data.validation import id_problems, text_problems
from lusifer.errors import LusiferError


class Columns(NamedTuple):
    """Names of the columns that are read; ``id`` is None where rows are numbered instead."""

    text: str = "text"
    id: str | None = None


class Position(NamedTuple):
    """Where a row begins: number of the file, byte in its unpacked stream (Parquet: row), rows of the file before."""

    file: int
    offset: int
    row: int


class Slice(NamedTuple):
    """Rows of a shard, bad ones included: its number, the first row's number, how many, where the first begins."""

    number: int
    first: int
    rows: int
    start: Position


class Rows(NamedTuple):
    """Checked records of one block.

    Attributes:
        block: Where they come from; its ``problems`` hold what is wrong with a row.
        texts: Their texts; anything where there is a problem.
        ids: Their ids, or None where rows are numbered.
    """

    block: Block
    texts: list[Any]
    ids: list[Any] | None


def read_rows(
    files: Sequence[InputFile], columns: Columns, *, start: tuple[int, int] = (0, 0), more: Sequence[str] = ()
) -> Iterator[Rows]:
    """Reads and checks rows, block by block.

    Args:
        files: The input.
        columns: What to read.
        start: Number of the file to begin with, and a position in it.
        more: Other columns that the blocks shall hold, where the file has them.

    Raises:
        LusiferError: If a file cannot be read or lacks a column.
    """
    names = [columns.text] if columns.id is None else [columns.text, columns.id]
    for block in read_blocks(files, [*names, *more], text=columns.text, start=start):
        missing = [name for name in names if block.header is not None and name not in block.header]
        if missing:
            has = f"it has {', '.join(block.names())} (choose with --column and --id-column)"
            raise LusiferError(f"{block.file!r} has no column {missing[0]!r}; {has}")
        texts = _checked(block, columns.text, text_problems)
        yield Rows(block, texts, None if columns.id is None else _checked(block, columns.id, id_problems))


def _checked(block: Block, column: str, problems: Callable[[list[Any], str], dict[int, str]]) -> list[Any]:
    """A column's values; what is wrong with them is noted at the block."""
    values = block.values(column)
    for index, problem in problems(values, column).items():
        if values[index] is None and not block.has(column, index):
            problem = f"no {column!r}; give it one, remove the row, or choose another column"
        block.problems.setdefault(index, problem)
    return values


class RowReader:
    """Reads rows from any position on; cheapest forwards, since it keeps the file open where it stopped.

    Args:
        files: The input.
        columns: What to read.
    """

    def __init__(self, files: Sequence[InputFile], columns: Columns) -> None:
        self.files, self.columns = files, columns
        self._later: Iterator[Rows] = iter(())
        self._rows: Rows | None = None
        self._next = 0  # The first row of the present block that was not given yet.

    def read(self, part: Slice) -> Iterator[tuple[int | str, str]]:
        """The good rows of a slice: id and text.

        Raises:
            LusiferError: If the input is shorter than it was.
        """
        self._go_to(part.start)
        number, end = part.first, part.first + part.rows
        while number < end:
            if self._rows is None or self._next == len(self._rows.block):
                self._rows, self._next = next(self._later, None), 0
                if self._rows is None:
                    raise LusiferError(f"the input ends before row {number + 1}: it changed while it was read")
            block, texts, ids = self._rows
            first, count = self._next, min(len(block) - self._next, end - number)
            self._next += count
            for index in range(first, first + count):
                if index not in block.problems:
                    yield (number + index - first if ids is None else ids[index]), texts[index]
            number += count

    def _go_to(self, start: Position) -> None:
        packed = self.files[start.file].format.packing is not None
        # A packed file can only be read from its beginning, or on from here.
        while packed and self._rows is not None and self._rows.block.file_number == start.file:
            if self._rows.block.ends[-1] >= start.offset:
                break
            self._rows = next(self._later, None)
        block = self._rows.block if self._rows is not None else None
        if block is not None and block.file_number == start.file and block.begin <= start.offset <= block.ends[-1]:
            self._next = 0 if start.offset == block.begin else bisect_left(block.ends, start.offset) + 1
        else:
            self._later, self._rows = read_rows(self.files, self.columns, start=start[:2]), None
