"""How far a Parquet file unpacks: how many of its rows fit into memory at once, and files that are made to burst it.

A value that stands once in a file's dictionary may be meant by every row: some hundred bytes become gigabytes. So the
longest value of a dictionary is looked up first, and rows are read so few at a time that each of them could be it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from lusifer.errors import LusiferError

MAX_BYTES = 1 << 26  # Of the rows read at once, as far as one row goes.
MAX_FOLD = 1000  # A chunk of a column may unpack to more than this many times its size, up to:
MAX_UNPACKED = 1 << 28
_NUMBER = 8  # Bytes of a number.


class Expansion:
    """What the row groups of a file unpack to.

    Args:
        url: The file's name, for messages.
        raw: The file, open.
        table: The same as Parquet.
        columns: The columns that will be read; all when None.
    """

    def __init__(self, url: str, raw: Any, table: parquet.ParquetFile, columns: Sequence[str] | None) -> None:
        self.url, self.table = url, table
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
        count = max(facts.num_rows, 1)
        longest = self._longest(group, [path for n, path in self._wanted.items() if _has_dictionary(facts.column(n))])
        row = 0.0
        for number, path in self._wanted.items():
            chunk = facts.column(number)
            stored, unpacked = max(chunk.total_compressed_size, 1), chunk.total_uncompressed_size
            value = longest.get(path, 0)
            if path in self._texts and "DELTA_BYTE_ARRAY" in chunk.encodings:
                # A value stands there as what the one before it lacks.
                value = max(value, unpacked)
            if value > MAX_BYTES and path in longest:
                raise self._error(group, path, f"holds a value of {value >> 20} MB, more than {MAX_BYTES >> 20}")
            # How many values of a list belong to one row is not known before they are read.
            whole = chunk.num_values * (value or _NUMBER) if "." in path else 0
            if (size := max(unpacked, whole)) > max(MAX_UNPACKED, MAX_FOLD * stored):
                raise self._error(group, path, f"unpacks from {stored:,} bytes to {size:,}")
            row += max(unpacked / count, value * chunk.num_values / count)
        return max(1, min(most, int(MAX_BYTES / max(row, 1))))

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
            f"{self.url}: {path!r} of row group {group + 1} {problem}; no data do that: do not trust this file, "
            "or write it again in smaller row groups"
        )


def _column(path: str, columns: Sequence[str]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in columns)


def _has_dictionary(chunk: Any) -> bool:
    return any("DICTIONARY" in encoding for encoding in chunk.encodings)
