"""Rows packed to the left, and pooling over their real positions."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_left(states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Moves the real positions of every row to the left, in order.

    Args:
        states: (batch, seq, dim).
        mask: (batch, seq) bool, True at real positions.

    Returns:
        The packed states, zero behind each row's end, and their mask; both cut to the longest row.
    """
    length = max(int(mask.sum(dim=1).max()), 1)
    order = torch.argsort(mask.logical_not().to(torch.uint8), dim=1, stable=True)[:, :length]
    packed = mask.gather(1, order)
    moved = states.gather(1, order.unsqueeze(-1).expand(-1, -1, states.shape[-1]))
    return moved * packed.unsqueeze(-1).to(moved.dtype), packed


def pool(states: Tensor, mask: Tensor, how: str) -> Tensor:
    """Pools token states into one vector per row, in float32.

    Args:
        states: (batch, seq, dim).
        mask: (batch, seq) bool, True at the positions to pool; each row has at least one.
        how: ``mean``, ``last_token`` or ``weighted_mean`` (weight 1, 2, 3, ... along the pooled
            positions; SGPT, arXiv 2202.08904, equation 2).

    Returns:
        (batch, dim) float32.
    """
    if how == "last_token":
        positions = torch.arange(mask.shape[1], device=mask.device)
        last = torch.where(mask, positions, -1).argmax(dim=1)
        return states[torch.arange(states.shape[0], device=states.device), last].float()
    weights = mask.float() if how == "mean" else mask.float().cumsum(dim=1) * mask.float()
    weights = weights / weights.sum(dim=1, keepdim=True)
    return torch.einsum("bs,bsd->bd", weights, states.float())
