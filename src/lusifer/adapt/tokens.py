"""Texts as the encoder reads them: token ids end to end, and which word each token belongs to."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_WORD = re.compile(r"[A-Za-z]+(?:['’](?:s|t|re|ve|ll|d|m)\b)?")
_CHUNK = 4096
_ROUND = 8  # Batches are padded to multiples of this: fewer shapes to compile kernels for.


def words_of(text: str) -> Iterator[tuple[int, int, str]]:
    """Start, end and lower-case form of each English word."""
    for match in _WORD.finditer(text):
        yield match.start(), match.end(), match.group().lower().replace("’", "'")


def count_words(texts: Iterable[str], *, least: int) -> list[str]:
    """The words that occur at least so often, most frequent first; letters alone count only as ``a`` and ``i``."""
    counts = Counter(word for text in texts for *_, word in words_of(text))
    return [word for word, n in counts.most_common() if (n >= least and len(word) > 1) or word in ("a", "i")]


@dataclass(frozen=True)
class TokenTexts:
    """Tokenised texts, end to end.

    Attributes:
        ids: (tokens,) int32 token ids, prompt and special tokens included.
        words: (tokens,) int32: a word's number, from 1, at its first token, minus it at its others, 0 elsewhere.
        lengths: (texts,) int64 tokens of each text.
        starts: (texts,) int64 place of each text's first token.
    """

    ids: Tensor
    words: Tensor
    lengths: Tensor
    starts: Tensor

    def __len__(self) -> int:
        return len(self.lengths)

    def to(self, device: torch.device) -> TokenTexts:
        """The same on a device."""
        return TokenTexts(*(part.to(device) for part in (self.ids, self.words, self.lengths, self.starts)))

    def batch(self, rows: Tensor, pad: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, mask (bool, True at tokens) and words of some texts, all (len(rows), longest of them, rounded up)."""
        lengths = self.lengths[rows]
        longest = -(int(lengths.max()) // -_ROUND) * _ROUND
        place = torch.arange(longest, device=lengths.device)
        mask = place < lengths[:, None]
        at = torch.where(mask, self.starts[rows, None] + place, 0)
        ids = torch.where(mask, self.ids[at].long(), pad)
        return ids.to(device), mask.to(device), torch.where(mask, self.words[at], 0).to(device)


def tokenize(
    tokenizer: Any, texts: Sequence[str], prompts: Sequence[str], vocabulary: Sequence[str], *, max_length: int
) -> TokenTexts:
    """Tokenises texts and marks the words of a vocabulary.

    Args:
        tokenizer: A fast tokenizer.
        texts: The texts.
        prompts: What stands in front of each.
        vocabulary: Words, lower-case; a word's number is its place plus 1.
        max_length: Most tokens of a text; what is beyond is truncated, with a word that is truncated unmarked.
    """
    numbers = {word: number for number, word in enumerate(vocabulary, start=1)}
    ids: list[np.ndarray] = []
    marks: list[np.ndarray] = []
    for start in range(0, len(texts), _CHUNK):
        pairs = list(zip(prompts[start : start + _CHUNK], texts[start : start + _CHUNK], strict=True))
        rows = tokenizer([a + b for a, b in pairs], truncation=True, max_length=max_length, return_attention_mask=False)
        for (prompt, text), row in zip(pairs, rows.encodings, strict=True):
            ids.append(np.array(row.ids, np.int32))
            marks.append(_mark(text, row, len(prompt), numbers))
    lengths = torch.tensor([len(row) for row in ids])
    nothing = np.zeros(0, np.int32)
    flat, words = (torch.from_numpy(np.concatenate([nothing, *parts])) for parts in (ids, marks))
    return TokenTexts(flat, words, lengths, torch.cumsum(lengths, 0) - lengths)


def _mark(text: str, row: Any, shift: int, numbers: dict[str, int]) -> np.ndarray:
    marks = np.zeros(len(row.ids), np.int32)
    starts: dict[int, int] = {}
    ends: dict[int, int] = {}
    for place, (start, end) in enumerate(row.offsets):
        if end > start:
            starts.setdefault(start, place)
            ends[end] = place
    for start, end, word in words_of(text):
        number, last = numbers.get(word), ends.get(end + shift)
        if number is None or last is None:
            continue
        # A word's first token may begin at the space before it. Only words whose tokens hold nothing else are marked:
        # replacing them must leave the rest as it is.
        first = starts.get(start + shift, starts.get(start + shift - 1))
        if first is not None and first <= last:
            marks[first : last + 1] = -number
            marks[first] = number
    return marks


class Tokenizing:
    """Texts that are tokenised as far as they are needed.

    Args:
        tokenizer: A fast tokenizer.
        texts: The texts.
        prompts: What stands in front of each.
        vocabulary: Words that are marked; see `tokenize`.
        max_length: Most tokens of a text.
    """

    def __init__(
        self, tokenizer: Any, texts: Sequence[str], prompts: Sequence[str], vocabulary: Sequence[str], max_length: int
    ) -> None:
        self.texts, self.prompts, self.vocabulary = texts, prompts, vocabulary
        self._tokenizer, self._max_length = tokenizer, max_length
        self._parts: list[TokenTexts] = []
        self._done = 0

    def __len__(self) -> int:
        return len(self.texts)

    def next(self, count: int) -> TokenTexts:
        """Tokenises the next texts."""
        part = slice(self._done, self._done + count)
        options: Any = {"max_length": self._max_length}
        new = tokenize(self._tokenizer, self.texts[part], self.prompts[part], self.vocabulary, **options)
        self._parts.append(new)
        self._done += len(new)
        return new

    def all(self) -> TokenTexts:
        """The texts tokenised so far, as one table."""
        lengths = torch.cat([part.lengths for part in self._parts])
        ids, words = (torch.cat([getattr(part, name) for part in self._parts]) for name in ("ids", "words"))
        self._parts = [TokenTexts(ids, words, lengths, torch.cumsum(lengths, 0) - lengths)]
        return self._parts[0]


def batches_by_length(lengths: Tensor, budget: int) -> Iterator[Tensor]:
    """Rows in batches of like length, the longest first, each within a budget of padded tokens."""
    order = torch.argsort(lengths, descending=True, stable=True)
    start = 0
    while start < len(order):
        padded = -(int(lengths[order[start]]) // -_ROUND) * _ROUND
        stop = start + max(1, budget // padded)
        yield order[start:stop]
        start = stop
