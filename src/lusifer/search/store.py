"""What every store of texts and vectors can do, whatever keeps them."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lusifer.errors import LusiferError
from lusifer.search.filters import COLUMN_TYPES, Filter, Value, parse_filter
from lusifer.search.lexical import words

FORMAT = 1
RRF_CONSTANT = 60  # Cormack et al. 2009, section 2.
RESERVED = ("id", "text", "lang", "vector", "words")
COLUMN_NAMES = f"names are letters, digits and _, and none of {', '.join(RESERVED)}; rename it in the input"
_NAME = re.compile(r"[^\W\d]\w*\Z")


def is_column_name(name: str) -> bool:
    """Whether a metadata column of an index may be called so."""
    return name not in RESERVED and _NAME.match(name) is not None


@dataclass(frozen=True)
class IndexInfo:
    """What an index records about itself.

    Attributes:
        model: Name of the model that made the vectors, as it was loaded.
        model_hash: Hash of its weights; see `lusifer.model.fingerprint.weights_hash`.
        columns: Metadata columns and their types: ``string``, ``int``, ``float`` or ``bool``.
        prompt: Put before every text when it is embedded; None in indexes of older versions, which had none.
    """

    model: str
    model_hash: str
    dimension: int
    columns: dict[str, str] = field(default_factory=dict)
    prompt: str | None = None

    def __post_init__(self) -> None:
        for name, kind in self.columns.items():
            if kind not in COLUMN_TYPES:
                raise LusiferError(f"metadata column {name!r} has type {kind!r}; known are {', '.join(COLUMN_TYPES)}")
            if not is_column_name(name):
                raise LusiferError(f"metadata column {name!r} cannot be kept: {COLUMN_NAMES}")

    @classmethod
    def from_dict(cls, stored: Any, location: str) -> IndexInfo:
        """Reads what `to_dict` gave; the location is for the message.

        Raises:
            LusiferError: If it is something else, or of a newer format.
        """
        try:
            if stored["format"] > FORMAT:
                raise LusiferError(f"the index {location!r} was made by a newer lusifer; update it")
            required = (stored["model"], stored["model_hash"], stored["dimension"], stored["columns"])
            return cls(*required, prompt=stored.get("prompt"))
        except (TypeError, KeyError, AttributeError) as error:
            raise LusiferError(f"the index {location!r} is damaged: its facts cannot be read; rebuild it") from error

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON."""
        fields = asdict(self)
        return {"format": FORMAT, **{name: value for name, value in fields.items() if value is not None}}


@dataclass(frozen=True)
class Entry:
    """A text of the index.

    Attributes:
        id: Its name, unique in the index.
        lang: Language code, or the name of its script where the language is not given.
        metadata: Value by column of `IndexInfo.columns`; what is missing is None.
    """

    id: str
    text: str
    lang: str
    metadata: dict[str, Value | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Hit:
    """A search result.

    Attributes:
        score: Cosine similarity, BM25 score, or the sum of reciprocal ranks, by the kind of search.
        ranks: In hybrid search, its rank from 1 on in each list that has it: ``vector``, ``bm25``.
    """

    entry: Entry
    score: float
    ranks: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """A flat dictionary for JSON."""
        flat = {**asdict(self.entry), "score": round(self.score, 4)}
        return {**flat, "ranks": self.ranks} if self.ranks else flat


class Store(ABC):
    """Texts, their unit vectors and metadata, searchable by meaning, by words and by both.

    Filters are those of `lusifer.search.filters`, as text or parsed. All methods raise LusiferError where a filter is
    wrong or what keeps the index cannot be reached or read. A backend implements the methods with an underscore.
    """

    info: IndexInfo
    location: str
    has_words = True  # Whether `bm25` and `hybrid` work.

    def writing(self, *, wait: bool = False) -> AbstractContextManager[None]:
        """Keeps other processes that write to the index out while a block runs, where the backend does not by itself.

        Args:
            wait: Wait for another process to end, instead of refusing.

        Raises:
            LusiferError: If another process writes to it.
        """
        return nullcontext()

    def upsert(self, entries: Sequence[Entry], vectors: np.ndarray) -> None:
        """Adds texts, or replaces those of the same id.

        Args:
            entries: Texts, every id once.
            vectors: (n, dim) float32 unit vectors.

        Raises:
            LusiferError: If the vectors do not fit the index.
        """
        rows = self._checked(entries, vectors)
        with self.writing(wait=True), self._errors():
            self._upsert(entries, rows)

    def fetch(self, ids: Sequence[str]) -> dict[str, tuple[Entry, np.ndarray]]:
        """Texts and (dim,) float32 vectors by id; ids that are not there are left out."""
        if not ids:
            return {}
        with self._errors():
            entries, vectors = self._fetch(ids)
        return {entry.id: (entry, vector) for entry, vector in zip(entries, vectors, strict=True)}

    def sample(self, count: int) -> tuple[list[Entry], np.ndarray]:
        """At most so many texts, drawn evenly, and their (n, dim) float32 vectors."""
        with self._errors():
            return self._sample(count)

    def count(self, where: Filter | str | None = None) -> int:
        """Number of texts that a filter keeps; all when None."""
        condition = self.parsed(where)
        with self._errors():
            return self._count(condition)

    def languages(self) -> dict[str, int]:
        """Number of texts by language tag, most first."""
        with self._errors():
            return self._languages()

    def build(self) -> None:
        """Makes or renews the index for approximate search."""
        with self.writing(wait=True), self._errors():
            self._build()

    def tidy(self) -> None:
        """Takes new texts into the indexes and frees what old versions hold; to be called after adding."""
        with self.writing(wait=True), self._errors():
            self._tidy()

    def heal(self) -> int:
        """Keeps one row, the latest, of each id; returns how many were too many.

        Earlier versions gave an id two rows where two processes added it at once.
        """
        with self.writing(wait=True), self._errors():
            return self._heal()

    def approximate(self) -> bool:
        """Whether there is an index for approximate search."""
        with self._errors():
            return self._approximate()

    def version(self) -> str:
        """A text that changes when the content does."""
        with self._errors():
            return self._version()

    @property
    def folder(self) -> Path | None:
        """Folder for what is derived from the index; None if it is not a folder."""
        return None

    def search(
        self, vector: np.ndarray, *, k: int = 10, where: Filter | str | None = None, exact: bool = False
    ) -> list[Hit]:
        """The nearest texts, the highest cosine similarity first.

        Args:
            vector: (dim,) unit vector.
            k: Texts wanted.
            where: Only texts this filter keeps; it is applied before the search, so k texts come back if there are.
            exact: Compare with every vector, even if there is an approximate index.
        """
        condition = self.parsed(where)
        with self._errors():
            return self._nearest(np.asarray(vector, dtype=np.float32), k, condition, exact)

    def bm25(self, query: str, *, k: int = 10, where: Filter | str | None = None) -> list[Hit]:
        """The texts that share the rarest words with a query (Robertson and Zaragoza 2009), best first.

        Args:
            query: The query.
            k: Texts wanted.
            where: Only texts this filter keeps.
        """
        condition, terms = self.parsed(where), words(query)
        with self._errors():
            return self._bm25(terms, k, condition) if terms else []

    def hybrid(
        self, vector: np.ndarray, query: str, *, k: int = 10, where: Filter | str | None = None, exact: bool = False
    ) -> list[Hit]:
        """Nearest texts and BM25, joined by reciprocal rank fusion; arguments as in `search` and `bm25`."""
        depth = max(5 * k, 50)
        nearest = self.search(vector, k=depth, where=where, exact=exact)
        return reciprocal_rank_fusion({"vector": nearest, "bm25": self.bm25(query, k=depth, where=where)})[:k]

    def delete(self, *, ids: Sequence[str] | None = None, where: Filter | str | None = None) -> int:
        """Deletes texts by id or by filter, and returns how many.

        Raises:
            LusiferError: If neither or both are given.
        """
        if (ids is None) == (where is None):
            raise LusiferError("choose what to delete: either ids or a filter")
        if ids is not None and not ids:
            return 0
        condition = self.parsed(where)
        with self.writing(wait=True):
            before = self.count()
            with self._errors():
                self._delete(ids, condition)
            return before - self.count()

    def parsed(self, where: Filter | str | None) -> Filter | None:
        """A filter, checked against the columns of the index."""
        if isinstance(where, str):
            return parse_filter(where, {"id": "string", "lang": "string", **self.info.columns})
        return where

    def check_model(self, name: str, model_hash: str, dimension: int) -> None:
        """Refuses a model other than the one that made the vectors.

        Raises:
            LusiferError: If the hash or the dimension differs.
        """
        if (model_hash, dimension) != (self.info.model_hash, self.info.dimension):
            raise LusiferError(
                f"the index {self.location!r} holds vectors of {self.info.model!r} (hash {self.info.model_hash}, "
                f"{self.info.dimension} dimensions), which cannot be compared with those of {name!r} (hash "
                f"{model_hash}, {dimension} dimensions); use that model, or make a new index"
            )

    def check_prompt(self, prompt: str, *, explicit: bool) -> None:
        """Refuses a document prompt other than the one that the vectors of the index were made with.

        Args:
            prompt: What would stand before new texts.
            explicit: Whether the caller asked for it. If not, an index that records no prompt goes on without one.

        Raises:
            LusiferError: If it differs.
        """
        recorded = self.info.prompt or ""
        if prompt != recorded and (self.info.prompt is not None or explicit):
            raise LusiferError(
                f"the index {self.location!r} was made with the document prompt {recorded!r}, not {prompt!r}; "
                f"give --prompt {recorded!r}, or make a new index"
            )

    def _checked(self, entries: Sequence[Entry], vectors: np.ndarray) -> np.ndarray:
        rows = np.ascontiguousarray(vectors, dtype=np.float32)
        if rows.shape != (len(entries), self.info.dimension):
            raise LusiferError(
                f"{len(entries)} texts need vectors of shape ({len(entries)}, {self.info.dimension}), not {rows.shape}"
            )
        lengths = np.linalg.norm(rows, axis=1)
        if not np.allclose(lengths, 1, atol=1e-2):
            raise LusiferError("vectors must have length 1 and no NaN; normalise them")
        if len({entry.id for entry in entries}) < len(entries):
            raise LusiferError("an id occurs twice among the texts to add")
        return rows

    @abstractmethod
    def _errors(self) -> AbstractContextManager[None]:
        """Turns the exceptions of the backend into LusiferErrors of one line."""

    @abstractmethod
    def _upsert(self, entries: Sequence[Entry], vectors: np.ndarray) -> None: ...
    @abstractmethod
    def _fetch(self, ids: Sequence[str]) -> tuple[list[Entry], np.ndarray]: ...
    @abstractmethod
    def _sample(self, count: int) -> tuple[list[Entry], np.ndarray]: ...
    @abstractmethod
    def _count(self, condition: Filter | None) -> int: ...
    @abstractmethod
    def _languages(self) -> dict[str, int]: ...
    @abstractmethod
    def _build(self) -> None: ...
    @abstractmethod
    def _tidy(self) -> None: ...
    def _heal(self) -> int:
        return 0  # A store whose ids are keys has none.

    @abstractmethod
    def _approximate(self) -> bool: ...
    @abstractmethod
    def _version(self) -> str: ...
    @abstractmethod
    def _nearest(self, vector: np.ndarray, k: int, condition: Filter | None, exact: bool) -> list[Hit]: ...
    @abstractmethod
    def _bm25(self, terms: list[str], k: int, condition: Filter | None) -> list[Hit]: ...
    @abstractmethod
    def _delete(self, ids: Sequence[str] | None, condition: Filter | None) -> None: ...


def reciprocal_rank_fusion(lists: dict[str, list[Hit]]) -> list[Hit]:
    """Joins ranked lists by name: a text scores the sum of 1 / (60 + rank) (Cormack et al. 2009, section 2)."""
    joined: dict[str, Hit] = {}
    for name, hits in lists.items():
        for rank, hit in enumerate(hits, start=1):
            known = joined.get(hit.entry.id, Hit(hit.entry, 0.0))
            score = known.score + 1 / (RRF_CONSTANT + rank)
            joined[hit.entry.id] = Hit(hit.entry, score, {**known.ranks, name: rank})
    return sorted(joined.values(), key=lambda hit: (-hit.score, hit.entry.id))
