"""Opens an index by its name: a folder, or a collection of a Qdrant server."""

from __future__ import annotations

from pathlib import Path

from lusifer.search.lance import LanceStore
from lusifer.search.qdrant import SCHEME, QdrantStore, connect
from lusifer.search.store import Entry, Hit, IndexInfo, Store

__all__ = ["Entry", "Hit", "IndexInfo", "Store", "create_store", "open_store", "store_exists"]


def open_store(location: str) -> Store:
    """Opens an index.

    Args:
        location: A folder, or ``qdrant+http://host:6333/collection``.

    Raises:
        LusiferError: If there is none, it is damaged, or its server cannot be reached.
    """
    if location.startswith(SCHEME):
        return QdrantStore.open(*connect(location))
    return LanceStore.open(Path(location))


def create_store(location: str, info: IndexInfo) -> Store:
    """Makes an empty index.

    Args:
        location: A new folder, or ``qdrant+http://host:6333/collection``.
        info: The model and the metadata columns.

    Raises:
        LusiferError: If something is there already, or it cannot be made.
    """
    if location.startswith(SCHEME):
        return QdrantStore.create(*connect(location), info)
    return LanceStore.create(Path(location), info)


def store_exists(location: str) -> bool:
    """Whether an index can be opened there, or something is there that claims to be one.

    Raises:
        LusiferError: If its server cannot be reached.
    """
    if location.startswith(SCHEME):
        return QdrantStore.exists(*connect(location))
    return (Path(location) / "facts.json").exists()
