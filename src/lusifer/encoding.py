"""Checkpoints: the Sentence Transformers view of a model, loading, describing and saving it."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Transformer
from transformers import PreTrainedTokenizerBase

from lusifer.adapters import parameters_by_part
from lusifer.errors import LusiferError
from lusifer.modeling import LusiferModel
from lusifer.released import resolve_model
from lusifer.textencoder import FastSentenceTransformer

logger = logging.getLogger(__name__)

_MODALITIES: Any = {"text": {"method": "forward", "method_output_name": "pooler_output"}}


class _InMemory(Transformer):
    """A Transformer module around a model that exists already, where the base class only loads from disk."""

    def __init__(self, folder: str, model: LusiferModel, **kwargs: Any) -> None:
        # nn.Module refuses sub-modules before its own constructor has run.
        self.__dict__["_ready"] = model
        super().__init__(folder, **kwargs)

    def _load_model(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__.pop("_ready")


def to_sentence_transformer(model: LusiferModel, tokenizer: PreTrainedTokenizerBase) -> SentenceTransformer:
    """Wraps a model in memory; saving the result gives a folder of built-in module classes only.

    Args:
        model: The model; shared, not copied.
        tokenizer: The encoder's tokenizer.
    """
    tokenizer.model_max_length = model.config.max_seq_length
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        module = _InMemory(folder, model, modality_config=_MODALITIES, module_output_name="sentence_embedding")
    # modules.json then names the built-in class, which loads without trust_remote_code.
    module.__class__ = Transformer
    return SentenceTransformer(modules=[module, Normalize()], device=str(model.connector.added_tokens.device))


def load_checkpoint(path: str, **kwargs: Any) -> SentenceTransformer:
    """Loads a checkpoint; see `lusifer.load`.

    Raises:
        LusiferError: If there is no readable LUSIFER checkpoint at ``path``.
    """
    path = resolve_model(path)
    folder = Path(path)
    looks_local = folder.is_dir() or path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not (folder / "modules.json").is_file():
        raise LusiferError(f"no checkpoint at {path!r}: it has no modules.json (train one, or check the path)")
    try:
        return FastSentenceTransformer(path, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise LusiferError(f"cannot read the checkpoint {path!r}: {reason}") from error


def lusifer_model(model: SentenceTransformer) -> LusiferModel:
    """The LusiferModel inside a loaded checkpoint.

    Raises:
        LusiferError: If it is another kind of model.
    """
    inner = getattr(model[0], "auto_model", None)
    if not isinstance(inner, LusiferModel):
        raise LusiferError(f"this is a {type(inner).__name__} model, not a LUSIFER checkpoint")
    return inner


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


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder to write a checkpoint into, which takes the place of ``folder`` once it is complete.

    Raises:
        LusiferError: If the disk is full or not writable; nothing half-written stays.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as staging:
            new, old = Path(staging) / "new", Path(staging) / "old"
            yield new
            try:
                if folder.exists():
                    os.replace(folder, old)
                os.replace(new, folder)
            except BaseException:
                if old.exists():
                    os.rename(old, folder)
                raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise LusiferError(f"cannot write the checkpoint {str(folder)!r}: {reason}") from error


def save_atomically(model: SentenceTransformer, folder: Path, **tokenizers: PreTrainedTokenizerBase) -> None:
    """Saves a model so that the folder is either complete or not there.

    Args:
        model: The model.
        folder: Where to; an older checkpoint there is replaced.
        **tokenizers: Further tokenizers, saved in a sub-folder of the keyword's name.

    Raises:
        LusiferError: If the disk is full or not writable; nothing half-written stays.
    """
    with replacing(folder) as new:
        model.save_pretrained(str(new), create_model_card=False)
        for name, tokenizer in tokenizers.items():
            tokenizer.save_pretrained(new / name)
