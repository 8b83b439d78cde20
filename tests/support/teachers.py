"""A tiny teacher and English sentences to adapt to it."""

from __future__ import annotations

import random

from support.bert import save_bert
from support.tiny import CORPUS

WORDS = sorted({word.strip(",") for line in CORPUS for word in line.split()})


def sentences(count, seed=0):
    """English sentences of the tiny tokenizer's words, each once."""
    rng = random.Random(seed)
    made = {}
    while len(made) < count:
        made[" ".join(["the", *rng.choices(WORDS, k=rng.randrange(4, 12))])] = None
    return list(made)


def save_teacher(folder, width=32, **options):
    """A Sentence Transformers model on a random BERT; its folder as a text."""
    return str(save_bert(folder / "model", size=width, **options))
