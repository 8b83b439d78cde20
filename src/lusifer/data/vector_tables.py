"""Opens a table of texts and vectors by its name, whoever made it."""

from __future__ import annotations

import glob
from pathlib import Path

from lusifer.data.sources import find_files
from lusifer.data.vectors.files import ArrayTable, ParquetTable, load_matrix, parquet_files
from lusifer.data.vectors.qdrant import SCHEME, QdrantTable, connect, open_folder
from lusifer.data.vectors.rows import VectorTable
from lusifer.data.vectors.stores import ChromaTable, LanceTable
from lusifer.errors import LusiferError
from lusifer.storage import is_remote

LOOKED_FOR = (
    "a lusifer index (facts.json), LanceDB (*.lance), Qdrant's local folder (meta.json and collection/), "
    "Chroma (chroma.sqlite3), Parquet files, or vectors.npy+texts.jsonl"
)


def open_vectors(location: str, *, text: str | None = None, vector: str | None = None) -> VectorTable:
    """Opens a table of texts and their vectors, and changes nothing of them.

    Args:
        location: An index of ours; a folder of LanceDB, one of its ``.lance`` tables, a folder of Chroma or of Qdrant's
            client (where one holds several, ``folder#name``); ``qdrant+http://host:6333/collection``; a Parquet file,
            folder or glob, here or in an object store; or ``vectors.npy+texts.jsonl``.
        text: Column or key of the text; found by type and name when None.
        vector: Column or name of the vector; found by type when None.

    Raises:
        LusiferError: If there is none, it cannot be read, has no texts, is empty, or its columns are ambiguous.
    """
    if location.startswith(SCHEME):
        return QdrantTable(location, *connect(location), text, vector, local=False)
    if "+" in location and not Path(location).expanduser().exists():
        array, _, texts = location.partition("+")
        if array.endswith(".npy"):
            return ArrayTable(location, array, texts, text)
    if location.endswith(".npy") and Path(location).expanduser().is_file():
        load_matrix(location)
        raise LusiferError(f"{location!r} holds vectors but no texts; give both, as in '{location}+texts.jsonl'")
    if is_remote(location) or glob.has_magic(location) or location.lower().endswith(".parquet"):
        files = [file for file in find_files(location) if file.format.kind == ".parquet"]
        if not files:
            raise LusiferError(f"{location!r} holds no Parquet files; remote vectors are read only from Parquet")
        return ParquetTable(location, files, text, vector)
    return _open_folder(location, text, vector)


def is_vectors(location: str) -> bool:
    """Whether something lies there that `open_vectors` would take, by its name and its files alone."""
    if location.startswith(SCHEME) or ".npy" in location or location.lower().endswith(".parquet"):
        return True
    folder, _ = _parts(location)
    return folder.is_dir() and (_kind(folder) is not None or bool(parquet_files(str(folder))))


def _open_folder(location: str, text: str | None, vector: str | None) -> VectorTable:
    folder, part = _parts(location)
    if not folder.exists():
        raise LusiferError(f"there is nothing at {location!r} (relative paths start at {str(Path.cwd())!r})")
    match _kind(folder):
        case "ours":
            where = folder / "lance"
            return LanceTable(location, where, "texts", text or "text", vector or "vector", facts=folder / "facts.json")
        case "table":
            return LanceTable(location, folder.parent, folder.stem, text, vector)
        case "lance":
            return LanceTable(location, folder, part, text, vector)
        case "chroma":
            if vector is not None:
                raise LusiferError(
                    f"the Chroma folder {str(folder)!r} has one vector a text; leave --vector-column out"
                )
            return ChromaTable(location, folder, part, text)
        case "qdrant":
            return QdrantTable(location, *open_folder(str(folder), part), text, vector, local=True)
        case "server":
            raise LusiferError(f"{location!r} belongs to a Qdrant server; give its address: qdrant+http://HOST/NAME")
    if folder.is_dir() and (files := parquet_files(str(folder))):
        return ParquetTable(location, files, text, vector)
    raise LusiferError(f"{location!r} holds no texts with vectors; looked for {LOOKED_FOR}")


def _parts(location: str) -> tuple[Path, str | None]:
    """A folder and, behind ``#``, the name of a table or collection in it."""
    if "#" in location and not Path(location).expanduser().exists():
        folder, _, part = location.rpartition("#")
        return Path(folder).expanduser(), part
    return Path(location).expanduser(), None


def _kind(folder: Path) -> str | None:
    """What a folder's files say it is."""
    if (folder / "facts.json").is_file() and (folder / "lance").is_dir():
        return "ours"
    if folder.suffix == ".lance" and folder.is_dir():
        return "table"
    if any(folder.glob("*.lance")):
        return "lance"
    if (folder / "chroma.sqlite3").is_file():
        return "chroma"
    if (folder / "meta.json").is_file() and (folder / "collection").is_dir():
        return "qdrant"
    return "server" if (folder / "raft_state.json").is_file() or (folder / "collections").is_dir() else None
