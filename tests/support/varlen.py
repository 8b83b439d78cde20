"""FlashAttention's result, computed without it."""

from __future__ import annotations

import torch


def flash_reference(module, query, key, value, attention_mask, scaling=None, is_causal=None, **kwargs):
    """What FlashAttention does for one packed row, a text at a time."""
    assert attention_mask is None and query.shape[0] == 1
    bounds = kwargs["cu_seq_lens_q"]
    assert bounds.dtype == torch.int32 and torch.equal(bounds, kwargs["cu_seq_lens_k"])
    lengths = bounds.diff()
    assert kwargs["max_length_q"] == kwargs["max_length_k"] == int(lengths.max()) and int(bounds[-1]) == query.shape[2]
    flash_reference.texts = len(lengths)
    causal = module.is_causal if is_causal is None else is_causal
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            *(states[:, :, begin:end] for states in (query, key, value)),
            is_causal=causal,
            scale=scaling,
            enable_gqa=True,
        )
        for begin, end in zip(bounds[:-1], bounds[1:], strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None
