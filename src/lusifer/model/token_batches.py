"""Which rows of a batch go through a model together: groups of similar length, within a budget of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

Features = dict[str, Tensor]


# Tokens of a pass on a CPU: enough rows for matrix products at full speed, few enough to stay in its cache.
PASS_TOKENS = 1024
# Padded by real tokens, above which a batch is split into groups: below it, the groups' own overhead is as much.
WORTH_SPLITTING = 1.15


def micro_batches(lengths: Tensor, max_tokens: int, at_least: int = 1) -> list[Tensor]:
    """Groups rows of similar length and returns the row indices of each group, longest rows first.

    Args:
        lengths: (rows,) tokens per row.
        max_tokens: Most padded tokens a group may hold; a longer single row is a group of its own.
        at_least: Least number of groups, at most ``rows``; groups are halved until there are so many.
    """
    groups = exact_batches(lengths, max_tokens, enough=max_tokens)
    while len(groups) < at_least:
        widest = max(range(len(groups)), key=lambda g: len(groups[g]))
        half = (len(groups[widest]) + 1) // 2
        groups[widest : widest + 1] = [groups[widest][:half], groups[widest][half:]]
    return groups


def padding_groups(attention_mask: Tensor) -> list[Tensor]:
    """Row indices of groups of similar length, where a batch on a CPU is mostly padding; none where that gains nothing.

    ``attention_mask`` is (rows, seq), non-zero at real tokens. Whoever sorts texts by characters, as Sentence
    Transformers does, sends batches that are a third padding.
    """
    lengths = attention_mask.bool().sum(dim=1)
    if attention_mask.device.type != "cpu" or attention_mask.numel() < WORTH_SPLITTING * int(lengths.sum()):
        return []
    groups = micro_batches(lengths, PASS_TOKENS)
    return groups if len(groups) > 1 else []


def exact_batches(lengths: Tensor, max_tokens: int, enough: int = 256) -> list[Tensor]:
    """Groups rows of equal length, and of nearly equal length only where a group would be small; longest rows first.

    Without padding attention needs no mask and is faster. Matrix products on a CPU are at full speed from some 256 rows
    on, so a group of that many tokens need not be filled up with shorter texts.

    Args:
        lengths: (rows,) tokens per row.
        max_tokens: Most padded tokens a group may hold; a longer single row is a group of its own.
        enough: Tokens from which on a group takes no row of another length.
    """
    order = torch.argsort(lengths, descending=True, stable=True)
    ordered = lengths[order].tolist()
    groups, begin = [], 0
    while begin < len(ordered):
        longest, end = max(ordered[begin], 1), begin + 1
        while (
            end < len(ordered)
            and (end - begin + 1) * longest <= max_tokens
            and (ordered[end] == ordered[begin] or (end - begin) * longest < enough)
        ):
            end += 1
        groups.append(order[begin:end])
        begin = end
    return groups


def padded_tokens(lengths: Tensor, groups: list[Tensor]) -> list[int]:
    """Tokens each group holds, padding included."""
    return [len(rows) * int(lengths[rows].max()) for rows in groups]


def trim(features: Features, rows: Tensor) -> Features:
    """Selects rows of padded token features and drops the columns that are padding in all of them.

    Args:
        features: Tensors (rows, seq), among them ``attention_mask``.
        rows: Indices of the rows to keep.
    """
    rows = rows.to(features["attention_mask"].device)
    columns = features["attention_mask"][rows].bool().any(dim=0)
    columns[0] |= ~columns.any()
    return {name: tensor[rows][:, columns] for name, tensor in features.items()}


def token_features(batch: dict[str, Any]) -> Features:
    """The entries of a batch that have one whole number per token: tensors of the shape of ``input_ids``."""
    shape, tensors = batch["input_ids"].shape, {n: v for n, v in batch.items() if isinstance(v, Tensor)}
    # A teacher's vectors may be as long as a text.
    return {n: v for n, v in tensors.items() if v.shape == shape and not v.is_floating_point()}


def run_groups(model: nn.Module, batch: Features, groups: list[Tensor]) -> BaseModelOutputWithPooling:
    """Runs a model group by group and puts the rows back into their order.

    Args:
        model: Takes the batch's entries as arguments.
        batch: Tensors (rows, seq), among them ``attention_mask``.
        groups: Row indices of each group.

    Returns:
        ``last_hidden_state`` (rows, length, dim), zero behind each group's end, and ``pooler_output`` (rows, dim).
    """
    parts = [model(**trim(batch, rows)) for rows in groups]
    hidden, back = [part.last_hidden_state for part in parts], torch.argsort(torch.cat(groups))
    width = max(states.shape[1] for states in hidden)
    padded = [nn.functional.pad(states, (0, 0, 0, width - states.shape[1])) for states in hidden]
    pooled = torch.cat([part.pooler_output for part in parts])[back]
    return BaseModelOutputWithPooling(last_hidden_state=torch.cat(padded)[back], pooler_output=pooled)
