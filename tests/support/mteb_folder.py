"""A folder with one small task of every type, and a model that is neither perfect nor useless on them."""

from __future__ import annotations

import json

import datasets
import mteb
import numpy as np

WORDS = ["sea", "tree", "goal", "bread", "train", "rain", "letter", "music"]


class Bag(mteb.models.abs_encoder.AbsEncoder):
    """Counts of letters, with noise by text, so that no score is perfect."""

    mteb_model_meta = mteb.models.ModelMeta.create_empty(overwrites={"name": "local/bag", "revision": "x"})

    def encode(self, inputs, **kwargs):
        texts = [text for batch in inputs for text in batch["text"]]
        rows = [np.bincount([ord(c) % 32 for c in text + "."], minlength=32) for text in texts]
        noise = [np.random.default_rng(sum(map(ord, text))).normal(size=32) for text in texts]
        return (np.stack(rows) + 0.5 * np.stack(noise)).astype("f4")


def save(folder, name, splits):
    lines = ["---", "configs:"]
    for config, parts in splits.items():
        lines += [f'- config_name: "{config}"', "  data_files:"]
        for split, rows in parts.items():
            path = folder / name / config / f"{split}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_list(rows).to_parquet(path)
            lines += [f'  - split: "{split}"', f'    path: "{config}/{split}.parquet"']
    (folder / name / "README.md").write_text("\n".join([*lines, "---", ""]))


def write_tasks(folder):
    """One small task of every type there is, and the ``tasks.json`` that lists them; returns the folder."""
    text = lambda i: f"{WORDS[i % 8]} {WORDS[i // 8 % 8]} {i}"  # noqa: E731
    # Pairs are the same text, or one or two steps apart; raters agree with that, more or less.
    real = 4 - 1.5 * (np.arange(48) % 3) + np.random.default_rng(0).random(48)
    # As in KLUE-STS: mean of the ratings, the same to a tenth (which mteb reads), and whether it is at least 3.
    label = [{"label": round(float(x), 1), "real-label": float(x), "binary-label": int(x >= 3)} for x in real]
    pair = [{"sentence1": text(i), "sentence2": text(i + i % 3)} for i in range(48)]
    save(
        folder,
        "klue",
        {"sts": {"validation": [{"guid": str(i), **row, "labels": label[i]} for i, row in enumerate(pair)]}},
    )
    save(folder, "farstail", {"default": {"test": [{**row, "labels": i % 2} for i, row in enumerate(pair)]}})
    rows = [{"index_id": i, "category": ["a", "b", "c"][i % 3], "text": text(i * (1 + i % 3))} for i in range(90)]
    save(folder, "sib", {"eng_Latn": {"train": rows, "validation": rows[:9], "test": rows[20:60]}})
    save(
        folder,
        "tatoeba",
        {
            "default": {
                "test": [
                    {"sentence1": text(i), "sentence2": text(i) + "x" * (i % 5), "lang": "fra-eng"} for i in range(60)
                ]
            }
        },
    )
    save(
        folder,
        "xquad",
        {
            "es-corpus": {"validation": [{"id": f"d{i}", "title": "", "text": text(i)} for i in range(40)]},
            "es-queries": {"validation": [{"id": f"q{i}", "text": text(i)[:8]} for i in range(40)]},
            "es-qrels": {"validation": [{"query-id": f"q{i}", "corpus-id": f"d{i}", "score": 1} for i in range(40)]},
        },
    )
    entries = [
        ("KLUE-STS", "klue", "validation", {"default": "ko"}),
        ("FarsTail", "farstail", "test", {"default": "fa"}),
        ("SIB200Classification", "sib", "test", {"eng_Latn": "en"}),
        ("SIB200ClusteringS2S", "sib", "test", {"eng_Latn": "en"}),
        ("Tatoeba", "tatoeba", "test", {"fra-eng": "fr"}),
        ("XQuADRetrieval", "xquad", "validation", {"es": "es"}),
    ]
    listed = [{"name": n, "dir": d, "eval_splits": [split], "subsets": subsets} for n, d, split, subsets in entries]
    (folder / "tasks.json").write_text(json.dumps(listed))
    return folder
