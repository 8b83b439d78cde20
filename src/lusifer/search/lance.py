"""An index in a folder, kept by LanceDB: no server, nothing to set up.

The folder holds ``facts.json`` (the model), ``lance`` (the texts) and, once drawn, ``map.json``. LanceDB writes a new
version for every change, so an interrupted one leaves the version before.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from lusifer.errors import LusiferError
from lusifer.search.filters import Filter, OneOf, to_sql
from lusifer.search.lexical import words
from lusifer.search.store import Entry, Facts, Hit, Store

# Up to here, comparing with every vector takes milliseconds.
APPROXIMATE_FROM = 50_000
_TABLE = "texts"
_KEEP_VERSIONS = timedelta(hours=1)  # For readers that are still at an older one.
_MIN_TRAIN = 256  # Rows from which LanceDB can train its partitions.


class LanceStore(Store):
    """See `Store`; use `create` or `open`."""

    def __init__(self, path: Path, facts: Facts, table: Any) -> None:
        self.path, self.facts, self._table = path, facts, table
        self.location = str(path)

    @classmethod
    def create(cls, path: Path, facts: Facts) -> LanceStore:
        """Makes an empty index.

        Args:
            path: New or empty folder.
            facts: The model and the columns.

        Raises:
            LusiferError: If something else is there, or the folder cannot be written.
        """
        lancedb = _lancedb()
        # What an interrupted creation left has no facts yet, and is made again.
        mode = "overwrite" if (path / "lance").exists() else "create"
        if path.exists() and (not path.is_dir() or {entry.name for entry in path.iterdir()} - {"lance"}):
            raise LusiferError(f"{str(path)!r} exists and is not an empty folder; choose another name for the index")
        try:
            path.mkdir(parents=True, exist_ok=True)
            with _one_line(path):
                table = _connect(lancedb, path).create_table(_TABLE, schema=_schema(facts), mode=mode)
                table.create_index("id", config=lancedb.index.BTree())
                # The words are made by us, for every script: see lexical.py.
                plain = lancedb.index.FTS(
                    base_tokenizer="whitespace",
                    max_token_length=None,
                    lower_case=False,
                    stem=False,
                    remove_stop_words=False,
                    ascii_folding=False,
                )
                table.create_index("words", config=plain)
            staging = path / ".facts.json"
            staging.write_text(json.dumps(facts.to_dict(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
            os.replace(staging, path / "facts.json")
        except OSError as error:
            raise LusiferError(f"cannot write the index {str(path)!r}: {error.strerror or error}") from error
        return cls(path, facts, table)

    @classmethod
    def open(cls, path: Path) -> LanceStore:
        """Opens an index.

        Raises:
            LusiferError: If there is none, or it is damaged.
        """
        lancedb = _lancedb()
        file = path / "facts.json"
        if not file.is_file():
            raise LusiferError(f"no index at {str(path)!r}: it has no facts.json (make one with `lusifer index add`)")
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise LusiferError(f"the index {str(path)!r} is damaged: facts.json is not JSON; build it anew") from error
        facts = Facts.from_dict(told, str(path))
        with _one_line(path):
            table = _connect(lancedb, path).open_table(_TABLE)
            if table.schema != _schema(facts):
                raise LusiferError(f"the index {str(path)!r} is damaged: facts.json does not fit its texts")
        return cls(path, facts, table)

    @property
    def folder(self) -> Path:
        """The folder of the index."""
        return self.path

    def upsert(self, entries: Sequence[Entry], vectors: np.ndarray) -> None:
        """See `Store.upsert`."""
        import pyarrow as pa

        flat = pa.array(self.checked(entries, vectors).reshape(-1))
        columns = {
            "id": [entry.id for entry in entries],
            "text": [entry.text for entry in entries],
            "lang": [entry.lang for entry in entries],
            "words": [" ".join(words(entry.text)) for entry in entries],
            "vector": pa.FixedSizeListArray.from_arrays(flat, self.facts.dimension),
        }
        for name in self.facts.columns:
            columns[name] = [entry.metadata.get(name) for entry in entries]
        with _one_line(self.path):
            rows = pa.table(columns, schema=_schema(self.facts))
            self._table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(rows)

    def fetch(self, ids: Sequence[str]) -> dict[str, tuple[Entry, np.ndarray]]:
        """See `Store.fetch`."""
        if not ids:
            return {}
        with _one_line(self.path):
            query = self._table.search().where(to_sql(OneOf("id", tuple(ids)))).limit(len(ids))
            rows = query.select(self._columns("vector")).to_arrow()
        entries, vectors = self._entries(rows), _matrix(rows, self.facts.dimension)
        return {entry.id: (entry, vector) for entry, vector in zip(entries, vectors, strict=True)}

    def sample(self, count: int) -> tuple[list[Entry], np.ndarray]:
        """See `Store.sample`; the same content gives the same sample."""
        total = self.count()
        rows = np.sort(np.random.default_rng(0).permutation(total)[:count]).tolist()
        if not rows:
            return [], np.empty((0, self.facts.dimension), dtype=np.float32)
        with _one_line(self.path):
            found = self._table.take_offsets(rows).select(self._columns("vector")).to_arrow()
        return self._entries(found), _matrix(found, self.facts.dimension)

    def count(self, where: Filter | str | None = None) -> int:
        """See `Store.count`."""
        condition = self.parsed(where)
        with _one_line(self.path):
            return self._table.count_rows(to_sql(condition) if condition else None)

    def languages(self) -> dict[str, int]:
        """See `Store.languages`."""
        with _one_line(self.path):
            tags = self._table.search().select(["lang"]).limit(self.count()).to_arrow()["lang"].to_pylist()
        return dict(Counter(tags).most_common())

    def search(
        self, vector: np.ndarray, *, k: int = 10, where: Filter | str | None = None, exact: bool = False
    ) -> list[Hit]:
        """See `Store.search`."""
        condition = self.parsed(where)
        with _one_line(self.path):
            query = self._table.search(np.asarray(vector, dtype=np.float32), vector_column_name="vector")
            # The approximate index keeps shortened vectors; the best are ranked again by the whole ones.
            query = query.distance_type("cosine").refine_factor(4).limit(k)
            if exact:
                query = query.bypass_vector_index()
            if condition is not None:
                query = query.where(to_sql(condition), prefilter=True)
            rows = query.select([*self._columns(), "_distance"]).to_arrow()
        scores = [1 - distance for distance in rows["_distance"].to_pylist()]
        return [Hit(*pair) for pair in zip(self._entries(rows), scores, strict=True)]

    def bm25(self, query: str, *, k: int = 10, where: Filter | str | None = None) -> list[Hit]:
        """See `Store.bm25`."""
        from lancedb.query import MatchQuery

        terms, condition = " ".join(words(query)), self.parsed(where)
        if not terms:
            return []
        with _one_line(self.path):
            asked = self._table.search(MatchQuery(terms, "words"), query_type="fts").limit(k)
            if condition is not None:
                asked = asked.where(to_sql(condition), prefilter=True)
            rows = asked.select([*self._columns(), "_score"]).to_arrow()
        return [Hit(*pair) for pair in zip(self._entries(rows), rows["_score"].to_pylist(), strict=True)]

    def build(self) -> None:
        """See `Store.build`; partitions of vectors in 8 bits a dimension (IVF_SQ).

        HNSW graphs in the partitions take sixty times as long to build and found nothing sooner at this size.

        Raises:
            LusiferError: If there are fewer than 256 texts, which need none.
        """
        if self.count() < _MIN_TRAIN:
            raise LusiferError(f"an approximate index needs {_MIN_TRAIN} texts; below that, every search is exact")
        with _one_line(self.path):
            self._table.create_index("vector", config=_lancedb().index.IvfSq(distance_type="cosine"))
            self._table.optimize(cleanup_older_than=_KEEP_VERSIONS)

    def tidy(self) -> None:
        """See `Store.tidy`; makes the approximate index when the texts have become many."""
        if self.count() >= APPROXIMATE_FROM and not self.approximate():
            self.build()
            return
        with _one_line(self.path):
            self._table.optimize(cleanup_older_than=_KEEP_VERSIONS)

    def approximate(self) -> bool:
        """See `Store.approximate`."""
        with _one_line(self.path):
            return any("vector" in index.columns for index in self._table.list_indices())

    def version(self) -> str:
        """See `Store.version`."""
        with _one_line(self.path):
            return str(self._table.version)

    def _delete(self, ids: Sequence[str] | None, where: Filter | None) -> None:
        condition = where if ids is None else OneOf("id", tuple(ids))
        assert condition is not None
        with _one_line(self.path):
            self._table.delete(to_sql(condition))

    def _columns(self, *more: str) -> list[str]:
        return ["id", "text", "lang", *self.facts.columns, *more]

    def _entries(self, rows: Any) -> list[Entry]:
        names = list(self.facts.columns)
        return [
            Entry(row["id"], row["text"], row["lang"], {name: row[name] for name in names})
            for row in rows.select(self._columns()).to_pylist()
        ]


def _lancedb() -> Any:
    try:
        import lancedb
        import lancedb.index
    except ImportError as error:
        raise LusiferError("an index needs LanceDB: pip install 'lusifer[search]'") from error
    return lancedb


def _connect(lancedb: Any, path: Path) -> Any:
    # Without an interval, an open index would never see what another process adds.
    return lancedb.connect(str(path / "lance"), read_consistency_interval=timedelta(0))


def _schema(facts: Facts) -> Any:
    import pyarrow as pa

    types = {"string": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
    fields = [pa.field(name, pa.string()) for name in ("id", "text", "lang", "words")]
    fields.append(pa.field("vector", pa.list_(pa.float32(), facts.dimension)))
    return pa.schema(fields + [pa.field(name, types[kind]) for name, kind in facts.columns.items()])


def _matrix(rows: Any, dimension: int) -> np.ndarray:
    flat = rows["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat, dtype=np.float32).reshape(-1, dimension)


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """What LanceDB cannot do becomes one line; its own messages run over many."""
    try:
        yield
    except (ValueError, RuntimeError, OSError, TypeError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise LusiferError(f"the index {str(path)!r} cannot be used; it may be damaged: {reason}") from error
