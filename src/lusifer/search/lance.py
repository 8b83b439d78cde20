"""An index in a folder, kept by LanceDB: no server, nothing to set up.

The folder holds ``facts.json`` (the model), ``lance`` (the texts) and, once drawn, ``map.json``. LanceDB writes a new
version for every change, so an interrupted one leaves the version before. A change is synced to the disk before its
call returns, and older versions go only after that: `LanceStore.repair` goes back to one of them after a power cut.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from lusifer.errors import LusiferError, first_line
from lusifer.locks import INSIDE, alone_at
from lusifer.publishing import make_folder, sync_tree, write_json
from lusifer.search.filters import Filter, OneOf, to_sql
from lusifer.search.lexical import words
from lusifer.search.store import Entry, Hit, IndexInfo, Store

# Up to here, comparing with every vector takes milliseconds.
APPROXIMATE_FROM = 50_000
_SYSTEM = {os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)}
_TABLE = "texts"
_KEEP_VERSIONS = timedelta(hours=1)  # For readers that are still at an older one.
_DELETED = 10_000  # Rows of one deletion.
_ALL_VERSIONS = timedelta(days=36_500)
_MIN_TRAIN = 256  # Rows from which LanceDB can train its partitions.


class LanceStore(Store):
    """See `Store`; use `create` or `open`."""

    def __init__(self, path: Path, info: IndexInfo, table: Any) -> None:
        self.path, self.info, self._table = path, info, table
        self.location = str(path)
        self._synced: dict[str, object] = {}  # Most of an index never changes again.

    @classmethod
    def create(cls, path: Path, info: IndexInfo) -> LanceStore:
        """Makes an empty index in a new or empty folder.

        Raises:
            LusiferError: If something else is there, or the folder cannot be written.
        """
        _lancedb()
        with alone_at(path):
            return cls._create(path, info)

    @classmethod
    def _create(cls, path: Path, info: IndexInfo) -> LanceStore:
        lancedb = _lancedb()
        names = {file.name for file in path.iterdir()} if path.is_dir() else set()
        ours = ("lance", INSIDE)
        if path.is_file() or any(name not in ours and not name.startswith(".facts.json") for name in names):
            raise LusiferError(f"{str(path)!r} exists and is not an empty folder; choose another name for the index")
        try:
            make_folder(path)
            # What an interrupted creation left has no facts.json yet, and perhaps files that LanceDB cannot read.
            shutil.rmtree(path / "lance" / f"{_TABLE}.lance", ignore_errors=True)
            with _one_line(path):
                table = _connect(lancedb, path).create_table(_TABLE, schema=_schema(info))
                table.create_index("id", config=lancedb.index.BTree())
                # The words are made by us, for every script: see lexical.py.
                off = dict.fromkeys(("lower_case", "stem", "remove_stop_words", "ascii_folding"), False)
                plain = lancedb.index.FTS(base_tokenizer="whitespace", max_token_length=None, **off)
                table.create_index("words", config=plain)
            sync_tree(path)
            write_json(path / "facts.json", info.to_dict())
        except OSError as error:
            raise LusiferError(f"cannot write the index {str(path)!r}: {first_line(error)}") from error
        return cls(path, info, table)

    @staticmethod
    def exists(path: Path) -> bool:
        """Whether there is something that claims to be an index."""
        return (path / "facts.json").exists()

    @classmethod
    def open(cls, path: Path) -> LanceStore:
        """Opens an index.

        Raises:
            LusiferError: If there is none, or it is damaged.
        """
        lancedb, info = _lancedb(), _info(path)
        with _one_line(path):
            table = _connect(lancedb, path).open_table(_TABLE)
            if table.schema != _schema(info):
                raise LusiferError(f"the index {str(path)!r} is damaged: facts.json does not fit its texts")
        return cls(path, info, table)

    @classmethod
    def repair(cls, path: Path) -> tuple[LanceStore, int]:
        """Goes back to the newest version that can be read whole.

        The manifests of newer ones are moved to ``damaged`` in the folder of the index.

        Args:
            path: The folder of the index; no other process is at work in it.

        Returns:
            The index, and how many versions it went back.

        Raises:
            LusiferError: If no version can be read; then nothing is changed.
        """
        _info(path)  # Without it, going back is of no use.
        folder, aside = path / "lance" / f"{_TABLE}.lance" / "_versions", path / "damaged"
        manifests = sorted(folder.glob("*.manifest"), key=_version_of)
        for back in range(len(manifests)):
            try:
                store = cls.open(path)
                store.read_all()
                sync_tree(path)
                return store, back
            except LusiferError:
                make_folder(aside)
                newest = manifests.pop()
                newest.rename(aside / newest.name)
        for manifest in aside.glob("*.manifest"):
            manifest.rename(folder / manifest.name)
        raise LusiferError(f"no version of the index {str(path)!r} can be read; rebuild it")

    def read_all(self) -> None:
        """Reads every text and vector, and asks the indexes.

        Raises:
            LusiferError: If something cannot be read.
        """
        with self._errors():
            count, found, last = self._table.count_rows(), 0, None
            for batch in self._table.search().limit(count).to_batches():
                found, last = found + len(batch), batch.slice(len(batch) - 1).to_pylist()[0] if len(batch) else last
            if found != count:
                raise ValueError(f"{found} of {count} texts can be read")
            if last is not None and not self._fetch([last["id"]])[0]:
                raise ValueError(f"{last['id']!r} is not found by its id")
            if last is not None:
                self._bm25(last["words"].split()[:1] or ["none"], 1, None)
                self._nearest(np.asarray(last["vector"], dtype=np.float32), 1, None, exact=False)

    @property
    def folder(self) -> Path:
        """The folder of the index."""
        return self.path

    def writing(self, *, wait: bool = False) -> AbstractContextManager[None]:
        """See `Store.writing`: LanceDB lets two processes insert one id twice."""
        return alone_at(self.path, wait=wait)

    def _errors(self) -> AbstractContextManager[None]:
        return _one_line(self.path)

    def _upsert(self, entries: Sequence[Entry], vectors: np.ndarray) -> None:
        new = self._table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
        new.execute(self._rows(entries, vectors))
        sync_tree(self.path, self._synced)

    def _rows(self, entries: Sequence[Entry], vectors: np.ndarray) -> Any:
        import pyarrow as pa

        columns: dict[str, Any] = {key: [getattr(one, key) for one in entries] for key in ("id", "text", "lang")}
        columns["words"] = [" ".join(words(entry.text)) for entry in entries]
        columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), self.info.dimension)
        columns |= {name: [entry.metadata.get(name) for entry in entries] for name in self.info.columns}
        return pa.table(columns, schema=_schema(self.info))

    def _fetch(self, ids: Sequence[str]) -> tuple[list[Entry], np.ndarray]:
        query = self._table.search().where(to_sql(OneOf("id", tuple(ids)))).limit(len(ids))
        return self._with_vectors(query)

    def _sample(self, count: int) -> tuple[list[Entry], np.ndarray]:
        # A seed: the same content gives the same sample.
        rows = np.sort(np.random.default_rng(0).permutation(self._table.count_rows())[:count]).tolist()
        if not rows:
            return [], np.empty((0, self.info.dimension), dtype=np.float32)
        return self._with_vectors(self._table.take_offsets(rows))

    def _count(self, condition: Filter | None) -> int:
        return self._table.count_rows(to_sql(condition) if condition else None)

    def _languages(self) -> dict[str, int]:
        tags = self._table.search().select(["lang"]).limit(self._table.count_rows()).to_arrow()["lang"].to_pylist()
        return dict(Counter(tags).most_common())

    def _nearest(self, vector: np.ndarray, k: int, condition: Filter | None, exact: bool) -> list[Hit]:
        # The approximate index keeps shortened vectors; the best are ranked again by the whole ones.
        query = self._table.search(vector, vector_column_name="vector").distance_type("cosine").refine_factor(4)
        rows = self._best(query.bypass_vector_index() if exact else query, k, condition, "_distance")
        return [Hit(entry, 1 - distance) for entry, distance in rows]

    def _bm25(self, terms: list[str], k: int, condition: Filter | None) -> list[Hit]:
        from lancedb.query import MatchQuery

        query = self._table.search(MatchQuery(" ".join(terms), "words"), query_type="fts")
        return [Hit(*row) for row in self._best(query, k, condition, "_score")]

    def _build(self) -> None:
        """Partitions of vectors in 8 bits a dimension (IVF_SQ).

        HNSW graphs in the partitions take sixty times as long to build and found nothing sooner at this size.
        """
        if self._table.count_rows() < _MIN_TRAIN:
            raise LusiferError(f"an approximate index needs {_MIN_TRAIN} texts; below that, every search is exact")
        self._table.create_index("vector", config=_lancedb().index.IvfSq(distance_type="cosine"))
        self._optimize()

    def _tidy(self) -> None:
        """Makes the approximate index, too, when the texts have become many."""
        if self._table.count_rows() >= APPROXIMATE_FROM and not self._approximate():
            self._build()
        else:
            self._optimize()

    def _optimize(self) -> None:
        self._table.optimize(cleanup_older_than=_ALL_VERSIONS)
        sync_tree(self.path, self._synced)  # Before the versions go that a power cut would leave.
        self._table.optimize(cleanup_older_than=_KEEP_VERSIONS)
        sync_tree(self.path, self._synced)

    def _heal(self) -> int:
        import pyarrow.compute as pc

        rows = self._table.search().with_row_id(True).select(["id"]).limit(self._table.count_rows()).to_arrow()
        counts = rows["id"].value_counts()
        doubled = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
        if not len(doubled):
            return 0
        latest: dict[str, int] = {}
        extra: list[int] = []
        for row in rows.filter(pc.is_in(rows["id"], doubled)).sort_by("_rowid").to_pylist():
            if row["id"] in latest:
                extra.append(latest[row["id"]])
            latest[row["id"]] = row["_rowid"]
        for begin in range(0, len(extra), _DELETED):
            self._table.delete(f"_rowid in ({', '.join(map(str, extra[begin : begin + _DELETED]))})")
        return len(extra)

    def _approximate(self) -> bool:
        return any("vector" in index.columns for index in self._table.list_indices())

    def _version(self) -> str:
        return str(self._table.version)

    def _delete(self, ids: Sequence[str] | None, condition: Filter | None) -> None:
        chosen = condition if ids is None else OneOf("id", tuple(ids))
        assert chosen is not None
        self._table.delete(to_sql(chosen))
        sync_tree(self.path, self._synced)

    def _best(self, query: Any, k: int, condition: Filter | None, score: str) -> list[tuple[Entry, float]]:
        """The first k texts of a query, and the column that ranks them."""
        if condition is not None:
            query = query.where(to_sql(condition), prefilter=True)
        rows = query.limit(k).select([*self._columns(), score]).to_arrow()
        return list(zip(self._entries(rows), rows[score].to_pylist(), strict=True))

    def _with_vectors(self, query: Any) -> tuple[list[Entry], np.ndarray]:
        """The texts of a query and their (n, dim) float32 vectors."""
        rows = query.select(self._columns("vector")).to_arrow()
        flat = rows["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return self._entries(rows), np.asarray(flat, dtype=np.float32).reshape(-1, self.info.dimension)

    def _columns(self, *more: str) -> list[str]:
        return ["id", "text", "lang", *self.info.columns, *more]

    def _entries(self, rows: Any) -> list[Entry]:
        return [
            Entry(row["id"], row["text"], row["lang"], {name: row[name] for name in self.info.columns})
            for row in rows.select(self._columns()).to_pylist()
        ]


def _lancedb() -> Any:
    try:
        import lancedb
        import lancedb.index
    except ImportError as error:
        raise LusiferError("an index needs LanceDB: pip install 'lusifer[search]'") from error
    return lancedb


def _info(path: Path) -> IndexInfo:
    """What an index records about itself; raises as `LanceStore.open`."""
    file = path / "facts.json"
    if not file.is_file():
        raise LusiferError(f"no index at {str(path)!r}: it has no facts.json (make one with `lusifer index add`)")
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LusiferError(f"the index {str(path)!r} is damaged: facts.json is not JSON; rebuild it") from error
    return IndexInfo.from_dict(stored, str(path))


def _connect(lancedb: Any, path: Path) -> Any:
    # Without an interval, an open index would never see what another process adds.
    return lancedb.connect(str(path / "lance"), read_consistency_interval=timedelta(0))


def _schema(info: IndexInfo) -> Any:
    import pyarrow as pa

    types = {"string": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
    fields = [pa.field(name, pa.string()) for name in ("id", "text", "lang", "words")]
    fields.append(pa.field("vector", pa.list_(pa.float32(), info.dimension)))
    return pa.schema(fields + [pa.field(name, types[kind]) for name, kind in info.columns.items()])


def _version_of(manifest: Path) -> int:
    """The version of a manifest; newer formats count down from 2**64 - 1, so that the newest is listed first."""
    number = int(manifest.stem)
    return number if number < 2**63 else 2**64 - 1 - number


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Turns LanceDB's errors into one line; its own messages run over many."""
    try:
        yield
    except (ValueError, RuntimeError, OSError, TypeError) as error:
        raise LusiferError(_told(error, path)) from error


def _told(error: Exception, path: Path) -> str:
    """What is the matter with an index, without the places in LanceDB's source that it names."""
    reason = re.sub(r",?\s*\S*\.rs:\d+(:\d+)?", "", first_line(error))[:200]
    if re.search("conflict|concurrent", str(error), re.IGNORECASE):
        return f"the index {str(path)!r} was changed by another process meanwhile; run the same command again"
    if reason in _SYSTEM:
        lost = "no existing data is lost; run the same command again to resume"
        return f"cannot write the index {str(path)!r}: {reason}; {lost}"
    return f"the index {str(path)!r} cannot be used; it may be damaged (lusifer index repair): {reason}"
