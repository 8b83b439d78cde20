"""Texts of files of any size, here or in an object store, row by row in bounded memory.

Reading happens twice. `make_plan` reads everything once: it checks every row, counts rows, and notes where each shard
begins, so that mistakes show before a model is loaded and a shard can be read by whoever encodes it. `RowReader` then
goes to the beginning of a shard and reads its rows.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import parquet

from lusifer.errors import LusiferError
from lusifer.storage import is_remote, locate, open_file, storage_errors, version

BLOCK_ROWS = 4096
_MAX_LINE = 1 << 26
PACKED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
_KINDS = (".txt", ".jsonl", ".parquet")
_NAMES = ", ".join(_KINDS)

Id = int | str | None
# Offset behind the row, its text, its id, and what is wrong with it.
_Raw = tuple[int, Any, Any, str | None]
_Parsed = tuple[Any, Any, str | None]


def kind_of(url: str) -> str:
    """``.txt``, ``.jsonl`` or ``.parquet``, or nothing where the name tells none of them."""
    name = url.rsplit("/", 1)[-1]
    for packed in PACKED:
        if name.endswith(packed):
            name = name.removesuffix(packed)
            return next((kind for kind in (".txt", ".jsonl") if name.endswith(kind)), "")
    return next((kind for kind in _KINDS if name.endswith(kind)), "")


def find_files(source: str) -> list[InputFile]:
    """The files of an input, sorted by path.

    Args:
        source: A file, a folder (all files below it that can be read) or a glob; here, ``s3://``, ``gs://``, ``hf://``.

    Raises:
        LusiferError: If there are none, or a name tells no format that is read here.
    """
    fs, path = locate(source)
    with storage_errors(source):
        if any(sign in source for sign in "*?[") and not fs.exists(path):
            paths = [name for name in fs.glob(path) if kind_of(name)]
            if not paths:
                raise LusiferError(f"no such file: nothing matches {source!r} (names end in {_NAMES})")
        elif fs.isdir(path):
            names = (name for name in fs.find(path) if kind_of(name))
            paths = [name for name in names if not _is_hidden(name.removeprefix(path))]
            if not paths:
                raise LusiferError(f"no files to read in {source!r}: name them {_NAMES}")
        elif not fs.exists(path):
            raise LusiferError(f"no such file: {source!r}")
        elif not kind_of(path):
            raise LusiferError(f"cannot read {source!r}: name it {_NAMES} (the first two also .gz, .bz2, .zst)")
        else:
            paths = [path]
        files = []
        for name in sorted(paths):
            info = fs.info(name)
            url = fs.unstrip_protocol(name) if is_remote(source) else name
            files.append(InputFile(url, int(info.get("size") or 0), version(info)))
        return files


def _is_hidden(path: str) -> bool:
    return any(part.startswith((".", "_")) for part in path.split("/") if part)


class RowReader:
    """Reads rows from any position on; cheapest forwards, since it keeps the file open where it stopped.

    Args:
        files: The input.
        columns: What to read.
    """

    def __init__(self, files: Sequence[InputFile], columns: Columns) -> None:
        self.files = files
        self.columns = columns
        self.packed_bytes = 0  # Read of the present file as it lies in the store, where that differs from the offset.
        self._at: Position | None = None
        self._rows: Iterator[tuple[Position, Any, Id, str | None]] | None = None

    def read(self, part: Slice) -> Iterator[tuple[int | str, str]]:
        """The good rows of a slice: id and text.

        Raises:
            LusiferError: If the input is shorter than it was.
        """
        rows = self._from(part.start)
        for number in range(part.first, part.first + part.rows):
            found = next(rows, None)
            if found is None:
                raise LusiferError(f"the input ends before row {number + 1}: it changed while it was read")
            self._at, text, given, problem = found
            if problem is None:
                yield (number if given is None else given), text

    def _from(self, start: Position) -> Iterator[tuple[Position, Any, Id, str | None]]:
        at = self._at
        if self._rows is None or at is None or at.file != start.file or at.offset > start.offset:
            self._rows = self.records(start)
        elif at.offset < start.offset:
            if self.files[start.file].url.endswith(tuple(PACKED)):
                # A packed file can only be read from its beginning, or on from here.
                while at.offset < start.offset:
                    at = next(self._rows)[0]
            else:
                self._rows = self.records(start)
        return self._rows

    def records(self, start: Position) -> Iterator[tuple[Position, Any, Id, str | None]]:
        """All rows from a position on: where each ends, text, id, and what is wrong with it (None: nothing)."""
        for number in range(start.file, len(self.files)):
            here = start if number == start.file else Position(number, 0, 0)
            row = here.row
            for offset, text, given, problem in self._stream(self.files[number], here):
                row += 1
                problem = problem or problem_of(text, self.columns.text)
                if problem is None and self.columns.id is not None and not isinstance(given, (int, str)):
                    problem = f"{self.columns.id!r} must be a number or text, not {type(given).__name__}"
                yield Position(number, offset, row), text, given, problem

    def _stream(self, file: InputFile, start: Position) -> Iterator[_Raw]:
        kind = kind_of(file.url)
        if kind == ".parquet":
            return self._table(file, start.offset)
        parse = self._plain if kind == ".txt" else self._parse
        return self._lines(file, start.offset, parse)

    def _lines(self, file: InputFile, offset: int, parse: Callable[[str], _Parsed]) -> Iterator[_Raw]:
        packing = next((name for end, name in PACKED.items() if file.url.endswith(end)), None)
        with storage_errors(file.url), open_file(file.url) as raw:
            if packing is None:
                raw.seek(offset)
            # The lines of a store's own file objects are found in Python, ten times as slowly.
            stream = io.BufferedReader(pa.CompressedInputStream(raw, packing) if packing else raw, 1 << 20)
            skip = offset if packing else 0
            while skip and (read := len(stream.read(min(skip, 1 << 20)))):
                skip -= read
            while line := stream.readline(_MAX_LINE):
                if len(line) == _MAX_LINE and not line.endswith(b"\n"):
                    raise LusiferError(f"{file.url}, byte {offset}: a line of more than {_MAX_LINE >> 20} MB")
                # Windows editors open a file with a byte order mark.
                encoding = "utf-8" if offset else "utf-8-sig"
                offset += len(line)
                if packing:
                    self.packed_bytes = raw.tell()
                try:
                    text = line.decode(encoding).rstrip("\r\n")
                except UnicodeDecodeError as error:
                    yield offset, None, None, f"not valid UTF-8 ({error.reason})"
                else:
                    yield offset, *parse(text)

    def _plain(self, line: str) -> _Parsed:
        return line, None, None

    def _parse(self, line: str) -> _Parsed:
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            return None, None, f"not valid JSON ({error.msg})"
        except (ValueError, RecursionError) as error:
            return None, None, f"not valid JSON ({error})"
        for name in (self.columns.text, self.columns.id):
            if name is not None and (not isinstance(record, dict) or name not in record):
                option = "--column" if name == self.columns.text else "--id-column"
                return None, None, f"no {name!r}; choose another with {option}"
        return record[self.columns.text], record[self.columns.id] if self.columns.id else None, None

    def _table(self, file: InputFile, offset: int) -> Iterator[_Raw]:
        wanted = [name for name in (self.columns.text, self.columns.id) if name is not None]
        try:
            with storage_errors(file.url), open_file(file.url) as raw:
                table = parquet.ParquetFile(raw)
                known = table.schema_arrow.names
                for name in wanted:
                    if name not in known:
                        option = "--column" if name == self.columns.text else "--id-column"
                        raise LusiferError(
                            f"{file.url!r} has no column {name!r}; it has {', '.join(known)} (choose with {option})"
                        )
                begin = 0
                for group in range(table.num_row_groups):
                    rows = table.metadata.row_group(group).num_rows
                    if begin + rows > offset:
                        yield from self._group(table, group, wanted, begin, offset)
                    begin += rows
        except pa.ArrowException as error:
            raise LusiferError(f"cannot read {file.url!r}: {str(error).splitlines()[0]}") from error

    def _group(self, table: Any, group: int, wanted: list[str], begin: int, offset: int) -> Iterator[_Raw]:
        # Group by group: asked for several, Arrow fetches all of them ahead.
        for batch in table.iter_batches(batch_size=BLOCK_ROWS, row_groups=[group], columns=list(dict.fromkeys(wanted))):
            skip = max(0, min(batch.num_rows, offset - begin))
            texts, broken = _values(batch[wanted[0]].slice(skip))
            ids = _values(batch[wanted[1]].slice(skip))[0] if len(wanted) > 1 else [None] * len(texts)
            for index, (text, given) in enumerate(zip(texts, ids, strict=True), start=begin + skip + 1):
                yield index, text, given, broken.get(index - begin - skip - 1)
            begin += batch.num_rows


def _values(array: pa.Array) -> tuple[list[Any], dict[int, str]]:
    """Python values, and by index what is wrong where bytes are not valid UTF-8."""
    try:
        return array.to_pylist(), {}
    except UnicodeDecodeError:
        values, broken = [], {}
        for index, scalar in enumerate(array):
            try:
                values.append(scalar.as_py())
            except UnicodeDecodeError as error:
                values.append(None)
                broken[index] = f"not valid UTF-8 ({error.reason})"
        return values, broken


def problem_of(text: Any, column: str) -> str | None:
    """What is wrong with a text, or None."""
    if not isinstance(text, str):
        return f"{column!r} must be text, not {type(text).__name__}"
    if not text.strip():
        return "the text is empty; remove the row"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"lone surrogate U+{ord(text[error.start]):04X} at character {error.start + 1}; replace it"
    return None


@dataclass(frozen=True)
class InputFile:
    """A file of the input.

    Attributes:
        url: Path or URL.
        size: Bytes.
        version: Changes with the content: a store's tag, or the time of the last change.
    """

    url: str
    size: int
    version: str


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are read; ``id`` is None where rows are numbered instead."""

    text: str = "text"
    id: str | None = None


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
