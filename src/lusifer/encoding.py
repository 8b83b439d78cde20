"""From checkpoint to embeddings: the Sentence Transformers view of a model, and encoding of whole files."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Transformer
from transformers import PreTrainedTokenizerBase

from lusifer.errors import LusiferError
from lusifer.modeling import LusiferModel

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
    folder = Path(path)
    looks_local = folder.is_dir() or path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not (folder / "modules.json").is_file():
        raise LusiferError(f"no checkpoint at {path!r}: it has no modules.json (train one, or check the path)")
    try:
        return SentenceTransformer(path, **kwargs)
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


def save_atomically(model: SentenceTransformer, folder: Path, **tokenizers: PreTrainedTokenizerBase) -> None:
    """Saves a model so that the folder is either complete or not there.

    Args:
        model: The model.
        folder: Where to; an older checkpoint there is replaced.
        **tokenizers: Further tokenizers, saved in a sub-folder of the keyword's name.

    Raises:
        LusiferError: If the disk is full or not writable; nothing half-written stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as staging:
        new = Path(staging) / "new"
        try:
            model.save_pretrained(str(new), create_model_card=False)
            for name, tokenizer in tokenizers.items():
                tokenizer.save_pretrained(new / name)
        except OSError as error:
            raise LusiferError(f"cannot write the checkpoint {str(folder)!r}: {error.strerror or error}") from error
        if folder.exists():
            os.replace(folder, Path(staging) / "old")
        os.replace(new, folder)
