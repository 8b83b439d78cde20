"""What an English LLM embedder is, read from its own files: pooling, prompts, attention, adapters, tokenizer.

Reads a Sentence Transformers folder, an LLM2Vec or GritLM style model, a PEFT adapter on top of an LLM, or a plain
decoder LLM, here or on the hub. Weights are not loaded, and code in a repository is neither fetched nor run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from transformers import PretrainedConfig

from lusifer.errors import LusiferError
from lusifer.hooks.transformers import cached_or_none
from lusifer.model.backbones import build_llm, load_config, load_tokenizer
from lusifer.model.published_adapters import read_base_adapter
from lusifer.starter.fetch import resolve_backbone

_POOLINGS = {"mean": "mean", "lasttoken": "last_token", "weightedmean": "weighted_mean"}
# Published instruction formats of families whose files do not tell them.
_GRITLM = {"query": "<|embed|>\n", "document": "<|embed|>\n"}


@dataclass
class Note:
    """One thing found, where, and what follows from it."""

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
        causal: Whether it was made with causal attention; None where its files do not say.
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
    """Finds out what an LLM embedder is.

    Args:
        name: Folder, hub id or starter name of an LLM embedder, of a PEFT adapter that is one, or of a decoder LLM.
        adapters: PEFT adapters on top of it, in order.

    Raises:
        LusiferError: If it cannot be read, or is no decoder LLM.
    """
    llm, own, notes = _follow_adapters(name)
    folded = [*own, *(adapters or [])]
    config = load_config("llm", llm)
    found = LLMEmbedder(llm, config, folded, notes=notes)
    with torch.device("meta"):
        found.parameters = sum(parameter.numel() for parameter in build_llm(_copy(config)).parameters())
    size = f"{found.parameters / 1e6:,.0f} million parameters"
    found.note(f"{config.model_type}, {config.num_hidden_layers} layers of {config.hidden_size}, {size}", llm)
    for adapter in folded:
        lora, tensors = read_base_adapter(adapter)
        told = lora.base_model_name_or_path
        where = f"{adapter}: adapter_config.json"
        found.note(f"LoRA of rank {lora.r} on {len(tensors) // 2} layers", where, "folded into the LLM as it loads")
        if told and told not in (llm, *own, name):
            found.note(f"made for {told}", where, f"make sure that this and {llm} have the same weights")
    read = _reader(name if name == llm or own else llm, llm)
    for look in (_dtype, _attention, _pooling, _prompts, _tokenizer, _head, _licence):
        look(found, name, read)
    return found


def _copy(config: PretrainedConfig) -> PretrainedConfig:
    return type(config).from_dict(config.to_dict())


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
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LusiferError(f"cannot read {file} of {name!r}: {error}") from error
    kind = list if file == "modules.json" else dict
    if not isinstance(found, kind):
        raise LusiferError(f"{file} of {name!r} holds no {'list' if kind is list else 'mapping'}")
    return found


def _reader(*names: str) -> Callable[[str], tuple[Any, str]]:
    """Looks for a file in the embedder's own folder first, then in that of the LLM below its adapters."""

    def read(file: str) -> tuple[Any, str]:
        for name in dict.fromkeys(names):
            if (found := _json(name, file)) is not None:
                return found, f"{name}: {file}"
        return {}, ""

    return read


def _follow_adapters(name: str) -> tuple[str, list[str], list[Note]]:
    """From a folder with an adapter down to the LLM below, through adapters on adapters."""
    chain: list[str] = []
    notes: list[Note] = []
    while (told := _json(name, "adapter_config.json")) is not None:
        below = told.get("base_model_name_or_path") if isinstance(told, dict) else None
        if not isinstance(below, str) or not below or name in chain:
            raise LusiferError(f"adapter_config.json of {name!r} does not name the LLM it belongs to")
        chain.insert(0, name)
        notes.append(Note(f"an adapter on {below}", f"{name}: adapter_config.json"))
        name = below
    return name, chain, notes


def _dtype(found: LLMEmbedder, name: str, read: Any) -> None:
    told = str(getattr(found.config, "dtype", None) or "float32").removeprefix("torch.")
    found.dtype = told if told in ("float32", "bfloat16", "float16") else "float32"
    if found.parameters > 1e9 and found.dtype == "float32":
        found.dtype = "bfloat16"
        found.note("weights in float32", f"{found.llm}: config.json", "loaded as bfloat16, to halve the memory")


def _attention(found: LLMEmbedder, name: str, read: Any) -> None:
    config, where = read("config.json")
    architectures = [str(entry) for entry in config.get("architectures") or []]
    told = config.get("is_causal")
    if told is None and config.get("use_bidirectional_attention") is not None:
        told = not config["use_bidirectional_attention"]
    two_sided = next((entry for entry in architectures if "Bi" in entry), None)
    if told is None and two_sided:
        told, where = False, f"{where}: {two_sided}"
    if told is None and _is_gritlm(name):
        told, where = False, "the name: GritLM embeds with attention in both directions"
    found.causal = told
    if told is None:
        found.note(
            "the direction of its attention is not told", where, "causal, as LLMs are made; stage 2 turns it both ways"
        )
    else:
        after = "stage 2 turns it both ways, which its adapter has to learn" if told else "as in stage 2"
        found.note(f"attention {'causal' if told else 'in both directions'}", where, after)
    if config.get("auto_map"):
        found.note("has code of its own", where, "not run: transformers' own class is taken")


def _is_gritlm(name: str) -> bool:
    return "gritlm" in name.lower()


def _pooling(found: LLMEmbedder, name: str, read: Any) -> None:
    modules, where = read("modules.json")
    told, place = None, ""
    for module in modules:
        kind = str(module.get("type", "")).rsplit(".", 1)[-1] if isinstance(module, dict) else ""
        if kind == "Pooling":
            settings, place = read(f"{module.get('path')}/config.json")
            told = _pooling_mode(settings)
        elif kind == "Normalize":
            found.note("normalises its embeddings", where, "as we do")
        elif kind not in ("Transformer", ""):
            found.note(f"a {kind} module behind the LLM", where, "cannot be carried over and is left out")
    if told is None:
        settings, place = read("llm2vec_config.json")
        told = settings.get("pooling_mode")
        told = {"eos_token": "lasttoken", "weighted_mean": "weightedmean"}.get(str(told), told)
    if told is None and _is_gritlm(name):
        told, place = "mean", "the name: GritLM pools by the mean"
    if told is None:
        found.note("pooling is not told", found.llm, "mean, which suits attention in both directions best")
    elif told not in _POOLINGS:
        found.note(f"pooling {told}", place, "not for decoders: mean instead")
    else:
        found.pooling = _POOLINGS[told]
        last = "the state of the learned token, which stands where its last token stood" if told == "lasttoken" else ""
        found.note(f"pooling {told}", place, last)


def _pooling_mode(settings: dict[str, Any]) -> str | None:
    mode = settings.get("pooling_mode")
    if mode is None:
        on = [key.removeprefix("pooling_mode_") for key, value in settings.items() if value is True and "_mode_" in key]
        mode = on[0].removesuffix("_tokens").removesuffix("_token") if on else None
    return mode if mode is None or isinstance(mode, str) else str(mode)


def _prompts(found: LLMEmbedder, name: str, read: Any) -> None:
    settings, where = read("config_sentence_transformers.json")
    told = settings.get("prompts")
    kept = {str(key): text for key, text in told.items() if isinstance(text, str)} if isinstance(told, dict) else {}
    if not any(kept.values()) and _is_gritlm(name):
        kept, where = dict(_GRITLM), "the name: GritLM's format for texts without an instruction"
    default = settings.get("default_prompt_name")
    if "query" not in kept and isinstance(default, str) and kept.get(default):
        kept["query"] = kept[default]
    found.prompts = {key: text for key, text in kept.items() if text}
    if not found.prompts:
        found.note("no prompts", where or name, "queries and documents stand as they are")
        return
    for key, text in found.prompts.items():
        found.note(f"prompt {key}: {text!r}", where)
    if any("<|" in text for text in found.prompts.values()):
        found.note("its prompts hold control tokens", where, "to the encoder they are ordinary characters, of no use")


def _tokenizer(found: LLMEmbedder, name: str, read: Any) -> None:
    tokenizer: Any = load_tokenizer("llm", found.llm)
    ids = tokenizer("a").input_ids
    bos = tokenizer.bos_token_id
    found.use_bos = bos is not None and bool(ids) and ids[0] == bos
    so = "soft tokens stand behind it too" if found.use_bos else "soft tokens stand first"
    found.note(f"its tokenizer puts {'a' if found.use_bos else 'no'} BOS token first", f"{found.llm}: tokenizer", so)
    if ids and tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id:
        found.note("its tokenizer puts EOS last", f"{found.llm}: tokenizer", "the learned token stands there instead")


def _head(found: LLMEmbedder, name: str, read: Any) -> None:
    architectures = [str(entry) for entry in getattr(found.config, "architectures", None) or []]
    found.head = any(entry.endswith("ForCausalLM") for entry in architectures)
    where = f"{found.llm}: config.json, architectures"
    if not found.head:
        found.note("no LM head", where, "stage 1, which needs one, is off; stage 0 starts the connector")


def _licence(found: LLMEmbedder, name: str, read: Any) -> None:
    for source in dict.fromkeys([name, found.llm]):
        if (path := _file(source, "README.md")) is None:
            continue
        try:
            told = ModelCard.load(path).data.to_dict().get("license")
        except (ValueError, TypeError, OSError):
            told = None
        if told:
            found.licence = str(told)
            found.note(f"licence {told}", f"{source}: README.md", "holds for what you make of it too")
            return
    found.note("no licence found", name, "look it up before you pass the result on")
