"""How far a Parquet file unpacks: how many of its rows fit into memory at once, and files that are made to burst it.

A value that stands once in a file's dictionary may be meant by every row: some hundred bytes become gigabytes. So the
longest value of a dictionary is looked up first, and rows are read so few at a time that each of them could be it.

What the metadata at the end of a file says of sizes need not be so. The pages say it too, and there a wrong size makes
Arrow fail rather than read more; so of the two the worse counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from lusifer.errors import LusiferError

MAX_BYTES = 1 << 26  # Of the rows read at once, as far as one row goes.
MAX_FOLD = 1000  # A chunk of a column may unpack to more than this many times its size, up to:
MAX_UNPACKED = 1 << 28
_NUMBER = 8  # Bytes of a number.
_FETCHED = 1 << 20  # Bytes of a chunk whose pages are looked at over a network as well.
_HEADERS = (1 << 12, 1 << 20)  # Bytes in which the header of a page is looked for; statistics make it long.
_DEEPEST = 16  # Structures within each other, in such a header.


@dataclass
class _Pages:
    """Of all pages of a chunk: bytes in the file, bytes unpacked, values, and whether one is a dictionary."""

    stored: int
    unpacked: int
    values: int
    coded: bool


class Expansion:
    """What the row groups of a file unpack to.

    Args:
        url: The file's name, for messages.
        raw: The file, open.
        table: The same as Parquet.
        columns: The columns that will be read; all when None.
        remote: Whether each look into the file is a request.
    """

    def __init__(
        self, url: str, raw: Any, table: parquet.ParquetFile, columns: Sequence[str] | None, *, remote: bool = False
    ) -> None:
        self.url, self.table, self._raw, self._remote = url, table, raw, remote
        paths = [table.schema.column(number).path for number in range(len(table.schema))]
        self._wanted = {n: path for n, path in enumerate(paths) if columns is None or _column(path, columns)}
        texts = [path for n, path in self._wanted.items() if table.schema.column(n).physical_type == "BYTE_ARRAY"]
        self._texts = set(texts)
        self._coded = parquet.ParquetFile(raw, metadata=table.metadata, read_dictionary=texts, pre_buffer=False)

    def rows(self, group: int, most: int) -> int:
        """How many rows of a group may be read at once.

        Args:
            group: Number of the row group.
            most: Never more than this.

        Raises:
            LusiferError: If a value is longer than 64 MB, or the group unpacks to far more than a file of data does.
        """
        facts = self.table.metadata.row_group(group)
        every = {path: self._pages(group, path, facts.column(number)) for number, path in self._wanted.items()}
        longest = self._longest(group, [path for path, pages in every.items() if pages.coded])
        row = 0.0
        for number, path in self._wanted.items():
            chunk, pages = facts.column(number), every[path]
            count = max(facts.num_rows, 1)
            if self.table.schema.column(number).max_repetition_level == 0:  # Every row is one value.
                count = max(min(count, chunk.num_values, pages.values), 1)
            values = max(chunk.num_values, pages.values)
            stored, unpacked = max(pages.stored, 1), max(chunk.total_uncompressed_size, pages.unpacked)
            value = longest.get(path, 0)
            if path in self._texts and "DELTA_BYTE_ARRAY" in chunk.encodings:
                # A value stands there as what the one before it lacks.
                value = max(value, unpacked)
            if value > MAX_BYTES and path in longest:
                raise self._error(group, path, f"holds a value of {value >> 20} MB, more than {MAX_BYTES >> 20}")
            # How many values of a list belong to one row is not known before they are read.
            whole = values * (value or _NUMBER) if "." in path else 0
            if (size := max(unpacked, whole)) > max(MAX_UNPACKED, MAX_FOLD * stored):
                raise self._error(group, path, f"unpacks from {stored:,} bytes to {size:,}")
            row += max(unpacked / count, value * values / count)
        return max(1, min(most, int(MAX_BYTES / max(row, 1))))

    def _pages(self, group: int, path: str, chunk: Any) -> _Pages:
        """What the pages of a chunk say."""
        if self._remote and chunk.total_compressed_size > _FETCHED:
            coded = any("DICTIONARY" in encoding for encoding in chunk.encodings)
            return _Pages(chunk.total_compressed_size, chunk.total_uncompressed_size, chunk.num_values, coded)
        found, at = _Pages(0, 0, 0, False), chunk.data_page_offset
        if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < at:
            at = chunk.dictionary_page_offset
        end = at + chunk.total_compressed_size
        while at < end and found.values < chunk.num_values:
            header, size = self._header(group, path, at)
            stored, unpacked = header.get(3), header.get(2)
            if not isinstance(stored, int) or not isinstance(unpacked, int) or stored < 0 or unpacked < 0:
                raise pa.ArrowInvalid(f"no page at byte {at}")
            data = header.get(5) or header.get(8)  # Of either version; a dictionary has another field.
            found.values += max(int(data.get(1, 0)), 0) if isinstance(data, dict) else 0
            found.coded |= isinstance(header.get(7), dict)
            found.stored, found.unpacked = found.stored + stored, found.unpacked + unpacked
            at += size + stored
        return found

    def _header(self, group: int, path: str, at: int) -> tuple[dict[int, Any], int]:
        """The header of the page at a byte, and its length."""
        for size in _HEADERS:
            self._raw.seek(at)
            try:
                return _structure(self._raw.read(size), 0)
            except (IndexError, ValueError):
                continue
        raise pa.ArrowInvalid(f"no page of {path!r} of row group {group + 1} at byte {at}")

    def _longest(self, group: int, paths: Sequence[str]) -> dict[str, int]:
        """Bytes of the longest value in the dictionary of a column, for those of texts."""
        found: dict[str, int] = {}
        for path in self._texts.intersection(paths):
            batch = next(self._coded.iter_batches(1, row_groups=[group], columns=[path]), None)
            values: Any = None if batch is None else batch.column(0)
            while values is not None and pa.types.is_nested(values.type):
                values = values.field(0) if pa.types.is_struct(values.type) else values.values
            if isinstance(values, pa.DictionaryArray) and len(values.dictionary):
                found[path] = int(pc.max(pc.binary_length(values.dictionary)).as_py() or 0)
        return found

    def _error(self, group: int, path: str, problem: str) -> LusiferError:
        return LusiferError(
            f"{self.url}: {path!r} of row group {group + 1} {problem}; no real data does that: do not trust this file, "
            "or rewrite it in smaller row groups"
        )


def _column(path: str, columns: Sequence[str]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in columns)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[at]
        number, shift, at = number | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return number, at
        if shift > 63:
            raise ValueError("no number")


def _structure(data: bytes, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """Numbers and structures by field, in Thrift's compact protocol, and the position behind; the rest is passed over.

    Raises:
        IndexError: If it goes on behind the data.
        ValueError: If it is none.
    """
    fields: dict[int, Any] = {}
    field = 0
    while kind := data[at]:
        step, kind, at = kind >> 4, kind & 15, at + 1
        if step:
            field += step
        else:
            number, at = _varint(data, at)
            field = number >> 1 ^ -(number & 1)
        fields[field], at = (None, at) if kind in (1, 2) else _value(data, at, kind, depth)
    return fields, at + 1


def _value(data: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if depth > _DEEPEST:
        raise ValueError("too deep")
    if kind in (4, 5, 6):
        number, at = _varint(data, at)
        return number >> 1 ^ -(number & 1), at
    if kind == 12:
        return _structure(data, at, depth + 1)
    if kind == 8:
        size, at = _varint(data, at)
        return None, at + size
    if kind in (9, 10):
        head, at = data[at], at + 1
        size, at = (head >> 4, at) if head >> 4 < 15 else _varint(data, at)
        for _ in range(min(size, len(data))):
            _, at = _value(data, at, head & 15, depth + 1)
        return None, at
    sizes = {1: 1, 2: 1, 3: 1, 7: 8}
    if kind not in sizes:
        raise ValueError(f"no kind {kind}")
    return None, at + sizes[kind]
