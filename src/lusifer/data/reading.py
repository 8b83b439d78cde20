"""Raw records of a data set, block by block with bounded memory, every record with its file and line."""

from __future__ import annotations

import glob
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from lusifer.errors import LusiferError
from lusifer.recipes.schema import DataRecipe
from lusifer.starter.text import resolve_data

_BLOCK_ROWS = 4096
_BLOCK_BYTES = _MAX_LINE = 1 << 26
# What people do have lying around, and what we do not read.
_OTHER = (".csv", ".tsv", ".txt", ".arrow", ".feather", ".xlsx", ".zip", ".gz", ".zst", ".bz2", ".xz", ".ndjson", ".pq")
_READABLE = "name it .jsonl, .jsonl.gz or .parquet (one record per line or row)"


@dataclass
class Block:
    """Consecutive records of one file.

    Attributes:
        file: What to call the file.
        file_number: Its number among the files of the set.
        numbers: Line (or row) of every record, from 1.
        data: The records, as mappings or as a table.
        names_of: Our column name -> theirs, where they differ.
    """

    file: str
    file_number: int
    numbers: Sequence[int]
    data: list[dict[str, Any]] | pa.Table
    names_of: Mapping[Any, str]

    def __len__(self) -> int:
        return len(self.numbers)

    def where(self, index: int) -> str:
        """File and line (or row) of a record."""
        return f"{self.file}, {unit(self.file)} {self.numbers[int(index)]}"

    def names(self) -> list[str]:
        """Columns of the file."""
        if isinstance(self.data, list):
            return sorted({name for record in self.data for name in record})
        return self.data.column_names

    def has(self, name: str, index: int) -> bool:
        """Whether a record has our column ``name``, be it null."""
        theirs = self.names_of.get(name, name)
        return theirs in (self.data[index] if isinstance(self.data, list) else self.data.column_names)

    def column(self, name: str) -> list[Any] | pa.Array | None:
        """Our column ``name``: Python values or one Arrow array; None where no record has it."""
        theirs = self.names_of.get(name, name)
        if isinstance(self.data, list):
            found = any(theirs in record for record in self.data)
            return [record.get(theirs) for record in self.data] if found else None
        return pa.concat_arrays(self.data[theirs].chunks) if theirs in self.data.column_names else None


@dataclass
class Found:
    """A set before it is read: ``files`` by name, and a ``key`` that changes when their content does."""

    files: list[str]
    key: list[Any]


def unit(file: str) -> str:
    """What a number within a file counts."""
    return "line" if ".json" in file else "row"


def local_files(source: str) -> list[Path] | None:
    """The files behind a source, sorted by name, or None for a hub id or a folder of the hub's layout.

    Raises:
        LusiferError: If there is no such file, or its name tells no format that is read here.
    """
    path = Path(resolve_data(source)).expanduser()
    if path.is_dir():
        return None
    stem = path.with_suffix("") if path.suffix == ".gz" else path
    known = stem.suffix in (".jsonl", ".json") or path.suffix == ".parquet"
    if any(sign in source for sign in "*?["):
        paths = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        if not paths:
            raise LusiferError(f"no such file: nothing matches {source!r}")
        return [file for name in paths for file in local_files(str(name)) or []]
    if not known and (path.is_file() or path.suffix.lower() in _OTHER):
        raise LusiferError(f"unknown format: {source!r}; {_READABLE}")
    if known or path.is_absolute() or source.startswith(".") or source.count("/") > 1:
        if not path.is_file():
            raise LusiferError(f"no such file: {source!r} (relative paths start at {str(Path.cwd())!r})")
        return [path]
    return None


def fingerprint(item: DataRecipe) -> Found:
    """What a set consists of, without reading it.

    Raises:
        LusiferError: If there is no such file or hub data set.
    """
    paths = local_files(item.source)
    if paths is None:
        records = _hub(item, streaming=False)
        return Found([item.source], [item.source, records._fingerprint, len(records)])
    stats = [(str(path.resolve()), path.stat()) for path in paths]
    return Found([str(path) for path in paths], [(name, s.st_size, s.st_mtime_ns) for name, s in stats])


def read_blocks(item: DataRecipe) -> Iterator[Block]:
    """The records of a set in their order.

    Raises:
        LusiferError: If a file is missing, broken, of another format or not valid UTF-8 or JSON.
    """
    paths = local_files(item.source)
    if paths is None:
        yield from _hub_blocks(item)
        return
    for number, path in enumerate(paths):
        read = _parquet if path.suffix == ".parquet" else _jsonl
        try:
            for numbers, data in read(path):
                yield Block(str(path), number, numbers, data, item.columns)
        except OSError as error:
            raise LusiferError(f"cannot read {str(path)!r}: {error.strerror or error}") from error


def _parquet(path: Path) -> Iterator[tuple[range, pa.Table]]:
    done = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_BLOCK_ROWS):
                if batch.num_rows:
                    yield range(done + 1, done + batch.num_rows + 1), pa.Table.from_batches([batch])
                done += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise LusiferError(f"{path}: broken Parquet after row {done} ({reason}); fetch or write it again") from error


def _jsonl(path: Path) -> Iterator[tuple[list[int], list[dict[str, Any]]]]:
    numbers: list[int] = []
    records: list[dict[str, Any]] = []
    size = 0
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in _lines(path, file):
            if not line.strip():
                continue
            numbers.append(number)
            records.append(_record(f"{path}, line {number}", line, first=number == 1))
            size += len(line)
            if len(records) == _BLOCK_ROWS or size > _BLOCK_BYTES:
                yield numbers, records
                numbers, records, size = [], [], 0
    if records:
        yield numbers, records


def _lines(path: Path, file: Any) -> Iterator[tuple[int, bytes]]:
    number = 0
    while True:
        try:
            line = file.readline(_MAX_LINE)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise LusiferError(
                f"{path}: broken gzip after line {number} ({error}); fetch or compress it again"
            ) from error
        if not line:
            return
        number += 1
        if len(line) == _MAX_LINE and not line.endswith(b"\n"):
            raise LusiferError(f"{path}, line {number}: longer than {_MAX_LINE >> 20} MB; write one record per line")
        yield number, line


def _record(where: str, line: bytes, *, first: bool) -> dict[str, Any]:
    try:
        # Windows editors open a file with a byte order mark.
        record = json.loads(line.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        problem = f"not valid UTF-8 ({error.reason} at byte {error.start + 1})"
        raise LusiferError(f"{where}: {problem}; convert the file to UTF-8") from error
    except json.JSONDecodeError as error:
        hint = "write one JSON object per line" if line.lstrip()[:1] == b"[" else "mend or remove the line"
        raise LusiferError(f"{where}: not valid JSON ({error.msg}, column {error.colno}); {hint}") from error
    except (ValueError, RecursionError) as error:
        raise LusiferError(f"{where}: not valid JSON ({error}); mend or remove the line") from error
    if not isinstance(record, dict):
        raise LusiferError(f'{where}: not a JSON object; write one record per line, such as {{"text": "..."}}')
    return record


def _hub(item: DataRecipe, *, streaming: bool) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        return load_dataset(item.source, item.subset, split=item.split, revision=item.revision, streaming=streaming)
    except (OSError, ValueError, DatasetGenerationError) as error:
        reason = next(iter(str(error.__cause__ or error).splitlines()), type(error).__name__)
        raise LusiferError(f"cannot read the data set {item.source!r}: {reason}") from error


def _hub_blocks(item: DataRecipe) -> Iterator[Block]:
    records = _hub(item, streaming=item.streaming)
    done = 0
    try:
        for data in records.with_format("arrow").iter(batch_size=_BLOCK_ROWS):
            yield Block(item.source, 0, range(done + 1, done + len(data) + 1), data, item.columns)
            done += len(data)
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise LusiferError(f"{item.source}: cannot read on after row {done} ({reason})") from error
