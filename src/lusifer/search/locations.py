"""Opens an index by its name: a folder, or a collection of a Qdrant server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lusifer.data.vectors.qdrant import SCHEME, connect
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
