"""plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lusifer.bulk.job import Plan
from lusifer.data.rows import BLOCK_ROWS, PACKED, Columns, InputFile, Position, RowReader, Slice, kind_of
from lusifer.errors import LusiferError


def make_plan(
    files: Sequence[InputFile],
    columns: Columns,
    *,
    shard_rows: int | None,
    skip_bad: bool = False,
    tick: Callable[[int], object] | None = None,
) -> Plan:
    """Reads the whole input once: checks every row and notes where each shard begins.

    Args:
        files: The input.
        columns: What is read of it.
        shard_rows: Rows of a shard; all of them when None.
        skip_bad: Whether bad rows are counted instead of refused.
        tick: Is told now and then how many bytes were read since.

    Raises:
        LusiferError: If a file cannot be read or lacks a column, a row is bad (the message names file and row), ids are
            of two kinds, or there is no row to encode.
    """
    reader = RowReader(files, columns)
    starts: list[Position] = []
    at, count, bad, kinds = Position(0, 0, 0), 0, 0, set[type]()
    told = done = 0
    for after, _, given, problem in reader.records(at):
        if problem is not None and not skip_bad:
            raise LusiferError(f"{files[after.file].url}, row {after.row}: {problem}")
        if shard_rows is None and not starts or shard_rows is not None and count % shard_rows == 0:
            # The end of the last file read may lie before the beginning of this row's file.
            starts.append(at if at.file == after.file else Position(after.file, 0, 0))
        at, count, bad = after, count + 1, bad + (problem is not None)
        if problem is None and given is not None:
            kinds.add(str if isinstance(given, str) else int)
            if len(kinds) > 1:
                raise LusiferError(f"{files[at.file].url}, row {at.row}: ids are numbers and text; use one of them")
        if tick is not None and count % BLOCK_ROWS == 0:
            done = _bytes_before(files, at.file) + _bytes_within(files[at.file], at.offset, reader.packed_bytes)
            tick(done - told)
            told = done
    if tick is not None:
        tick(sum(file.size for file in files) - told)
    if count == bad:
        name = files[0].url if len(files) == 1 else f"{files[0].url} and {len(files) - 1} more"
        raise LusiferError(f"{name!r} holds no texts" + (f" ({bad} bad rows)" if bad else ""))
    size = shard_rows or count
    slices = [
        Slice(number, number * size, min(size, count - number * size), start) for number, start in enumerate(starts)
    ]
    return Plan(slices, count, bad, "string" if str in kinds else "int64")


def _bytes_before(files: Sequence[InputFile], number: int) -> int:
    return sum(file.size for file in files[:number])


def _bytes_within(file: InputFile, offset: int, packed: int) -> int:
    if kind_of(file.url) == ".parquet":
        return 0  # Its offset counts rows; a whole file is told at its end.
    return min(file.size, packed if file.url.endswith(tuple(PACKED)) else offset)
