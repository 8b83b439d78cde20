"""Checkpoints: loading and describing them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

from lusifer.errors import LusiferError
from lusifer.interop.authors import find_authors
from lusifer.model.adapters import parameters_by_part
from lusifer.model.modeling import LusiferModel
from lusifer.model.safe_files import SAFE, check_files
from lusifer.model.sentence_transformer import lusifer_model
from lusifer.model.text_encoder import FastSentenceTransformer
from lusifer.starter.released import resolve_model


def load_checkpoint(path: str, **kwargs: Any) -> SentenceTransformer:
    """Loads a checkpoint; see `lusifer.load`.

    Raises:
        LusiferError: If there is no readable LUSIFER checkpoint at ``path``.
    """
    if kwargs.get("backend", "torch") != "torch":
        raise LusiferError(f"no backend {kwargs['backend']!r}: two backbones and a connector run on torch alone")
    path = find_authors(resolve_model(path))
    folder = Path(path)
    looks_local = folder.is_dir() or path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not (folder / "modules.json").is_file():
        raise LusiferError(f"no checkpoint at {path!r}: it has no modules.json (train one, or check the path)")
    hub = {key: kwargs[key] for key in ("revision", "token", "local_files_only") if kwargs.get(key) is not None}
    check_files(repr(path), path, **hub)
    # A model's own files may ask for other options, but not over these.
    kwargs["model_kwargs"] = {**SAFE, **(kwargs.get("model_kwargs") or {})}
    try:
        model = FastSentenceTransformer(path, **kwargs)
        _try_out(model)
        return model
    except LusiferError:
        raise
    except Exception as error:  # Whatever a library says of files that it cannot make sense of.
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise LusiferError(f"cannot read the checkpoint {path!r}: {reason}") from error


@torch.inference_mode()
def _try_out(model: SentenceTransformer) -> None:
    """One short text through all parts: settings that do not fit each other show here, not in the middle of work.

    Adapters are not folded and no mode is changed, so that training goes on from the very weights of the file.
    """
    if not hasattr(model[0], "preprocess"):
        raise LusiferError("modules.json names no model that reads texts")
    if not isinstance(getattr(model[0], "auto_model", None), LusiferModel):
        return
    tokenizer: Any = model.tokenizer
    limit = int(model.max_seq_length or 512)
    tokenizer(["a"], truncation=False, verbose=False)
    ids = tokenizer(["a"], truncation=True, max_length=limit)["input_ids"]
    batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt", verbose=False)
    vector = model({name: tensor.to(model.device) for name, tensor in batch.items()})["sentence_embedding"]
    if vector.dim() != 2 or len(vector) != 1 or not bool(torch.isfinite(vector).all()):
        raise LusiferError(f"the checkpoint gives no embedding: a vector of shape {tuple(vector.shape)}, or no numbers")


def describe(path: str) -> dict[str, Any]:
    """What a checkpoint is made of: parameters by part, sizes, languages, provenance.

    ``trainable`` counts what training changed: adapters, connector, head, and the encoder if it was trained in full.

    Raises:
        LusiferError: If there is no readable LUSIFER checkpoint at ``path``.
    """
    path = resolve_model(path)
    model = lusifer_model(load_checkpoint(path))
    config = model.config
    if not config.standalone:
        model.set_trainable(
            encoder="full" if config.encoder_stored else "lora" if config.encoder_adapter else "frozen",
            connector=True,
            llm=bool(config.llm_adapter),
        )
    folder = Path(path)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
    return {
        "encoder": config.encoder,
        "llm": config.llm,
        "llm_base_adapters": config.llm_base_adapters,
        "llm_layers": config.llm_config.num_hidden_layers,
        "dimension": config.hidden_size,
        "max_seq_length": config.max_seq_length,
        "pooling": config.pooling,
        "standalone": config.standalone,
        "checkpoint_mb": round(size / 1e6, 1),
        "parameters": parameters_by_part(model),
        "languages": getattr(config.encoder_config, "languages", None) or "those of the encoder",
        "provenance": config.provenance,
    }
