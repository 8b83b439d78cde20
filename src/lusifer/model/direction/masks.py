"""Attention masks written out, for decoders that do not follow ``is_causal``.

transformers' own functions make them, and every model of it that builds its mask with these takes such a mask as it is.
It costs (batch, seq, seq) values and the fastest kernels, which take no mask; so only those directions get one that
need it, as `lusifer.model.direction.measured` finds.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PretrainedConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.utils.generic import is_flash_attention_requested

from lusifer.errors import LusiferError

# In the LLM's configuration, so that a checkpoint keeps reading as it was trained.
_FIELD = "masked_directions"


def direction_name(*, is_causal: bool) -> str:
    """``causal`` or ``bidirectional``."""
    return "causal" if is_causal else "bidirectional"


def needs_mask(config: PretrainedConfig, *, is_causal: bool) -> bool:
    """Whether a decoder reads in a direction only with a mask written out."""
    return direction_name(is_causal=is_causal) in masked_directions(config)


def masked_directions(config: PretrainedConfig) -> list[str]:
    """Which of ``bidirectional`` and ``causal`` a decoder needs a mask for."""
    return list(getattr(config, _FIELD, None) or ())


def set_needs_mask(config: PretrainedConfig, directions: list[str]) -> None:
    """Notes in a decoder's configuration, in place, which directions need a mask; none leaves it as it is."""
    if directions:
        setattr(config, _FIELD, directions)
    elif hasattr(config, _FIELD):
        delattr(config, _FIELD)


def attention_mask(config: PretrainedConfig, embeds: Tensor, mask: Tensor, *, is_causal: bool) -> Any:
    """The mask of a batch, in the form that the decoder's attention takes.

    Args:
        config: The decoder's configuration.
        embeds: (batch, seq, llm_dim) input embeddings.
        mask: (batch, seq) bool, True at real positions.
        is_causal: Direction of the attention.

    Returns:
        (batch, 1, seq, seq): bool for ``sdpa``, additive in the type of ``embeds`` for ``eager``, a block mask for
        ``flex_attention``.

    Raises:
        LusiferError: If the attention takes no mask.
    """
    if is_flash_attention_requested(config):
        raise LusiferError(
            "this LLM needs an attention mask, which FlashAttention does not support; set attn_implementation: sdpa"
        )
    order = {"and_mask_function": _not_ahead} if is_causal else {}
    return create_bidirectional_mask(config, embeds, mask, allow_is_bidirectional_skip=False, **order)


def _not_ahead(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return key <= query
