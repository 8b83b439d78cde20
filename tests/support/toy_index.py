"""An encoder and entries for indexes whose vectors do not matter, here and in other processes."""

from __future__ import annotations

import numpy as np

from lusifer.search import Entry

DIM = 16


class Encoder:
    """Gives every text one vector."""

    cut = 0

    class model:
        class device:
            type = "cpu"

    def encode(self, texts):
        return np.tile(np.eye(DIM, dtype=np.float32)[0], (len(texts), 1))


def entries(count, word="text"):
    return [Entry(f"id{i}", f"{word} {i}", "en") for i in range(count)]
