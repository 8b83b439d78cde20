"""What is done of a shard that is not finished, so that an interruption costs seconds, not the shard.

Batches of a shard come in one order, whoever makes them, so that the vectors of the first batches are all there is to
keep: in pieces, each a file named by shard, first row and rows. They are read as far as they follow one another, are
the same bytes whoever wrote them, and go when the shard is there.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from contextlib import suppress

import numpy as np

from lusifer.errors import LusiferError
from lusifer.storage import Folder, storage_errors

_EVERY = 15.0  # Seconds between two pieces: a file of a few hundred vectors on a CPU, synced to the disk.
_PIECE = re.compile(r"_partial-(\d+)-(\d+)-(\d+)\.npy")
_Pieces = dict[int, tuple[str, int]]


def pieces(names: Iterable[str]) -> dict[int, _Pieces]:
    """The pieces among the files of a folder that can be used: by shard, by first row, name and rows."""
    every: dict[int, dict[int, tuple[str, int]]] = {}
    for name in sorted(names):
        if found := _PIECE.fullmatch(name):
            shard, first, rows = map(int, found.groups())
            every.setdefault(shard, {})[first] = name, rows
    return {shard: _following(some) for shard, some in every.items()}


def _following(some: _Pieces) -> _Pieces:
    kept, row = {}, 0
    while row in some and some[row][1]:
        kept[row] = some[row]
        row += some[row][1]
    return kept


def kept_rows(names: Iterable[str], done: set[int]) -> int:
    """Rows that pieces hold of shards that are not there yet.

    Args:
        names: Files of the folder.
        done: Shards that are there.
    """
    return sum(rows for shard, some in pieces(names).items() if shard not in done for _, rows in some.values())


class Journal:
    """Keeps the vectors of a shard's batches, and gives those that were kept before.

    Args:
        folder: Where shards are written.
        number: The shard.
    """

    def __init__(self, folder: Folder, number: int) -> None:
        self.folder, self.number = folder, number
        self._before = list(pieces(folder.names()).get(number, {}).values())
        self._names = [name for name, _ in self._before]
        self._rows = sum(rows for _, rows in self._before)  # On the disk.
        self._loaded: np.ndarray | None = None
        self._new: list[np.ndarray] = []
        self._saved = time.monotonic()

    def take(self, rows: int) -> np.ndarray | None:
        """The (rows, dim) vectors of the next batch, if they were kept."""
        if self._loaded is None or not len(self._loaded):
            if not self._before:
                return None
            name = self._before.pop(0)[0]
            try:
                with self.folder.fs.open(self.folder.path(name), "rb") as file:
                    self._loaded = np.load(file, allow_pickle=False)
            except (ValueError, EOFError) as error:
                raise LusiferError(f"{self.folder.url}/{name} is damaged; remove it to have its rows again") from error
        batch, self._loaded = self._loaded[:rows], self._loaded[rows:]
        return batch

    def put(self, vectors: np.ndarray) -> None:
        """Keeps the vectors of the batch that follows; on the disk every few seconds."""
        self._new.append(vectors)
        if time.monotonic() - self._saved >= _EVERY:
            self.save()

    def save(self) -> None:
        """Writes what is not on the disk yet."""
        self._saved = time.monotonic()
        if not self._new:
            return
        piece, self._new = np.concatenate(self._new), []
        name = f"_partial-{self.number:05}-{self._rows:09}-{len(piece):09}.npy"
        with self.folder.put(name) as path, path.open("wb") as file:
            np.save(file, piece)
        self._names.append(name)
        self._rows += len(piece)

    def remove(self) -> None:
        """Removes everything that was kept of the shard."""
        remove(self.folder, self._names)
        self._new, self._before, self._names, self._loaded, self._rows = [], [], [], None, 0


def remove(folder: Folder, names: Iterable[str]) -> None:
    """Removes pieces.

    Args:
        folder: Where they are.
        names: Files of the folder; those that are no pieces stay.
    """
    for name in names:
        if _PIECE.fullmatch(name):
            with storage_errors(folder.url, "write"), suppress(FileNotFoundError):  # Two may be at work in a store.
                folder.fs.rm_file(folder.path(name))
