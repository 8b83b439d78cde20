"""FSDP2 (arXiv 2304.11277): every process holds a part of each parameter, gathered while its layer computes.

A unit, what is gathered at once, is one layer of encoder or LLM, a table of embeddings, or all the rest (connector,
head, norms). Nothing stays gathered after a pass, so a save may follow an evaluation. Data types are those of the
plain model: frozen weights as loaded, trained ones float32, the computation by autocast.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import broadcast
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel


def shard(model: Any, *, device: torch.device, ranks: int, cpu_offload: bool = False) -> None:
    """Shards a model over all processes, in place.

    Args:
        model: A model with the backbones ``encoder`` and ``llm``, or one of them alone.
        device: Where this process computes.
        ranks: Number of processes.
        cpu_offload: Whether the parts stay in the host's memory while they are not used.
    """
    options: dict[str, Any] = {"mesh": init_device_mesh(device.type, (ranks,)), "reshard_after_forward": True}
    options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda") if cpu_offload else OffloadPolicy()
    for parameter in model.parameters():
        if parameter.requires_grad:  # Stage 0 rounds differently on another GPU.
            broadcast(parameter.data, src=0)
    for unit in units(model):
        fully_shard(unit, **options)
    fully_shard(model, **options)


def units(model: nn.Module) -> list[nn.Module]:
    """The modules that are gathered by themselves: the outermost lists' layers, and tables that nothing shares.

    Parameters that several modules hold (T5's ``shared``) stay with the rest: one unit must own them all.
    """
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    tables = {id(m.get_input_embeddings()) for m in model.modules() if isinstance(m, PreTrainedModel)}
    found: list[nn.Module] = []

    def walk(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList) and all(list(item.parameters()) for item in child):
                found.extend(child)
            elif id(child) in tables:
                found.append(child)
            else:
                walk(child)

    walk(model)
    return [module for module in found if all(owners[id(p)] == 1 for p in module.parameters())]


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was called for a model."""
    return isinstance(model, FSDPModule)


def without_reduction(model: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """For a model, sharded or in DDP or plain: a context in which gradients are not reduced over the processes."""
    if isinstance(model, FSDPModule):
        return lambda: _deferred(model)
    return getattr(model, "no_sync", nullcontext)


@contextmanager
def _deferred(model: FSDPModule) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def in_full(value: Tensor) -> Tensor:
    """A parameter, or any tensor, put together from all processes; every process must ask."""
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def copy_into(parameter: Tensor, value: Tensor) -> None:
    """Copies a whole tensor into a parameter, sharded or not."""
    value = value.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    parameter.copy_(value)
