"""Code-switching without a dictionary: words of English texts are replaced by words the encoder's vocabulary holds.

Which foreign piece stands for which English word is matched in the encoder's own space by CSLS (arXiv 1710.04087).
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn import functional as F

NO_SPACES = {"CJK", "KANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"}  # scripts that write no spaces
ALIASES = {"HIRAGANA": "KANA", "KATAKANA": "KANA", "COMBINING": "LATIN"}
NEIGHBOURS = 10  # of CSLS
LEAST_SCORE = 0.1
LEAST_PIECES = 150  # of a script that is switched to
CHUNK = 4096
Pairs = tuple[Tensor, Tensor]


def script_of(word: str) -> str | None:
    """Name of the one script a word is written in, None for a mixture or other signs."""
    names = set()
    for char in word:
        if unicodedata.category(char)[0] in "LM":
            name = unicodedata.name(char, "X").split()[0]
            names.add(ALIASES.get(name, name))
        elif char not in "'’-":
            return None
    if names == {"CJK", "KANA"}:
        return "KANA"
    return names.pop() if len(names) == 1 else None


def foreign_pieces(pieces: list[str], english: Collection[str]) -> dict[str, list[int]]:
    """Ids of the pieces that are whole words, by script, without those written like a (lower-case) English word."""
    by_script = defaultdict(list)
    for i, piece in enumerate(pieces[4:], start=4):
        word = piece.removeprefix("▁")
        script = script_of(word) if word else None
        if script is None or (script not in NO_SPACES and (not piece.startswith("▁") or len(word) < 2)):
            continue
        if script != "LATIN" or word.lower() not in english:
            by_script[script].append(i)
    return {script: ids for script, ids in by_script.items() if len(ids) >= LEAST_PIECES}


def nearest(a: Tensor, b: Tensor, density_a: Tensor, density_b: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of a [n, d], their ``most`` nearest rows of b [m, d] by CSLS, and the scores; all [n x most]."""
    found = [
        (2 * part @ b.T - density[:, None] - density_b).topk(min(most, len(b)), 1)
        for part, density in zip(a.split(CHUNK), density_a.split(CHUNK), strict=True)
    ]
    index = torch.cat([indices for _, indices in found])
    rows = torch.arange(len(a), device=a.device)[:, None].expand_as(index)
    return rows.flatten(), index.flatten(), torch.cat([values for values, _ in found]).flatten()


def match_words(foreign: Tensor, english: Tensor, *, reverse: int, most: int) -> Pairs:
    """Pairs by CSLS: the nearest English word of every foreign one, and the nearest foreign ones of every English one.

    Args:
        foreign: [n, d], centred, of length 1.
        english: [m, d], likewise.
        reverse: Foreign words taken for each English one.
        most: Pairs kept of an English word, best first.

    Returns:
        English and foreign indices [pairs], sorted by the English one.
    """

    def density(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([(part @ b.T).topk(min(NEIGHBOURS, len(b)), 1).values.mean(1) for part in a.split(CHUNK)])

    n, of_foreign, of_english = len(foreign), density(foreign, english), density(english, foreign)
    f, e, score = nearest(foreign, english, of_foreign, of_english, 1)
    e2, f2, score2 = nearest(english, foreign, of_english, of_foreign, reverse)
    key, inverse = torch.unique(torch.cat([e * n + f, e2 * n + f2]), return_inverse=True)
    score = torch.zeros(len(key), device=key.device).scatter(0, inverse, torch.cat([score, score2]))
    key, score = key[score >= LEAST_SCORE], score[score >= LEAST_SCORE]
    order = torch.argsort(score, descending=True)
    key = key[order[torch.argsort(key[order] // n, stable=True)]]
    counts = torch.bincount(key // n, minlength=len(english))
    rank = torch.arange(len(key), device=key.device) - (torch.cumsum(counts, 0) - counts)[key // n]
    return key[rank < most] // n, key[rank < most] % n


def match_scripts(vectors: dict[str, Tensor], english: Tensor, pieces: dict[str, list[int]]) -> dict[str, Pairs]:
    """The dictionary: by script, indices of English words and ids of foreign pieces, both [pairs].

    Args:
        vectors: By script, of its foreign pieces, [n, d].
        english: Of the English words, [m, d].
        pieces: By script, ids of the n pieces.
    """
    dictionary = {}
    target = F.normalize(english - english.mean(0), dim=1)
    for script, v in vectors.items():
        reverse, most = (6, 16) if script == "LATIN" else (3, 8)
        word, index = match_words(F.normalize(v - v.mean(0), dim=1), target, reverse=reverse, most=most)
        if len(word) >= 50:
            dictionary[script] = (word, torch.as_tensor(pieces[script], device=index.device)[index])
    return dictionary


class Switcher:
    """Replaces words of a batch by words of one script a text, on the device."""

    def __init__(self, dictionary: dict[str, Pairs]) -> None:
        """Takes the dictionary; a script is drawn by the root of the number of its words."""
        pairs = list(dictionary.values())
        most = max(int(word.max()) for word, _ in pairs) + 2
        self.count = torch.stack([torch.bincount(word + 1, minlength=most) for word, _ in pairs])
        self.piece = torch.cat([piece for _, piece in pairs])
        flat = self.count.flatten()
        self.start = (torch.cumsum(flat, 0) - flat).view_as(self.count)
        self.weights = torch.tensor([len(piece.unique()) for _, piece in pairs], device=flat.device).sqrt()

    def __call__(self, ids: Tensor, mask: Tensor, words: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """Switches 30 to 100 % of the words of some texts.

        Args:
            ids: Token ids [B, L].
            mask: True at tokens [B, L].
            words: [B, L], the word's number at its first token, minus it at its others, 0 elsewhere.
            share: Of the texts that are switched.

        Returns:
            New ids and mask [B, L]; what a word's further tokens leave is closed up.
        """
        n, length = ids.shape
        device = ids.device
        script = torch.multinomial(self.weights, n, replacement=True)[:, None]
        chance = 0.3 + 0.7 * torch.rand(n, 1, device=device)
        chance = torch.where(torch.rand(n, 1, device=device) < share, chance, -1.0)
        first, word = words > 0, words.abs().long()
        word = torch.where(word < self.count.shape[1], word, 0)  # rarer words than any in the dictionary
        coin = torch.rand(n, length + 1, device=device).gather(1, torch.cumsum(first, 1))
        choices = self.count[script, word]
        switched = (choices > 0) & (word > 0) & (coin < chance)
        pick = (torch.rand(n, length, device=device) * choices).long().clamp_max((choices - 1).clamp_min(0))
        piece = self.piece[(self.start[script, word] + pick).clamp_max(len(self.piece) - 1)].to(ids.dtype)
        ids = torch.where(switched & first, piece, ids)
        keep = mask & ~(switched & (words < 0))
        ids = ids.gather(1, torch.argsort((~keep).to(torch.uint8), dim=1, stable=True))
        mask = torch.arange(length, device=device) < keep.sum(1, keepdim=True)
        return torch.where(mask, ids, 1), mask
