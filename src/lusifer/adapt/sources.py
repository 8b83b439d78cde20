"""Where vectors to learn from come from: a model that embeds English text, or a table that holds both."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lusifer.adapt.report import MULTILINGUAL, everyday_scores, mean_other
from lusifer.adapt.texts import Corpus, check_english, english_texts, hold_out, is_english
from lusifer.data.everyday_set import load_everyday
from lusifer.data.vector_tables import is_vectors, open_vectors
from lusifer.data.vectors.agreement import unit
from lusifer.data.vectors.rows import VectorTable
from lusifer.errors import LusiferError
from lusifer.starter.fetch import PREFIX
from lusifer.teacher.embedder import Teacher, check_vectors
from lusifer.terminal import without_secrets

if TYPE_CHECKING:
    from lusifer.adapt.run import Options

logger = logging.getLogger(__name__)

_BATCH = 4_096


class Source(Protocol):
    """Texts and the teacher's vectors of them.

    Attributes:
        name: The teacher's name.
        hash: Hash of the model that made the vectors, or of the vectors.
        texts_hash: Hash of the texts.
        dimension: Length of a vector.
        asymmetric: Whether queries and documents have vectors of their own.
        train: Texts to learn from, in random order.
        held_out: Texts to choose and report by.
        roles: ``query`` or ``document`` of each text, those to learn from first.
        left_out: Rows that were not English.
        described: Where the texts come from.
    """

    name: str
    hash: str
    texts_hash: str
    dimension: int
    asymmetric: bool
    train: list[str]
    held_out: list[str]
    roles: list[str]
    left_out: int
    described: str

    def vectors(self, rows: Tensor) -> np.ndarray:
        """(n, dimension) float32 unit vectors of texts to learn from, by their rows."""

    def held_out_vectors(self) -> Tensor:
        """(n, dimension) float32 unit vectors of the held-out texts."""

    def everyday(self, queries: Callable[[Sequence[str]], np.ndarray]) -> dict[str, Any]:
        """What the report says of other languages; nothing where no model can embed the English side."""


def open_source(teacher: str, options: Options) -> Source:
    """The teacher as a model or as a table.

    Raises:
        LusiferError: If it is neither, or there are fewer texts than dimensions.
    """
    source: Source = ModelSource(teacher, options) if is_model(teacher) else TableSource(teacher, options)
    if len(source.train) < source.dimension:
        raise LusiferError(
            f"{len(source.train):,} English texts to learn from, for vectors of {source.dimension} dimensions: "
            "give at least as many texts as dimensions"
        )
    return source


def is_model(name: str) -> bool:
    """Whether a name is that of a model rather than of a table of vectors."""
    if name.startswith(PREFIX) or (Path(name).expanduser() / "modules.json").is_file():
        return True
    return not is_vectors(name)


def _hash(texts: Sequence[str]) -> str:
    digest = hashlib.sha256(str(len(texts)).encode())
    for text in texts:
        digest.update(text.encode(errors="surrogatepass") + b"\0")
    return digest.hexdigest()[:16]


class ModelSource:
    """A model that embeds whatever English text there is; see `Source`."""

    def __init__(self, name: str, options: Options) -> None:
        self.teacher = Teacher(name, device=options.device)
        corpus = _corpus(options)
        self.name, self.hash, self.dimension = name, self.teacher.hash, self.teacher.dimension
        self.asymmetric = self.teacher.asymmetric
        self.train, self.held_out, self.left_out = corpus.train, corpus.held_out, corpus.left_out
        self.described, self.texts_hash = corpus.source, _hash(self.train)
        names = ("query", "document") if self.asymmetric else ("query",)
        self.roles = [names[row % len(names)] for row in range(len(self.train) + len(self.held_out))]
        self._held_out: Tensor | None = None
        sentences = load_everyday().sentences["en"]
        self._index = self.teacher.encode(sentences, ["document"] * len(sentences))
        check_vectors(self._index, f"the teacher {name!r}")
        self._own = everyday_scores(self._queries, self._index)
        if mean_other(self._own) >= MULTILINGUAL:
            share = 100 * mean_other(self._own)
            logger.warning(
                "%s already retrieves %.0f %% of everyday sentences across languages; continuing", name, share
            )

    def _queries(self, texts: Sequence[str]) -> np.ndarray:
        return self.teacher.encode(texts, ["query"] * len(texts))

    def vectors(self, rows: Tensor) -> np.ndarray:
        """See `Source.vectors`."""
        chosen = rows.tolist()
        return self.teacher.encode([self.train[row] for row in chosen], [self.roles[row] for row in chosen])

    def held_out_vectors(self) -> Tensor:
        """See `Source.held_out_vectors`."""
        if self._held_out is None:
            before = self.teacher.truncated
            vectors = self.teacher.encode(self.held_out, self.roles[len(self.train) :])
            if longer := self.teacher.truncated - before:
                share = 100 * longer / len(self.held_out)
                window = self.teacher.window
                logger.warning(
                    "%.1f %% of the texts are longer than the teacher's %d tokens and truncated", share, window
                )
            self._held_out = torch.from_numpy(vectors)
        return self._held_out

    def everyday(self, queries: Callable[[Sequence[str]], np.ndarray]) -> dict[str, Any]:
        """See `Source.everyday`."""
        return {"everyday": everyday_scores(queries, self._index), "everyday_teacher": self._own}


def _corpus(options: Options) -> Corpus:
    """The user's texts, the bundled ones, or both."""
    if not options.texts:
        return english_texts((), most=options.most_texts, seed=options.seed)
    own = english_texts(options.texts, column=options.text_column or "text", most=options.most_texts, seed=options.seed)
    if not options.general:
        return own
    general = english_texts((), most=options.most_texts - len(own.train), seed=options.seed)
    mixed = list(dict.fromkeys([*own.train, *general.train]))
    order = torch.randperm(len(mixed), generator=torch.Generator().manual_seed(options.seed)).tolist()
    held_out = [*own.held_out, *general.held_out]
    return Corpus([mixed[row] for row in order], held_out, own.left_out, f"{own.source} and the bundled texts")


class TableSource:
    """Texts with their vectors, the model that made them not at hand; see `Source`."""

    asymmetric = False

    def __init__(self, location: str, options: Options) -> None:
        table = open_vectors(location, text=options.text_column, vector=options.vector_column)
        texts, vectors, self.left_out = _rows(table, options.most_texts, location)
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(options.seed)).tolist()
        places = {text: row for row, text in enumerate(texts)}
        self.train, self.held_out = hold_out([texts[row] for row in order])
        self._vectors = vectors[[places[text] for text in self.train]]
        self._held_out = torch.from_numpy(vectors[[places[text] for text in self.held_out]].astype(np.float32))
        self.name = table.origin.model if table.origin else without_secrets(location)
        self.dimension, self.described = table.dimension, table.describe
        self.hash = (
            table.origin.model_hash if table.origin else hashlib.sha256(self._vectors.tobytes()).hexdigest()[:16]
        )
        self.texts_hash = _hash(self.train)
        self.roles = ["query"] * (len(self.train) + len(self.held_out))

    def vectors(self, rows: Tensor) -> np.ndarray:
        """See `Source.vectors`."""
        return self._vectors[rows.numpy()].astype(np.float32)

    def held_out_vectors(self) -> Tensor:
        """See `Source.held_out_vectors`."""
        return self._held_out

    def everyday(self, queries: Callable[[Sequence[str]], np.ndarray]) -> dict[str, Any]:
        """See `Source.everyday`."""
        return {}


def _rows(table: VectorTable, most: int, location: str) -> tuple[list[str], np.ndarray, int]:
    """English texts, each once, their unit vectors in float16, and how many rows were not English.

    Of a table with more rows, rows at even distances are taken.
    """
    stride = max(1, table.rows // most)
    texts: dict[str, np.ndarray] = {}
    seen = read = english = 0
    for names, vectors in table.batches(_BATCH):
        chosen = [row for row in range(len(names)) if (seen + row) % stride == 0]
        seen += len(names)
        read += len(chosen)
        for row in chosen:
            text = " ".join(names[row].split())
            if is_english(text):
                english += 1
                texts.setdefault(text, unit(vectors[row : row + 1])[0].astype(np.float16))
    check_english(english, read, location)
    stacked = np.stack(list(texts.values()))
    check_vectors(stacked.astype(np.float32), location)
    return list(texts), stacked, read - english
