"""Words and scripts of any language, by Unicode alone.

BM25 needs words. Where a script puts no spaces between them, overlapping pairs of characters stand in for words; Hangul
is paired too, because particles stick to its words. Han characters also count alone, since one can be a word.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from functools import lru_cache
from itertools import groupby

NO_LETTERS = "no letters"
_READ = 500  # Characters that decide the script of a text.
_PAIRED = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "BOPOMOFO")
_KANA = ("HIRAGANA", "KATAKANA")
_LABELS = {"CJK": "Han", "NKO": "N'Ko"}
# Zero-width joiners shape letters but separate nothing: with and without them is the same word.
_INVISIBLE = dict.fromkeys((0x200B, 0x200C, 0x200D, 0xFEFF))


@lru_cache(maxsize=65536)
def _name(char: str) -> str:
    """First word of a letter's or mark's Unicode name, which is its script; empty for everything else."""
    # The long vowel mark is common to both kana.
    known = unicodedata.category(char)[0] in "LM" and unicodedata.name(char, "").replace("-", " ").split(" ")[0]
    return "KATAKANA" if char in "\u30fc\u3005" else known or ""


@lru_cache(maxsize=65536)
def _kind(char: str) -> str:
    """How a character is made into words: ``paired``, ``spaced``, or not at all (empty)."""
    if _name(char) in _PAIRED:
        return "paired"
    return "spaced" if unicodedata.category(char)[0] in "LMN" else ""


def words(text: str) -> list[str]:
    """Words for BM25, in any language: lower case, in order, compatibility forms (full width, ligatures) made plain.

    Pairs of characters where the script has no spaces. Accents stay: they tell words apart in many languages.
    """
    plain = unicodedata.normalize("NFKC", text).casefold().translate(_INVISIBLE)
    terms = []
    for kind, group in groupby(plain, key=_kind):
        run = "".join(group)
        if kind == "spaced":
            terms.append(run)
        elif kind == "paired":
            terms += [char for char in run if len(run) == 1 or _name(char) == "CJK"]
            terms += [run[i : i + 2] for i in range(len(run) - 1)]
    return terms


def script(text: str) -> str:
    """The script most letters of a text's first 500 characters belong to: a label where the language is not given.

    For example ``Latin script`` or ``Devanagari script``; ``Japanese script`` for Han with kana; ``no letters``.
    """
    counts = Counter(name for char in text[:_READ] if (name := _name(char)))
    kana = sum(counts.pop(name, 0) for name in _KANA)
    if kana:
        counts["JAPANESE"] = kana + counts.pop("CJK", 0)
    if not counts:
        return NO_LETTERS
    name = counts.most_common(1)[0][0]
    return f"{_LABELS.get(name, name.capitalize())} script"
