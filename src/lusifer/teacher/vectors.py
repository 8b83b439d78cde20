"""A teacher's vectors of texts, each computed once and kept on the disk.

One SQLite file for each teacher, in the cache folder: runs, stages and the processes of one machine share it. A text's
key is a hash of the text behind its prompt. What is used is always what was read back, so that a vector has the same
bits whoever computed it, and when.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lusifer.data.prompts import Role
from lusifer.errors import LusiferError, first_line
from lusifer.starter.fetch import cache_dir
from lusifer.teacher.embedder import Teacher, check_vectors

_WAIT = 600.0  # Seconds for another process that writes.
_ASKED = 500  # Keys of a query; SQLite takes at least 999.
_TABLE = "CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, vector BLOB NOT NULL)"


class TeacherVectors:
    """A teacher as a function from texts to unit vectors that remembers its answers, in float16.

    Args:
        name: Folder or hub id of the teacher; a starter name.
        device: Torch device; the best there is when None.

    Attributes:
        dimension: Length of a vector.
        hash: Hash of the teacher's weights.
        path: The file; another teacher, window or pooling has another one.

    Raises:
        LusiferError: If the teacher cannot be loaded.
    """

    def __init__(self, name: str, *, device: str | None = None) -> None:
        self.name, self.device = name, device
        teacher = Teacher(name, device=device)
        self._teacher: Teacher | None = teacher
        self.dimension, self.hash, self.prompts = teacher.dimension, teacher.hash, teacher.prompts
        self.path = cache_dir() / "teacher" / f"{_identity(teacher)}.sqlite"

    def release(self) -> None:
        """Gives the teacher's memory back; it is loaded again for a text that is not known."""
        self._teacher = None

    def __call__(self, texts: Sequence[str], roles: Sequence[Role]) -> Tensor:
        """The teacher's vectors of texts: (n, dimension) float32, of length 1 but for the rounding to float16.

        Args:
            texts: The texts, without prompts.
            roles: What each is: the teacher's prompt for it stands in front.

        Raises:
            LusiferError: If the file cannot be read or written, or a vector is NaN, infinite or zero.
        """
        keys = [_key(self.prompts[role] + text) for text, role in zip(texts, roles, strict=True)]
        with self._connection() as connection:
            known = _read(connection, keys)
        rows = {key: row for row, key in enumerate(keys) if key not in known}
        if rows:
            vectors = self._compute([texts[row] for row in rows.values()], [roles[row] for row in rows.values()])
            with self._connection() as connection:
                # Whoever was first counts, for all processes.
                connection.executemany("INSERT OR IGNORE INTO vectors VALUES (?, ?)", zip(rows, vectors, strict=True))
                connection.commit()
                known |= _read(connection, list(rows))
        stacked = np.frombuffer(b"".join(known[key] for key in keys), dtype=np.float16)
        return torch.from_numpy(stacked.reshape(len(keys), self.dimension).astype(np.float32))

    def _compute(self, texts: list[str], roles: list[Role]) -> list[bytes]:
        if self._teacher is None:
            self._teacher = Teacher(self.name, device=self.device)
            if self._teacher.hash != self.hash:
                raise LusiferError(f"the teacher {self.name!r} is not the one this stage began with")
        vectors = self._teacher.encode(texts, roles)
        check_vectors(vectors, f"the teacher {self.name!r}")
        return [row.tobytes() for row in vectors.astype(np.float16)]

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # A connection of its own each time: one does not survive a fork, nor may threads share it.
            with closing(sqlite3.connect(self.path, timeout=_WAIT)) as connection:
                connection.execute(_TABLE)
                yield connection
        except (OSError, sqlite3.Error) as error:
            raise LusiferError(
                f"cannot read or write the teacher's vectors in {str(self.path)!r}: {first_line(error)}; "
                "make room, or remove the file to compute them again"
            ) from error


def _identity(teacher: Teacher) -> str:
    """Hash of all that decides a vector but the text: weights, window, length, and what the modules are set to."""
    modules: list[Any] = [[type(module).__name__, repr(module)] for module in list(teacher.model)[1:]]
    facts = [teacher.hash, teacher.window, teacher.dimension, modules]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _read(connection: sqlite3.Connection, keys: Sequence[bytes]) -> dict[bytes, bytes]:
    wanted = list(dict.fromkeys(keys))
    found: dict[bytes, bytes] = {}
    for begin in range(0, len(wanted), _ASKED):
        few = wanted[begin : begin + _ASKED]
        marks = ",".join("?" * len(few))
        found.update(connection.execute(f"SELECT key, vector FROM vectors WHERE key IN ({marks})", few).fetchall())
    return found
