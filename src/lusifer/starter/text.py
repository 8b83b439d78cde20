"""English text that pip brings: three translations of one book, aligned verse by verse.

The World English Bible, the American Standard and the King James Version (the ``pythonbible-*`` packages, MIT): verses
for stage 0 and reconstruction, the same verse in two translations as paraphrase pairs, and a verse with the passage
around it in another translation as retrieval pairs.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lusifer.errors import LusiferError, first_line
from lusifer.publishing import make_folder, publish_file
from lusifer.starter.fetch import PREFIX, cache_dir, starter_path

VERSES = "english-verses"
PAIRS = "english-pairs"
PASSAGES = "english-passages"
_PASSAGE_VERSES = 7
# Short verses keep CPU training quick; the bounds are in characters.
_SHORTEST, _LONGEST_PAIR, _LONGEST_VERSE = 20, 95, 160


def resolve_data(name: str) -> str:
    """Maps ``starter:english-verses``, ``-pairs`` and ``-passages`` to their files, made once, other starters to their
    folders, and returns everything else unchanged.

    Raises:
        LusiferError: If the name is unknown, the text packages are missing or the cache is not writable.
    """
    key = name.removeprefix(PREFIX)
    if not name.startswith(PREFIX):
        return name
    if key not in (VERSES, PAIRS, PASSAGES):
        return str(starter_path(name))
    path = cache_dir() / "starter" / f"{key}.jsonl"
    if not path.is_file():
        _write_all(path.parent)
    return str(path)


def _translations() -> dict[str, dict[int, str]]:
    try:
        import pythonbible
        from pythonbible.verses import VERSE_IDS
    except ImportError as error:
        raise LusiferError(f"the starter text needs {error.name}; run `pip install 'lusifer[quickstart]'`") from error
    names = ("WORLD_ENGLISH", "AMERICAN_STANDARD", "KING_JAMES")
    texts: dict[str, dict[int, str]] = {name: {} for name in names}
    for name in names:
        version = getattr(pythonbible.Version, name)
        for verse in VERSE_IDS:
            try:
                text = pythonbible.get_verse_text(verse, version)
            except Exception:  # The index lists verses that not every translation has.
                continue
            texts[name][verse] = re.sub(r"\s+", " ", text.replace("`", "\u2019")).strip()
    return texts


def _write_all(folder: Path) -> None:
    texts = _translations()
    modern, others = texts["WORLD_ENGLISH"], (texts["AMERICAN_STANDARD"], texts["KING_JAMES"])
    verses = [{"text": text} for text in modern.values() if _SHORTEST < len(text) <= _LONGEST_VERSE]
    pairs = []
    for verse, text in modern.items():
        translations = [other[verse] for other in others if verse in other]
        positives = sorted({o for o in translations if _SHORTEST < len(o) <= _LONGEST_PAIR and o != text})
        if positives and _SHORTEST < len(text) <= _LONGEST_PAIR:
            pairs.append({"query": text, "positive": positives, "negative": []})
    passages = _passages(modern, others, random.Random(1))
    generator = random.Random(0)
    try:
        make_folder(folder)
        for name, rows in ((VERSES, verses), (PAIRS, pairs), (PASSAGES, passages)):
            generator.shuffle(rows)
            with publish_file(folder / f"{name}.jsonl") as staging, staging.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except OSError as error:
        raise LusiferError(f"cannot write the starter text into {str(folder)!r}: {first_line(error)}") from error


def _passages(
    modern: Mapping[int, str], others: Sequence[Mapping[int, str]], generator: random.Random
) -> list[dict[str, Any]]:
    """Each verse with the seven around it, at a place of its own among them, within one chapter."""
    chapters: dict[int, list[int]] = {}
    for verse in sorted(modern):
        chapters.setdefault(verse // 1000, []).append(verse)
    rows = []
    for verses in chapters.values():
        for place, verse in enumerate(verses):
            other = generator.choice(others)
            begin = max(0, min(place - generator.randrange(_PASSAGE_VERSES), len(verses) - _PASSAGE_VERSES))
            passage = " ".join(other[v] for v in verses[begin : begin + _PASSAGE_VERSES] if v in other)
            if verse in other and _SHORTEST < len(modern[verse]) <= _LONGEST_VERSE:
                rows.append({"query": modern[verse], "positive": [passage], "negative": []})
    return rows
