"""Text files as numbered records: lines of text, JSON lines, a JSON array, CSV and TSV; packed or not."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from lusifer.data.sources import InputFile
from lusifer.errors import LusiferError, first_line

MAX_RECORD = 1 << 26  # Bytes of one line, value or row.
_BUFFER = 1 << 20
_BOM = codecs.BOM_UTF8
# Number of a record's line (or row), the position behind it, the record, and what is wrong with it.
Numbered = tuple[int, int, dict[str, Any], str | None]


def not_utf8(error: UnicodeDecodeError) -> str:
    """What is wrong with bytes that are no UTF-8, and the remedy."""
    return f"not valid UTF-8 ({error.reason} at byte {error.start + 1}); convert the file to UTF-8"


def refuse_repeated(file: str, names: Sequence[str]) -> None:
    """Refuses a file with a column twice.

    Args:
        file: Its name.
        names: Its columns.

    Raises:
        LusiferError: If one occurs twice.
    """
    if (repeated := _repeated(names)) is not None:
        raise LusiferError(f"{file}: the column {repeated!r} occurs twice; rename or remove one")


def _repeated(names: Sequence[str]) -> str | None:
    return next((name for name in names if names.count(name) > 1), None)


class Lines:
    """The lines of a text file, packed or not.

    Attributes:
        number: Lines read so far.
        offset: Bytes of the unpacked file read so far.
    """

    def __init__(self, file: InputFile, raw: Any) -> None:
        self.file, self._raw = file, raw
        self.packing = file.format.packing
        # The lines of a store's own file objects are found in Python, ten times as slowly.
        packed = pa.CompressedInputStream(raw, self.packing) if self.packing else raw
        self.stream = io.BufferedReader(packed, _BUFFER)
        self.number = self.offset = 0
        self.head = self._read(self.stream.peek, 1)[:4096]
        if self.head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise LusiferError(f"{file.url}: UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8")
        if self.head.startswith(_BOM):  # Windows editors open a file with a byte order mark.
            self.offset = len(self.stream.read(len(_BOM)))

    def bytes_read(self, offset: int) -> int:
        """Bytes of the file read so far, as it is stored, when the unpacked file was read up to ``offset``."""
        return self._raw.tell() if self.packing else offset

    def skip_to(self, offset: int) -> None:
        """Goes forward to a byte; a packed file has to be read up to there."""
        if offset > self.offset and not self.packing:
            self.offset = self.stream.seek(offset)
        while self.offset < offset and (piece := self.take(min(offset - self.offset, _BUFFER))):
            self.offset += len(piece)

    def take(self, size: int) -> bytes:
        """The next bytes, at most ``size``; none at the end."""
        return self._read(self.stream.read, size)

    def numbered(self) -> Iterator[tuple[int, int, bytes]]:
        """Number, position behind and content of every line from here on; ``number`` and ``offset`` may lag."""
        rest = b""
        while piece := self.take(_BUFFER):
            lines = (rest + piece).split(b"\n")
            rest = lines.pop()
            number, offset = self.number, self.offset
            for line in lines:
                number += 1
                offset += len(line) + 1
                yield number, offset, line
            self.number, self.offset = number, offset
            self.limit(len(rest))
        if rest:
            yield self.number + 1, self.offset + len(rest) + 1, rest

    def __iter__(self) -> Iterator[bytes]:
        """One line after the other with its end; ``number`` and ``offset`` are those behind it."""
        while line := self._read(self.stream.readline, MAX_RECORD + 1):
            self.number += 1
            self.offset += len(line)
            self.limit(len(line))
            yield line

    def _read(self, read: Callable[[int], bytes], size: int) -> bytes:
        """Reads, and says what went wrong while unpacking; an error of the disk or the store stays as it is."""
        try:
            return read(size)
        except (OSError, pa.ArrowException) as error:
            if self.packing is None or getattr(error, "errno", None) is not None:
                raise
            problem = f"broken {self.packing} after line {self.number} ({first_line(error)})"
            raise LusiferError(f"{self.file.url}: {problem}; fetch or compress it again") from error

    def limit(self, size: int) -> None:
        """Refuses a record of so many bytes if it is too long; raises LusiferError."""
        if size > MAX_RECORD:
            where = f"{self.file.url}, line {self.number + 1}"
            raise LusiferError(f"{where}: longer than {MAX_RECORD >> 20} MB; write one record per line")


def records_of(lines: Lines, offset: int, text: str) -> tuple[list[str] | None, Iterator[Numbered]]:
    """The columns of a text file, where all records have the same, and its records.

    Args:
        lines: The file, opened.
        offset: Byte of the unpacked file to begin at: 0 or the position behind a record.
        text: What to call the only column of a ``.txt`` file.

    Raises:
        LusiferError: If the file cannot be read.
    """
    kind = lines.file.format.kind
    if kind in (".csv", ".tsv"):
        rows = _CsvRows(lines, "," if kind == ".csv" else "\t")
        return rows.header, rows.records(offset)
    array = kind == ".json" and lines.head.removeprefix(_BOM).lstrip().startswith(b"[")
    lines.skip_to(offset)
    if array:
        return None, _array_records(lines, opened=offset > 0)
    if kind == ".txt":
        return [text], _plain_records(lines, text)
    records = _json_records(lines)
    if kind == ".json":
        return None, ((row, *record[1:]) for row, record in enumerate(records, start=1))
    return None, records


def _plain_records(lines: Lines, text: str) -> Iterator[Numbered]:
    for number, end, line in lines.numbered():
        try:
            yield number, end, {text: line.decode().rstrip("\r")}, None
        except UnicodeDecodeError as error:
            yield number, end, {}, not_utf8(error)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError(f"the key {_repeated([name for name, _ in pairs])!r} occurs twice")
    return record


_JSON = json.JSONDecoder(object_pairs_hook=_unique)
_FAST_JSON = json.JSONDecoder()
_NO_OBJECT = 'not a JSON object; write records such as {"text": "..."}'
_LINES = ", one JSON object per line, or name the file .json"


def _json_records(lines: Lines) -> Iterator[Numbered]:
    """One record a line; blank lines are none."""
    decode = _FAST_JSON.decode
    for number, end, line in lines.numbered():
        try:
            text = line.decode()
            record = decode(text)
            if isinstance(record, dict):
                if line.count(b'":') != len(record) or b'" :' in line:
                    record = _JSON.decode(text)  # There may be more keys than the record holds: one occurs twice.
                yield number, end, record, None
                continue
            problem = _NO_OBJECT
        except UnicodeDecodeError as error:
            problem = not_utf8(error)
        except (ValueError, RecursionError) as error:
            if not line or line.isspace():
                continue
            problem = _not_json(error)
        yield number, end, {}, problem + (_LINES if line.startswith(b"[") else "")


def _not_json(error: Exception) -> str:
    reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else first_line(error)
    return f"not valid JSON ({reason}); fix or remove it"


_GAP = re.compile(r"[\s,]*")


def _array_records(lines: Lines, *, opened: bool) -> Iterator[Numbered]:
    """The elements of one JSON array, a piece of the file at a time, from its beginning or behind an element."""
    url, number, size, rest = lines.file.url, 0, 1 << 16, ""
    behind = lines.offset
    decode = codecs.getincrementaldecoder("utf-8")().decode
    while True:
        piece = lines.take(size)
        try:
            rest += decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            raise LusiferError(f"{url}, row {number + 1}: {not_utf8(error)}") from error
        if not opened:
            gap = len(rest) - len(rest.lstrip()) + 1
            behind, rest, opened = behind + gap, rest[gap:], True
        at = 0
        while True:
            begin = _GAP.match(rest, at).end()  # type: ignore[union-attr]
            if rest[begin : begin + 1] in ("]", "") and (begin < len(rest) or piece):
                break
            try:
                record, end = _JSON.raw_decode(rest, begin)
                if end == len(rest) and piece and not isinstance(record, dict):
                    break  # A number may go on.
            except (ValueError, RecursionError) as error:
                if piece and len(rest) - begin < MAX_RECORD and "occurs twice" not in str(error):
                    size *= 2
                    break
                raise LusiferError(f"{url}, row {number + 1}: {_not_json(error)}") from error
            number += 1
            behind += len(rest[at:end].encode())
            at = end
            good = isinstance(record, dict)
            yield number, behind, record if good else {}, None if good else _NO_OBJECT
        if rest[begin : begin + 1] == "]":
            return
        rest = rest[at:]


class _CsvRows:
    """Rows of CSV or TSV (RFC 4180); an empty cell is none, a blank line no row."""

    def __init__(self, lines: Lines, delimiter: str) -> None:
        csv.field_size_limit(max(csv.field_size_limit(), MAX_RECORD))
        self.lines = lines
        self._problem: str | None = None
        self._begin = lines.offset
        self._reader = csv.reader(self._decoded(), delimiter=delimiter, strict=True)
        while (cells := self._next()) == []:
            pass
        if self._problem:
            raise LusiferError(f"{lines.file.url}, line 1: {self._problem}")
        self.header = cells or []
        refuse_repeated(lines.file.url, self.header)

    def _decoded(self) -> Iterator[str]:
        for line in self.lines:
            # A row of quoted cells may go on over any number of lines; of one cell the reader itself says more.
            self.lines.limit((self.lines.offset - self._begin) // 2)
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                self._problem = not_utf8(error)
                yield line.decode(errors="replace")

    def _next(self) -> list[str] | None:
        self._begin = self.lines.offset
        try:
            return next(self._reader, None)
        except csv.Error as error:
            self._problem = (
                f"not valid CSV ({error}); quote values that contain quotes or line breaks, and double quotes"
            )
            return [""]

    def records(self, offset: int) -> Iterator[Numbered]:
        """The rows from a position on."""
        self.lines.skip_to(offset)
        while True:
            first, self._problem = self.lines.number + 1, None
            cells = self._next()
            if cells is None:
                return
            if cells and not self._problem and len(cells) != len(self.header):
                self._problem = f"{len(cells)} values, but the header has {len(self.header)}; fix or remove the row"
            if self._problem:
                yield first, self.lines.offset, {}, self._problem
            elif cells:
                record = {name: cell for name, cell in zip(self.header, cells, strict=True) if cell}
                yield first, self.lines.offset, record, None
