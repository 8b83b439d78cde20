"""Embeddings of texts that tasks share, computed once and kept on disk.

mteb's `CachedEmbeddingWrapper` keeps a cache per task and side, writes its index after a whole corpus only, and is not
safe with several processes: one that opens it before another has written fails, and two writers give one row twice.
"""

from __future__ import annotations

import hashlib
import logging
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from lusifer.errors import LusiferError

logger = logging.getLogger(__name__)

Vectors = np.ndarray
_ROWS = 2048  # Texts embedded before they are written.
_ASKED = 500  # Parameters in one question to SQLite.


def _open(path: Path) -> sqlite3.Connection:
    base = sqlite3.connect(path, timeout=600, isolation_level=None)
    # No write-ahead log: SQLite waits for nobody while it switches one on, and a second process fails.
    base.execute("CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, vector BLOB) WITHOUT ROWID")
    return base


class EmbeddingCache:
    """A file of embeddings by text; several processes may use it at once.

    Args:
        path: SQLite file; made when missing.
        embed: Maps texts to (n, dim) float32.

    Attributes:
        computed: Texts embedded so far, without those found on disk.
        given: Texts whose embeddings were given so far.
        progress: Called after each chunk that was embedded, and at the end of each call.
    """

    def __init__(self, path: Path, embed: Callable[[list[str]], Vectors]) -> None:
        self.embed = embed
        self.progress: Callable[[], None] = lambda: None
        self.computed = self.given = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.base = _open(path)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise LusiferError(f"cannot use the cache of embeddings {str(path)!r}: {error}") from error
            aside = path.with_suffix(".damaged")
            path.replace(aside)
            logger.warning("the cache of embeddings %s is damaged (%s); it is begun anew", path, error)
            self.base = _open(path)

    def __call__(self, texts: Sequence[str]) -> Vectors:
        """(n, dim) float32 of texts, prompts included, in their order; what was embedded before is read."""
        keys = [hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in texts]
        vectors = self._known(sorted(set(keys)))
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in vectors}
        for begin in range(0, len(new), _ROWS):
            part = list(new)[begin : begin + _ROWS]
            computed = np.asarray(self.embed([new[key] for key in part]), dtype=np.float32)
            rows = [(key, vector.tobytes()) for key, vector in zip(part, computed, strict=True)]
            self.base.execute("BEGIN IMMEDIATE")
            self.base.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?)", rows)
            self.base.execute("COMMIT")
            vectors.update(zip(part, computed, strict=True))
            self.computed += len(part)
            self.progress()
        self.given += len(texts)
        self.progress()
        return np.stack([vectors[key] for key in keys]) if keys else np.zeros((0, 0), dtype=np.float32)

    def _known(self, keys: list[bytes]) -> dict[bytes, Vectors]:
        rows: list[tuple[bytes, bytes]] = []
        for begin in range(0, len(keys), _ASKED):
            part = keys[begin : begin + _ASKED]
            marks = ",".join("?" * len(part))
            rows += self.base.execute(f"SELECT key, vector FROM vectors WHERE key IN ({marks})", part)
        return {key: np.frombuffer(vector, dtype=np.float32) for key, vector in rows}
