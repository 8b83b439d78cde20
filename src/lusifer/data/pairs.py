"""A set of pairs as numbers: its unique texts, and which of them are a row's own, up to letter case and punctuation."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from lusifer.data.check import normalise
from lusifer.data.records import Records
from lusifer.progress import track


class Texts:
    """Unique texts in order, and for each its ``kind``, shared by texts equal but for case and punctuation."""

    def __init__(self) -> None:
        self.number: dict[str, int] = {}
        self.kind: list[int] = []
        self._kinds: dict[bytes, int] = {}

    def add(self, text: str) -> int:
        """The number of a text, a new one if it is new."""
        number = self.number.setdefault(text, len(self.number))
        if number == len(self.kind):
            self.kind.append(self.kind_of(text))
        return number

    def kind_of(self, text: str) -> int:
        """The kind of a text, also of one that is not among them."""
        digest = hashlib.blake2b(normalise(text).encode(), digest_size=12).digest()
        return self._kinds.setdefault(digest, len(self._kinds))

    def digest(self) -> str:
        """Hash of all texts in their order, 16 hexadecimal digits."""
        content = hashlib.sha256()
        for text in self.number:
            content.update(text.encode() + b"\0")
        return content.hexdigest()[:16]


class Problem(NamedTuple):
    """The rows of a set as numbers of unique queries and passages."""

    queries: Texts
    passages: Texts
    rows: list[tuple[int, list[int]]]
    own: list[set[int]]  # For every query, the classes of its own texts over all rows.


def read_problem(records: Records, corpus: Records | None, progress: bool) -> Problem:
    """Reads the rows of a set of pairs, and a corpus, as numbers.

    Args:
        records: The set.
        corpus: More passages.
        progress: Whether to show a bar.
    """
    queries, passages = Texts(), Texts()
    rows: list[tuple[int, list[int]]] = []
    own: list[set[int]] = []
    for row in track(range(len(records)), "reading texts", "row", show=progress):
        record = records[row]
        query = queries.add(record["query"])
        if query == len(own):
            own.append({passages.kind_of(record["query"])})
        positives = [passages.add(text) for text in record["positive"]]
        own[query].update(passages.kind[number] for number in positives)
        rows.append((query, positives))
    if corpus is not None:
        for row in range(len(corpus)):
            passages.add(corpus[row]["text"])
    return Problem(queries, passages, rows, own)
