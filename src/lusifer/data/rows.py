"""Texts to encode with their ids and other columns, from any position of the input on.

Reading happens twice: `lusifer.bulk.plan.make_plan` checks and counts everything, so that mistakes show before a model
is loaded, and notes where each shard begins; there `RowReader` begins to read.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date, datetime, time
from typing import Any, NamedTuple

import pyarrow as pa

from lusifer.data.reading import Block, read_blocks
from lusifer.data.sources import InputFile, format_of
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
        more: Other columns to give, and their types as in `ColumnTypes`.
    """

    def __init__(self, files: Sequence[InputFile], columns: Columns, more: Mapping[str, str] | None = None) -> None:
        self.files, self.columns, self.more = files, columns, more or {}
        self._later: Iterator[Rows] = iter(())
        self._rows: Rows | None = None
        self._next = 0  # The first row of the present block that was not given yet.
        self._rest: tuple[Block, list[list[Any]]] | None = None

    def read(self, part: Slice) -> Iterator[tuple[Any, ...]]:
        """The good rows of a slice: id, text, and a value for each of the other columns.

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
            rest = self._other_columns(block)
            for index in range(first, first + count):
                if index not in block.problems:
                    name = number + index - first if ids is None else ids[index]
                    yield name, texts[index], *(values[index] for values in rest)
            number += count

    def _other_columns(self, block: Block) -> list[list[Any]]:
        if self._rest is None or self._rest[0] is not block:
            bad, rest = set(block.problems), []
            for name, kind in self.more.items():
                values = [as_type(value, kind) for value in block.values(name)]
                if new := sorted(block.problems.keys() - bad):
                    raise block.error(new[0], f"{name!r}: {block.problems[new[0]]}; or leave this column out")
                rest.append(values)
            self._rest = block, rest
        return self._rest[1]

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
            self._later = read_rows(self.files, self.columns, start=start[:2], more=list(self.more))
            self._rows = None


INT64 = range(-(2**63), 2**63)
# Which types hold all values of a Python type; of two, the first is taken.
_HOLDS: dict[type, tuple[str, ...]] = {bool: ("bool",), int: ("int", "float"), float: ("float",)}
# What a cell of CSV looks like; 007 is a name, not a number.
_CELLS = (
    (("int", "float"), re.compile(r"-?(0|[1-9]\d{0,17})")),
    (("float",), re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?")),
    (("bool",), re.compile(r"true|false", re.IGNORECASE)),
)


class ColumnTypes:
    """Finds the type of each column from all of its values: ``bool``, ``int``, ``float``, else ``string``.

    A cell of CSV that looks like a number is one if all others of its column do.
    """

    def __init__(self) -> None:
        self._fits: dict[str, tuple[str, ...] | None] = {}

    def add(self, block: Block, names: Sequence[str]) -> None:
        """Takes in the values of columns of a block; its Parquet types say all, where there are any.

        Args:
            block: The block.
            names: The columns.
        """
        known = format_of(block.file)
        in_cells = known is not None and known.kind in (".csv", ".tsv")
        for name in names:
            if block.schema is not None:
                if name in block.schema.names and is_kept(kind := block.schema.field(name).type):
                    self._fits.setdefault(name, None)
                    if (fits := _fits(kind)) is not None:
                        self._narrow(name, fits)
            elif self._fits.setdefault(name, None) != ():
                self._add_values(name, block.values(name), in_cells)

    def _add_values(self, name: str, values: Sequence[Any], in_cells: bool) -> None:
        kinds = set(map(type, values)) - {type(None)}
        if in_cells and kinds == {str}:
            for cell in values:
                if cell is not None:
                    self._narrow(name, next((fits for fits, form in _CELLS if form.fullmatch(cell)), ()))
            return
        for kind in kinds:
            self._narrow(name, _HOLDS.get(kind, ()))
        if int in kinds and not all(value in INT64 for value in values if type(value) is int):
            self._narrow(name, ())

    def _narrow(self, name: str, fits: tuple[str, ...]) -> None:
        before = self._fits.get(name)
        self._fits[name] = fits if before is None else tuple(kind for kind in before if kind in fits)

    def types(self) -> dict[str, str]:
        """The columns in the order in which they were seen, and their types."""
        return {name: fits[0] if fits else "string" for name, fits in self._fits.items()}


def is_kept(kind: pa.DataType) -> bool:
    """Whether values of an Arrow type can stand beside a text: all but bytes, and vectors."""
    types = pa.types
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return not types.is_floating(kind.value_type)
    return not any(test(kind) for test in (types.is_binary, types.is_large_binary, types.is_fixed_size_binary))


def _fits(kind: pa.DataType) -> tuple[str, ...] | None:
    """The types of `ColumnTypes` that hold all values of an Arrow type; None where it has no values."""
    if pa.types.is_null(kind):
        return None
    if pa.types.is_boolean(kind):
        return ("bool",)
    if pa.types.is_integer(kind) and not pa.types.is_uint64(kind):  # Half of whose numbers an int64 cannot hold.
        return ("int", "float")
    return ("float",) if pa.types.is_floating(kind) else ()


def as_type(value: Any, kind: str) -> Any:
    """A value as one of a type of `ColumnTypes`: dates as in ISO 8601, lists and objects as JSON."""
    if value is None:
        return None
    if kind == "bool":
        return value.lower() == "true" if isinstance(value, str) else bool(value)
    if kind in ("int", "float"):
        return int(value) if kind == "int" else float(value)
    if isinstance(value, list | dict):
        value = json.dumps(value, ensure_ascii=False, default=str)
    text = value.isoformat() if isinstance(value, datetime | date | time) else str(value)
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()  # JSON may hold half letters.
