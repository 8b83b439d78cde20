"""Batches, gradients and two processes for the tests of the losses."""

from __future__ import annotations

import copy
import tempfile
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import distributed, multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from support.forked import context

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}


def tokens(lengths, low=4, high=80, seed=1):
    """Right-padded random token features of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()
    ids = torch.randint(low, high, mask.shape, generator=generator)
    return {"input_ids": torch.where(mask.bool(), ids, 1), "attention_mask": mask}


def contrast_batch(rows=4, columns=3, *, in_batch=True, seed=1):
    lengths = torch.randint(3, 20, (rows * columns,), generator=torch.Generator().manual_seed(seed)).tolist()
    return {
        **tokens(lengths, seed=seed),
        "keys": torch.arange(rows * columns),
        "columns": columns,
        "in_batch_negatives": in_batch,
        "positions": torch.arange(rows),
        "task": "contrast",
        "dataset": "tiny",
    }


def align_batch(rows=6, seed=1):
    draw = torch.Generator().manual_seed(seed)
    sources, targets = (torch.randint(2, 20, (rows,), generator=draw).tolist() for _ in range(2))
    return {
        "source": tokens(sources, seed=seed),
        "target": tokens(targets, low=3, high=200, seed=seed + 1),
        "positions": torch.arange(100, 100 + rows),
        "task": "reconstruct",
        "dataset": "tiny",
    }


def part(batch, rank, size):
    """The contiguous rows of one rank."""
    rows = len(batch["positions"])
    mine = slice(rank * rows // size, (rank + 1) * rows // size)

    def cut(value):
        if isinstance(value, dict):
            return {name: cut(inner) for name, inner in value.items()}
        if not torch.is_tensor(value):
            return value
        if len(value) == rows:
            return value[mine]
        return value.unflatten(0, (-1, rows))[:, mine].flatten(0, 1)

    return {name: cut(value) for name, value in batch.items()}


def learning(model, dropout=0.0):
    """Adapters on both backbones, moved off their start, where half their gradients are zero; every dropout set."""
    for name in ("encoder", "llm"):
        model.add_adapter(name, {**LORA, "lora_dropout": 0.5})
    model.set_trainable(encoder="lora", connector=True, llm=True)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    return model.train()


def collect(model):
    found = {}
    for name, parameter in model.named_parameters():
        if (gradient := parameter.grad) is not None:
            whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            found[name.removeprefix("module.")] = whole.clone()
    model.zero_grad()
    assert found
    return found


def step_gradients(loss, model, batch, **options):
    options = {"backward": torch.Tensor.backward, "no_sync": getattr(model, "no_sync", nullcontext), **options}
    metrics = loss.step(model, batch, **options)
    return metrics, collect(model)


def graph_gradients(loss, model, batch, **options):
    value = loss(model, batch, **options)
    value.backward()
    return float(value.detach()), collect(model)


def assert_same(found, expected, tolerance=1e-5):
    """Same gradients: float32 sums over all tokens in another order, relative to the largest entry of all."""
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert largest > 0
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=tolerance * largest, rtol=0, msg=lambda m, n=name: n + m)


def sharded(model):
    """A copy of the model under FSDP2, and its ``no_sync``; to be called on every rank."""
    model = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for layer in [*model.encoder.encoder.layer, *model.llm.layers, model]:
        fully_shard(layer, mesh=mesh)

    @contextmanager
    def no_sync():
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)

    return model, no_sync


def _entry(rank, size, folder, work, arguments):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    try:
        torch.save(work(rank, size, *arguments), f"{folder}/{rank}.pt")
    finally:
        distributed.destroy_process_group()


def on_two_ranks(work, *arguments):
    """What ``work(rank, size, *arguments)`` returns on each of two gloo processes."""
    with tempfile.TemporaryDirectory() as folder:
        context()  # Has the libraries imported once.
        multiprocessing.start_processes(_entry, (2, folder, work, arguments), nprocs=2, start_method="forkserver")
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]
