"""Texts and vectors in the folders of LanceDB and of Chroma."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lusifer.data.vectors.columns import arrow_vectors, choose_columns, text_getter
from lusifer.data.vectors.qdrant import choose_part, origin_of
from lusifer.data.vectors.rows import Match, RawRows, Rows, VectorTable, nearest_of, reading
from lusifer.errors import LusiferError

_TAKE = 4096  # Rows of LanceDB read at once.
_LOOK = 64  # Rows of Chroma that show where the text stands.


class LanceTable(VectorTable):
    """A table of LanceDB; an index of ours is one.

    Args:
        location: As it was asked for.
        folder: Folder of the database.
        table: The table; the only one when None.
        text: Column of the text; found when None.
        vector: Column of the vector; found when None.
        facts: File in which an index of ours records its model.

    Raises:
        LusiferError: If it cannot be read, or texts or vectors are not to be found.
    """

    def __init__(
        self,
        location: str,
        folder: Path,
        table: str | None,
        text: str | None,
        vector: str | None,
        *,
        facts: Path | None = None,
    ) -> None:
        self.location = location
        names = sorted(path.stem for path in folder.glob("*.lance"))
        name = choose_part(f"the LanceDB folder {str(folder)!r}", "table", names, table, str(folder))
        self.describe = f"the LanceDB table {name!r} of {str(folder)!r}"
        try:
            import lancedb
        except ImportError as error:
            raise LusiferError(f"{self.describe} needs LanceDB: pip install 'lusifer[search]'") from error
        with self._errors():
            self._table = lancedb.connect(str(folder)).open_table(name)
            schema, self.rows = self._table.schema, self._table.count_rows()
        self._text, self._vector, self._id = choose_columns(self.describe, schema, text, vector)
        if not self.rows:
            raise LusiferError(f"{self.describe} is empty: it has no rows")
        self.dimension = self._width(schema.field(self._vector).type)
        if facts is not None:
            with self._errors():
                self.origin = origin_of(json.loads(facts.read_text(encoding="utf-8")))
        self.describe += f" (text in {self._text!r}, {self.dimension} dimensions in {self._vector!r})"

    def _errors(self) -> AbstractContextManager[None]:
        return reading(self.describe)

    @property
    def _columns(self) -> list[str]:
        return [self._text, self._vector, *([self._id] if self._id else [])]

    def _width(self, kind: pa.DataType) -> int:
        if pa.types.is_fixed_size_list(kind):
            return int(kind.list_size)
        with self._errors():
            there = self._table.search().where(f"`{self._vector}` IS NOT NULL").limit(1).select([self._vector])
            if len(found := there.to_arrow()):
                return len(found[self._vector][0].as_py())
        raise LusiferError(f"{self.describe} has no vector in {self._vector!r}")

    def _read(self, size: int) -> Iterator[RawRows]:
        # By their places: a query without a limit collects its whole answer before it gives the first batch.
        for begin in range(0, self.rows, _TAKE):
            with self._errors():
                places = list(range(begin, min(begin + _TAKE, self.rows)))
                found = self._table.take_offsets(places).select(self._columns).to_arrow()
            for first in range(0, len(found), size):
                with self._errors():
                    rows = self._rows(found.slice(first, size))
                yield rows

    def _rows(self, found: pa.RecordBatch | pa.Table) -> RawRows:
        vectors, has = arrow_vectors(self.describe, found[self._vector], self.dimension)
        ids = [str(one) for one in found[self._id].to_pylist()] if self._id else None
        return RawRows(found[self._text].to_pylist(), vectors, has, ids)

    def _sample(self, count: int, draw: np.random.Generator) -> Rows:
        wanted = np.sort(draw.choice(self.rows, size=min(count, self.rows), replace=False))
        with self._errors():
            found = self._table.take_offsets(wanted.tolist()).select(self._columns).to_arrow()
            return self._joined([self._checked(self._rows(found), 0)])

    def nearest(self, vector: np.ndarray, k: int, *, exact: bool = False) -> list[Match]:
        """As `VectorTable.nearest`, always exact; LanceDB compares where rows have names, else we do."""
        kind = self._table.schema.field(self._vector).type
        if self._id is None or not pa.types.is_fixed_size_list(kind) or kind.value_type != pa.float32():
            return super().nearest(vector, k, exact=exact)
        query = np.asarray(vector, dtype=np.float32)
        with self._errors():
            # An approximate index that somebody made may be of another metric.
            search = self._table.search(query, vector_column_name=self._vector).distance_type("cosine")
            found = search.bypass_vector_index().limit(k).select([*self._columns, "_distance"]).to_arrow()
            return nearest_of([self._checked(self._rows(found), 0)], query, k) if len(found) else []


class ChromaTable(VectorTable):
    """A collection of Chroma's folder, read by Chroma itself: it keeps vectors in files that it does not document.

    Args:
        location: As it was asked for.
        folder: Folder with ``chroma.sqlite3``.
        collection: The collection; the only one when None.
        text: Key of the text in the metadata; the documents, or found when None.

    Raises:
        LusiferError: If it cannot be read, or texts or vectors are not to be found.
    """

    def __init__(self, location: str, folder: Path, collection: str | None, text: str | None) -> None:
        self.location, self._folder = location, folder
        what = f"the Chroma folder {str(folder)!r}"
        self.describe = what
        client = self._client()
        with self._errors():
            names = sorted(one.name for one in client.list_collections())
        name = choose_part(what, "collection", names, collection, str(folder))
        self.describe = f"the Chroma collection {name!r} of {str(folder)!r}"
        with self._errors():
            # Without its embedding function: Chroma's own would load a model.
            self._collection = client.get_collection(name, embedding_function=None)
            self.rows = self._collection.count()
            look = self._collection.get(limit=_LOOK, include=["documents", "metadatas", "embeddings"])
        if not self.rows:
            raise LusiferError(f"{self.describe} is empty: it has no records")
        where, self._text = text_getter(self.describe, _payloads(look), text)
        given = look["embeddings"]
        self.dimension = len(given[0]) if given is not None and len(given) else 0
        if not self.dimension:
            raise LusiferError(f"{self.describe} has no vectors")
        self.describe += f" (text in {where!r}, {self.dimension} dimensions)"

    def _client(self) -> Any:
        try:
            import chromadb
            from chromadb.config import Settings
        except ImportError as error:
            raise LusiferError(f"{self.describe} needs Chroma: pip install 'lusifer[chroma]'") from error
        # "validate": a folder of an older version is refused, where Chroma would change it for good.
        settings = Settings(anonymized_telemetry=False, migrations="validate")
        try:
            with self._errors():
                return chromadb.PersistentClient(str(self._folder), settings=settings)
        except LusiferError as error:
            if "migrations" not in str(error).lower():
                raise
            newer = "was written by another version of Chroma; open it once with the installed one, which upgrades it"
            raise LusiferError(f"{self.describe} {newer}, or install the version that made it") from error

    def _errors(self) -> AbstractContextManager[None]:
        from chromadb.errors import ChromaError

        return reading(self.describe, ChromaError)

    def _read(self, size: int) -> Iterator[RawRows]:
        for begin in range(0, self.rows, size):
            yield self._rows(limit=size, offset=begin)

    def _rows(self, **which: Any) -> RawRows:
        with self._errors():
            found = self._collection.get(include=["documents", "metadatas", "embeddings"], **which)
        return self._unpacked(found)

    def _unpacked(self, found: Any) -> RawRows:
        texts = [self._text(payload) for payload in _payloads(found)]
        return RawRows(texts, np.asarray(found["embeddings"], dtype=np.float32), None, list(found["ids"]))

    def _sample(self, count: int, draw: np.random.Generator) -> Rows:
        with self._errors():
            ids = self._collection.get(include=[])["ids"]
        wanted = np.sort(draw.choice(len(ids), size=min(count, len(ids)), replace=False))
        return self._joined([self._checked(self._rows(ids=[ids[row] for row in wanted]), 0)])

    def nearest(self, vector: np.ndarray, k: int, *, exact: bool = False) -> list[Match]:
        """As `VectorTable.nearest`; Chroma's graph finds the rows, by the metric of the collection."""
        if exact:
            return super().nearest(vector, k, exact=True)
        query = np.asarray(vector, dtype=np.float32)
        with self._errors():
            answer = self._collection.query(
                query_embeddings=[query.tolist()],
                n_results=min(k, self.rows),
                include=["documents", "metadatas", "embeddings"],
            )
        first = {key: answer[key][0] for key in ("ids", "documents", "metadatas", "embeddings")}
        return nearest_of([self._checked(self._unpacked(first), 0)], query, k) if len(first["ids"]) else []


def _payloads(found: Any) -> Sequence[dict[str, Any]]:
    """Records as one mapping each, their document first."""
    documents, metadatas = found["documents"], found["metadatas"]
    return [
        ({"document": document} if document else {}) | {k: v for k, v in (metadata or {}).items() if k != "document"}
        for document, metadata in zip(documents, metadatas, strict=True)
    ]
