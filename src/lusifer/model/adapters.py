"""LoRA adapters (arXiv 2106.09685): put into a module, folded back into it."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from lusifer.errors import LusiferError


def linear_names(module: nn.Module) -> list[str]:
    """Names of all kinds of linear layers below a module: what a LoRA adapter covers by default."""
    names = {name.rsplit(".", 1)[-1] for name, child in module.named_modules() if isinstance(child, nn.Linear)}
    return sorted(names)


def add_lora(module: nn.Module, fields: dict[str, Any]) -> None:
    """Puts LoRA layers into a module, in place; what learned before goes on learning.

    Args:
        module: An encoder or an LLM.
        fields: Fields of ``peft.LoraConfig``; every linear layer is covered unless they say otherwise.

    Raises:
        LusiferError: If PEFT refuses the configuration.
    """
    # PEFT would import the module that stands there.
    if named := [name for name in ("megatron_core", "megatron_config") if fields.get(name)]:
        raise LusiferError(f"cannot add this adapter: {named[0]} names code to import; leave it out")
    learned = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    try:
        inject_adapter_in_model(LoraConfig(**{"target_modules": linear_names(module), **fields}), module)
    except (TypeError, ValueError) as error:
        raise LusiferError(f"cannot add this adapter: {error}") from error
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            # Adapters stay in float32 beside a bfloat16 backbone: their updates are smaller
            # than bfloat16 can add up.
            parameter.data = parameter.data.float()
        else:
            parameter.requires_grad_(name.replace(".base_layer", "") in learned)


def _first(token_id: int | list[int]) -> int:
    return token_id[0] if isinstance(token_id, list) else token_id


def fold_adapters(root: nn.Module, *, folded: bool) -> None:
    """Adds every LoRA product below a module to the weight it belongs to, or takes it out again.

    The adapters stay, so what is saved does not change. Taking out restores the weights up to their rounding.
    """
    for module in root.modules():
        if not isinstance(module, LoraLayer):
            continue
        layer: Any = module
        # A quantised weight cannot take an addition without being quantised anew.
        if folded and not layer.merged and layer.get_base_layer().weight.dtype.is_floating_point:
            layer.merge(safe_merge=False)
        elif not folded and layer.merged:
            layer.unmerge()


def merge_adapters(root: nn.Module) -> None:
    """Folds every LoRA layer below a module into the linear layer it wraps, in place."""
    wrapped = [(name, module) for name, module in root.named_modules() if isinstance(module, LoraLayer)]
    for name, module in wrapped:
        layer: Any = module
        layer.merge(safe_merge=True)
        parent, _, child = name.rpartition(".")
        setattr(root.get_submodule(parent), child, layer.get_base_layer())


def parameters_by_part(model: nn.Module) -> dict[str, dict[str, int]]:
    """Counts parameters of encoder, connector, LLM, head and adapters.

    Returns:
        ``{part: {"total": n, "trainable": n}}``.
    """
    counts: dict[str, dict[str, int]] = {}
    for name, parameter in model.named_parameters():
        part = name.split(".", 1)[0] + (" adapter" if "lora_" in name else "")
        row = counts.setdefault(part, {"total": 0, "trainable": 0})
        row["total"] += parameter.numel()
        row["trainable"] += parameter.numel() if parameter.requires_grad else 0
    return counts
