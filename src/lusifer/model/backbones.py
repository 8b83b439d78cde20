"""Loading the two backbones: any Hugging Face encoder and any Hugging Face decoder LLM."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
)

from lusifer.errors import LusiferError, first_line
from lusifer.hooks.huggingface_hub import why_not_loaded
from lusifer.hooks.transformers import has_pooler, no_load_report, no_panics
from lusifer.model.published_adapters import merge_in
from lusifer.starter.names import resolve_backbone
from lusifer.trust import SAFE, check_files

HUB_KEYS = ("token", "cache_dir", "local_files_only", "force_download", "proxies")
SAFE_LOADING = {**SAFE, "output_loading_info": True}


def load_part(what: str, name: str, loader: Callable[..., Any], **kwargs: Any) -> Any:
    """Calls a ``from_pretrained``; a backbone that cannot be read becomes one clear line.

    Args:
        what: What is loaded, for the message.
        name: Hub id, local folder or starter name.
        loader: The ``from_pretrained``.
        **kwargs: Its options.

    Raises:
        LusiferError: If the folder or hub id cannot be loaded, or asks for what `check_files` refuses.
    """
    where = resolve_backbone(name)
    hub = {key: kwargs[key] for key in (*HUB_KEYS, "revision") if kwargs.get(key) is not None}
    check_files(f"the {what} {name!r}", where, **hub)
    try:
        # Explicit, because transformers would ask at a terminal.
        with no_panics(f"the {what} {name!r}"):
            return loader(where, trust_remote_code=False, **kwargs)
    except LusiferError:
        raise
    except Exception as error:  # Whatever a library says of files that it cannot make sense of.
        if "model.safetensors" in str(error):
            raise LusiferError(
                f"the {what} {name!r} has no model.safetensors; if its weights are a pickle, pytorch_model.bin, run "
                f"`lusifer convert pickled {name} FOLDER` and give that folder"
            ) from error
        raise LusiferError(
            f"cannot load the {what} {name!r}: {why_not_loaded(name, error)} "
            "(give a hub id you can reach, a local folder, or a starter name after `lusifer fetch`)"
        ) from error


def load_config(what: str, name: str, *, revision: str | None = None, **hub: Any) -> PretrainedConfig:
    """Loads a backbone's configuration without its weights.

    Args:
        what: ``encoder`` or ``llm``; decides which architectures are accepted.
        name: Hub id, local folder or starter name.
        revision: Hub revision.
        **hub: Passed to ``AutoConfig.from_pretrained`` (``token``, ``cache_dir``, ...).

    Raises:
        LusiferError: If it cannot be read, or is not the kind of model asked for.
    """
    config = load_part(what, name, AutoConfig.from_pretrained, revision=revision or "main", **hub)
    family = config.model_type
    masked, causal = family in MODEL_FOR_MASKED_LM_MAPPING_NAMES, family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if what == "llm" and (config.is_encoder_decoder or masked or not causal):
        raise LusiferError(f"{name!r} ({family}) is not a decoder LLM; give a causal language model as llm")
    if what == "encoder" and causal and not masked and not config.is_encoder_decoder:
        raise LusiferError(f"{name!r} ({family}) is a decoder LLM; give a bidirectional encoder as encoder")
    if not config.is_encoder_decoder and config.get_text_config() is not config:
        raise LusiferError(f"{name!r} ({family}) is a multimodal model; give its text-only checkpoint as {what}")
    if type(config) not in (MODEL_FOR_TEXT_ENCODING_MAPPING if config.is_encoder_decoder else MODEL_MAPPING):
        raise LusiferError(f"{name!r} ({family}) cannot be loaded without its head or decoder; give another {what}")
    return config


def keep_layers(config: PretrainedConfig, num_layers: int) -> None:
    """Shortens an LLM's configuration, in place, to its first ``num_layers`` layers.

    Raises:
        LusiferError: If the model does not have so many.
    """
    if not 1 <= num_layers <= config.num_hidden_layers:
        raise LusiferError(f"num_layers must be between 1 and {config.num_hidden_layers}, not {num_layers}")
    if layer_types := getattr(config, "layer_types", None):
        config.layer_types = layer_types[:num_layers]
    config.num_hidden_layers = num_layers


def truncate_llm(llm: PreTrainedModel, num_layers: int) -> None:
    """Drops all but the first layers of a loaded LLM, in place; raises as `keep_layers`."""
    keep_layers(llm.config, num_layers)
    llm.layers = llm.layers[:num_layers]


def _encoder_kind(config: PretrainedConfig) -> tuple[Any, dict[str, Any]]:
    """Class and options of an encoder: no decoder, and no pooler, a trained part that would never get a gradient."""
    # T5 and its kin, also where a folder holds the encoder alone and says it is no encoder-decoder.
    pair = config.model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    if config.is_encoder_decoder or (pair and type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING):
        return AutoModelForTextEncoding, {}
    return AutoModel, {"add_pooling_layer": False} if has_pooler(config) else {}


def load_encoder(name: str, config: PretrainedConfig, **kwargs: Any) -> PreTrainedModel:
    """Loads an encoder, or the encoder half of an encoder-decoder.

    Args:
        name: Hub id, local folder or starter name.
        config: Its configuration, as `load_config` gives it.
        **kwargs: Passed to ``from_pretrained`` (``dtype``, ``attn_implementation``, ``revision``, ...).

    Raises:
        LusiferError: If it cannot be read.
    """
    kind, options = _encoder_kind(config)
    return _load_whole("encoder", name, kind, config=config, **{**options, **kwargs})


def load_llm(
    name: str, config: PretrainedConfig, *, adapters: Sequence[str] = (), quantization: str | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Loads a decoder LLM without its LM head, ready for both attention directions.

    Args:
        name: Hub id, local folder or starter name.
        config: Its configuration; a sliding window for all layers is switched off in it.
        adapters: LoRA adapters of PEFT to merge into it, in this order.
        quantization: ``8bit`` or ``4bit``, as `quantized` takes it.
        **kwargs: Passed to ``from_pretrained``.

    Raises:
        LusiferError: If it or an adapter cannot be read, or they do not fit, or it is quantised beside adapters.
    """
    if adapters and quantization is not None:
        raise LusiferError("an LLM in 8 or 4 bits cannot merge adapters: omit quantization, or merge them first")
    _no_sliding_window(config)
    kwargs |= quantized(quantization, kwargs.get("dtype", torch.float32))
    llm = _load_whole("llm", name, AutoModel, config=config, **kwargs)
    if adapters:
        hub = {key: kwargs[key] for key in HUB_KEYS if key in kwargs}
        depth = load_config("llm", name, revision=kwargs.get("revision"), **hub).num_hidden_layers
        for adapter in adapters:
            merge_in(llm, adapter, depth=depth, **hub)
    return llm


def _load_whole(what: str, name: str, kind: Any, **kwargs: Any) -> Any:
    """Refuses a backbone without all of its weights, where transformers would fill in random ones."""
    with no_load_report():  # It lists the layers and the head that are left out on purpose.
        model, report = load_part(what, name, partial(kind.from_pretrained, **SAFE_LOADING), **kwargs)
    if missing := sorted(report["missing_keys"]):
        raise LusiferError(f"the {what} {name!r} lacks {len(missing)} tensors, {missing[0]} first; fetch it again")
    if other := sorted(report["mismatched_keys"]):
        raise LusiferError(f"the {what} {name!r} has other shapes than its configuration for {other[0][0]}")
    return model


def quantized(kind: str | None, dtype: torch.dtype | str) -> dict[str, Any]:
    """Options of ``from_pretrained`` for a frozen LLM in 8 or 4 bits (QLoRA, arXiv 2305.14314).

    Args:
        kind: ``8bit``, ``4bit`` (NF4, constants quantised again) or None.
        dtype: Data type the LLM computes in.

    Raises:
        LusiferError: If bitsandbytes is missing, or 4 bits are asked for where there is no accelerator.
    """
    if kind is None:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise LusiferError(f"quantization: {kind} needs bitsandbytes; run `pip install 'lusifer[quantization]'`")
    if kind == "8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    if not torch.accelerator.is_available():
        # bitsandbytes 0.50 repacks 4-bit weights when it first evaluates on a CPU; without its extra kernels results
        # are wrong from then on, and adapters get no gradient.
        raise LusiferError("quantization: 4bit needs a GPU; on a CPU use 8bit, or none and llm_dtype: bfloat16")
    compute = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": compute}
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **nf4)}


def _no_sliding_window(config: PretrainedConfig) -> None:
    # Families with layer_types (Gemma 3, Qwen) choose the window layer by layer and handle
    # is_causal=False there; only a window for all layers has to go.
    if getattr(config, "sliding_window", None) is None or getattr(config, "layer_types", None):
        return
    try:
        config.sliding_window = None
    except Exception:  # A family whose configuration wants a number there: one that no text outgrows.
        config.sliding_window = config.max_position_embeddings


def build_encoder(config: PretrainedConfig) -> PreTrainedModel:
    """An encoder with random weights, for loading a state dict into.

    Raises:
        LusiferError: If transformers has no encoder by itself for such a configuration.
    """
    kind, options = _encoder_kind(config)
    try:
        return kind.from_config(config, **options)
    except ValueError as error:
        raise LusiferError(f"cannot build an encoder of the family {config.model_type}: {first_line(error)}") from error


def build_llm(config: PretrainedConfig) -> PreTrainedModel:
    """A decoder LLM with random weights and no LM head."""
    _no_sliding_window(config)
    return AutoModel.from_config(config)


def load_tokenizer(
    what: str, name: str, *, revision: str | None = None, config: PretrainedConfig | None = None, **hub: Any
) -> PreTrainedTokenizerBase:
    """Loads a backbone's tokenizer.

    Args:
        what: ``encoder`` or ``llm``.
        name: Hub id, local folder or starter name.
        revision: Hub revision.
        config: The backbone's configuration; read when None.
        **hub: ``token``, ``cache_dir``, ...

    Raises:
        LusiferError: If it cannot be read, is not there, or has tokens that the model has no embedding for.
    """
    options = {"revision": revision or "main", **hub}
    tokenizer = load_part(f"{what} tokenizer", name, AutoTokenizer.from_pretrained, **options)
    config = load_config(what, name, revision=revision, **hub) if config is None else config
    check_tokenizer(f"the {what} {name!r}", tokenizer, config)
    return tokenizer


def check_tokenizer(what: str, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Refuses a tokenizer that is empty or larger than the embedding matrix; gives it a pad token if it has none.

    Args:
        what: The model, for the message.
        tokenizer: Its tokenizer.
        config: Its configuration.

    Raises:
        LusiferError: If it knows special tokens alone, or a token has no embedding.
    """
    vocabulary = tokenizer.get_vocab()
    special = set(tokenizer.all_special_tokens)
    if not vocabulary.keys() - special - {"", "▁"}:
        raise LusiferError(
            f"{what} has no tokenizer: its files are missing or hold no vocabulary; "
            "save the tokenizer beside the model (tokenizer.save_pretrained)"
        )
    config = getattr(config, "encoder_config", config)  # An adapted encoder's tokens are those of the encoder inside.
    rows: Any = getattr(config, "vocab_size", None)
    last = max(vocabulary, key=lambda token: vocabulary[token])
    if rows is not None and vocabulary[last] >= rows:
        raise LusiferError(
            f"{what} has no embedding for the token {last!r} (id {vocabulary[last]}): its tokenizer knows "
            f"{len(vocabulary)} tokens, its embedding matrix has {rows} rows; resize the embeddings or remove the token"
        )
    if tokenizer.pad_token is None:
        # Padding is masked, so that any token does; RoBERTa and its kin count positions by the configured one.
        number = getattr(config, "pad_token_id", None)
        chosen = tokenizer.convert_ids_to_tokens(number) if isinstance(number, int) else None
        tokenizer.pad_token = chosen or tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise LusiferError(f"{what} has no pad token, end token or unknown token to pad with; set pad_token")
