"""What an English LLM embedder is, read from its own files: pooling, prompts, attention, adapters, tokenizer.

Reads Sentence Transformers folders, LLM2Vec or GritLM style models, PEFT adapters and plain decoder LLMs, here or on
the hub. Weights are not loaded, and code in a repository is neither fetched nor run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from transformers import PretrainedConfig

from lusifer.errors import LusiferError
from lusifer.hooks.transformers import cached_or_none
from lusifer.model.backbone_alone import is_sentence_model
from lusifer.model.backbones import build_llm, load_config, load_tokenizer
from lusifer.model.direction.families import causal_layers, check_family
from lusifer.model.published_adapters import read_base_adapter
from lusifer.starter.names import resolve_backbone

_POOLINGS = {"mean": "mean", "lasttoken": "last_token", "weightedmean": "weighted_mean"}
# Published instruction formats of families whose files do not state them.
_GRITLM = {"query": "<|embed|>\n", "document": "<|embed|>\n"}


@dataclass
class Note:
    """One fact about an embedder, where it was read, and what follows from it."""

    what: str
    where: str
    so: str = ""


@dataclass
class LLMEmbedder:
    """An English LLM embedder as a recipe needs it.

    Attributes:
        llm: Hub id, folder or starter name of the decoder LLM.
        adapters: PEFT adapters that belong to it, in order.
        config: The LLM's configuration.
        pooling: One of `lusifer.model.configuration.POOLINGS`.
        prompts: Under ``query`` and ``document``, and whatever other names it has.
        causal: Whether it was trained with causal attention; None where its files do not say.
        use_bos: Whether its tokenizer puts a BOS token first.
        head: Whether its files hold an LM head, which stage 1 needs.
        dtype: Data type of its weights, as recipes name it.
        parameters: Its number of parameters, without LM head.
        licence: As its card says.
        notes: All of the above in words.
    """

    llm: str
    config: PretrainedConfig
    adapters: list[str] = field(default_factory=list)
    pooling: str = "mean"
    prompts: dict[str, str] = field(default_factory=dict)
    causal: bool | None = None
    use_bos: bool = True
    head: bool = True
    dtype: str = "float32"
    parameters: int = 0
    licence: str | None = None
    notes: list[Note] = field(default_factory=list)

    def note(self, what: str, where: str, so: str = "") -> None:
        """Adds a line to the explanation."""
        self.notes.append(Note(what, where, so))


def inspect_embedder(name: str, adapters: list[str] | None = None) -> LLMEmbedder:
    """Reads what an LLM embedder is from its files.

    Args:
        name: Folder, hub id or starter name of an LLM embedder, of a PEFT adapter that is one, or of a decoder LLM.
        adapters: PEFT adapters on top of it, in order.

    Raises:
        LusiferError: If it cannot be read, is no decoder LLM, or is of a family that cannot read both ways.
    """
    llm, own, notes = _follow_adapters(name)
    merged = [*own, *(adapters or [])]
    try:
        config = load_config("llm", llm)
    except LusiferError as error:
        if is_sentence_model(llm):
            raise LusiferError(f"{error}; `lusifer adapt {name} OUT` adds languages to any embedder") from error
        raise
    check_family(llm, config)
    embedder = LLMEmbedder(llm, config, merged, notes=notes)
    with torch.device("meta"):
        embedder.parameters = sum(parameter.numel() for parameter in build_llm(deepcopy(config)).parameters())
    size = f"{embedder.parameters / 1e6:,.0f} million parameters"
    embedder.note(f"{config.model_type}, {config.num_hidden_layers} layers of {config.hidden_size}, {size}", llm)
    for adapter in merged:
        lora, tensors = read_base_adapter(adapter)
        base = lora.base_model_name_or_path
        where = f"{adapter}: adapter_config.json"
        embedder.note(f"LoRA of rank {lora.r} on {len(tensors) // 2} layers", where, "merged into the LLM as it loads")
        if base and base not in (llm, *own, name):
            embedder.note(f"made for {base}", where, f"make sure that this and {llm} have the same weights")
    read = _reader(name if name == llm or own else llm, llm)
    _dtype(embedder)
    _attention(embedder, name, read)
    _pooling(embedder, name, read)
    _prompts(embedder, name, read)
    _tokenizer(embedder)
    _head(embedder)
    _licence(embedder, name)
    return embedder


def _file(name: str, file: str) -> str | None:
    where, _, revision = name.partition("@")
    try:
        return cached_or_none(resolve_backbone(where), file, revision=revision or None)
    except (OSError, ValueError):
        return None


def _json(name: str, file: str) -> Any:
    path = _file(name, file)
    if path is None:
        return None
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LusiferError(f"cannot read {file} of {name!r}: {error}") from error
    kind = list if file == "modules.json" else dict
    if not isinstance(value, kind):
        raise LusiferError(f"{file} of {name!r} holds no {'list' if kind is list else 'mapping'}")
    return value


def _reader(*names: str) -> Callable[[str], tuple[Any, str]]:
    """Looks for a file in the embedder's own folder first, then in that of the LLM below its adapters."""

    def read(file: str) -> tuple[Any, str]:
        for name in dict.fromkeys(names):
            if (value := _json(name, file)) is not None:
                return value, f"{name}: {file}"
        return {}, ""

    return read


def _follow_adapters(name: str) -> tuple[str, list[str], list[Note]]:
    """From a folder with an adapter down to the LLM below, through adapters on adapters."""
    chain: list[str] = []
    notes: list[Note] = []
    while (adapter := _json(name, "adapter_config.json")) is not None:
        below = adapter.get("base_model_name_or_path")
        if not isinstance(below, str) or not below or name in chain:
            raise LusiferError(f"adapter_config.json of {name!r} does not name the LLM it belongs to")
        chain.insert(0, name)
        notes.append(Note(f"an adapter on {below}", f"{name}: adapter_config.json"))
        name = below
    return name, chain, notes


def _dtype(embedder: LLMEmbedder) -> None:
    stated = str(getattr(embedder.config, "dtype", None) or "float32").removeprefix("torch.")
    embedder.dtype = stated if stated in ("float32", "bfloat16", "float16") else "float32"
    if embedder.parameters > 1e9 and embedder.dtype == "float32":
        embedder.dtype = "bfloat16"
        embedder.note("weights in float32", f"{embedder.llm}: config.json", "loaded as bfloat16, to halve the memory")


def _attention(embedder: LLMEmbedder, name: str, read: Any) -> None:
    config, where = read("config.json")
    architectures = [str(entry) for entry in config.get("architectures") or []]
    stated = config.get("is_causal")
    if stated is None and config.get("use_bidirectional_attention") is not None:
        stated = not config["use_bidirectional_attention"]
    two_sided = next((entry for entry in architectures if "Bi" in entry), None)
    if stated is None and two_sided:
        stated, where = False, f"{where}: {two_sided}"
    if stated is None and "gritlm" in name.lower():
        stated, where = False, "the name: GritLM embeds with attention in both directions"
    embedder.causal = stated
    if stated is None:
        after = "causal, as LLMs are; stage 2 makes it bidirectional"
        embedder.note("the direction of its attention is not stated", where, after)
    else:
        after = "stage 2 makes it bidirectional, which its adapter has to learn" if stated else "as in stage 2"
        embedder.note(f"attention {'causal' if stated else 'in both directions'}", where, after)
    if stay := causal_layers(embedder.config):
        embedder.note(stay, where, "only its attention becomes bidirectional")
    if config.get("auto_map"):
        embedder.note("has custom code", where, "not run: transformers' own class is used")


def _pooling(embedder: LLMEmbedder, name: str, read: Any) -> None:
    modules, where = read("modules.json")
    stated, place = None, ""
    for module in modules:
        kind = str(module.get("type", "")).rsplit(".", 1)[-1] if isinstance(module, dict) else ""
        if kind == "Pooling":
            settings, place = read(f"{module.get('path')}/config.json")
            stated = _pooling_mode(settings)
        elif kind == "Normalize":
            embedder.note("normalises its embeddings", where, "as lusifer does")
        elif kind not in ("Transformer", ""):
            embedder.note(f"a {kind} module after the LLM", where, "cannot be carried over; left out")
    if stated is None:
        settings, place = read("llm2vec_config.json")
        stated = settings.get("pooling_mode")
        if stated is not None:
            stated = {"eos_token": "lasttoken", "weighted_mean": "weightedmean"}.get(str(stated), str(stated))
    if stated is None and "gritlm" in name.lower():
        stated, place = "mean", "the name: GritLM pools by the mean"
    if stated is None:
        embedder.note("pooling is not stated", embedder.llm, "mean, which suits attention in both directions best")
    elif stated not in _POOLINGS:
        embedder.note(f"pooling {stated}", place, "not for decoders: mean instead")
    else:
        embedder.pooling = _POOLINGS[stated]
        last = "the state of the added token, in place of its last one" if stated == "lasttoken" else ""
        embedder.note(f"pooling {stated}", place, last)


def _pooling_mode(settings: dict[str, Any]) -> str | None:
    mode = settings.get("pooling_mode")
    if mode is None:
        on = [key.removeprefix("pooling_mode_") for key, value in settings.items() if value is True and "_mode_" in key]
        mode = on[0].removesuffix("_tokens").removesuffix("_token") if on else None
    return None if mode is None else str(mode)


def _prompts(embedder: LLMEmbedder, name: str, read: Any) -> None:
    settings, where = read("config_sentence_transformers.json")
    stated = settings.get("prompts")
    kept = {str(key): text for key, text in stated.items() if isinstance(text, str)} if isinstance(stated, dict) else {}
    if not any(kept.values()) and "gritlm" in name.lower():
        kept, where = dict(_GRITLM), "the name: GritLM's format for texts without an instruction"
    default = settings.get("default_prompt_name")
    if "query" not in kept and isinstance(default, str) and kept.get(default):
        kept["query"] = kept[default]
    embedder.prompts = {key: text for key, text in kept.items() if text}
    if not embedder.prompts:
        embedder.note("no prompts", where or name, "no prompt for queries or documents")
        return
    for key, text in embedder.prompts.items():
        embedder.note(f"prompt {key}: {text!r}", where)
    if any("<|" in text for text in embedder.prompts.values()):
        after = "plain characters to the encoder, without effect"
        embedder.note("its prompts contain control tokens", where, after)


def _tokenizer(embedder: LLMEmbedder) -> None:
    tokenizer: Any = load_tokenizer("llm", embedder.llm)
    ids = tokenizer("a").input_ids
    where = f"{embedder.llm}: tokenizer"
    embedder.use_bos = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
    after = "soft tokens follow it too" if embedder.use_bos else "soft tokens come first"
    embedder.note(f"its tokenizer puts {'a' if embedder.use_bos else 'no'} BOS token first", where, after)
    if tokenizer.eos_token_id is not None and ids[-1:] == [tokenizer.eos_token_id]:
        embedder.note("its tokenizer appends EOS", where, "the added token replaces it")


def _head(embedder: LLMEmbedder) -> None:
    architectures = getattr(embedder.config, "architectures", None) or []
    embedder.head = any(str(entry).endswith("ForCausalLM") for entry in architectures)
    if not embedder.head:
        where = f"{embedder.llm}: config.json, architectures"
        embedder.note("no LM head", where, "stage 1, which needs one, is off; stage 0 starts the connector")


def _licence(embedder: LLMEmbedder, name: str) -> None:
    for source in dict.fromkeys([name, embedder.llm]):
        if (path := _file(source, "README.md")) is None:
            continue
        try:
            stated = ModelCard.load(path).data.to_dict().get("license")
        except (ValueError, TypeError, OSError):
            stated = None
        if stated:
            embedder.licence = str(stated)
            embedder.note(f"licence {stated}", f"{source}: README.md", "also applies to models derived from it")
            return
    embedder.note("no licence found", name, "check it before sharing the result")
