"""Texts to encode with their ids, from any position of the input on.

Reading happens twice. `lusifer.bulk.plan.make_plan` reads everything once: it checks every row, counts rows, and notes
where each shard begins, so that mistakes show before a model is loaded and a shard can be read by whoever encodes it.
`RowReader` then goes to the beginning of a shard and reads its rows.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lusifer.data.reading import Block, read_blocks
from lusifer.data.sources import InputFile
from lusifer.data.validation import id_problems, text_problems
from lusifer.errors import LusiferError


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are read; ``id`` is None where rows are numbered instead."""

    text: str = "text"
    id: str | None = None

    def names(self) -> list[str]:
        """Those that are needed."""
        return [self.text] if self.id is None else [self.text, self.id]


class Position(NamedTuple):
    """Where a row begins: number of the file, byte in its unpacked stream (Parquet: row), rows of the file before."""

    file: int
    offset: int
    row: int


@dataclass(frozen=True)
class Slice:
    """Consecutive rows of the input, bad ones included.

    Attributes:
        number: Of the shard.
        first: Number of its first row in the whole input.
        rows: How many.
        start: Where the first one begins.
    """

    number: int
    first: int
    rows: int
    start: Position


@dataclass
class Rows:
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
    for block in read_blocks(files, [*columns.names(), *more], text=columns.text, start=start):
        block.refuse_without(columns.names(), "choose with --column and --id-column")
        texts = block.values(columns.text)
        ids = None if columns.id is None else block.values(columns.id)
        _note(block, columns.text, texts, text_problems(texts, columns.text))
        if columns.id is not None and ids is not None:
            _note(block, columns.id, ids, id_problems(ids, columns.id))
        yield Rows(block, texts, ids)


def _note(block: Block, column: str, values: list[Any], problems: dict[int, str]) -> None:
    for index, problem in problems.items():
        if values[index] is None and not block.has(column, index):
            problem = f"no {column!r}; give it one, remove the row, or choose another column"
        block.problems.setdefault(index, problem)


class RowReader:
    """Reads rows from any position on; cheapest forwards, since it keeps the file open where it stopped.

    Args:
        files: The input.
        columns: What to read.
    """

    def __init__(self, files: Sequence[InputFile], columns: Columns) -> None:
        self.files = files
        self.columns = columns
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
            rows = self._rows
            if rows is None or self._next == len(rows.block):
                self._rows, self._next = next(self._later, None), 0
                if self._rows is None:
                    raise LusiferError(f"the input ends before row {number + 1}: it changed while it was read")
                continue
            first, count = self._next, min(len(rows.block) - self._next, end - number)
            self._next += count
            for index in range(first, first + count):
                if index not in rows.block.problems:
                    yield (number + index - first if rows.ids is None else rows.ids[index]), rows.texts[index]
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
