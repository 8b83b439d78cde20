"""An index kept by Qdrant, a server: for several machines, or more texts than one folder should hold.

Vectors and BM25 weights stand side by side in one collection. The weight of a word is the part of BM25 that its text
alone decides; the server, which knows all texts, multiplies the inverse document frequency.
"""

from __future__ import annotations

import hashlib
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np

from lusifer.data.vectors.qdrant import qdrant_library
from lusifer.errors import LusiferError, first_line
from lusifer.search.filters import Compare, Filter, Not, OneOf, Several
from lusifer.search.lexical import words
from lusifer.search.store import Entry, Hit, IndexInfo, Store

_NAMESPACE = uuid.UUID("8d0a1c1e-6d5c-4f0e-9f5e-2f4f1c6f7a10")
_SIGNS = {"<": "lt", "<=": "lte", ">": "gt", ">=": "gte"}
# BM25's usual constants. The mean length is fixed: it would change with every text added.
_K1, _B, _MEAN_WORDS = 1.2, 0.75, 64
_UPLOAD = 256


class QdrantStore(Store):
    """See `Store`; use `create` or `open`. The client may be a local one, too."""

    def __init__(self, client: Any, collection: str, info: IndexInfo) -> None:
        self.client, self.collection, self.info = client, collection, info
        self.location = collection
        self._models = qdrant_library().models

    @classmethod
    def create(cls, client: Any, collection: str, info: IndexInfo) -> QdrantStore:
        """Makes an empty collection.

        Raises:
            LusiferError: If it exists, or the server cannot be reached.
        """
        models = qdrant_library().models
        with _one_line(collection):
            if client.collection_exists(collection):
                raise LusiferError(f"there is a collection {collection!r} already; choose another name")
            client.create_collection(
                collection,
                vectors_config={"text": models.VectorParams(size=info.dimension, distance=models.Distance.COSINE)},
                sparse_vectors_config={"words": models.SparseVectorParams(modifier=models.Modifier.IDF)},
                metadata={"lusifer": info.to_dict()},
            )
            # The server filters and counts quickly only by what it has indexed.
            kinds = {"string": "keyword", "int": "integer", "float": "float", "bool": "bool"}
            for name, kind in {"id": "string", "lang": "string", **info.columns}.items():
                client.create_payload_index(collection, _path(name), field_schema=kinds[kind])
        return cls(client, collection, info)

    @staticmethod
    def exists(client: Any, collection: str) -> bool:
        """Whether there is such a collection."""
        with _one_line(collection):
            return bool(client.collection_exists(collection))

    @staticmethod
    def is_ours(client: Any, collection: str) -> bool:
        """Whether `create` made the collection; also where there is none, which `open` says."""
        with _one_line(collection):
            if not client.collection_exists(collection):
                return True
            return "lusifer" in (client.get_collection(collection).config.metadata or {})

    @classmethod
    def open(cls, client: Any, collection: str) -> QdrantStore:
        """Opens a collection that `create` made.

        Raises:
            LusiferError: If there is none, it is another's, or the server cannot be reached.
        """
        with _one_line(collection):
            if not client.collection_exists(collection):
                raise LusiferError(f"there is no collection {collection!r}; make it with `lusifer index add`")
            stored = (client.get_collection(collection).config.metadata or {}).get("lusifer")
        if stored is None:
            raise LusiferError(f"the collection {collection!r} was not made by lusifer; choose another name")
        return cls(client, collection, IndexInfo.from_dict(stored, collection))

    def _errors(self) -> AbstractContextManager[None]:
        return _one_line(self.collection)

    def _upsert(self, entries: Sequence[Entry], vectors: np.ndarray) -> None:
        points = []
        for entry, vector in zip(entries, vectors, strict=True):
            sides = {"text": vector.tolist(), "words": self._weights(entry.text)}
            payload = {**asdict(entry), "metadata": {name: entry.metadata.get(name) for name in self.info.columns}}
            points.append(self._models.PointStruct(id=_point(entry.id), vector=sides, payload=payload))
        for begin in range(0, len(points), _UPLOAD):
            self.client.upsert(self.collection, points[begin : begin + _UPLOAD])

    def _fetch(self, ids: Sequence[str]) -> tuple[list[Entry], np.ndarray]:
        return self._unpacked(self.client.retrieve(self.collection, [_point(id) for id in ids], with_vectors=["text"]))

    def _sample(self, count: int) -> tuple[list[Entry], np.ndarray]:
        """Another one each time."""
        drawn = self._models.SampleQuery(sample=self._models.Sample.RANDOM)
        answer = self.client.query_points(self.collection, query=drawn, limit=count, with_vectors=["text"])
        return self._unpacked(answer.points)

    def _count(self, condition: Filter | None) -> int:
        return self.client.count(self.collection, count_filter=self._filter(condition)).count

    def _languages(self) -> dict[str, int]:
        """The thousand most frequent."""
        facets = self.client.facet(self.collection, "lang", limit=1000, exact=True).hits
        return {str(facet.value): facet.count for facet in facets}

    def _nearest(self, vector: np.ndarray, k: int, condition: Filter | None, exact: bool) -> list[Hit]:
        # A local client compares with every vector anyway and warns of the parameter.
        how = {"search_params": self._models.SearchParams(exact=True)} if exact else {}
        return self._query(vector.tolist(), "text", k, condition, **how)

    def _bm25(self, terms: list[str], k: int, condition: Filter | None) -> list[Hit]:
        indices = list({_term(word): None for word in terms})
        weights = self._models.SparseVector(indices=indices, values=[1.0] * len(indices))
        return self._query(weights, "words", k, condition)

    def _build(self) -> None:
        """The server makes its graph by itself; this only asks it to begin now."""
        at_once = self._models.OptimizersConfigDiff(indexing_threshold=1)
        self.client.update_collection(self.collection, optimizers_config=at_once)

    def _tidy(self) -> None:
        """The server does it by itself."""

    def _approximate(self) -> bool:
        return bool(self.client.get_collection(self.collection).indexed_vectors_count)

    def _version(self) -> str:
        """The server gives no more than the number of texts."""
        return str(self._count(None))

    def _delete(self, ids: Sequence[str] | None, condition: Filter | None) -> None:
        points = None if ids is None else self._models.PointIdsList(points=[_point(id) for id in ids])
        chosen = points or self._models.FilterSelector(filter=self._filter(condition))
        self.client.delete(self.collection, points_selector=chosen)

    def _query(self, query: Any, using: str, k: int, condition: Filter | None, **how: Any) -> list[Hit]:
        how |= {"limit": k, "query_filter": self._filter(condition)}
        answer = self.client.query_points(self.collection, query=query, using=using, **how)
        return [Hit(self._entry(point), float(point.score)) for point in answer.points]

    def _unpacked(self, points: Sequence[Any]) -> tuple[list[Entry], np.ndarray]:
        """The texts of points and their (n, dim) float32 vectors."""
        vectors = np.array([point.vector["text"] for point in points], dtype=np.float32)
        return [self._entry(point) for point in points], vectors.reshape(-1, self.info.dimension)

    def _entry(self, point: Any) -> Entry:
        payload = point.payload
        return Entry(payload["id"], payload["text"], payload["lang"], payload["metadata"])

    def _weights(self, text: str) -> Any:
        """How much each word of a text counts in BM25, before the inverse document frequency."""
        counts = Counter(_term(word) for word in words(text))
        norm = _K1 * (1 - _B + _B * sum(counts.values()) / _MEAN_WORDS)
        values = [count * (_K1 + 1) / (count + norm) for count in counts.values()]
        return self._models.SparseVector(indices=list(counts), values=values)

    def _filter(self, condition: Filter | None) -> Any:
        return None if condition is None else self._models.Filter(must=[self._clause(condition)])

    def _clause(self, condition: Filter) -> Any:
        models = self._models
        match condition:
            case OneOf(_, ()):
                return models.HasIdCondition(has_id=[])  # No point has one of no ids.
            case OneOf(column, values):
                if any(isinstance(value, float | bool) for value in values) or self.info.columns.get(column) == "float":
                    return models.Filter(should=[self._equal(column, value) for value in values])
                return models.FieldCondition(key=_path(column), match=models.MatchAny(any=list(values)))
            case Compare(column, sign, value):
                bounds: Any = {_SIGNS[sign]: value}
                return models.FieldCondition(key=_path(column), range=models.Range(**bounds))
            case Not(inner):
                return models.Filter(must_not=[self._clause(inner)])
            case Several(word, parts):
                clauses: Any = {"must" if word == "AND" else "should": [self._clause(part) for part in parts]}
                return models.Filter(**clauses)

    def _equal(self, column: str, value: Any) -> Any:
        models = self._models
        if isinstance(value, bool):
            return models.FieldCondition(key=_path(column), match=models.MatchValue(value=value))
        return models.FieldCondition(key=_path(column), range=models.Range(gte=value, lte=value))


def _path(column: str) -> str:
    """Where a column stands in a point."""
    return column if column in ("id", "lang") else f"metadata.{column}"


def _point(id: str) -> str:
    """Qdrant names points by UUIDs only."""
    return str(uuid.uuid5(_NAMESPACE, id))


def _term(word: str) -> int:
    """A word as the index of a sparse vector: 32 bits."""
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8"), digest_size=4).digest(), "big")


@contextmanager
def _one_line(collection: str) -> Iterator[None]:
    """What the server or the way to it refuses becomes one line."""
    from qdrant_client.http.exceptions import ApiException

    try:
        yield
    except (ApiException, ValueError, OSError) as error:
        raise LusiferError(f"Qdrant, collection {collection!r}: {first_line(error)[:200]}") from error
