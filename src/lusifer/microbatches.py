"""Length-sorted passes over a batch, and the gradient cache for batches whose graphs do not fit.

Padding decides the speed of training: a batch padded to its longest text wastes half its tokens or
more. A batch is therefore sorted by length, cut into groups of at most a budget of padded tokens,
and each group is trimmed to its own longest text. A loss over all rows at once then needs the
gradient cache (arXiv 2101.06983) only for what exceeds the memory:

1. Embed every group: the first ones, up to ``graph_tokens``, with their graphs, the rest without.
2. Compute the loss on the embeddings of all rows, and its gradient with respect to them.
3. Back-propagate that gradient through the graphs there are, then group by group through a second
   forward pass of the rest, which replays the first one's randomness.

On several processes every rank runs the same number of groups, since a sharded model talks to the
other ranks in each pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

Features = dict[str, Tensor]
NoSync = Callable[[], AbstractContextManager[Any]]
Backward = Callable[[Tensor], Any]

# Tokens of a pass on a CPU: enough rows for matrix products at full speed, few enough to stay in its cache.
PASS_TOKENS = 1024
_MULTIPLIERS = (-0x61C8864680B583EB, -0x40A7B892E31B1A47)  # The odd constants of SplitMix64, as signed numbers.


def micro_batches(lengths: Tensor, max_tokens: int, at_least: int = 1) -> list[Tensor]:
    """Groups rows of similar length.

    Args:
        lengths: (rows,) tokens per row.
        max_tokens: Most padded tokens a group may hold; a longer single row is a group of its own.
        at_least: Least number of groups, at most ``rows``; groups are halved until there are so many.

    Returns:
        Row indices of each group, longest rows first.
    """
    order = torch.argsort(lengths, descending=True, stable=True)
    groups = []
    while len(order):
        size = max(1, max_tokens // max(int(lengths[order[0]]), 1))
        groups.append(order[:size])
        order = order[size:]
    while len(groups) < at_least:
        widest = max(range(len(groups)), key=lambda g: len(groups[g]))
        half = (len(groups[widest]) + 1) // 2
        groups[widest : widest + 1] = [groups[widest][:half], groups[widest][half:]]
    return groups


def exact_batches(lengths: Tensor, max_tokens: int, enough: int = 256) -> list[Tensor]:
    """Groups rows of equal length, and of nearly equal length only where a group would be small.

    Without padding an attention mask is not needed, and attention without one is faster. Matrix products on a CPU are
    at full speed from some 256 rows on, so a group of that many tokens need not be filled up with shorter texts.

    Args:
        lengths: (rows,) tokens per row.
        max_tokens: Most padded tokens a group may hold; a longer single row is a group of its own.
        enough: Tokens from which on a group takes no row of another length.

    Returns:
        Row indices of each group, longest rows first.
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
    """The entries of a batch that have one value per token: tensors of the shape of ``input_ids``."""
    shape = batch["input_ids"].shape
    return {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.shape == shape}


def text_keys(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(rows,) int64 keys, equal exactly when two rows hold the same tokens (up to 64-bit hash collisions)."""
    ids, mask = input_ids.long(), attention_mask.long()
    weights = mask.cumsum(dim=1) * _MULTIPLIERS[0]
    weights = (weights ^ (weights >> 30)) * _MULTIPLIERS[1]
    weights = (weights ^ (weights >> 27)) | 1
    return ((ids + 1) * mask * weights).sum(dim=1)


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


class RandomState:
    """The state of the random generators of the CPU and one other device, to be put back later."""

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
        self.embed = embed
        self.groups = groups
        self.kept = kept
        self.device = device
        self.graphs: list[Tensor] = []
        self.states: list[RandomState] = []

    def forward(self, no_sync: NoSync) -> Tensor:
        """Embeds all rows.

        Args:
            no_sync: Context in which gradients are not reduced over the ranks.

        Returns:
            (rows, dim) in the order of the batch, detached.
        """
        parts = []
        for index, rows in enumerate(self.groups):
            if index >= self.kept:
                self.states.append(RandomState(self.device))
                with torch.no_grad(), no_sync():
                    parts.append(self.embed(rows))
                # Autocast of torch before 2.10 or so hands weights it cast without a graph to the pass that needs one.
                torch.clear_autocast_cache()
                continue
            # A distributed wrapper prepares the reduction in the forward pass before the last backward pass.
            last = index == len(self.groups) - 1
            with nullcontext() if last else no_sync():
                self.graphs.append(self.embed(rows))
            parts.append(self.graphs[-1].detach())
        order = torch.cat(self.groups)
        return torch.cat(parts)[torch.argsort(order).to(parts[0].device)]

    def backward(self, gradient: Tensor, backward: Backward, no_sync: NoSync) -> None:
        """Back-propagates a gradient with respect to the embeddings.

        Args:
            gradient: (rows, dim).
            backward: Back-propagates a scalar.
            no_sync: As in `forward`; all but the last backward pass run inside.
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


def _inner(vectors: Tensor, gradient: Tensor) -> Tensor:
    return (vectors.float() * gradient).sum()


def groups_within(lengths: Tensor, max_tokens: int, graph_tokens: int) -> tuple[list[Tensor], int]:
    """Groups of a batch and how many of them may keep their graphs, the same numbers on every rank.

    Args:
        lengths: (rows,) tokens per row; every rank has the same number of rows.
        max_tokens: Most padded tokens in one forward pass.
        graph_tokens: Most padded tokens whose graphs are kept.
    """
    device = lengths.device
    lengths = lengths.cpu()
    groups = micro_batches(lengths, max_tokens)
    if world()[1] > 1:
        most = int(gather(torch.tensor(len(groups), device=device)).max())
        groups = micro_batches(lengths, max_tokens, at_least=most)
    kept = int((torch.tensor(padded_tokens(lengths, groups)).cumsum(dim=0) <= graph_tokens).sum())
    if world()[1] > 1:
        kept = int(gather(torch.tensor(kept, device=device)).min())
    return groups, kept
