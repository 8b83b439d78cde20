"""Examples of a mixture to batches of tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lusifer.data.prompts import Role, with_instruction

Features = dict[str, Tensor]
Teach = Callable[[Sequence[str], Sequence[Role]], Tensor]  # Texts and their roles to a teacher's vectors (texts, dim).

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


def source_texts(examples: Sequence[dict[str, Any]]) -> tuple[list[str], list[Role]]:
    """The sources of stage 1 without instructions, and what each is."""
    return [row["plain"] for row in examples], [row["role"] for row in examples]


def column_texts(examples: Sequence[dict[str, Any]]) -> tuple[list[str], list[Role]]:
    """The texts of stage 2 without instructions, column by column, and what each is."""
    columns = zip(*([row["plain_query"], row["positive"], *row["negatives"]] for row in examples), strict=True)
    texts = [text for column in columns for text in column]
    return texts, ["query" if place < len(examples) else "document" for place in range(len(texts))]


_MULTIPLIERS = (-0x61C8864680B583EB, -0x40A7B892E31B1A47)  # The odd constants of SplitMix64, as signed numbers.


def text_keys(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Keys of rows, (rows,) int64, equal exactly when two rows hold the same tokens (up to 64-bit hash collisions).

    Args:
        input_ids: (rows, seq) int64.
        attention_mask: (rows, seq), non-zero at real tokens.
    """
    ids, mask = input_ids.long(), attention_mask.long()
    weights = mask.cumsum(dim=1) * _MULTIPLIERS[0]
    weights = (weights ^ (weights >> 30)) * _MULTIPLIERS[1]
    weights = (weights ^ (weights >> 27)) | 1
    return ((ids + 1) * mask * weights).sum(dim=1)


def _positions(examples: Sequence[dict[str, Any]]) -> Tensor:
    return torch.tensor([example["position"] for example in examples], dtype=torch.int64)


@dataclass
class AlignCollator:
    """Batches of stage 1.

    Attributes:
        tokenizer: The encoder's.
        max_seq_length: Encoder tokens of a source, special tokens included.
        target_preprocess: Tokenizes targets for the LLM, see `llm_preprocess`.
        prompts: What the encoder reads in front of a source, by role.
        teach: Gives a teacher's vectors of the sources, or None without a teacher.
    """

    tokenizer: PreTrainedTokenizerBase
    max_seq_length: int
    target_preprocess: Callable[[list[str]], Features]
    prompts: Mapping[Role, str] = field(default_factory=dict)
    teach: Teach | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Tokenizes a batch, all of one task and set.

        Returns:
            ``source`` and ``target``, each with ``input_ids`` and ``attention_mask`` (rows, seq) int64;
            ``positions`` (rows,) int64; ``task``; ``dataset``; with a teacher, ``teacher``: its vectors of the sources,
            (rows, dim) float32.
        """
        texts, roles = source_texts(examples)
        sources = [self.prompts.get(row["role"], "") + row["source"] for row in examples]
        batch: dict[str, Any] = {
            "source": tokenize(self.tokenizer, sources, self.max_seq_length),
            "target": self.target_preprocess([row["target"] for row in examples]),
            "positions": _positions(examples),
            "task": examples[0]["task"],
            "dataset": examples[0]["dataset"],
        }
        if self.teach is not None:
            batch["teacher"] = self.teach(texts, roles)
        return batch


@dataclass
class ContrastCollator:
    """Batches of stage 2.

    Attributes:
        tokenizer: The encoder's.
        max_seq_length: Encoder tokens of a text, special tokens included.
        guide_preprocess: Maps the texts without instructions and their roles to the guide model's features, or None
            without a guide.
        prompts: What the encoder reads in front of a text, by role; the guide does not.
        teach: Gives a teacher's vectors of the texts without instructions, or None without a teacher.
    """

    tokenizer: PreTrainedTokenizerBase
    max_seq_length: int
    guide_preprocess: Callable[[Sequence[str], Sequence[Role]], dict[str, Any]] | None = None
    prompts: Mapping[Role, str] = field(default_factory=dict)
    teach: Teach | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Tokenizes a batch of one set at once, column by column: queries, positives, first negatives, ...

        Returns:
            ``input_ids`` and ``attention_mask`` (columns * rows, seq) int64; ``keys`` (columns * rows,) int64, equal
            for texts that are equal without prompts and instructions; ``columns``; ``in_batch_negatives``;
            ``positions`` (rows,) int64; ``task``; ``dataset``; with a guide, ``guide``: its features of the texts; with
            a teacher, ``teacher``: its vectors, (columns * rows, dim) float32.
        """
        texts, roles = column_texts(examples)
        instruction = examples[0]["document_instruction"]
        documents = [with_instruction(instruction, text) for text in texts[len(examples) :]]
        instructed = [row["query"] for row in examples] + documents
        prompted = [self.prompts.get(role, "") + text for text, role in zip(instructed, roles, strict=True)]
        features = tokenize(self.tokenizer, prompted, self.max_seq_length)
        batch: dict[str, Any] = {
            **features,
            "keys": self._keys(texts, prompted, features),
            "columns": len(texts) // len(examples),
            "in_batch_negatives": examples[0]["in_batch_negatives"],
            "positions": _positions(examples),
            "task": "contrast",
            "dataset": examples[0]["dataset"],
        }
        if self.guide_preprocess is not None:
            batch["guide"] = self.guide_preprocess(texts, roles)
        if self.teach is not None:
            batch["teacher"] = self.teach(texts, roles)
        return batch

    def _keys(self, texts: list[str], prompted: list[str], features: Features) -> Tensor:
        """Keys of the texts' tokens, as many as the encoder reads: what it cannot tell apart is no negative either."""
        keys = text_keys(**features)
        other = [place for place, text in enumerate(texts) if text != prompted[place]]
        if other:
            keys[other] = text_keys(**tokenize(self.tokenizer, [texts[place] for place in other], self.max_seq_length))
        return keys
