"""What more texts are worth in the closed form: the sums of one regression, solved and scored after so many texts.

``python benchmarks/adapt/amounts.py --texts FILE --eval DIR [--out FILE]``. FILE is what ``bundled_texts.py --every``
writes. Encoder and teacher are the starter's, both frozen; each text goes in plain and code-switched; scores are those
of ``ablations.py``. ``--vectors STEM`` keeps the first 50,000 texts and their vectors as STEM.jsonl and STEM.npy, an
index for ``lusifer adapt STEM.npy+STEM.jsonl OUT``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from ablations import starters
from lusifer.adapt.closed_form import Moments
from lusifer.adapt.collect import dictionary, prepare
from lusifer.adapt.switching import Switcher
from lusifer.adapt.texts import english_texts
from lusifer.publishing import write_json

COUNTS = (10_000, 50_000, 100_000, 200_000)
BLOCK, KEPT, PENALTY = 2_000, 50_000, 0.03


def keep(stem: Path, texts: list[str], vectors: list[np.ndarray]) -> None:
    """Writes texts and vectors as an index."""
    np.save(stem.with_suffix(".npy"), np.concatenate(vectors))
    stem.with_suffix(".jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")


def main() -> None:
    """Reads the command line, streams the texts and prints a row for each number of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", required=True)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--vectors", type=Path)
    args = parser.parse_args()
    student, teacher, sets = starters(args.eval)
    corpus = english_texts((args.texts,), most=max(COUNTS))
    roles = ["query"] * (len(corpus.train) + len(corpus.held_out))
    prepared = prepare(student, corpus.train, corpus.held_out, roles)
    switcher = Switcher(dictionary(student, prepared.train.vocabulary, most=None), student.device)
    moments = Moments(student.width * len(student.layers), sets.contexts.shape[1])
    generator, vectors, rows = torch.Generator().manual_seed(0), [], {}
    for start in range(0, len(corpus.train), BLOCK):
        texts = corpus.train[start : start + BLOCK]
        targets = torch.from_numpy(teacher.encode(texts, ["document"] * len(texts)))
        tokens, order = prepared.train.next(BLOCK), torch.arange(len(texts))
        for options in ({}, {"switcher": switcher, "generator": generator}):
            moments.add(student.states(tokens, order, **options), targets)
        done = start + len(texts)
        if args.vectors and start < KEPT:
            vectors.append(targets.numpy())
            if done == KEPT:
                keep(args.vectors, corpus.train[:KEPT], vectors)
        if done in COUNTS:
            rows[done] = sets.score(moments.solve(torch.arange(moments.inputs), PENALTY))
            print(f"{done:,}", json.dumps(rows[done]), flush=True)
            if args.out:
                write_json(args.out, {str(count): row for count, row in rows.items()})


if __name__ == "__main__":
    main()
