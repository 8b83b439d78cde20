"""Where the real positions of a batch go: rows moved to the left, or all of them in one long row.

Attention of the varlen kind (FlashAttention and what transformers registers like it) reads one row
of all texts and their boundaries, and so computes nothing for padding. Every other kind would let
the texts of such a row see each other, whatever the position ids say; it gets padded rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.utils.generic import is_flash_attention_requested


def pack_left(states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Moves the real positions of every row to the left, in order.

    Args:
        states: (batch, seq, dim).
        mask: (batch, seq) bool, True at real positions.

    Returns:
        The packed states, zero behind each row's end, and their mask; both cut to the longest row.
    """
    if bool(mask.all()):
        return states, mask
    length = max(int(mask.sum(dim=1).max()), 1)
    order = torch.argsort(mask.logical_not().to(torch.uint8), dim=1, stable=True)[:, :length]
    packed = mask.gather(1, order)
    moved = states.gather(1, order.unsqueeze(-1).expand(-1, -1, states.shape[-1]))
    return moved * packed.unsqueeze(-1).to(moved.dtype), packed


def is_varlen(config: PretrainedConfig) -> bool:
    """Whether a model's attention takes text boundaries (transformers' convention: ``flash`` in its name)."""
    return is_flash_attention_requested(config)


def text_bounds(lengths: Tensor) -> dict[str, Any]:
    """What attention of the varlen kind wants to know about one packed row, in transformers' names.

    Args:
        lengths: (rows,) tokens of each text.
    """
    bounds = nn.functional.pad(lengths.cumsum(dim=0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max())
    ends = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    return {"attention_mask": None, **ends}


def run_llm(llm: nn.Module, embeds: Tensor, mask: Tensor, *, is_causal: bool) -> Tensor:
    """Runs a decoder over input embeddings, in one packed row where its attention allows it.

    Args:
        llm: A decoder of transformers, without LM head.
        embeds: (batch, seq, llm_dim) in the LLM's data type, packed to the left.
        mask: (batch, seq) bool, True at real positions; each row has at least one.
        is_causal: Direction of the attention.

    Returns:
        (batch, seq, llm_dim) states; what lies behind a row's end means nothing.
    """
    model: Any = llm
    positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    shared = {"is_causal": is_causal, "use_cache": False}
    if not is_varlen(model.config):
        # Attention without a mask takes the faster kernel, and grouped heads as they are.
        real = None if bool(mask.all()) else mask.long()
        return model(inputs_embeds=embeds, attention_mask=real, position_ids=positions, **shared).last_hidden_state
    packed = model(
        inputs_embeds=embeds[mask].unsqueeze(0),
        position_ids=positions[mask].unsqueeze(0),
        **text_bounds(mask.sum(dim=1)),
        **shared,
    ).last_hidden_state.squeeze(0)
    return packed.new_zeros((*mask.shape, packed.shape[-1])).masked_scatter(mask.unsqueeze(-1), packed)
