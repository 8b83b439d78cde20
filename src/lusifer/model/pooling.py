"""Pooling of token states over a row's real positions."""

from __future__ import annotations

import torch
from torch import Tensor


def pool(states: Tensor, mask: Tensor, how: str) -> Tensor:
    """Pools token states into one vector per row, (batch, dim) float32.

    Args:
        states: (batch, seq, dim).
        mask: (batch, seq) bool, True at the positions to pool; each row has at least one.
        how: ``mean``, ``last_token`` or ``weighted_mean`` (weight 1, 2, 3, ...; SGPT, arXiv 2202.08904, equation 2).
    """
    if how == "last_token":
        positions = torch.arange(mask.shape[1], device=mask.device)
        last = torch.where(mask, positions, -1).argmax(dim=1)
        return states[torch.arange(states.shape[0], device=states.device), last].float()
    weights = mask.float() if how == "mean" else mask.float().cumsum(dim=1) * mask.float()
    weights = weights / weights.sum(dim=1, keepdim=True)
    return torch.einsum("bs,bsd->bd", weights, states.float())


def mean_pool(states: Tensor, mask: Tensor) -> Tensor:
    """Mean of the states at real tokens, (batch, dim) float32; zero for a row without any.

    Args:
        states: (batch, seq, dim).
        mask: (batch, seq), non-zero at real tokens.
    """
    weights = mask.unsqueeze(-1).float()
    return (states.float() * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
