"""Where the real positions of a batch go: rows moved to the left, or all of them in one long row.

Attention of the varlen kind (FlashAttention and what transformers registers like it) reads one row of all texts and
their boundaries, and computes nothing for padding. Other kinds would let the texts of such a row see each other; they
get padded rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import is_flash_attention_requested

from lusifer.model.backbone_pair import position_table
from lusifer.model.direction.masks import attention_mask, needs_mask

if TYPE_CHECKING:
    from lusifer.model.modeling import LusiferModel


def pack_left(states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Moves the real positions of every row to the left, in order.

    Args:
        states: (batch, seq, dim).
        mask: (batch, seq) bool, True at real positions.

    Returns:
        The packed states, zero behind each row's end, and their mask; both truncated to the longest row.
    """
    exporting = torch.compiler.is_exporting()  # To a graph, whose shapes and paths follow no value.
    if not exporting and bool(mask.all()):
        return states, mask
    length = mask.shape[1] if exporting else max(int(mask.sum(dim=1).max()), 1)
    places = torch.arange(mask.shape[1], device=mask.device)
    # No two keys are equal, as ONNX has no stable sort.
    order = torch.argsort(torch.where(mask, places, places + mask.shape[1]), dim=1)[:, :length]
    packed = mask.gather(1, order)
    moved = states.gather(1, order.unsqueeze(-1).expand(-1, -1, states.shape[-1]))
    return moved * packed.unsqueeze(-1).to(moved.dtype), packed


def _text_bounds(lengths: Tensor) -> dict[str, Any]:
    """What attention of the varlen kind wants to know about a row of texts of these lengths, in transformers' names."""
    bounds = nn.functional.pad(lengths.cumsum(dim=0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max())
    ends = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    return {"attention_mask": None, **ends}


def run_llm(llm: Any, embeds: Tensor, mask: Tensor, *, is_causal: bool) -> Tensor:
    """Runs a decoder over input embeddings, in one packed row where its attention allows it.

    Args:
        llm: A decoder of transformers, without LM head.
        embeds: (batch, seq, llm_dim), packed to the left.
        mask: (batch, seq) bool, True at real positions; each row has at least one.
        is_causal: Direction of the attention.

    Returns:
        (batch, seq, llm_dim) states in the LLM's data type; what lies behind a row's end means nothing.

    Raises:
        LusiferError: If the decoder needs a mask for this direction and its attention takes none.
    """
    embeds = embeds.to(llm.dtype)
    positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    shared = {"is_causal": is_causal, "use_cache": False}
    if needs_mask(llm.config, is_causal=is_causal):
        seen = attention_mask(llm.config, embeds, mask, is_causal=is_causal)
        return llm(inputs_embeds=embeds, attention_mask=seen, position_ids=positions, **shared).last_hidden_state
    if not is_flash_attention_requested(llm.config):
        # Attention without a mask takes the faster kernel, and grouped heads as they are.
        real = mask.long() if torch.compiler.is_exporting() or not bool(mask.all()) else None
        return llm(inputs_embeds=embeds, attention_mask=real, position_ids=positions, **shared).last_hidden_state
    row, places = embeds[mask].unsqueeze(0), positions[mask].unsqueeze(0)
    shared |= _text_bounds(mask.sum(dim=1))
    packed = llm(inputs_embeds=row, position_ids=places, **shared).last_hidden_state.squeeze(0)
    return packed.new_zeros((*mask.shape, packed.shape[-1])).masked_scatter(mask.unsqueeze(-1), packed)


def can_pack(model: LusiferModel) -> bool:
    """Whether both backbones have attention of the varlen kind and the encoder's positions are known."""
    varlen = all(is_flash_attention_requested(part.config) for part in (model.encoder, model.llm))
    return varlen and _first_position(model.encoder) is not None and not needs_mask(model.llm.config, is_causal=False)


def _first_position(encoder: nn.Module) -> int | None:
    """Position of a text's first token; None for encoders that do not add positions in ``embeddings``."""
    known: Any = getattr(encoder, "embeddings", None)
    table = position_table(encoder) if hasattr(known, "position_embeddings") else None
    return None if table is None else table.first


def _within(lengths: Tensor) -> Tensor:
    """(sum of lengths,) index of each token in its text."""
    starts = (lengths.cumsum(dim=0) - lengths).repeat_interleave(lengths)
    return torch.arange(len(starts), device=lengths.device) - starts


def embed_packed(model: LusiferModel, input_ids: Tensor, lengths: Tensor) -> Tensor:
    """Embeds texts that stand behind each other in one row, from the tokens to the pooled vector.

    Args:
        model: A model for which `can_pack` holds.
        input_ids: (total,) int64, the encoder's token ids of all texts.
        lengths: (rows,) int64, tokens of each text, at least one each.

    Returns:
        (rows, dim) float32, not normalised: the ``pooler_output`` of ``model``.
    """
    encoder, llm = model.encoder, model.llm
    inside, first = _within(lengths), _first_position(encoder)
    assert first is not None, "ask can_pack first"
    positions = (inside + first).unsqueeze(0)
    output = encoder(input_ids=input_ids.unsqueeze(0), position_ids=positions, **_text_bounds(lengths))
    soft = model.connector(output.last_hidden_state.squeeze(0).to(model.connector.up.weight.dtype)).float()
    added, bos = model.connector.added_tokens.float(), model.bos_embedding()
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
    inputs = {"inputs_embeds": row.to(llm.dtype).unsqueeze(0), "position_ids": places.unsqueeze(0)}
    output = llm(**inputs, is_causal=False, use_cache=False, **_text_bounds(longer))
    hidden = output.last_hidden_state.squeeze(0)
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
