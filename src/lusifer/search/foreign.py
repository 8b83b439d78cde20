"""A table of texts and vectors that something else made, searched like an index; nothing is written to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NoReturn

import numpy as np

from lusifer.data.vectors.rows import Rows, VectorTable, nearest_of
from lusifer.errors import LusiferError
from lusifer.search.filters import Compare, Filter, Not, OneOf, Several
from lusifer.search.lexical import script
from lusifer.search.store import Entry, Hit, IndexInfo, Store

_ALL_READ = 50_000  # Rows up to which the scripts of all are counted, which reads them.


class TableStore(Store):
    """See `Store`. A table has no metadata here: filters know ``id`` and ``lang``, which is the script of a text.

    Args:
        table: The table.
    """

    has_words = False

    def __init__(self, table: VectorTable) -> None:
        self.table, self.location = table, table.location
        origin = table.origin
        model, made_by, prompt = (origin.model, origin.model_hash, origin.prompt) if origin else ("", "", None)
        self.info = IndexInfo(model, made_by, table.dimension, prompt=prompt)

    def _errors(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _nearest(self, vector: np.ndarray, k: int, condition: Filter | None, exact: bool) -> list[Hit]:
        if condition is None:
            found = self.table.nearest(vector, k, exact=exact)
        else:
            found = nearest_of(self._kept(condition), vector, k)
        return [Hit(_entry(match.id, match.text), match.score) for match in found]

    def _kept(self, condition: Filter) -> Iterator[Rows]:
        for rows in self.table.blocks():
            entries = map(_entry, rows.ids, rows.texts)
            kept = [row for row, entry in enumerate(entries) if _holds(condition, entry)]
            if kept:
                yield Rows([rows.ids[row] for row in kept], [rows.texts[row] for row in kept], rows.vectors[kept])

    def _fetch(self, ids: Sequence[str]) -> tuple[list[Entry], np.ndarray]:
        rows = list(self._kept(OneOf("id", tuple(ids))))
        entries = [entry for part in rows for entry in map(_entry, part.ids, part.texts)]
        vectors = [part.vectors for part in rows] or [np.empty((0, self.info.dimension), dtype=np.float32)]
        return entries, np.concatenate(vectors)

    def _sample(self, count: int) -> tuple[list[Entry], np.ndarray]:
        rows = self.table.sample_rows(count)
        return list(map(_entry, rows.ids, rows.texts)), rows.vectors

    def _count(self, condition: Filter | None) -> int:
        return self.table.rows if condition is None else sum(len(rows.ids) for rows in self._kept(condition))

    def _languages(self) -> dict[str, int]:
        """Texts by script; of a large table all count as one, since counting would read it whole."""
        if self.table.rows > _ALL_READ:
            return {"any script": self.table.rows}
        return dict(Counter(script(text) for rows in self.table.blocks() for text in rows.texts).most_common())

    def _approximate(self) -> bool:
        return False

    def _version(self) -> str:
        return str(self.table.rows)

    def _bm25(self, terms: list[str], k: int, condition: Filter | None) -> list[Hit]:
        raise LusiferError(f"{self.location!r} was not made by lusifer and has no index of words; leave --hybrid out")

    def _upsert(self, entries: Sequence[Entry], vectors: np.ndarray) -> None:
        self._refuse()

    def _delete(self, ids: Sequence[str] | None, condition: Filter | None) -> None:
        self._refuse()

    def _build(self) -> None:
        self._refuse()

    def _tidy(self) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise LusiferError(
            f"{self.location!r} was not made by lusifer, which only reads it; change it with its own tool"
        )


def _entry(id: str, text: str) -> Entry:
    return Entry(id, text, script(text))


def _holds(condition: Filter, entry: Entry) -> bool:
    """Whether an entry is kept by a filter over ``id`` and ``lang``, which are texts and never missing."""
    match condition:
        case OneOf(column, values):
            return (entry.id if column == "id" else entry.lang) in values
        case Not(inner):
            return not _holds(inner, entry)
        case Several(word, parts):
            return (all if word == "AND" else any)(_holds(part, entry) for part in parts)
        case Compare():
            raise LusiferError("ids and scripts have no order; compare them with = and IN")
