"""The Sentence Transformers view of a model, and its folder on disk: whole or not there."""

from __future__ import annotations

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

from lusifer.errors import LusiferError
from lusifer.model.card import CARD, make_card
from lusifer.model.configuration import LusiferConfig
from lusifer.model.modeling import LusiferModel

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
        config = getattr(getattr(model[0], "auto_model", None), "config", None)
        if isinstance(config, LusiferConfig):
            (new / CARD).write_text(make_card(config.to_dict()), encoding="utf-8")
        for name, tokenizer in tokenizers.items():
            tokenizer.save_pretrained(new / name)


def lusifer_model(model: SentenceTransformer) -> LusiferModel:
    """The LusiferModel inside a loaded checkpoint.

    Raises:
        LusiferError: If it is another kind of model.
    """
    inner = getattr(model[0], "auto_model", None)
    if not isinstance(inner, LusiferModel):
        raise LusiferError(f"this is a {type(inner).__name__} model, not a LUSIFER checkpoint")
    return inner
