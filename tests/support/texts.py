"""Texts to encode, and what is compared afterwards."""

from __future__ import annotations

import random

import pytest

from lusifer import LusiferError
from lusifer.bulk.run import encode
from support.tiny import CORPUS


def some_texts(count, seed=0):
    words, rng = " ".join(CORPUS).split(), random.Random(seed)
    return [" ".join(rng.choices(words, k=rng.randint(1, 15))) for _ in range(count)]


def refused(*args, **kwargs):
    with pytest.raises(LusiferError) as caught:
        encode(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def content(folder):
    """Every file below a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


TEXTS = [
    *CORPUS,
    "bread and milk",
    "the green river",
    "friends at the station",
    "a letter about the house near the sea",
    "milk and apples every morning",
    "the dog slept on the roof",
    "she sent bread to the market",
    "his mother reads a letter by the river",
    "the history of football in the valley",
    "apples fell on the green mat",
    "my brother and the long train",
    "rain at the station all evening",
    "they wrote a small book",
    "the friends looked at the sea",
    "a cat in the market",
    "nine small apples",
]
