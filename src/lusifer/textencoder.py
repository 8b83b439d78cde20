"""Texts to vectors at the speed of the hardware: tokenised ahead, sorted by tokens, in batches of a token budget.

1. A window of texts is tokenised at once, in a thread of its own, while the model is busy with the window before.
2. Its rows are sorted by their number of tokens and cut into batches of at most a budget of padded tokens, so that
   padding is a few per cent however lengths and scripts are mixed (sorted by characters, as Sentence Transformers does,
   a third of the tokens is padding when scripts differ).
3. Each batch goes through the model; the vectors return to the order of the texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from tqdm.auto import tqdm

from lusifer.microbatches import micro_batches

# Enough rows for matrix products at full speed, few enough that a layer's states stay in the cache of a CPU.
TOKEN_BUDGET = {"cpu": 2048}
_TOKEN_BUDGET_ELSEWHERE = 32_768
WINDOW = 4096


class TextEncoder:
    """A loaded model as a function from texts to unit vectors.

    Args:
        model: Any Sentence Transformers model of texts.
        token_budget: Padded tokens of a batch; chosen by the device when None.
        window: Texts tokenised and sorted together.

    Attributes:
        dimension: Length of a vector.
        max_seq_length: Tokens read of a text.
        cut: How many texts so far were longer and were cut.
    """

    def __init__(self, model: SentenceTransformer, *, token_budget: int | None = None, window: int = WINDOW) -> None:
        self.model = model.eval()
        self.tokenizer: Any = model.tokenizer
        self.dimension = int(model.get_embedding_dimension() or 0)
        self.max_seq_length = int(model.max_seq_length or 512)
        self.token_budget = token_budget or TOKEN_BUDGET.get(model.device.type, _TOKEN_BUDGET_ELSEWHERE)
        self.window = window
        self.cut = 0

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts, special tokens included, cut to what the model reads; counts the cut ones."""
        found: list[list[int]] = self.tokenizer(
            list(texts), truncation=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )["input_ids"]
        long = [row for row, ids in enumerate(found) if len(ids) > self.max_seq_length]
        for row in long:  # Cut by the tokenizer, which knows what stands at the end.
            found[row] = self.tokenizer(texts[row], truncation=True, max_length=self.max_seq_length)["input_ids"]
        self.cut += len(long)
        return found

    @torch.inference_mode()
    def encode_ids(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        """Embeds tokenised texts, in token-sorted batches.

        Args:
            ids: Token ids by text, as `tokenize` gives them.

        Returns:
            (n, dim) float32 unit vectors, in the order of the texts.
        """
        found = np.empty((len(ids), self.dimension), dtype=np.float32)
        for rows, vectors in self._batches(ids):
            found[rows] = vectors
        return found

    def encode(self, texts: Sequence[str], *, progress: bool = False) -> np.ndarray:
        """Embeds texts.

        Args:
            texts: The texts.
            progress: Whether to show a bar.

        Returns:
            (n, dim) float32 unit vectors.
        """
        found = np.empty((len(texts), self.dimension), dtype=np.float32)
        begin = 0
        with tqdm(total=len(texts), desc="encoding", unit="text", disable=not progress) as bar:
            for ids in self._tokenized(texts):
                with torch.inference_mode():
                    for rows, vectors in self._batches(ids):
                        found[begin + rows] = vectors
                        bar.update(len(rows))
                begin += len(ids)
        return found

    def _tokenized(self, texts: Iterable[str]) -> Iterator[list[list[int]]]:
        """Windows of token ids, each made while the one before is in the model."""
        rest = iter(texts)
        with ThreadPoolExecutor(max_workers=1) as pool:
            ahead = None
            while window := list(islice(rest, self.window)):
                current, ahead = ahead, pool.submit(self.tokenize, window)
                if current is not None:
                    yield current.result()
            if ahead is not None:
                yield ahead.result()

    def _batches(self, ids: Sequence[Sequence[int]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        if not len(ids):
            return
        lengths = torch.tensor([len(row) for row in ids])
        for rows in micro_batches(lengths, self.token_budget):
            chosen = rows.tolist()
            yield np.array(chosen), self._forward([ids[row] for row in chosen]).float().cpu().numpy()

    def _forward(self, ids: list[Sequence[int]]) -> Tensor:
        """(n, dim) unit vectors of one batch."""
        batch = self.tokenizer.pad({"input_ids": [list(row) for row in ids]}, return_tensors="pt", verbose=False)
        features = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
        return self.model(features)["sentence_embedding"]
