"""What a loss knows of other processes: which rank this is, and everybody's tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist


def world() -> tuple[int, int]:
    """Rank and number of processes; (0, 1) outside of distributed training."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(tensor: Tensor) -> Tensor:
    """Collects a tensor of the same shape from every rank, without gradient: (world, *shape)."""
    _, size = world()
    tensor = tensor.detach().contiguous()
    if size == 1:
        return tensor.unsqueeze(0)
    parts = [torch.empty_like(tensor) for _ in range(size)]
    dist.all_gather(parts, tensor)
    return torch.stack(parts)
