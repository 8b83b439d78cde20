"""The first reading of an input: every row checked and counted, shards laid out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from lusifer.bulk.job import Plan
from lusifer.data.reading import Block
from lusifer.data.rows import INT64, Columns, ColumnTypes, Position, Rows, read_rows
from lusifer.data.sources import InputFile
from lusifer.errors import LusiferError


def make_plan(
    files: Sequence[InputFile],
    columns: Columns,
    *,
    shard_rows: int | None,
    metadata: Sequence[str] | None = (),
    skip_bad: bool = False,
    tick: Callable[[int], object] | None = None,
) -> Plan:
    """Reads the whole input once: checks every row and notes where each shard begins.

    Args:
        files: The input.
        columns: What is read of it.
        shard_rows: Rows of a shard; all of them when None.
        metadata: Other columns to keep; all when None, but for bytes and vectors.
        skip_bad: Whether bad rows are counted instead of refused.
        tick: Is told now and then how many bytes were read since.

    Raises:
        LusiferError: If a file cannot be read or lacks a column, a row is bad, ids are of two kinds, or there is no
            row to encode; or if a column to keep is not there or holds bytes or vectors.
    """
    starts: list[Position] = []
    ids, kept = _Ids(), _Kept(columns, metadata)
    step = shard_rows or sys.maxsize
    count = bad = reported = row = number = 0
    for rows in read_rows(files, columns):
        block = rows.block
        if not skip_bad:
            block.refuse_problems()
        row = row if number == block.file_number else 0
        number = block.file_number
        for index in range(-count % step, len(block), step):
            starts.append(Position(number, block.ends[index - 1] if index else block.begin, row + index))
        count, row, bad = count + len(block), row + len(block), bad + len(block.problems)
        ids.add(rows)
        kept.add(block)
        if tick is not None:
            done = sum(file.size for file in files[:number]) + min(files[number].size, block.bytes_read)
            tick(done - reported)
            reported = done
    if tick is not None:
        tick(sum(file.size for file in files) - reported)
    if count == bad:
        name = files[0].url if len(files) == 1 else f"{files[0].url} and {len(files) - 1} more"
        raise LusiferError(f"{name!r} holds no texts" + (f" ({bad} bad rows)" if bad else ""))
    return Plan(count, bad, ids.type(), starts, shard_rows or count, kept.types())


class _Kept:
    """The columns of an input that go into the output beside text and id."""

    def __init__(self, columns: Columns, metadata: Sequence[str] | None) -> None:
        self._own, self._wanted = set(columns), metadata
        self._types, self._names = ColumnTypes(), dict[str, None]()

    def add(self, block: Block) -> None:
        """Takes in a block."""
        if self._wanted is not None and not self._wanted:
            return
        names = [name for name in block.names() if name not in self._own]
        self._names |= dict.fromkeys(names)
        self._types.add(block, [name for name in names if self._wanted is None or name in self._wanted])

    def types(self) -> dict[str, str]:
        """The columns and their types.

        Raises:
            LusiferError: If one that was asked for is not there, or cannot be kept.
        """
        types = self._types.types()
        for name in self._wanted or ():
            if name not in self._own and name not in types:
                has = f"there are {', '.join(self._names) or 'none'}"
                unfit = "holds bytes or vectors and cannot be kept; leave it out of --metadata"
                raise LusiferError(f"the column {name!r} " + (unfit if name in self._names else f"is not there; {has}"))
        return types


class _Ids:
    """What all ids of an input have in common: text, or whole numbers of one type of 64 bits."""

    def __init__(self) -> None:
        self._least = self._greatest = 0
        self._kinds: set[type] = set()

    def add(self, rows: Rows) -> None:
        """Takes in the ids of the good rows of a block."""
        bad = rows.block.problems
        good = [(index, value) for index, value in enumerate(rows.ids or ()) if index not in bad]
        if not good:
            return
        values = [value for _, value in good]
        before = self._kinds or {type(values[0])}
        self._kinds = before | set(map(type, values))
        if len(self._kinds) > 1:
            index = next(index for index, value in good if type(value) not in before)
            raise rows.block.error(index, "ids are numbers and text; use one of them")
        if int in self._kinds:
            self._least, self._greatest = min(self._least, min(values)), max(self._greatest, max(values))
            if self._least < 0 and self._greatest not in INT64:
                place = f"{rows.block.where(good[0][0])} or before"
                raise LusiferError(f"{place}: ids are below 0 and above 2^63; write them as text")

    def type(self) -> str:
        """How Arrow calls the type that holds them all."""
        if str in self._kinds:
            return "string"
        return "uint64" if self._greatest not in INT64 else "int64"
