"""What we use of Sentence Transformers that is not public."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Module
from sentence_transformers.sentence_transformer.modules import StaticEmbedding, Transformer
from tokenizers import Tokenizer, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from lusifer.errors import LusiferError

_MODALITIES: Any = {"text": {"method": "forward", "method_output_name": "pooler_output"}}


_OPTIONS = {"prompt", "batch_size", "show_progress_bar", "output_value", "save_to_cpu", "normalize_embeddings"}
# ``task`` is what encode_query and encode_document say to a router of modules, which our models have none of.
_OPTIONS |= {"truncate_dim", "device", "task"}


class _InMemory(Transformer):
    """A Transformer module around a model in memory, where the base class only loads from disk."""

    def __init__(self, folder: str, model: nn.Module) -> None:
        # nn.Module refuses sub-modules before its own constructor has run.
        self.__dict__["_ready"] = model
        super().__init__(folder, modality_config=_MODALITIES, module_output_name="sentence_embedding")

    def _load_model(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__.pop("_ready")


def transformer_module(folder: str, model: nn.Module) -> Transformer:
    """The module of Sentence Transformers around a model in memory.

    Touches ``Transformer._load_model`` and the module's class, so that modules.json names the built-in one, which loads
    without ``trust_remote_code``.

    Args:
        folder: Folder with the model's configuration and tokenizer.
        model: The model; its output has ``pooler_output``, (batch, dim).
    """
    module = _InMemory(folder, model)
    module.__class__ = Transformer
    return module


_loading = threading.RLock()


@contextmanager
def no_pickled_modules(what: str) -> Iterator[None]:
    """Refuses modules (Dense, ...) whose weights are a pickle, while a model loads; one load at a time.

    Touches ``Module.load_file_path``, through which every module finds its files; no option of Sentence Transformers
    keeps them from opening ``pytorch_model.bin`` where there is no ``model.safetensors``.

    Args:
        what: The model, for the message.

    Raises:
        LusiferError: If a module asks for a pickle that is there.
    """

    def refusing(*args: Any, **kwargs: Any) -> str | None:
        path = found(*args, **kwargs)
        if path is not None and Path(path).suffix in (".bin", ".pt", ".pkl"):
            place = f"{kwargs.get('subfolder') or '.'}/{Path(path).name}".removeprefix("./")
            raise LusiferError(f"{place} of {what} is a pickle and is not opened; save the model with safetensors")
        return path

    with _loading:
        found = Module.load_file_path
        Module.load_file_path = staticmethod(refusing)
        try:
            yield
        finally:
            Module.load_file_path = staticmethod(found)


class InferenceHook(SentenceTransformer):
    """A Sentence Transformers model whose embeddings of plain texts are made by `embed_texts`.

    Touches ``SentenceTransformer._inference``, which every ``encode`` comes to with its arguments resolved, and
    ``_resolve_inference_device``.
    """

    def embed_texts(self, texts: list[str], *, batch_size: int, progress: bool) -> torch.Tensor | None:
        """Embeddings of texts, (n, dim) float32 on the CPU; None leaves them to Sentence Transformers.

        Args:
            texts: The texts, prompts included.
            batch_size: Most texts of full length in one pass.
            progress: Whether to show a bar.
        """
        raise NotImplementedError

    def _inference(self, inputs: list[Any], **options: Any) -> Any:
        plain = options["output_value"] == "sentence_embedding" and not options.keys() - _OPTIONS
        vectors = None
        if plain and inputs and all(isinstance(text, str) for text in inputs):
            self._resolve_inference_device(options["device"])
            texts = [f"{options['prompt']}{text}" for text in inputs] if options["prompt"] else inputs
            size, progress = options["batch_size"], options["show_progress_bar"]
            vectors = self.embed_texts(texts, batch_size=size, progress=progress)
        if vectors is None:
            return super()._inference(inputs, **options)
        if options["truncate_dim"] is not None:
            vectors = vectors[:, : options["truncate_dim"]]
        if options["normalize_embeddings"]:
            vectors = torch.nn.functional.normalize(vectors, dim=1)
        return vectors if options["save_to_cpu"] else vectors.to(self.device)


def static_tokenizer(model: SentenceTransformer) -> PreTrainedTokenizerFast | None:
    """A tokenizer as of transformers for a model of token vectors without a transformer, as model2vec makes; else None.

    Touches that ``StaticEmbedding`` tokenises without special tokens, by a tokenizer of the library beneath.
    """
    if not isinstance(module := model[0], StaticEmbedding):
        return None
    plain = Tokenizer.from_str(module.tokenizer.to_str())
    plain.no_truncation()
    plain.no_padding()
    fast = PreTrainedTokenizerFast(tokenizer_object=plain)
    fast.backend_tokenizer.post_processor = processors.Sequence([])
    return fast


def static_features(ids: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """What ``StaticEmbedding.forward`` takes: all ids in a row, and where each text begins.

    Args:
        ids: Token ids by text.
    """
    flat = torch.tensor([token for row in ids for token in row], dtype=torch.long)
    lengths = torch.tensor([0, *(len(row) for row in ids[:-1])], dtype=torch.long)
    return {"input_ids": flat, "offsets": lengths.cumsum(0)}
