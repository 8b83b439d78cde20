"""The Sentence Transformers view of a model, and its folder on disk: complete or not there."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lusifer.errors import LusiferError, first_line
from lusifer.hooks.sentence_transformers import transformer_module
from lusifer.hooks.transformers import cached_or_none
from lusifer.model.card import CARD, make_card
from lusifer.model.configuration import LusiferConfig
from lusifer.publishing import publish_folder
from lusifer.starter.names import resolve_backbone

if TYPE_CHECKING:
    from lusifer.model.modeling import LusiferModel

CONFIG = "config_sentence_transformers.json"  # The first file that Sentence Transformers writes into a folder.


class _Saved(nn.Module):
    """Stands for a model whose weights are written elsewhere; `forward` is read for its arguments alone."""

    def __init__(self, config: LusiferConfig) -> None:
        super().__init__()
        self.config = config
        self.save_pretrained = lambda folder, **_: config.save_pretrained(folder)

    def forward(self, input_ids: Any, attention_mask: Any = None, return_dict: Any = None) -> None: ...


def to_sentence_transformer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> SentenceTransformer:
    """Wraps a model in memory; saving the result gives a folder of built-in module classes only.

    Args:
        model: A model whose output has ``pooler_output`` and whose configuration ``max_seq_length``; not copied.
        tokenizer: The encoder's tokenizer.
    """
    return _wrap(model, tokenizer, str(model.device))


def _wrap(model: Any, tokenizer: PreTrainedTokenizerBase, device: str) -> SentenceTransformer:
    tokenizer.model_max_length = model.config.max_seq_length
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        module = transformer_module(folder, model)
    return SentenceTransformer(modules=[module, Normalize()], device=device)


def save_around(
    folder: Path,
    config: LusiferConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompts: dict[str, str] | None = None,
    default_prompt: str | None = None,
) -> None:
    """Writes all of a checkpoint but its weights: configurations, tokenizer and card.

    Args:
        folder: Where to.
        config: The model's configuration.
        tokenizer: The encoder's tokenizer.
        prompts: The model's prompts by name.
        default_prompt: Name of the prompt that ``encode`` uses unless told otherwise.
    """
    wrapped = _wrap(_Saved(config), tokenizer, "cpu")
    wrapped.prompts.update(prompts or {})
    wrapped.default_prompt_name = default_prompt
    _save(wrapped, config, folder)


def _save(model: SentenceTransformer, config: Any, folder: Path) -> None:
    if (backend := getattr(getattr(model, "tokenizer", None), "backend_tokenizer", None)) is not None:
        backend.no_truncation()  # As the last batch left it; who loads the file would take it for the model's own.
        backend.no_padding()
    if isinstance(config, LusiferConfig):  # As in a model that is loaded, whoever has trained or saved it before.
        config.__dict__.pop("use_cache", None)
        for part in (config.encoder_config, config.llm_config):
            if hasattr(part, "use_cache"):
                part.use_cache = False
    model.save_pretrained(str(folder), create_model_card=False)
    if isinstance(config, LusiferConfig):
        (folder / CARD).write_text(make_card(config.to_dict()), encoding="utf-8")


def save_atomically(model: SentenceTransformer, folder: Path, **tokenizers: PreTrainedTokenizerBase) -> None:
    """Saves a model so that the folder is either complete or not there.

    Args:
        model: The model.
        folder: Where to; an older checkpoint there is replaced.
        **tokenizers: Further tokenizers, saved in a sub-folder of the keyword's name.

    Raises:
        LusiferError: If the disk is full or not writable; nothing half-written stays.
    """
    try:
        with publish_folder(folder, "checkpoint") as new:
            _save(model, getattr(getattr(model[0], "auto_model", None), "config", None), new)
            for name, tokenizer in tokenizers.items():
                tokenizer.save_pretrained(new / name)
    except SafetensorError as error:
        raise LusiferError(f"cannot write the checkpoint {str(folder)!r}: {first_line(error)}") from error


def copy_prompts(model: SentenceTransformer, name: str, *, revision: str | None = None) -> None:
    """Gives a model the prompts that a Sentence Transformers model was saved with, and its default prompt.

    Args:
        model: The model; changed in place.
        name: Folder, hub id or starter name of the other one; one without prompts changes nothing.
        revision: Hub revision.
    """
    path = cached_or_none(resolve_backbone(name), CONFIG, revision=revision or "main")
    saved = {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    model.prompts.update(saved.get("prompts") or {})
    model.default_prompt_name = saved.get("default_prompt_name")


def lusifer_model(model: SentenceTransformer) -> LusiferModel:
    """The LusiferModel inside a loaded checkpoint.

    Raises:
        LusiferError: If it is another kind of model.
    """
    inner: Any = getattr(model[0], "auto_model", None)
    if not isinstance(getattr(inner, "config", None), LusiferConfig):
        raise LusiferError(f"this is a {type(inner).__name__} model, not a LUSIFER checkpoint")
    return inner
