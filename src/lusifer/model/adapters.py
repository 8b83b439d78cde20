"""LoRA adapters (arXiv 2106.09685): put into a module, merged with its weights.

Merging saves two small matrix products per layer. `inference_copy` gives a merged copy and leaves the model as it is;
`merge_in_place` is for models loaded for inference alone; `merge_adapters` makes plain layers for good.
"""

from __future__ import annotations

import copy
import threading
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from lusifer.errors import LusiferError
from lusifer.trust import check_adapter

_lock = threading.Lock()
_copies: WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], nn.Module]] = WeakKeyDictionary()


def add_lora(module: nn.Module, fields: dict[str, Any]) -> dict[str, Any]:
    """Puts LoRA layers into a module, in place, and returns all fields used; what was trainable before stays trainable.

    Args:
        module: An encoder or an LLM.
        fields: Fields of ``peft.LoraConfig``; linear layers unless they say otherwise.

    Raises:
        LusiferError: If PEFT refuses the configuration, or `check_adapter` does.
    """
    check_adapter("this adapter", fields)
    if "target_modules" not in fields:
        fields = {"target_modules": _linear_names(module), **fields}
    if not fields["target_modules"]:
        raise LusiferError(f"cannot add an adapter: {type(module).__name__} has no linear layers of torch's own")
    trainable = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    try:
        inject_adapter_in_model(LoraConfig(**fields), module)
    except (TypeError, ValueError) as error:
        raise LusiferError(f"cannot add this adapter: {error}") from error
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            # In float32 beside a bfloat16 backbone: their updates are smaller than bfloat16 can add up.
            parameter.data = parameter.data.float()
        else:
            parameter.requires_grad_(name.replace(".base_layer", "") in trainable)
    return fields


# What PEFT takes for experts, where there are any, and puts adapters on that cannot be saved; what it refuses beside
# state-space layers.
_EXPERTS, _BESIDE_SCANS = {"gate_proj", "up_proj", "down_proj"}, {"out_proj"}


def _linear_names(module: nn.Module) -> list[str]:
    """Last parts of the names of a backbone's linear layers, as PEFT matches them; no other module has these.

    A router is left out, which gives more than states, and so are the layers beside a mixture of experts that are
    called as experts are.
    """
    linear, other, left_out = set[str](), set[str](), set[str]()
    for name, child in module.named_modules():
        plain = isinstance(child, nn.Linear | Conv1D) and "Router" not in type(child).__name__
        (linear if plain else other).add(name.rpartition(".")[2])
        left_out |= _BESIDE_SCANS if isinstance(child, nn.Conv1d) else set()
    if any("expert" in name and parameter.dim() == 3 for name, parameter in module.named_parameters()):
        left_out |= _EXPERTS
    return sorted(linear - other - left_out)


def inference_copy(model: nn.Module) -> nn.Module:
    """The model with its adapters merged, in evaluation mode; made on first use and again when a parameter has changed.

    Layers without an adapter share their tensors with ``model``; quantised layers keep their adapters beside them. A
    model without adapters to merge is returned itself. Safe to call from several threads. In-place writes through
    ``parameter.data``, which raise no version, show after the next call of ``train()``.
    """
    layers = _lora_layers(model)
    if not any(_mergeable(layer) for layer in layers):
        return model
    settings = [(*layer.active_adapters, layer.disable_adapters, *layer.scaling.items()) for layer in layers]
    versions = ((id(p), p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters())
    signature = (*settings, *versions)
    with _lock:
        known = _copies.get(model)
        if known is None or known[0] != signature:
            _copies.pop(model, None)  # Gives its memory back before more is taken.
            known = _copies[model] = (signature, _merged_copy(model))
        return known[1]


def forget_copy(model: nn.Module) -> None:
    """Frees the copy that `inference_copy` made of a model, if any."""
    with _lock:
        _copies.pop(model, None)


def merge_in_place(root: nn.Module) -> None:
    """Adds every adapter below a module to the weight it belongs to, without a second copy of any weight.

    The model can no longer be trained or saved. Adapters stay in their places, so that its `weights_hash` does not
    change; quantised weights cannot take an addition and stay as they are.
    """
    for layer in _lora_layers(root):
        if _mergeable(layer):
            layer.merge(safe_merge=False)


def is_merged_in_place(root: nn.Module) -> bool:
    """Whether `merge_in_place` has changed weights below a module."""
    return any(layer.merged for layer in _lora_layers(root))


def merge_adapters(root: nn.Module) -> None:
    """Replaces every LoRA layer below a module by the plain layer it wraps, adapter merged, in place."""
    layers: list[tuple[str, Any]] = [pair for pair in root.named_modules() if isinstance(pair[1], LoraLayer)]
    for name, layer in layers:
        if not layer.merged:
            layer.merge(safe_merge=True)
        root.set_submodule(name, layer.get_base_layer())


def _lora_layers(root: nn.Module) -> list[Any]:
    return [module for module in root.modules() if isinstance(module, LoraLayer)]


def _mergeable(layer: Any) -> bool:
    return not layer.merged and layer.get_base_layer().weight.dtype.is_floating_point


def _merged_copy(model: nn.Module) -> nn.Module:
    """A copy that shares every tensor and configuration, with a plain layer where the model has an adapted one."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    memo |= {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    # Outside of inference mode, whose tensors autograd refuses for good.
    with torch.inference_mode(False), torch.no_grad():
        memo |= {id(layer): _merged_layer(layer) if _mergeable(layer) else layer for layer in _lora_layers(model)}
        return copy.deepcopy(model, memo).eval()


def _merged_layer(layer: Any) -> nn.Module:
    if layer.disable_adapters:
        return layer.get_base_layer()
    own = copy.deepcopy(layer)  # With a base weight of its own, one layer at a time.
    own.merge(safe_merge=False)
    return own.get_base_layer().requires_grad_(False)


def parameters_by_part(model: nn.Module) -> dict[str, dict[str, int]]:
    """Counts parameters of encoder, connector, LLM, head and adapters: ``{part: {"total": n, "trainable": n}}``."""
    counts: dict[str, dict[str, int]] = {}
    for name, parameter in model.named_parameters():
        part = name.split(".", 1)[0] + (" adapter" if "lora_" in name else "")
        row = counts.setdefault(part, {"total": 0, "trainable": 0})
        row["total"] += parameter.numel()
        row["trainable"] += parameter.numel() if parameter.requires_grad else 0
    return counts
