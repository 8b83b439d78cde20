"""Texts and vectors in files: Parquet, and a matrix of NumPy beside a file of texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from lusifer.data.reading import Block, read_blocks
from lusifer.data.rows import ColumnTypes
from lusifer.data.sources import InputFile, find_files
from lusifer.data.vectors.columns import arrow_vectors, choose, choose_columns
from lusifer.data.vectors.encoded import FLOATS, MadeBy, made_by
from lusifer.data.vectors.rows import Origin, RawRows, VectorTable, reading
from lusifer.errors import LusiferError
from lusifer.storage import open_file, storage_errors


class ParquetTable(VectorTable):
    """Parquet files of the same columns; what ``lusifer encode`` writes is one.

    Args:
        location: A file, a folder or a glob, here or in an object store.
        files: The Parquet files there.
        text: Column of the text; found when None.
        vector: Column of the vector; found when None.

    Attributes:
        more: Other columns to read; to be set before.
        made_by: What ``lusifer encode`` says of its files; None where something else wrote them.

    Raises:
        LusiferError: If a file cannot be read, or texts or vectors are not to be found.
    """

    def __init__(self, location: str, files: Sequence[InputFile], text: str | None, vector: str | None) -> None:
        self.location, self._files = location, list(files)
        self.more: Sequence[str] = ()
        self.made_by: MadeBy | None = None
        what = f"the Parquet of {location!r}"
        schema, self.rows = self._facts(what)
        if self.made_by is not None:
            self._refuse_unfit(schema)
            text, vector = "text" if text in (None, self.made_by.text_column) else text, vector or "embedding"
            self.origin = Origin(self.made_by.model, self.made_by.model_hash, self.made_by.prompt)
        self._text, self._vector, self._id = choose_columns(what, schema, text, vector)
        kind = schema.field(self._vector).type
        width = kind.list_size if pa.types.is_fixed_size_list(kind) else self._first_width()
        self.describe = what
        if not self.rows or not width:
            raise LusiferError(f"{what} is empty: it has {self.rows:,} rows" + (" without vectors" * bool(self.rows)))
        self.dimension = width
        self.describe = f"{what} (text in {self._text!r}, {width} dimensions in {self._vector!r})"

    def _facts(self, what: str) -> tuple[pa.Schema, int]:
        """The columns of the first file, and the rows of all; what they say of themselves has to be the same."""
        rows, schema, given = 0, None, None
        for file in self._files:
            with reading(what), storage_errors(file.url), open_file(file.url) as raw:
                opened = parquet.ParquetFile(raw)
                rows += opened.metadata.num_rows
                schema = schema or opened.schema_arrow
                said = made_by(opened)
            if given is not None and said != given:
                raise LusiferError(
                    f"{what} is of several runs of `lusifer encode`: {file.url!r} differs; take one at a time"
                )
            given = said
        assert schema is not None
        self.made_by = given if isinstance(given, MadeBy) else None
        return schema, rows

    def _refuse_unfit(self, schema: pa.Schema) -> None:
        """Refuses what ``lusifer encode`` wrote without texts, or with vectors that are none any more."""
        assert self.made_by is not None
        if "text" not in schema.names:
            raise LusiferError(f"{self.location!r} has vectors but no texts; encode without --no-text")
        if (kind := self.made_by.output_dtype) not in FLOATS:
            raise LusiferError(
                f"{self.location!r} holds vectors as {kind}, which cannot be compared as they are; "
                f"encode with --output-dtype {' or '.join(FLOATS)}"
            )

    def column(self, name: str) -> Iterator[Any]:
        """The values of one of `column_types`, read alone."""
        for block in read_blocks(self._files, [name]):
            yield from block.values(name)

    def column_types(self) -> dict[str, str]:
        """The columns beside text and vector that can be asked for, and their types as in `ColumnTypes`."""
        types = ColumnTypes()
        for block in read_blocks(self._files, [self._text]):
            types.add(block, [name for name in block.names() if name not in (self._text, self._vector)])
        return types.types()

    def _first_width(self) -> int:
        """Numbers of the first vector, where the type does not say."""
        for block in read_blocks(self._files, [self._vector]):
            values = _column(block, self._vector)
            if len(there := values.drop_null()):
                return len(there[0].as_py())
        return 0

    def _read(self, size: int) -> Iterator[RawRows]:
        names = [self._text, self._vector, *([self._id] if self._id else []), *self.more]
        for block in read_blocks(self._files, names):
            for name in (self._text, self._vector):
                if block.header is not None and name not in block.header:
                    has = ", ".join(block.header)
                    raise LusiferError(f"{block.file}: no column {name!r}, which other files have; it has {has}")
            texts, ids = block.values(self._text), block.values(self._id) if self._id else None
            more = {name: block.values(name) for name in self.more}
            for begin in range(0, len(block), size):
                part = slice(begin, begin + size)
                with reading(block.file):
                    lists = _column(block, self._vector)[part]
                    vectors, has_vector = arrow_vectors(block.file, lists, self.dimension)
                rest = {name: values[part] for name, values in more.items()}
                yield RawRows(texts[part], vectors, has_vector, ids and ids[part], rest)


def _column(block: Block, name: str) -> Any:
    column = block.column(name)
    assert column is not None
    return column


class ArrayTable(VectorTable):
    """A matrix in NumPy's format, a row for every text of a file.

    Args:
        location: Both, as they were asked for.
        array: Path of the matrix, (rows, dim).
        texts: File of the texts, see `lusifer.data.sources.find_files`.
        text: Column of the text; found when None.

    Attributes:
        more: Other columns of the texts to read; to be set before.

    Raises:
        LusiferError: If either cannot be read, or they differ in rows.
    """

    def __init__(self, location: str, array: str, texts: str, text: str | None) -> None:
        self.location = location
        self.more: Sequence[str] = ()
        self._array = load_matrix(array)
        self._files = find_files(texts)
        self._text = self._find_text(texts, text)
        self.rows, self.dimension = self._array.shape
        self.describe = f"{array!r} with the texts of {texts!r} ({self.dimension} dimensions, text in {self._text!r})"
        if not self.rows:
            raise LusiferError(f"{array!r} is empty: it has no rows")
        if (count := sum(len(block) for block in self._blocks())) != self.rows:
            raise LusiferError(
                f"{array!r} has {self.rows:,} vectors, but {texts!r} has {count:,} rows; they must be of the same texts"
            )

    def _find_text(self, texts: str, asked: str | None) -> str:
        block = next(iter(read_blocks(self._files, text=asked or "text")), None)
        if block is None:
            raise LusiferError(f"{texts!r} is empty")
        names = block.names()
        strings = [name for name in names if any(isinstance(value, str) for value in block.values(name)[:100])]
        return choose(f"{texts!r}", "text", strings, asked, names)

    def _blocks(self) -> Iterator[Block]:
        for block in read_blocks(self._files, [self._text, *self.more], text=self._text):
            block.refuse_problems()
            yield block

    def column(self, name: str) -> Iterator[Any]:
        """The values of one of `column_types`, read alone."""
        for block in read_blocks(self._files, text=self._text):
            yield from block.values(name)

    def column_types(self) -> dict[str, str]:
        """The columns beside the text that can be asked for, and their types as in `ColumnTypes`."""
        types = ColumnTypes()
        for block in read_blocks(self._files, text=self._text):
            types.add(block, [name for name in block.names() if name != self._text])
        return types.types()

    def _read(self, size: int) -> Iterator[RawRows]:
        done = 0
        for block in self._blocks():
            texts, more = block.values(self._text), {name: block.values(name) for name in self.more}
            for begin in range(0, len(texts), size):
                part = texts[begin : begin + size]
                rest = {name: values[begin : begin + size] for name, values in more.items()}
                yield RawRows(part, self._array[done : done + len(part)], more=rest)
                done += len(part)
        if done != self.rows:
            raise LusiferError(f"{self.location!r}: the texts have {done:,} rows now; they changed while being read")


def load_matrix(path: str) -> np.ndarray:
    """A (rows, dim) matrix of floating-point numbers, mapped into memory.

    Raises:
        LusiferError: If it is something else.
    """
    if not Path(path).expanduser().is_file():
        raise LusiferError(f"no such file: {path!r}")
    with reading(repr(path), EOFError):
        array = np.load(Path(path).expanduser(), mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind != "f":
        found = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else "an archive"
        raise LusiferError(
            f"{path!r} is not a matrix of vectors (rows, dimensions) of floating-point numbers, but {found}"
        )
    return array


def parquet_files(location: str) -> list[InputFile]:
    """The Parquet files of a file, a folder or a glob; none where nothing is there."""
    try:
        return [file for file in find_files(location) if file.format.kind == ".parquet"]
    except LusiferError:
        return []
