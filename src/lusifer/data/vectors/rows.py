"""What every table of texts and vectors is, whoever made it, read from front to back.

A table is read in blocks: memory does not grow with its rows. Rows without a text or without a
vector are left out and counted; a vector that is not finite is an error, for whatever made it failed there.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from lusifer.data.vectors.columns import is_text
from lusifer.errors import LusiferError, first_line

BLOCK_ROWS = 1024


@dataclass(frozen=True)
class Origin:
    """What a table says of the model that made its vectors; our own indexes and ``lusifer encode`` say it.

    Attributes:
        model: Its name, as it was loaded.
        model_hash: See `lusifer.model.fingerprint.weights_hash`.
        prompt: What stood in front of every text; None where that is not known.
    """

    model: str
    model_hash: str
    prompt: str | None = None


class RawRows(NamedTuple):
    """Rows as a source gives them.

    Attributes:
        texts: Their texts; anything but a string with letters in it where a row has none.
        vectors: (n, dim) array; anything where there is no vector.
        has_vector: (n,) bool: which rows have one; None where all do.
        ids: Their names; None where rows are numbered.
        more: Values of the other columns that were asked for.
    """

    texts: Sequence[Any]
    vectors: np.ndarray
    has_vector: np.ndarray | None = None
    ids: Sequence[str] | None = None
    more: Mapping[str, Sequence[Any]] = MappingProxyType({})


class Rows(NamedTuple):
    """Checked rows: ids, texts, (n, dim) float32 vectors, all of one length, and the other columns asked for."""

    ids: list[str]
    texts: list[str]
    vectors: np.ndarray
    more: Mapping[str, Sequence[Any]] = MappingProxyType({})


class Match(NamedTuple):
    """A row that was found: cosine similarity, id, text."""

    score: float
    id: str
    text: str


class VectorTable(ABC):
    """Texts and their vectors. All methods raise LusiferError where the table cannot be read.

    Attributes:
        location: Where it is, as it was asked for.
        describe: What it is, for a report: kind, name, columns.
        dimension: Numbers of a vector.
        rows: Rows in the table, those without text included.
        origin: Model that made the vectors, where the table says so.
        left_out: Rows without text or vector that the last reading has passed over.
    """

    location: str
    describe: str
    dimension: int
    rows: int
    origin: Origin | None = None
    left_out: int = 0

    def batches(self, size: int = BLOCK_ROWS) -> Iterator[tuple[list[str], np.ndarray]]:
        """All rows in their order: texts, and (n, dim) float32 vectors as they are stored, not normalised.

        Args:
            size: Most rows of a batch; there may be fewer in any of them.

        Raises:
            LusiferError: If a vector is not finite or of another length, or no row has a text.
        """
        for rows in self.blocks(size):
            yield rows.texts, rows.vectors

    def blocks(self, size: int = BLOCK_ROWS) -> Iterator[Rows]:
        """As `batches`, with the ids of the rows: their own, else their numbers from 1 on."""
        self.left_out = found = done = 0
        for raw in self._read(size):
            rows = self._checked(raw, done)
            done += len(raw.texts)
            self.left_out += len(raw.texts) - len(rows.texts)
            found += len(rows.texts)
            if rows.texts:
                yield rows
        if not found:
            what = "is empty" if not done else f"has {done:,} rows, but none with both a text and a vector"
            raise LusiferError(f"{self.describe} {what}")

    def sample(self, count: int, seed: int = 0) -> tuple[list[str], np.ndarray]:
        """Texts drawn evenly, every text once, and their (n, dim) float32 vectors; fewer where there are fewer.

        Args:
            count: Texts wanted.
            seed: The same seed gives the same rows, but for a Qdrant server, which draws by itself.
        """
        rows = self.sample_rows(count, seed)
        return rows.texts, rows.vectors

    def sample_rows(self, count: int, seed: int = 0) -> Rows:
        """As `sample`, with the ids of the rows."""
        found, first = self._sample(count, np.random.default_rng(seed)), dict[str, int]()
        for row, text in enumerate(found.texts):
            first.setdefault(text, row)
        rows = list(first.values())
        return Rows([found.ids[row] for row in rows], list(first), found.vectors[rows])

    def nearest(self, vector: np.ndarray, k: int, *, exact: bool = False) -> list[Match]:
        """The rows of the highest cosine similarity, highest first.

        Args:
            vector: (dim,) query.
            k: Rows wanted.
            exact: Compare with every vector, even where the source has an approximate index of its own.
        """
        return nearest_of(self.blocks(), vector, k)

    def close(self) -> None:  # noqa: B027  Most have nothing to let go of.
        """Lets go of the source; some let nobody else in until then."""

    def __enter__(self) -> VectorTable:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    @abstractmethod
    def _read(self, size: int) -> Iterator[RawRows]:
        """All rows in their order, at most so many at a time."""

    def _sample(self, count: int, draw: np.random.Generator) -> Rows:
        """Reads the whole table once; to be replaced where the source can do better."""
        wanted = np.sort(draw.choice(self.rows, size=min(count, self.rows), replace=False))
        parts, done = [], 0
        for raw in self._read(BLOCK_ROWS):
            here = wanted[np.searchsorted(wanted, done) : np.searchsorted(wanted, done + len(raw.texts))] - done
            if len(here):
                parts.append(self._checked(raw, done, here))
            done += len(raw.texts)
            if not len(wanted) or done > wanted[-1]:
                break
        return self._joined(parts)

    def _joined(self, parts: Sequence[Rows]) -> Rows:
        ids, texts = [one for part in parts for one in part.ids], [one for part in parts for one in part.texts]
        if not texts:
            raise LusiferError(f"{self.describe} has no rows with both a text and a vector, as far as was drawn")
        return Rows(ids, texts, np.concatenate([part.vectors for part in parts]))

    def _checked(self, raw: RawRows, before: int, rows: Iterable[int] | None = None) -> Rows:
        """The rows that have a text and a vector; ``before`` rows stand in front of the first.

        Raises:
            LusiferError: If a vector of them is not finite, or has another length than those of the table.
        """
        asked = range(len(raw.texts)) if rows is None else rows
        has = raw.has_vector
        kept = [int(i) for i in asked if is_text(raw.texts[i]) and (has is None or has[i])]
        every = kept == list(range(len(raw.texts)))
        vectors = np.asarray(raw.vectors if every else raw.vectors[kept], dtype=np.float32)
        ids = [str(before + i + 1) for i in kept] if raw.ids is None else [str(raw.ids[i]) for i in kept]
        if kept and vectors.shape[1:] != (self.dimension,):
            width = vectors.shape[-1] if vectors.ndim == 2 else 0
            raise LusiferError(f"{self.describe}: a vector has {width} dimensions, another {self.dimension}")
        if not np.isfinite(vectors).all():
            wrong = ids[int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])]
            raise LusiferError(
                f"{self.describe}, row {wrong}: the vector contains NaN or infinite values; embed or remove it"
            )
        more = {name: [values[i] for i in kept] for name, values in raw.more.items()}
        return Rows(ids, [raw.texts[i] for i in kept], vectors, more)


def nearest_of(blocks: Iterable[Rows], vector: np.ndarray, k: int) -> list[Match]:
    """The rows of the highest cosine similarity to a (dim,) vector, highest first, those before on a tie."""
    query = np.asarray(vector, dtype=np.float32)
    query = query / max(float(np.linalg.norm(query)), 1e-12)
    best: list[tuple[float, int, str, str]] = []
    done = 0
    for rows in blocks:
        scores = rows.vectors @ query / np.maximum(np.linalg.norm(rows.vectors, axis=1), 1e-12)
        top = np.argpartition(-scores, k - 1)[:k] if len(scores) > k else np.arange(len(scores))
        for row in np.sort(top).tolist():
            one = (float(scores[row]), -(done + row), rows.ids[row], rows.texts[row])
            if len(best) < k:
                heapq.heappush(best, one)
            elif one > best[0]:
                heapq.heapreplace(best, one)
        done += len(scores)
    return [Match(score, id, text) for score, _, id, text in sorted(best, reverse=True)]


@contextmanager
def reading(what: str, *errors: type[BaseException]) -> Iterator[None]:
    """Turns what a library says while it reads into one line.

    Args:
        what: What is read.
        *errors: Exceptions of the library, beside Python's usual ones.

    Raises:
        LusiferError: In their place.
    """
    try:
        yield
    except LusiferError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, pa.ArrowException, *errors) as error:
        raise LusiferError(f"{what} cannot be read: {first_line(error)[:200]}") from error
