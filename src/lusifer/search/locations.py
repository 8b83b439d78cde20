"""Opens an index by its name: a folder, a collection of a Qdrant server, or a table that something else made."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from lusifer.data.vector_tables import is_vectors, open_vectors
from lusifer.data.vectors.qdrant import SCHEME, connect
from lusifer.errors import LusiferError
from lusifer.locks import alone_at
from lusifer.search.foreign import TableStore
from lusifer.search.lance import LanceStore
from lusifer.search.qdrant import QdrantStore
from lusifer.search.store import IndexInfo, Store


def open_store(location: str) -> Store:
    """Opens an index: a folder, or ``qdrant+http://host:6333/collection``.

    Raises:
        LusiferError: If there is none, it is damaged, or its server cannot be reached.
    """
    backend, where = _backend(location)
    return backend.open(*where)


def open_any(location: str, *, text: str | None = None, vector: str | None = None) -> Store:
    """Opens an index of ours, or a table of texts and vectors that something else made, to be read only.

    Args:
        location: As for `open_store` or `lusifer.data.vector_tables.open_vectors`.
        text: Column of the text in a table; found when None.
        vector: Column of the vector in a table; found when None.

    Raises:
        LusiferError: If there is none, it cannot be read, or its server cannot be reached.
    """
    if _is_ours(location):
        if text is not None or vector is not None:
            raise LusiferError(f"{location!r} was made by lusifer; leave --text-column and --vector-column out")
        return open_store(location)
    return TableStore(open_vectors(location, text=text, vector=vector))


def _is_ours(location: str) -> bool:
    """Whether `open_store` is to open it, be it to say that there is nothing."""
    if location.startswith(SCHEME):
        return QdrantStore.is_ours(*connect(location))
    path = Path(location)
    return LanceStore.exists(path) or not (path.exists() or is_vectors(location) or "#" in location)


def create_store(location: str, info: IndexInfo) -> Store:
    """Makes an empty index.

    Args:
        location: A new folder, or ``qdrant+http://host:6333/collection``.
        info: The model and the metadata columns.

    Raises:
        LusiferError: If something is there already, or it cannot be made.
    """
    backend, where = _backend(location)
    return backend.create(*where, info)


def writing(location: str) -> AbstractContextManager[None]:
    """Keeps other processes that write to an index out while a block runs, also before it is made.

    Args:
        location: As for `create_store`; a server keeps order by itself.

    Raises:
        LusiferError: If another process writes to it.
    """
    return nullcontext() if location.startswith(SCHEME) else alone_at(location)


def repair_store(location: str) -> tuple[Store, int]:
    """Goes back to the newest version of an index in a folder that can be read whole.

    Args:
        location: The folder.

    Returns:
        The index, and how many versions it went back.

    Raises:
        LusiferError: If it is not a folder, or no version can be read.
    """
    if location.startswith(SCHEME):
        raise LusiferError(f"{location!r} is kept by a Qdrant server; only a folder is repaired here")
    return LanceStore.repair(Path(location))


def store_exists(location: str) -> bool:
    """Whether an index can be opened there, or something is there that claims to be one.

    Raises:
        LusiferError: If its server cannot be reached.
    """
    backend, where = _backend(location)
    return backend.exists(*where)


def _backend(location: str) -> tuple[Any, tuple[Any, ...]]:
    """The class that keeps an index, and what its class methods find it by."""
    return (QdrantStore, connect(location)) if location.startswith(SCHEME) else (LanceStore, (Path(location),))
