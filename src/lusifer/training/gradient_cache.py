"""Length-sorted passes over a batch, and the gradient cache for batches whose graphs do not fit.

1. Embed every group: the first ones, up to ``graph_tokens``, with their graphs, the rest without (arXiv 2101.06983).
2. Compute the loss on the embeddings of all rows, and its gradient with respect to them.
3. Back-propagate it through the graphs there are, then group by group through a second forward pass of the rest, which
   replays the first one's randomness.

Every rank runs the same number of groups, since a sharded model talks to the other ranks in each pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from lusifer.model.token_batches import micro_batches, padded_tokens

NoSync = Callable[[], AbstractContextManager[Any]]
Backward = Callable[[Tensor], Any]


def world() -> tuple[int, int]:
    """Rank and number of processes; (0, 1) outside of distributed training."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(tensor: Tensor) -> Tensor:
    """Collects a tensor of the same shape from every rank, without gradient: (world, *shape)."""
    tensor, size = tensor.detach().contiguous(), world()[1]
    if size == 1:
        return tensor.unsqueeze(0)
    parts = [torch.empty_like(tensor) for _ in range(size)]
    dist.all_gather(parts, tensor)
    return torch.stack(parts)


class RandomState:
    """The state of the random generators of the CPU and one other device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu = torch.get_rng_state()
        self.other = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state()

    def restore(self) -> None:
        """Sets the generators to this state."""
        torch.set_rng_state(self.cpu)
        if self.other is not None:
            torch.get_device_module(self.device).set_rng_state(self.other)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Runs a block from this state on, then goes on from where the generators were before."""
        before = RandomState(self.device)
        self.restore()
        try:
            yield
        finally:
            before.restore()


class CachedPass:
    """One pass over the rows of a batch whose backward comes after a loss over all of them.

    Args:
        embed: Maps row indices to their embeddings, (rows, dim).
        groups: Row indices of each group, every row once.
        kept: How many groups, from the first, keep their graphs; the rest is computed twice.
        device: Device whose randomness is replayed beside the CPU's.
    """

    def __init__(
        self, embed: Callable[[Tensor], Tensor], groups: list[Tensor], kept: int, device: torch.device
    ) -> None:
        self.embed, self.groups, self.kept, self.device = embed, groups, kept, device
        self.graphs: list[Tensor] = []
        self.states: list[RandomState] = []

    def forward(self, no_sync: NoSync) -> Tensor:
        """Embeds all rows: (rows, dim), detached; gradients are not reduced over the ranks inside of ``no_sync``."""
        parts = []
        for index, rows in enumerate(self.groups):
            if index < self.kept:
                # A distributed wrapper prepares the reduction in the forward pass before the last backward pass.
                with nullcontext() if index == len(self.groups) - 1 else no_sync():
                    self.graphs.append(self.embed(rows))
                parts.append(self.graphs[-1].detach())
                continue
            self.states.append(RandomState(self.device))
            with torch.no_grad(), no_sync():
                parts.append(self.embed(rows))
            # Autocast of torch before 2.10 or so hands weights it cast without a graph to the pass that needs one.
            torch.clear_autocast_cache()
        return in_order(parts, self.groups)

    def backward(self, gradient: Tensor, backward: Backward, no_sync: NoSync) -> None:
        """Back-propagates a gradient with respect to the embeddings.

        Args:
            gradient: (rows, dim).
            backward: Back-propagates a scalar.
            no_sync: As in `forward`.
        """
        recomputed = self.groups[self.kept :]
        if self.graphs:
            rows = torch.cat(self.groups[: self.kept]).to(gradient.device)
            # One pass over all graphs: a wrapper reduces each gradient when it is complete.
            with no_sync() if recomputed else nullcontext():
                backward(_inner(torch.cat(self.graphs), gradient[rows]))
            self.graphs = []
        for index, (rows, state) in enumerate(zip(recomputed, self.states, strict=True)):
            with nullcontext() if index == len(recomputed) - 1 else no_sync():
                with state.replayed():
                    again = self.embed(rows)
                backward(_inner(again, gradient[rows.to(gradient.device)]))


def in_order(parts: list[Tensor], groups: list[Tensor]) -> Tensor:
    """Rows (rows, dim) computed group by group, in the order of the batch."""
    return torch.cat(parts)[torch.argsort(torch.cat(groups)).to(parts[0].device)]


def _inner(vectors: Tensor, gradient: Tensor) -> Tensor:
    return (vectors.float() * gradient).sum()


def groups_within(lengths: Tensor, max_tokens: int, graph_tokens: int) -> tuple[list[Tensor], int]:
    """Row indices of a batch's groups and how many, from the first, keep their graphs; the same numbers on every rank.

    Args:
        lengths: (rows,) tokens per row; every rank has the same number of rows.
        max_tokens: Most padded tokens in one forward pass.
        graph_tokens: Most padded tokens whose graphs are kept.
    """
    device, lengths = lengths.device, lengths.cpu()
    number = len(micro_batches(lengths, max_tokens))
    most = int(gather(torch.tensor(number, device=device)).max())
    groups = micro_batches(lengths, max_tokens, at_least=most)
    kept = (torch.tensor(padded_tokens(lengths, groups)).cumsum(dim=0) <= graph_tokens).sum()
    return groups, int(gather(kept.to(device)).min())
