"""Adapters that belong to an LLM as it is published: merged into its weights while it loads.

Many LLM embedders are a base LLM and one or two LoRA adapters of PEFT on top (LLM2Vec, arXiv 2404.05961: one for masked
next token prediction, then one for contrastive training). To us they are the LLM, which nothing trains further. PEFT's
own LoRA layers are put where the adapter's tensors belong, with the ranks these have, filled and merged.
"""

from __future__ import annotations

import re
from typing import Any

from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lusifer.errors import LusiferError, first_line
from lusifer.hooks.peft import forget_adapter
from lusifer.hooks.transformers import cached_or_none
from lusifer.model.adapters import merge_adapters
from lusifer.trust import check_adapter, check_folder

WEIGHTS = "adapter_model.safetensors"
_TENSOR = re.compile(r"(?:base_model\.model\.)?(?:model\.)?(?P<layer>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")


def read_base_adapter(name: str, **hub: Any) -> tuple[LoraConfig, dict[str, Tensor]]:
    """An adapter's configuration, and its tensors by the layer's name in an LLM without head and ``A`` or ``B``.

    Args:
        name: Folder or hub id of a LoRA adapter of PEFT; ``ID@REVISION`` pins a hub id.
        **hub: ``token``, ``cache_dir``, ...

    Raises:
        LusiferError: If it cannot be read, has no safetensors, or holds more than LoRA matrices of inner layers.
    """
    where, _, revision = name.partition("@")
    check_folder(f"the adapter {name!r}", where)
    options = {"revision": revision or "main", **hub}
    try:
        config: Any = PeftConfig.from_pretrained(where, **options)
        path = cached_or_none(where, WEIGHTS, **options)
        tensors = None if path is None else load_file(path)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise LusiferError(f"cannot read the adapter {name!r}: {first_line(error)}") from error
    if tensors is None:
        raise LusiferError(f"the adapter {name!r} has no {WEIGHTS}; other formats may run code: save it as safetensors")
    _check_kind(name, config)
    # What else could be a pattern there is not used: the layers are those of the tensors.
    check_adapter(f"the adapter {name!r}", {"alpha_pattern": config.alpha_pattern})
    matrices: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if (match := _TENSOR.fullmatch(key)) is None:
            raise LusiferError(
                f"the adapter {name!r} holds {key}, which is not a LoRA matrix of a layer; merge it by hand"
            )
        matrices[f"{match['layer']} {match['side']}"] = tensor
    return config, matrices


def _check_kind(name: str, config: Any) -> None:
    if not isinstance(config, LoraConfig):
        raise LusiferError(f"the adapter {name!r} is {config.peft_type!s}, not LoRA; merge it into its LLM by hand")
    refused = ("use_dora", "modules_to_save", "lora_bias", "layer_replication", "trainable_token_indices")
    used = [field for field in refused if getattr(config, field)]
    if config.bias not in (None, "none"):
        used.append("bias")
    if used:
        raise LusiferError(f"the adapter {name!r} uses {', '.join(used)}; merge it into its LLM by hand")


def merge_in(llm: PreTrainedModel, name: str, *, depth: int, **hub: Any) -> None:
    """Adds an adapter to the LLM it was trained on, in place, in float32; nothing of it remains to be trained.

    Args:
        llm: An LLM without LM head, perhaps shortened to its first layers.
        name: As in `read_base_adapter`.
        depth: Layers of the LLM as published; what belongs to a layer left out of ours is left out too.
        **hub: As in `read_base_adapter`.

    Raises:
        LusiferError: If the adapter cannot be read or does not fit the LLM.
    """
    config, tensors = read_base_adapter(name, **hub)
    adapted = sorted({key.rpartition(" ")[0] for key in tensors})
    model: Any = llm
    kept = int(model.config.num_hidden_layers)
    layers = [layer for layer in adapted if not kept <= _number(layer) < depth]
    present = {path for path, _ in llm.named_modules()}
    if not adapted or (unknown := [layer for layer in layers if layer not in present]):
        what = unknown[0] if adapted else "layer for it"
        raise LusiferError(f"the adapter {name!r} does not fit the LLM, which has no {what}")
    ranks = {layer: tensors[f"{layer} A"].shape[0] for layer in layers if f"{layer} A" in tensors}
    fields = {
        **{key: getattr(config, key) for key in ("r", "lora_alpha", "use_rslora", "fan_in_fan_out")},
        "target_modules": layers,
        "rank_pattern": {re.escape(layer): rank for layer, rank in ranks.items() if rank != config.r},
        "alpha_pattern": {key.removeprefix("model."): value for key, value in (config.alpha_pattern or {}).items()},
    }
    if not layers:
        return
    try:
        inject_adapter_in_model(LoraConfig(**fields), llm)
    except (TypeError, ValueError) as error:
        raise LusiferError(f"cannot add the adapter {name!r}: {error}") from error
    _copy(llm, name, layers, tensors)
    merge_adapters(llm)
    forget_adapter(llm)


def _number(layer: str) -> int:
    number = re.search(r"\.(\d+)\.", f".{layer}")
    return int(number[1]) if number else -1


def _copy(llm: nn.Module, name: str, layers: list[str], tensors: dict[str, Tensor]) -> None:
    for layer in layers:
        for side in "AB":
            place: Any = llm.get_submodule(f"{layer}.lora_{side}.default")
            tensor = tensors.get(f"{layer} {side}")
            if tensor is None or tensor.shape != place.weight.shape:
                problem = "lacks" if tensor is None else f"has shape {tuple(tensor.shape)} for"
                raise LusiferError(f"the adapter {name!r} {problem} {layer}.lora_{side}; it does not fit the LLM")
            place.weight.data = tensor.to(place.weight.device).float()
