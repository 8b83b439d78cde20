"""The door of every command: from a model's name to a loaded checkpoint."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

from lusifer.errors import LusiferError
from lusifer.hooks.huggingface_hub import why_not_loaded
from lusifer.hooks.sentence_transformers import no_pickled_modules
from lusifer.hooks.transformers import cached_or_none, no_panics
from lusifer.interop.authors import find_authors
from lusifer.model.adapters import parameters_by_part
from lusifer.model.backbones import check_tokenizer
from lusifer.model.configuration import ADAPTED
from lusifer.model.modeling import LusiferModel
from lusifer.model.sentence_transformer import lusifer_model
from lusifer.model.text_encoder import FastSentenceTransformer, set_precision
from lusifer.starter.names import resolve_backbone
from lusifer.trust import SAFE, check_modules


def resolve(name: str) -> str:
    """Where a model is, a folder or the hub id as it is: the one place that knows all kinds of names.

    ``name`` is ``starter``, the released model; ``starter:...``, a starter backbone; a folder, perhaps with ``~``; a
    hub id; or a checkpoint of LUSIFER's authors, folder or hub id, which is converted on first use.

    Raises:
        LusiferError: If it is a starter that is not fetched, or a checkpoint of the authors that cannot be converted.
    """
    folder = resolve_backbone(name)
    return folder if folder != name else find_authors(os.path.expanduser(name))


def load_checkpoint(path: str, **kwargs: Any) -> SentenceTransformer:
    """Loads a checkpoint; see `lusifer.load`.

    Args:
        path: A name as `resolve` takes it.
        **kwargs: As for ``sentence_transformers.SentenceTransformer``.

    Raises:
        LusiferError: If there is no readable LUSIFER checkpoint at ``path``.
    """
    if kwargs.get("backend", "torch") != "torch":
        backend = kwargs["backend"]
        raise LusiferError(f"no backend {backend!r}, only torch; `lusifer export onnx` writes a model for ONNX Runtime")
    path = resolve(path)
    folder = Path(path)
    looks_local = folder.is_dir() or path.startswith((".", "/")) or path.count("/") > 1
    if looks_local and not (folder / "modules.json").is_file():
        raise LusiferError(f"no checkpoint at {path!r}: it has no modules.json (train one, or check the path)")
    hub = {key: kwargs[key] for key in ("revision", "token", "local_files_only") if kwargs.get(key) is not None}
    if kwargs.get("cache_folder") is not None:
        hub["cache_dir"] = kwargs["cache_folder"]
    check_modules(repr(path), path, **hub)
    # A model's own files may ask for other options, but not over these.
    kwargs["model_kwargs"] = {**SAFE, **(kwargs.get("model_kwargs") or {})}
    insisted = not kwargs["model_kwargs"]["use_safetensors"]
    try:
        with nullcontext() if insisted else no_pickled_modules(repr(path)), no_panics(repr(path)):
            model = FastSentenceTransformer(path, **kwargs)
            _try_out(path, model)
        return model
    except LusiferError:
        raise
    except Exception as error:  # Whatever a library says of files that it cannot make sense of.
        raise LusiferError(f"cannot read the checkpoint {path!r}: {why_not_loaded(path, error)}") from error


def load_for_inference(path: str, *, device: str | None = None, precision: str | None = None) -> SentenceTransformer:
    """Loads a checkpoint to encode with and nothing else: adapters are merged in place, which takes no second copy.

    Args:
        path: A name as `resolve` takes it.
        device: Torch device; the best there is when None.
        precision: Data type to compute in, as for `set_precision`; the checkpoint's own when None.

    Raises:
        LusiferError: If there is no readable checkpoint at ``path``, or no such precision.
    """
    model = load_checkpoint(path, device=device)
    if precision is not None:
        set_precision(model, precision)
    elif isinstance(inner := getattr(model[0], "auto_model", None), LusiferModel):
        inner.merge_for_inference()
    return model


@torch.inference_mode()
def _try_out(path: str, model: SentenceTransformer) -> None:
    """One short text through all parts: settings that do not fit each other show here, not in the middle of work.

    Adapters are not merged and no mode is changed, so that training goes on from the very weights of the file.
    """
    if not hasattr(model[0], "preprocess"):
        raise LusiferError("modules.json names no model that reads texts")
    inner = getattr(model[0], "auto_model", None)
    if not isinstance(inner, LusiferModel):
        return
    tokenizer: Any = model.tokenizer
    check_tokenizer(f"the checkpoint {path!r}", tokenizer, inner.config.encoder_config)
    limit = int(model.max_seq_length or 512)
    if inner.window is not None and limit > inner.window:
        # Older versions wrote checkpoints whose longest texts have no positions in the encoder.
        model.max_seq_length = limit = inner.window
    tokenizer(["a"], truncation=False, verbose=False)
    ids = tokenizer(["a"], truncation=True, max_length=limit)["input_ids"]
    batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt", verbose=False)
    vector = model({name: tensor.to(model.device) for name, tensor in batch.items()})["sentence_embedding"]
    if vector.dim() != 2 or len(vector) != 1 or not bool(torch.isfinite(vector).all()):
        raise LusiferError(
            f"the checkpoint yields no valid embedding: a vector of shape {tuple(vector.shape)}, or NaN in it"
        )


def describe(path: str) -> dict[str, Any]:
    """What a checkpoint is made of: parameters by part, sizes, languages, provenance; ``path`` as `resolve` takes it.

    ``trainable`` counts what training changed: adapters, connector, head, and the encoder if it was trained in full.

    Raises:
        LusiferError: If there is no readable LUSIFER checkpoint at ``path``.
    """
    path = resolve(path)
    loaded = load_checkpoint(path)
    if not isinstance(getattr(loaded[0], "auto_model", None), LusiferModel):
        return _describe_other(path, loaded)
    model = lusifer_model(loaded)
    config = model.config
    if not config.standalone:
        model.set_trainable(
            encoder="full" if config.encoder_stored else "lora" if config.encoder_adapter else "frozen",
            connector=True,
            llm=bool(config.llm_adapter),
        )
    return {
        "encoder": config.encoder,
        "llm": config.llm,
        "llm_base_adapters": config.llm_base_adapters,
        "llm_layers": config.llm_config.num_hidden_layers,
        "dimension": config.hidden_size,
        "max_seq_length": config.max_seq_length,
        "pooling": config.pooling,
        "standalone": config.standalone,
        "checkpoint_mb": _megabytes(path),
        "parameters": parameters_by_part(model),
        "languages": getattr(config.token_config, "languages", None) or "those of the encoder",
        "provenance": config.provenance,
    }


def _describe_other(path: str, model: SentenceTransformer) -> dict[str, Any]:
    """The same of any other Sentence Transformers model, as far as it says."""
    inner: Any = getattr(model[0], "auto_model", None)
    config: Any = getattr(inner, "config", None)
    encoder = getattr(config, "encoder_config", config)
    parts = {type(module).__name__: sum(p.numel() for p in module.parameters()) for module in model}
    return {
        "kind": " -> ".join(parts),
        "adapted": adapted_from(path),
        "dimension": model.get_embedding_dimension(),
        "max_seq_length": model.max_seq_length,
        "prompts": dict(model.prompts),
        "checkpoint_mb": _megabytes(path),
        "parameters": {part: {"total": count, "trainable": count} for part, count in parts.items() if count},
        "languages": getattr(encoder, "languages", None) or "those of the encoder",
    }


def adapted_from(path: str) -> dict[str, Any] | None:
    """What a model says of the model whose vector space it answers in: ``teacher``, ``teacher_hash``, ``dimension``.

    Args:
        path: Folder or hub id.

    Returns:
        None where it says nothing, or nothing that can be read.
    """
    try:
        file = cached_or_none(path, ADAPTED)
        facts = None if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) and "teacher_hash" in facts else None


def _megabytes(path: str) -> float:
    folder = Path(path)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
    return round(size / 1e6, 1)
