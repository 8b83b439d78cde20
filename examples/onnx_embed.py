"""Embeds texts with an exported model: nothing but onnxruntime, tokenizers and numpy.

Usage: lusifer export onnx starter starter-onnx
       python examples/onnx_embed.py starter-onnx "When does the library open?" "Wann öffnet die Bibliothek?"

Prints the cosine of the first text with each of the others.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


class Embedder:
    """A folder of ``lusifer export onnx``."""

    def __init__(self, folder: str) -> None:
        self.tokenizer = Tokenizer.from_file(str(Path(folder, "tokenizer.json")))  # Pads and truncates.
        self.session = onnxruntime.InferenceSession(Path(folder, "model.onnx"))

    def encode(self, texts: list[str], prompt: str = "") -> np.ndarray:
        """(n, dim) float32 unit vectors of a batch; the model's prompts are in its config.json."""
        rows = self.tokenizer.encode_batch([prompt + text for text in texts])
        ids = np.array([row.ids for row in rows], dtype=np.int64)
        mask = np.array([row.attention_mask for row in rows], dtype=np.int64)
        return self.session.run(None, {"input_ids": ids, "attention_mask": mask})[0]


def main(folder: str, *texts: str) -> None:
    """Prints cosines."""
    first, *others = Embedder(folder).encode(list(texts))
    for vector, text in zip(others, texts[1:], strict=True):
        print(f"{first @ vector:.3f} {text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
