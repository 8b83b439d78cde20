"""Texts to vectors in one packed row: no padding from the tokens to the pooled vector.

For attention of the varlen kind alone (FlashAttention and what transformers registers like it), in encoder and LLM:

1. The encoder reads all texts as one row, with their boundaries.
2. The connector maps real token states alone; every soft token goes to its place in a second row,
   ``[bos] soft tokens [added tokens]`` text by text.
3. The LLM reads that row in both directions; each text's states are pooled by sums over its part of the row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lusifer.model.modeling import LusiferModel
from lusifer.model.packing import is_varlen, text_bounds


def can_pack(model: LusiferModel) -> bool:
    """Whether both backbones have attention of the varlen kind and the encoder's positions are known."""
    return (
        is_varlen(model.encoder.config) and is_varlen(model.llm.config) and _first_position(model.encoder) is not None
    )


def _first_position(encoder: Any) -> int | None:
    """Position of a text's first token: BERT counts from 0, RoBERTa and its kin from behind the padding index."""
    embeddings: Any = getattr(encoder, "embeddings", None)
    if getattr(embeddings, "position_embeddings", None) is None:
        return None
    return embeddings.padding_idx + 1 if hasattr(embeddings, "create_position_ids_from_input_ids") else 0


def _within(lengths: Tensor) -> Tensor:
    """(sum of lengths,) index of each token in its text."""
    starts = (lengths.cumsum(dim=0) - lengths).repeat_interleave(lengths)
    return torch.arange(len(starts), device=lengths.device) - starts


def embed_packed(model: LusiferModel, input_ids: Tensor, lengths: Tensor) -> Tensor:
    """Embeds texts that stand behind each other.

    Args:
        model: A model for which `can_pack` holds.
        input_ids: (total,) int64, the encoder's token ids of all texts.
        lengths: (rows,) int64, tokens of each text, at least one each.

    Returns:
        (rows, dim) float32, not normalised: the ``pooler_output`` of ``model``.
    """
    encoder: Any = model.encoder
    llm: Any = model.llm
    inside, first = _within(lengths), _first_position(encoder)
    assert first is not None, "ask can_pack first"
    states = encoder(
        input_ids=input_ids.unsqueeze(0),
        position_ids=(inside + first).unsqueeze(0),
        **text_bounds(lengths),
    ).last_hidden_state.squeeze(0)
    soft = model.connector(states.to(model.connector.up.weight.dtype)).float()
    added = model.connector.added_tokens.float()
    bos = model.bos_embedding()
    front = 0 if bos is None else 1
    longer = lengths + front + len(added)
    starts = longer.cumsum(dim=0) - longer
    row = soft.new_empty(int(longer.sum()), soft.shape[-1])
    row[starts.repeat_interleave(lengths) + front + inside] = soft
    if bos is not None:
        row[starts] = bos
    for number, token in enumerate(added):
        row[starts + front + lengths + number] = token
    places = _within(longer)
    hidden = llm(
        inputs_embeds=row.to(llm.dtype).unsqueeze(0),
        position_ids=places.unsqueeze(0),
        is_causal=False,
        use_cache=False,
        **text_bounds(longer),
    ).last_hidden_state.squeeze(0)
    if model.config.pooling == "last_token":
        vector = hidden[starts + longer - 1].float()
    else:
        weights = (places >= front).float()
        if model.config.pooling == "weighted_mean":
            weights = weights * (places - front + 1)
        texts = torch.arange(len(lengths), device=lengths.device).repeat_interleave(longer)
        total = weights.new_zeros(len(lengths)).index_add_(0, texts, weights)
        sums = weights.new_zeros(len(lengths), hidden.shape[-1])
        vector = sums.index_add_(0, texts, hidden.float() * weights.unsqueeze(1)) / total.unsqueeze(1)
    return vector if model.head is None else model.head(vector)
