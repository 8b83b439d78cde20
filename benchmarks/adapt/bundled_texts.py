"""Makes the English text inside the package, src/lusifer/resources/english.jsonl.bz2, from larger collections.

``python benchmarks/adapt/bundled_texts.py --texts DIR --eval DIR``. TEXTS holds ``sentences``, ``questions`` and
``passages`` (columns ``text`` and ``source``) and ``wordnet`` (``query``, ``positive``) as ``.jsonl.gz``; EVAL the
evaluation sets as Parquet. ``--every FILE`` writes all passages and glosses of the same sources instead, for a longer
run: ``lusifer adapt ... --texts FILE --no-general``.
Only sources whose licence lets the text be passed on are taken (`LEFT_OUT` names the others), and no text that equals a
sentence of an English evaluation text, whole or in one of its sentences of five words or more.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from lusifer.adapt.texts import SENTENCE_END
from lusifer.publishing import publish_file

# No licence of their own, one that asks for more than naming the source and keeping the licence, or poor text.
LEFT_OUT = {"lc-quad", "foldoc", "masc", "python-doc", "squality", "movie-reviews", "movie-snippets", "subjectivity"}
LEFT_OUT |= {"product-reviews", "pros-cons", "opinosis", "site-policy", "basecamp-policies"}
PASSAGES = {
    "wikipedia": 4_000,
    "books-essays": 900,
    "books-fiction": 900,
    "openstax": 800,
    "medquad": 600,
    "speeches": 400,
}
PASSAGES |= {
    "onestop": 400,
    "sgd": 200,
    "rust-book": 150,
    "18f-handbook": 150,
    "recipes": 100,
    "nist": 80,
    "opensource-guide": 60,
}
GLOSSES = 12_000
TARGET = Path(__file__).parents[2] / "src/lusifer/resources/english.jsonl.bz2"


def rows_of(folder: Path, name: str) -> Iterator[dict]:
    """Rows of one gzipped JSON-lines file."""
    with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def plain(text: str) -> str:
    """A text without case and punctuation."""
    return " ".join(re.findall(r"\w+", text.lower()))


def sentence_keys(text: str) -> set[str]:
    """Its sentences of five words or more."""
    return {key for key in map(plain, SENTENCE_END.split(text)) if key.count(" ") >= 4}


def pieces(text: str) -> set[str]:
    """A text and whatever `lusifer.adapt.texts.split_passage` may make of it: sentences and runs of two or three."""
    parts = [part for part in SENTENCE_END.split(text) if part]
    runs = {" ".join(parts[start : start + size]) for size in (1, 2, 3) for start in range(len(parts) - size + 1)}
    return {plain(run) for run in (text, *runs)}


def evaluation_texts(folder: Path) -> tuple[set[str], set[str]]:
    """Every text of the evaluation sets, English ones among them, and the sentences in them."""
    values: set[str] = set()
    for path in sorted(folder.rglob("*.parquet")):
        table = pd.read_parquet(path)
        for column in table.columns:
            values.update(value for value in table[column] if isinstance(value, str) and " " in value)
    return set(map(plain, values)), set().union(*map(sentence_keys, values))


def main() -> None:
    """Reads the command line and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("texts", "eval"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--every", type=Path)
    args = parser.parse_args()
    target, rng, counts = args.every or TARGET, random.Random(0), dict.fromkeys(PASSAGES, 0)
    most = dict.fromkeys(PASSAGES, 1 << 30) if args.every else PASSAGES
    texts: list[tuple[str, str]] = []
    for name in ("sentences", "questions"):
        texts += [(row["text"], row["source"]) for row in rows_of(args.texts, name) if row["source"] not in LEFT_OUT]
    for row in rows_of(args.texts, "passages"):
        if counts.get(row["source"], 1 << 30) < most.get(row["source"], 0):
            counts[row["source"]] += 1
            texts.append((row["text"], row["source"]))
    glosses = [row["positive"][0] for row in rows_of(args.texts, "wordnet")]
    texts += [(text, "wordnet") for text in rng.sample(glosses, len(glosses) if args.every else GLOSSES)]
    whole, sentences = evaluation_texts(args.eval)
    kept = [row for row in texts if whole.isdisjoint(pieces(row[0])) and sentences.isdisjoint(sentence_keys(row[0]))]
    rng.shuffle(kept)
    lines = [json.dumps({"text": text, "source": source}, ensure_ascii=False) for text, source in kept]
    with publish_file(target) as path:
        path.write_bytes(bz2.compress("\n".join(lines).encode() + b"\n"))
    print(
        f"{len(kept):,} texts, {len(texts) - len(kept):,} left out as evaluation text, {target.stat().st_size:,} bytes"
    )


if __name__ == "__main__":
    main()
