"""English texts to learn from: read, split into sentences and short runs of them, told apart from other languages."""

from __future__ import annotations

import hashlib
import logging
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files

from lusifer.data.rows import Columns, read_rows
from lusifer.data.sources import find_files
from lusifer.errors import LusiferError

logger = logging.getLogger(__name__)

SHORT = 45  # Words up to which a text is taken as it is.
_PASSAGE = 60  # Words of a passage that are read: a query is short, and long texts take most of the time.
_HELD_OUT = 500
SENTENCE_END = re.compile(r"(?<=[.!?])[\"”’']?\s+(?=[A-Z\"“‘'])")
_LETTERS = re.compile(r"[^\W\d_]")
_ENGLISH = (  # As one text: a list would take 50 lines.
    "the of and to is are was were with that this these for it its you your have has from what how which who why when "
    "where not be been by as at or an we they he she his her their there can will would do does did if but my"
)
_COMMON = frozenset(_ENGLISH.split(" "))
_MOSTLY = 0.5


@dataclass(frozen=True)
class Corpus:
    """Texts to learn from.

    Attributes:
        train: The texts, in a fixed random order.
        held_out: Texts to choose and report by.
        left_out: How many rows were not English.
        source: Where they come from, for the report.
    """

    train: list[str]
    held_out: list[str]
    left_out: int
    source: str


def is_english(text: str) -> bool:
    """Whether a text looks English: Latin letters, and from six words on one of the commonest English words."""
    letters = _LETTERS.findall(text)
    if not letters or sum(letter.isascii() for letter in letters) < 0.9 * len(letters):
        return False
    words = re.findall(r"[a-z']+", text.lower())
    return len(words) < 6 or not _COMMON.isdisjoint(words)


def _pieces(text: str, rng: random.Random) -> Iterable[str]:
    return [text] if len(text.split()) <= SHORT else split_passage(text, rng)


def split_passage(text: str, rng: random.Random) -> Iterator[str]:
    """The sentences of 3 to 45 words of a longer text, two runs of two or three sentences, and the text itself."""
    sentences = [sentence for sentence in SENTENCE_END.split(text) if sentence]
    yield from (sentence for sentence in sentences if 3 <= len(sentence.split()) <= SHORT)
    for _ in range(2 if len(sentences) >= 3 else 0):
        count = rng.choice([2, 2, 3])
        start = rng.randrange(len(sentences) - count + 1)
        yield " ".join(sentences[start : start + count])
    yield " ".join(text.split()[:_PASSAGE])


def english_texts(sources: Sequence[str], *, column: str = "text", most: int | None = None, seed: int = 0) -> Corpus:
    """Reads, splits and shuffles texts; each is there once.

    Args:
        sources: Files, folders, globs or URLs as every command reads them; the bundled texts when empty.
        column: Column of the text.
        most: Texts kept to learn from; all when None.
        seed: Of the order and of the runs of sentences.

    Raises:
        LusiferError: If a source cannot be read, or there is no English text.
    """
    rng = random.Random(seed)
    rows = list(_read(sources, column))
    english = [text for text in rows if is_english(text)]
    check_english(len(english), len(rows), ", ".join(sources) or "the bundled texts")
    texts = list(dict.fromkeys(piece for text in english for piece in _pieces(text, rng)))
    rng.shuffle(texts)
    train, held_out = hold_out(texts)
    return Corpus(train[:most], held_out, len(rows) - len(english), ", ".join(sources) or "bundled")


def check_english(english: int, rows: int, where: str) -> None:
    """Says how many rows are not English.

    Args:
        english: Rows that are.
        rows: All of them.
        where: What holds them, for the message.

    Raises:
        LusiferError: If none is, or there are no rows.
    """
    if not rows:
        raise LusiferError(f"no texts in {where}")
    if not english:
        raise LusiferError(f"none of the {rows:,} texts in {where} looks English; English text is needed")
    if english < _MOSTLY * rows:
        share = 100 * english / rows
        logger.warning("only %.0f %% of the texts in %s look English; the others are left out", share, where)


def hold_out(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits off held-out texts, the same ones whatever the order: at most a tenth and 500."""
    ranked = sorted(range(len(texts)), key=lambda row: hashlib.sha256(texts[row].encode()).digest()[:8])
    chosen = set(ranked[: min(_HELD_OUT, len(texts) // 10)])
    return [t for i, t in enumerate(texts) if i not in chosen], [t for i, t in enumerate(texts) if i in chosen]


def _read(sources: Sequence[str], column: str) -> Iterable[str]:
    if not sources:
        with as_file(files("lusifer") / "resources" / "english.jsonl.bz2") as bundled:
            yield from _read([str(bundled)], "text")
        return
    for source in sources:
        for rows in read_rows(find_files(source), Columns(text=column)):
            for index, text in enumerate(rows.texts):
                if index not in rows.block.problems:
                    yield " ".join(text.split())
