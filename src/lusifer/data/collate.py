"""Examples of a mixture to batches of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

Features = dict[str, Tensor]


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int) -> Features:
    """Texts for the encoder: ``input_ids`` and ``attention_mask``, (texts, seq) int64, padded on the right.

    What is longer than ``max_length`` is cut before the special tokens, which stay (also the last one).
    """
    encoded = tokenizer(
        list(texts), truncation=True, max_length=max_length, padding=True, padding_side="right", return_tensors="pt"
    )
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


def llm_preprocess(tokenizer: PreTrainedTokenizerBase, max_length: int) -> Callable[[list[str]], Features]:
    """A function that tokenises targets with the LLM's tokenizer, without special tokens, padded on the right.

    Returns:
        Maps texts to ``input_ids`` and ``attention_mask``, (texts, seq) int64.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token

    def preprocess(texts: list[str]) -> Features:
        encoded = tokenizer(
            texts,
            add_special_tokens=False,
            truncation=True,
            max_length=max_length,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}

    return preprocess


def _positions(examples: Sequence[dict[str, Any]]) -> Tensor:
    return torch.tensor([example["position"] for example in examples], dtype=torch.int64)


@dataclass
class AlignCollator:
    """Batches of stage 1.

    Attributes:
        tokenizer: The encoder's.
        max_seq_length: Encoder tokens of a source, special tokens included.
        target_preprocess: Tokenises targets for the LLM, see `llm_preprocess`.
    """

    tokenizer: PreTrainedTokenizerBase
    max_seq_length: int
    target_preprocess: Callable[[list[str]], Features]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Tokenises sources and targets.

        Args:
            examples: Rows of one batch, all of one task and set.

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
        """Tokenises all texts of a batch at once, column by column: queries, positives, first negatives, ...

        Args:
            examples: Rows of one batch, all of one set.

        Returns:
            ``input_ids`` and ``attention_mask`` (columns * rows, seq) int64; ``columns``; ``in_batch_negatives``;
            ``positions`` (rows,) int64; ``task``; ``dataset``; ``guide``, its features of the same texts, if there
            is a guide.
        """
        negatives = len(examples[0]["negatives"])
        texts = [row["query"] for row in examples] + [row["positive"] for row in examples]
        texts += [row["negatives"][k] for k in range(negatives) for row in examples]
        batch: dict[str, Any] = {
            **tokenize(self.tokenizer, texts, self.max_seq_length),
            "columns": 2 + negatives,
            "in_batch_negatives": examples[0]["in_batch_negatives"],
            "positions": _positions(examples),
            "task": "contrast",
            "dataset": examples[0]["dataset"],
        }
        if self.guide_preprocess is not None:
            batch["guide"] = self.guide_preprocess(texts)
        return batch
