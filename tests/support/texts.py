"""Texts to encode, and what is compared afterwards."""

from __future__ import annotations

import random

import numpy as np
import pytest
from pyarrow import parquet

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


def kept_rows(folder):
    """Rows of an encoding that lie in a folder, in shards and in what is kept of unfinished ones."""
    whole = sum(parquet.ParquetFile(path).metadata.num_rows for path in folder.glob("part-*"))
    return whole + sum(len(np.load(path)) for path in folder.glob("_partial-*"))


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
