"""Small tasks of own data, one of every type, and a model that is neither perfect nor useless on them."""

from __future__ import annotations

import csv
import json

from support.mteb_folder import WORDS

TEXTS = [f"{WORDS[i % 8]} {WORDS[i // 8 % 8]} {i}" for i in range(48)]
LABELS = ["abc"[i % 3] for i in range(48)]
PAIRS = [(TEXTS[i], TEXTS[(i + i % 3) % 48]) for i in range(48)]


def write_csv(path, rows, delimiter=","):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path.name


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path.name


def labelled(language, count=48):
    return [{"text": f"{text} {language}", "label": label} for text, label in zip(TEXTS, LABELS, strict=True)][:count]


def scored():
    return [{"sentence1": a, "sentence2": b, "score": 5 - 2 * (i % 3) + i % 2} for i, (a, b) in enumerate(PAIRS)]


def write_task(folder, stem, /, **keys):
    """A task's YAML file; JSON is YAML."""
    path = folder / f"{stem}.yaml"
    path.write_text(json.dumps(keys), encoding="utf-8")
    return path


def write_own_tasks(folder):
    """One task of every type, in as many formats; returns the folder."""
    folder.mkdir(exist_ok=True)
    for code in ("en", "de"):
        write_csv(folder / f"labelled-{code}.csv", labelled(code))
    write_jsonl(folder / "scored.jsonl", scored())
    write_csv(
        folder / "pairs.tsv", [{"sentence1": a, "sentence2": b, "label": i % 2} for i, (a, b) in enumerate(PAIRS)], "\t"
    )
    (folder / "de.txt").write_text("".join(f"{text}\n" for text in TEXTS))
    (folder / "en.txt").write_text("".join(f"{text}{'x' * (i % 5)}\n" for i, text in enumerate(TEXTS)))
    write_jsonl(folder / "corpus.jsonl", [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(TEXTS)])
    write_jsonl(folder / "queries.jsonl", [{"_id": f"q{i}", "text": text[:9]} for i, text in enumerate(TEXTS[:24])])
    judged = [{"query-id": f"q{i}", "corpus-id": f"d{i + k}", "score": 2 - k} for i in range(24) for k in range(3)]
    write_csv(folder / "qrels.tsv", judged, "\t")
    asked = [{"query": TEXTS[i][:9], "positive": TEXTS[i], "negative": TEXTS[i + 8 : i + 14]} for i in range(8)]
    write_jsonl(folder / "ranked.jsonl", asked)
    both = {"en": "labelled-en.csv", "de": {"train": "labelled-en.csv", "test": "labelled-de.csv"}}
    write_task(folder, "topics", type="classification", languages=both)
    write_task(folder, "clusters", type="clustering", languages={"en": "labelled-en.csv", "de": "labelled-de.csv"})
    about = {"description": "How similar are two lines?"}
    write_task(folder, "similar", type="sts", languages={"en": "scored.jsonl"}, **about)
    write_task(folder, "same", type="pair-classification", languages={"en": "pairs.tsv"})
    write_task(folder, "bitext", type="bitext", languages={"de-en": {"sentence1": "de.txt", "sentence2": "en.txt"}})
    files = {"queries": "queries.jsonl", "corpus": "corpus.jsonl", "qrels": "qrels.tsv"}
    write_task(folder, "answers", type="retrieval", languages={"en": files, "de-en": files})
    write_task(folder, "ranked", type="reranking", languages={"en": "ranked.jsonl"})
    return folder
