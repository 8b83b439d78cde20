"""Code-switching without a dictionary: words of English texts become words that the encoder's vocabulary holds.

1. The vocabulary's pieces that are whole words, by script, and the texts' English words are encoded alone.
2. Both are centred, by script, and matched in the encoder's own space by CSLS (arXiv 1710.04087, section 2.2).
3. `Switcher` replaces words of a text by their matches in one script; the text keeps the vector of the original.

CoSDA-ML (arXiv 2006.06402) does the last step with a bilingual dictionary.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_NO_SPACES = {"CJK", "KANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"}  # Scripts that write no spaces.
_ALIASES = {"HIRAGANA": "KANA", "KATAKANA": "KANA", "COMBINING": "LATIN"}
_NEIGHBOURS = 10  # Of CSLS.
_LEAST_SCORE = 0.1
_LEAST_PIECES = 150  # Of a script that is switched to.
_LEAST_PAIRS = 50
_CHUNK = 4096
_MARKER = "▁"  # What SentencePiece writes for the space in front of a word.


@dataclass(frozen=True)
class Pairs:
    """Matches of one script: numbers of English words, from 0, and ids of pieces, both (pairs,) int64, by word."""

    words: Tensor
    pieces: Tensor


Dictionary = dict[str, Pairs]


def script_of(word: str) -> str | None:
    """Name of the one script a word is written in, None for a mixture or other signs."""
    names = set()
    for char in word:
        if unicodedata.category(char)[0] in "LM":
            name = unicodedata.name(char, "X").split()[0]
            names.add(_ALIASES.get(name, name))
        elif char not in "'’-":
            return None
    if names == {"CJK", "KANA"}:
        return "KANA"
    return names.pop() if len(names) == 1 else None


def foreign_pieces(tokenizer: Any, english: Collection[str], *, most: int | None = None) -> dict[str, list[int]]:
    """Ids of the pieces that are whole words, by script, without those written like an English word.

    Args:
        tokenizer: A tokenizer with a SentencePiece vocabulary; any other gives nothing.
        english: The English words, lower-case.
        most: Pieces taken in all, those first in the vocabulary, which are the most frequent; all when None.
    """
    vocabulary = sorted((index, piece) for piece, index in tokenizer.get_vocab().items())
    if sum(piece.startswith(_MARKER) for _, piece in vocabulary) < len(vocabulary) // 20:
        return {}
    special, known = set(tokenizer.all_special_ids), set(english)
    by_script: dict[str, list[int]] = defaultdict(list)
    count = 0
    for index, piece in vocabulary:
        word = piece.removeprefix(_MARKER)
        script = script_of(word) if word and index not in special else None
        if script is None or (script not in _NO_SPACES and (not piece.startswith(_MARKER) or len(word) < 2)):
            continue
        if script != "LATIN" or word.lower() not in known:
            by_script[script].append(index)
            count += 1
            if count == most:
                break
    return {script: ids for script, ids in by_script.items() if len(ids) >= _LEAST_PIECES}


def match_scripts(vectors: Mapping[str, Tensor], english: Tensor, pieces: Mapping[str, list[int]]) -> Dictionary:
    """Matches the pieces of each script with the English words.

    Args:
        vectors: By script, states of its pieces, (n, d) float32.
        english: States of the English words, (m, d) float32.
        pieces: By script, ids of the n pieces.
    """
    dictionary = {}
    target = F.normalize(english - english.mean(0), dim=1)
    for script, rows in vectors.items():
        reverse, most = (6, 16) if script == "LATIN" else (3, 8)  # Latin holds dozens of languages.
        words, index = _match(F.normalize(rows - rows.mean(0), dim=1), target, reverse=reverse, most=most)
        if len(words) >= _LEAST_PAIRS:
            dictionary[script] = Pairs(words.cpu(), torch.tensor(pieces[script])[index.cpu()])
    return dictionary


def _match(foreign: Tensor, english: Tensor, *, reverse: int, most: int) -> tuple[Tensor, Tensor]:
    """The nearest English word of each foreign one and the ``reverse`` nearest foreign ones of each English one.

    Returns English and foreign indices, sorted by the English one, at most ``most`` of each, the best first.
    """
    n, of_foreign, of_english = len(foreign), _density(foreign, english), _density(english, foreign)
    f, e, score = _nearest(foreign, english, of_foreign, of_english, 1)
    e2, f2, score2 = _nearest(english, foreign, of_english, of_foreign, reverse)
    key, inverse = torch.unique(torch.cat([e * n + f, e2 * n + f2]), return_inverse=True)
    score = torch.zeros(len(key), device=key.device).scatter(0, inverse, torch.cat([score, score2]))
    key, score = key[score >= _LEAST_SCORE], score[score >= _LEAST_SCORE]
    order = torch.argsort(score, descending=True, stable=True)
    key = key[order[torch.argsort(key[order] // n, stable=True)]]
    counts = torch.bincount(key // n, minlength=len(english))
    rank = torch.arange(len(key), device=key.device) - (torch.cumsum(counts, 0) - counts)[key // n]
    return key[rank < most] // n, key[rank < most] % n


def _density(a: Tensor, b: Tensor) -> Tensor:
    """Mean similarity of each row of a (n, d) to its nearest rows of b: (n,)."""
    return torch.cat([(part @ b.T).topk(min(_NEIGHBOURS, len(b)), 1).values.mean(1) for part in a.split(_CHUNK)])


def _nearest(a: Tensor, b: Tensor, near_a: Tensor, near_b: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of a, their ``most`` nearest rows of b by CSLS, and the scores, all (n x most,)."""
    best = [
        (2 * part @ b.T - density[:, None] - near_b).topk(min(most, len(b)), 1)
        for part, density in zip(a.split(_CHUNK), near_a.split(_CHUNK), strict=True)
    ]
    index = torch.cat([indices for _, indices in best])
    rows = torch.arange(len(a), device=a.device)[:, None].expand_as(index)
    return rows.flatten(), index.flatten(), torch.cat([values for values, _ in best]).flatten()


class Switcher:
    """Replaces words of a batch by words of one script a text.

    Args:
        dictionary: Matches by script; a script is drawn by the root of the number of its pieces.
        device: Where batches are.
    """

    def __init__(self, dictionary: Dictionary, device: torch.device) -> None:
        pairs = list(dictionary.values())
        self.empty = not pairs
        most = max((int(p.words.max()) for p in pairs), default=0) + 2
        counts = [torch.bincount(p.words + 1, minlength=most) for p in pairs] or [torch.zeros(most, dtype=torch.long)]
        self.count = torch.stack(counts).to(device)
        self.piece = torch.cat([p.pieces for p in pairs] or [torch.zeros(1, dtype=torch.long)]).to(device)
        flat = self.count.flatten()
        self.start = (torch.cumsum(flat, 0) - flat).view_as(self.count)
        self.weights = torch.tensor([len(p.pieces.unique()) for p in pairs] or [1.0], device=device).sqrt()

    def __call__(
        self, ids: Tensor, mask: Tensor, words: Tensor, share: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Switches 30 to 100 % of the words of some texts.

        Args:
            ids: (batch, seq) token ids.
            mask: (batch, seq) bool, True at tokens.
            words: (batch, seq) as in `lusifer.adapt.tokens.TokenTexts`.
            share: Of the texts that are switched.
            generator: Source of chance, on the device of the batch.

        Returns:
            New ids and mask, (batch, seq); the room of a word's further tokens is closed.
        """
        if self.empty or share <= 0:
            return ids, mask
        n, length = ids.shape

        def rand(*shape: int) -> Tensor:
            return torch.rand(*shape, device=ids.device, generator=generator)

        script = torch.multinomial(self.weights, n, replacement=True, generator=generator)[:, None]
        chance = torch.where(rand(n, 1) < share, 0.3 + 0.7 * rand(n, 1), -1.0)
        first, word = words > 0, words.abs().long()
        word = torch.where(word < self.count.shape[1], word, 0)  # Beyond are words without any match.
        coin = rand(n, length + 1).gather(1, torch.cumsum(first, 1))  # One for all tokens of a word.
        choices = self.count[script, word]
        switched = (choices > 0) & (word > 0) & (coin < chance)
        pick = (rand(n, length) * choices).long().minimum((choices - 1).clamp_min(0))
        piece = self.piece[(self.start[script, word] + pick).clamp_max(len(self.piece) - 1)]
        ids = torch.where(switched & first, piece, ids)
        keep = mask & ~(switched & (words < 0))
        ids = ids.gather(1, torch.argsort((~keep).to(torch.uint8), dim=1, stable=True))
        return ids, torch.arange(length, device=ids.device) < keep.sum(1, keepdim=True)
