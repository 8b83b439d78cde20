"""Texts and vectors in Qdrant: a collection of a server, or the folder that its client keeps without one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from lusifer.data.vectors.columns import choose, text_getter
from lusifer.data.vectors.rows import Match, Origin, RawRows, Rows, VectorTable, nearest_of, reading
from lusifer.errors import LusiferError, first_line

SCHEME = "qdrant+"
_LOOK = 64  # Points whose payloads show where the text stands.
_PAGE = 256  # Points of an answer: a thousand long vectors as JSON would be megabytes.


def connect(location: str) -> tuple[Any, str]:
    """A client and the name of a collection.

    Args:
        location: ``qdrant+http://host:6333/collection`` or https; a key in ``$QDRANT_API_KEY`` is sent along.

    Raises:
        LusiferError: If the location is not one, or the client is not installed.
    """
    parts = urlsplit(location.removeprefix(SCHEME))
    collection = parts.path.strip("/")
    if parts.scheme not in ("http", "https") or not parts.hostname or not collection or "/" in collection:
        raise LusiferError(f"{location!r} is not an index; write it like qdrant+http://localhost:6333/texts")
    url, key = f"{parts.scheme}://{parts.netloc}", os.environ.get("QDRANT_API_KEY")
    return qdrant_library().QdrantClient(url=url, api_key=key, timeout=60, check_compatibility=False), collection


def open_folder(folder: str, collection: str | None) -> tuple[Any, str]:
    """A client of a folder, which it shuts to others until it is closed, and the name of a collection.

    Raises:
        LusiferError: If somebody else has it open, or it has not just one collection and none is asked for.
    """
    library = qdrant_library()
    try:
        client = library.QdrantClient(path=folder)
    except RuntimeError as error:
        problem = f"the Qdrant folder {folder!r} cannot be opened; close any other process that has it open"
        raise LusiferError(f"{problem} ({first_line(error)[:120]})") from error
    except Exception as error:  # Its content is pickled: a damaged one may raise anything.
        raise LusiferError(f"the Qdrant folder {folder!r} cannot be read: {first_line(error)[:200]}") from error
    try:
        names = sorted(one.name for one in client.get_collections().collections)
        return client, choose_part(f"the Qdrant folder {folder!r}", "collection", names, collection, folder)
    except BaseException:
        client.close()
        raise


def choose_part(what: str, kind: str, names: Sequence[str], asked: str | None, folder: str) -> str:
    """The table or collection of a folder: the one asked for, or the only one.

    Raises:
        LusiferError: If it is not there, or there are several or none.
    """
    if asked is not None and asked not in names:
        raise LusiferError(f"{what} has no {kind} {asked!r}; it has {', '.join(names) or 'none'}")
    if asked is None and len(names) != 1:
        if not names:
            raise LusiferError(f"{what} has no {kind}")
        raise LusiferError(f"{what} has several: {', '.join(names)[:200]}; choose one, as in '{folder}#{names[0]}'")
    return asked or names[0]


class QdrantTable(VectorTable):
    """A collection.

    Args:
        location: As it was asked for.
        client: Of a server or a folder.
        collection: Its name.
        text: Key of the text in the payloads; found when None.
        vector: Name of the vector; the only one when None.
        local: Whether the client keeps a folder itself.

    Raises:
        LusiferError: If the server cannot be reached, or texts or vectors are not to be found.
    """

    def __init__(
        self, location: str, client: Any, collection: str, text: str | None, vector: str | None, *, local: bool
    ) -> None:
        self.location, self._client, self._collection, self._local = location, client, collection, local
        self._models = qdrant_library().models
        self.describe = f"the Qdrant collection {collection!r}"
        try:
            with self._errors():
                if not client.collection_exists(collection):
                    raise LusiferError(f"there is no collection {collection!r} at {location!r}")
                config = client.get_collection(collection).config
                self.rows = client.count(collection).count
                self._name, self.dimension = self._vector(config.params.vectors, vector)
                if not self.rows:
                    raise LusiferError(f"{self.describe} is empty: it has no points")
                points = client.scroll(collection, limit=_LOOK, with_payload=True)[0]
            where, self._text = text_getter(self.describe, [point.payload or {} for point in points], text)
        except BaseException:
            self.close()
            raise
        ours = (getattr(config, "metadata", None) or {}).get("lusifer")
        self.origin = origin_of(ours)
        self._id = "id" if self.origin else None
        named = f", vector {self._name!r}" if self._name else ""
        self.describe += f" (text in {where!r}, {self.dimension} dimensions{named})"

    def close(self) -> None:
        """Closes the client."""
        self._client.close()

    def _errors(self) -> AbstractContextManager[None]:
        from qdrant_client.http.exceptions import ApiException

        return reading(f"{self.describe} at {self.location!r}", ApiException)

    def _vector(self, vectors: Any, asked: str | None) -> tuple[str, int]:
        """Name (empty where there is but one, without a name) and dimensions of the vector."""
        known = vectors if isinstance(vectors, Mapping) else {"": vectors} if vectors is not None else {}
        if "" in known and asked is None:
            name = ""
        else:
            dense = [key for key, params in known.items() if params.multivector_config is None]
            if not dense and asked is None:
                raise LusiferError(f"{self.describe} has no vector of one row to a text")
            name = choose(self.describe, "vector", dense, asked, list(known))
        if (kind := str(getattr(known[name].datatype, "value", known[name].datatype))) == "uint8":
            raise LusiferError(f"{self.describe} keeps its vectors in {kind}, which cannot be compared")
        return name, int(known[name].size)

    def _read(self, size: int) -> Iterator[RawRows]:
        offset: Any = None
        while True:
            with self._errors():
                points, offset = self._client.scroll(
                    self._collection, limit=min(size, _PAGE), offset=offset, with_payload=True, with_vectors=self._want
                )
            if points:
                yield self._unpacked(points)
            if offset is None:
                return

    @property
    def _want(self) -> Any:
        return [self._name] if self._name else True

    def _unpacked(self, points: Sequence[Any]) -> RawRows:
        given = [(point.vector or {}).get(self._name) if self._name else point.vector for point in points]
        has = np.array([isinstance(one, list) and len(one) == self.dimension for one in given], dtype=bool)
        vectors = np.zeros((len(points), self.dimension), dtype=np.float32)
        if has.any():
            vectors[has] = np.array([one for one, good in zip(given, has, strict=True) if good], dtype=np.float32)
        payloads = [point.payload or {} for point in points]
        ids = [
            str(payload[self._id] if self._id else point.id) for payload, point in zip(payloads, points, strict=True)
        ]
        return RawRows([self._text(payload) for payload in payloads], vectors, has, ids)

    def _sample(self, count: int, draw: np.random.Generator) -> Rows:
        if self._local:  # It compares with everything anyway, and draws anew each time.
            return super()._sample(count, draw)
        drawn = self._models.SampleQuery(sample=self._models.Sample.RANDOM)
        return self._joined([self._checked(self._unpacked(self._query(drawn, count)), 0)])

    def nearest(self, vector: np.ndarray, k: int, *, exact: bool = False) -> list[Match]:
        """As `VectorTable.nearest`; the server finds the rows, by the metric of the collection."""
        using: dict[str, Any] = {"using": self._name} if self._name else {}
        if exact and not self._local:
            using["search_params"] = self._models.SearchParams(exact=True)
        points = self._query(np.asarray(vector, dtype=np.float32).tolist(), k, **using)
        return nearest_of([self._checked(self._unpacked(points), 0)], vector, k) if points else []

    def _query(self, query: Any, limit: int, **how: Any) -> Sequence[Any]:
        how |= {"limit": limit, "with_payload": True, "with_vectors": self._want}
        with self._errors():
            return self._client.query_points(self._collection, query=query, **how).points


def origin_of(facts: Any) -> Origin | None:
    """What an index of ours records of its model; None for anything else."""
    try:
        return Origin(str(facts["model"]), str(facts["model_hash"]), facts.get("prompt"))
    except (TypeError, KeyError, AttributeError):
        return None


def qdrant_library() -> Any:
    """The module ``qdrant_client``.

    Raises:
        LusiferError: If it is not installed.
    """
    try:
        import qdrant_client
    except ImportError as error:
        raise LusiferError("an index on a Qdrant server needs its client: pip install qdrant-client") from error
    return qdrant_client
