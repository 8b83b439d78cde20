"""The two backbones of a model together: checked before anything is loaded, identified, loaded."""

from __future__ import annotations

import copy
import os
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils.hub import extract_commit_hash

from lusifer.errors import LusiferError
from lusifer.hooks.transformers import cached_or_none
from lusifer.model.backbones import build_encoder, keep_layers, load_config, load_encoder, load_llm, load_tokenizer
from lusifer.model.configuration import ADAPTED, ADAPTED_TYPE, LusiferConfig
from lusifer.model.direction.families import check_family
from lusifer.model.fingerprint import files_fingerprint
from lusifer.starter.fetch import PREFIX
from lusifer.starter.names import resolve_backbone


def configure(encoder: str, llm: str, *, llm_layers: int | None = None, **fields: Any) -> LusiferConfig:
    """The configuration of a new model, after everything that can be checked of its backbones without loading them.

    Args:
        encoder: Hub id, local folder or starter name.
        llm: The same of the LLM.
        llm_layers: Use only the LLM's first layers; all when None.
        **fields: Further fields of `LusiferConfig`; ``max_seq_length`` is 512 or what the encoder reads.

    Raises:
        LusiferError: If a backbone is missing, of the wrong kind or without a fitting tokenizer, the encoder reads
            fewer tokens than ``max_seq_length``, or the LLM's family cannot read both ways.
    """
    names = {"encoder": _recorded_name(encoder), "llm": _recorded_name(llm)}
    configs = {part: load_config(part, name, revision=fields.get(f"{part}_revision")) for part, name in names.items()}
    check_adapted(encoder, configs["encoder"], revision=fields.get("encoder_revision"))
    check_family(llm, configs["llm"])
    if "max_seq_length" in fields:
        check_window(encoder, configs["encoder"], fields["max_seq_length"])
    else:
        fields["max_seq_length"] = min(512, encoder_window(configs["encoder"]) or 512)
    for part, name in names.items():
        load_tokenizer(part, name, revision=fields.get(f"{part}_revision"), config=configs[part])
        # A hub's branch moves on and a folder's content changes; the checkpoint is to mean what it was trained with.
        fields[f"{part}_revision"] = _commit_of(name, fields.get(f"{part}_revision"))
        fields[f"{part}_fingerprint"] = _identity(name, fields[f"{part}_revision"])
    if llm_layers is not None:
        keep_layers(configs["llm"], llm_layers)
    fields["llm_base_adapters"] = [_recorded_name(name) for name in fields.get("llm_base_adapters") or []]
    fields |= {**names, "encoder_config": configs["encoder"], "llm_config": configs["llm"]}
    return LusiferConfig(**fields)


def load_backbones(
    config: LusiferConfig,
    encoder_dtype: torch.dtype | str,
    llm_dtype: torch.dtype | str,
    attn_implementation: str | None,
    quantization: str | None = None,
    device: torch.device | None = None,
    **hub: Any,
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Loads the encoder and the LLM a configuration names, and notes their data types in it, for its checkpoint.

    Args:
        config: The configuration.
        encoder_dtype: Data type of the encoder's weights.
        llm_dtype: Data type of the LLM's weights.
        attn_implementation: As transformers names it; its own choice when None.
        quantization: ``8bit`` or ``4bit`` for the LLM.
        device: Where to; the CPU when None, or where bitsandbytes puts what it quantises.
        **hub: ``token``, ``cache_dir``, ...

    Raises:
        LusiferError: If it names none, one cannot be read, or the LLM cannot be quantised.
    """
    if config.encoder is None or config.llm is None:
        raise LusiferError("this checkpoint holds no backbone weights and does not name its backbones")
    for part in ("encoder", "llm"):
        _check_identity(config, part, **hub)
    shared = {**hub, **({"attn_implementation": attn_implementation} if attn_implementation else {})}
    if device is not None and device.type != "cpu":
        shared["device_map"] = device  # Straight from the file: as many processes as GPUs share the host's memory.
    own: dict[str, Any] = {"dtype": encoder_dtype, "revision": config.encoder_revision or "main"}
    encoder = load_encoder(config.encoder, config.encoder_config, **own, **shared)
    own = {"quantization": quantization, "dtype": llm_dtype, "revision": config.llm_revision or "main"}
    llm = load_llm(config.llm, config.llm_config, adapters=config.llm_base_adapters or (), **own, **shared)
    # Not those of the backbones' own files: whoever loads the checkpoint gets the weights that were trained with.
    config.encoder_config.dtype, config.llm_config.dtype = encoder.dtype, llm.dtype
    return encoder, llm


def _recorded_name(name: str) -> str:
    """A folder's absolute path, everything else as it is."""
    folder = os.path.expanduser(name)
    return os.path.abspath(folder) if os.path.isdir(folder) else name


def _commit_of(name: str, revision: str | None) -> str | None:
    """The commit that a backbone's revision means now, where it comes from a hub; else the revision as it is."""
    try:
        path = cached_or_none(resolve_backbone(name), "config.json", revision=revision or "main")
    except OSError:
        return revision
    return extract_commit_hash(path, None) or revision


def _identity(name: str, revision: str | None, **hub: Any) -> str | None:
    """Fingerprint of a backbone's weights; None for starters, whose version pins them."""
    return None if name.startswith(PREFIX) else files_fingerprint(name, revision=revision or "main", **hub)


def _check_identity(config: LusiferConfig, part: str, **hub: Any) -> None:
    """Refuses another backbone under the recorded name; older checkpoints record no fingerprint."""
    name, recorded = getattr(config, part), getattr(config, f"{part}_fingerprint")
    if recorded is None or (part == "encoder" and config.encoder_stored):
        return
    present = _identity(name, getattr(config, f"{part}_revision"), **hub)
    if present not in (None, recorded):
        raise LusiferError(
            f"the {part} {name!r} is not the one this checkpoint was trained with: its weights are different "
            f"(fingerprint {present}, not {recorded}); restore the right model, or correct its location in config.json"
        )


def check_adapted(name: str, config: PretrainedConfig, *, revision: str | None = None) -> None:
    """Refuses an encoder whose embedding in its teacher's space would be lost: one adapted to built-in modules.

    Args:
        name: The encoder's name.
        config: Its configuration.
        revision: Its hub revision.

    Raises:
        LusiferError: If so.
    """
    try:
        path = cached_or_none(resolve_backbone(name), ADAPTED, revision=revision or "main")
    except OSError:  # Whoever loads it says what is wrong.
        path = None
    if path is not None and config.model_type != ADAPTED_TYPE:
        raise LusiferError(
            f"the encoder {name!r} was adapted with --plain, into modules that LUSIFER cannot build on; "
            "adapt it again without --plain"
        )


class PositionTable(NamedTuple):
    """An encoder's table of absolute positions.

    Attributes:
        window: Most tokens of a text, special tokens included.
        first: Position of a text's first token: 0 for BERT, one behind the padding index for RoBERTa and its kin.
    """

    window: int
    first: int


def position_table(encoder: nn.Module) -> PositionTable | None:
    """The table of absolute positions of an encoder; None where positions are relative or rotary, without an end."""
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name.rpartition(".")[2]:
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            config: Any = encoder.config
            rows = min(module.num_embeddings, getattr(config, "max_position_embeddings", module.num_embeddings))
            return PositionTable(rows - first, first)
    return None


def encoder_window(config: PretrainedConfig) -> int | None:
    """Most tokens an encoder can read of a text; None where its positions have no end. Needs no weights."""
    with torch.device("meta"):
        table = position_table(build_encoder(copy.deepcopy(config)))  # T5 changes the configuration it is built from.
    return None if table is None else table.window


def check_window(name: str, config: PretrainedConfig, max_seq_length: int) -> None:
    """Refuses a length that the encoder's positions do not reach, where the first long text would raise an IndexError.

    Args:
        name: The encoder's name, for the message.
        config: Its configuration.
        max_seq_length: Tokens of a text that shall be read, special tokens included.

    Raises:
        LusiferError: If the encoder reads fewer.
    """
    window = encoder_window(config)
    if window is not None and max_seq_length > window:
        raise LusiferError(
            f"max_seq_length is {max_seq_length}, but the encoder {name!r} reads at most {window} tokens; "
            f"set max_seq_length to {window} or less"
        )
