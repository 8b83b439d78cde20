"""Prepares the training data of recipes/starter.yaml from three freely licensed pair files.

Usage: python tools/starter_data.py SOURCE TARGET

SOURCE holds debian.jsonl.gz (short -> long package descriptions), wordnet.jsonl.gz (lemmas -> gloss) and
scitldr.jsonl.gz (title, TLDR -> abstract); docs/starter.md says where they come from. TARGET receives
them and crops.jsonl: a sentence of a passage, and the passage without it (inverse cloze, arXiv 1906.00300).
"""

from __future__ import annotations

import gzip
import json
import random
import re
import shutil
import sys
from pathlib import Path

PAIRS = ("debian", "wordnet", "scitldr")
PASSAGES = ("debian", "scitldr")
_END = re.compile(r"(?<=[.?!]) +(?=[A-Z])")


def crops(passages: list[str], generator: random.Random) -> list[dict[str, object]]:
    """One pair per passage of at least three sentences."""
    rows: list[dict[str, object]] = []
    for passage in passages:
        sentences = _END.split(passage)
        long = [k for k, sentence in enumerate(sentences) if 25 < len(sentence) < 300]
        if len(sentences) < 3 or not long:
            continue
        chosen = generator.choice(long)
        rest = " ".join(sentences[:chosen] + sentences[chosen + 1 :])
        rows.append({"query": sentences[chosen], "positive": [rest], "negative": []})
    return rows


def main() -> None:
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    target.mkdir(parents=True, exist_ok=True)
    passages = []
    for name in PAIRS:
        shutil.copyfile(source / f"{name}.jsonl.gz", target / f"{name}.jsonl.gz")
        if name in PASSAGES:
            with gzip.open(source / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
                passages += sorted({json.loads(line)["positive"][0] for line in file})
    rows = crops(passages, random.Random(0))
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (target / "crops.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"{len(rows)} crops in {target}")


if __name__ == "__main__":
    main()
