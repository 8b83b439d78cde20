"""Examples of a mixture to batches of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

Features = dict[str, Tensor]

_PADDED: dict[str, Any] = {"truncation": True, "padding": True, "padding_side": "right", "return_tensors": "pt"}


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int, *, special_tokens: bool = True
) -> Features:
    """Texts as ``input_ids`` and ``attention_mask``, (texts, seq) int64, padded on the right.

    Args:
        tokenizer: The encoder's, or the LLM's for targets.
        texts: The texts.
        max_length: Tokens of a text; a longer one is truncated, its special tokens stay (also the last one).
        special_tokens: Whether to add them.
    """
    encoded = tokenizer(list(texts), add_special_tokens=special_tokens, max_length=max_length, **_PADDED)
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


def llm_preprocess(tokenizer: PreTrainedTokenizerBase, max_length: int) -> Callable[[list[str]], Features]:
    """A function that tokenizes targets for the LLM, see `tokenize`, without special tokens.

    Args:
        tokenizer: The LLM's; it gets a padding token if it has none.
        max_length: Tokens of a target.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return partial(tokenize, tokenizer, max_length=max_length, special_tokens=False)


def _positions(examples: Sequence[dict[str, Any]]) -> Tensor:
    return torch.tensor([example["position"] for example in examples], dtype=torch.int64)


@dataclass
class AlignCollator:
    """Batches of stage 1.

    Attributes:
        tokenizer: The encoder's.
        max_seq_length: Encoder tokens of a source, special tokens included.
        target_preprocess: Tokenizes targets for the LLM, see `llm_preprocess`.
    """

    tokenizer: PreTrainedTokenizerBase
    max_seq_length: int
    target_preprocess: Callable[[list[str]], Features]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Tokenizes a batch, all of one task and set.

        Returns:
            ``source`` and ``target``, each with ``input_ids`` and ``attention_mask`` (rows, seq) int64;
            ``positions`` (rows,) int64; ``task``; ``dataset``.
        """
        return {
            "source": tokenize(self.tokenizer, [row["source"] for row in examples], self.max_seq_length),
            "target": self.target_preprocess([row["target"] for row in examples]),
            "positions": _positions(examples),
            "task": examples[0]["task"],
            "dataset": examples[0]["dataset"],
        }


@dataclass
class ContrastCollator:
    """Batches of stage 2.

    Attributes:
        tokenizer: The encoder's.
        max_seq_length: Encoder tokens of a text, special tokens included.
        guide_preprocess: Maps the same texts to the guide model's features, or None without a guide.
    """

    tokenizer: PreTrainedTokenizerBase
    max_seq_length: int
    guide_preprocess: Callable[[list[str]], dict[str, Any]] | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Tokenizes a batch of one set at once, column by column: queries, positives, first negatives, ...

        Returns:
            ``input_ids`` and ``attention_mask`` (columns * rows, seq) int64; ``columns``; ``in_batch_negatives``;
            ``positions`` (rows,) int64; ``task``; ``dataset``; with a guide, ``guide``: its features of the texts.
        """
        columns = zip(*([row["query"], row["positive"], *row["negatives"]] for row in examples), strict=True)
        texts = [text for column in columns for text in column]
        batch: dict[str, Any] = {
            **tokenize(self.tokenizer, texts, self.max_seq_length),
            "columns": len(texts) // len(examples),
            "in_batch_negatives": examples[0]["in_batch_negatives"],
            "positions": _positions(examples),
            "task": "contrast",
            "dataset": examples[0]["dataset"],
        }
        if self.guide_preprocess is not None:
            batch["guide"] = self.guide_preprocess(texts)
        return batch
