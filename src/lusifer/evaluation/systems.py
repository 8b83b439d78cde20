"""What can be scored, under one face: our models, others, an encoder or an LLM alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from lusifer.data.everyday_set import load_everyday
from lusifer.errors import LusiferError, first_line
from lusifer.evaluation.diagnosis import pieces
from lusifer.evaluation.everyday import language_bias
from lusifer.loading import load_for_inference, resolve
from lusifer.model import fingerprint
from lusifer.model.backbone_alone import EncoderAlone, SentenceEncoder, is_sentence_model, mean_pooled_llm
from lusifer.model.backbones import load_tokenizer
from lusifer.model.sentence_transformer import lusifer_model

ALONE = ("encoder:", "llm:", "llm-causal:")  # In front of a backbone's name: the backbone by itself.


@dataclass(frozen=True)
class Embedder:
    """A model as far as an evaluation needs it.

    Attributes:
        embed: From texts, prompts included, to (n, dim) float32 numpy.
        max_seq_length: Tokens it reads of a text, where the model says it.
        tokenizers: By what they are of: ``encoder``, ``llm`` or ``model``.
        prompts: The model's own, by name, as Sentence Transformers has them.
        default_prompt_name: Name of the prompt of a text whose role has none.
        similarity: ``cosine``, ``dot``, ...; mteb's default when None.
        native: mteb's own object, for models that do more than embed texts behind a prompt.
    """

    embed: Callable[[list[str]], Any]
    max_seq_length: int | None = None
    tokenizers: dict[str, Any] = field(default_factory=dict)
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    similarity: str | None = None
    device: str | None = None
    dtype: str | None = None
    native: Any = None


def load_embedder(model: str, *, device: str | None = None, batch_size: int = 32) -> Embedder:
    """Loads whatever can be scored.

    Args:
        model: A Sentence Transformers folder or hub id, ``starter``, ``encoder:NAME`` for a multilingual encoder alone
            (its own pooling and prompts where it is a Sentence Transformers model, else the mean of its states),
            ``llm:NAME`` for an LLM alone with attention in both directions, ``llm-causal:NAME`` for one as it is, or
            ``mteb:NAME`` for a model mteb has a loader for.
        device: Torch device; the best there is when None.
        batch_size: Texts per forward pass.

    Raises:
        LusiferError: If it cannot be loaded.
    """
    try:
        torch.device(device or "cpu")
    except RuntimeError as error:
        raise LusiferError(f"there is no device {device!r}: {first_line(error)}") from None
    if model.startswith("mteb:"):
        return _from_mteb(model.removeprefix("mteb:"), device)
    kind, _, name = model.partition(":")
    if kind == "encoder" and not is_sentence_model(name):
        return _encoder(name, device, batch_size)
    if kind == "encoder":
        loaded = SentenceEncoder.from_name(name, device=device).model
        tokenizers = {"encoder": loaded.tokenizer}
    elif kind in ("llm", "llm-causal"):
        loaded = mean_pooled_llm(name, causal=kind == "llm-causal", device=device)
        tokenizers = {"llm": loaded.tokenizer}
    else:
        loaded = load_for_inference(model, device=device)
        tokenizers = _tokenizers(loaded)
    limit: Any = loaded.get_max_seq_length()
    options = {"batch_size": batch_size, "show_progress_bar": False, "convert_to_numpy": True}
    weight = next(loaded.parameters(), None)
    return Embedder(
        # An empty prompt, or the model would add its default one to ours.
        partial(loaded.encode, prompt="", **options),
        limit,
        tokenizers,
        prompts=dict(loaded.prompts or {}),
        default_prompt_name=loaded.default_prompt_name,
        similarity=str(getattr(loaded.similarity_fn_name, "value", loaded.similarity_fn_name or "cosine")),
        device=str(loaded.device),
        dtype=None if weight is None else str(weight.dtype).removeprefix("torch."),
    )


def _encoder(name: str, device: str | None, batch_size: int) -> Embedder:
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    alone = EncoderAlone.from_name(name, device=where)

    def embed(texts: list[str]) -> Any:
        order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
        parts = [
            alone.embed([texts[i] for i in order[begin : begin + batch_size]]).float().cpu().numpy()
            for begin in range(0, len(order), batch_size)
        ]
        return np.concatenate(parts)[np.argsort(order)]

    return Embedder(
        embed, alone.max_seq_length, {"encoder": load_tokenizer("encoder", name)}, device=where, dtype="float32"
    )


def _from_mteb(name: str, device: str | None) -> Embedder:
    import mteb

    try:
        native: Any = mteb.get_model(name, **({"device": device} if device else {}))
    except Exception as error:  # Loaders of all kinds, with errors of all kinds.
        raise LusiferError(f"mteb cannot load {name!r}: {first_line(error)}") from error
    sentences = mteb.get_task("STSBenchmark").metadata

    def embed(texts: list[str]) -> Any:
        batches = [{"text": texts[begin : begin + 32]} for begin in range(0, len(texts), 32)]
        return native.encode(batches, task_metadata=sentences, hf_split="test", hf_subset="default", prompt_type=None)

    meta = native.mteb_model_meta
    return Embedder(embed, getattr(meta, "max_tokens", None), native=native)


def _tokenizers(model: Any) -> dict[str, Any]:
    try:
        config = lusifer_model(model).config
    except LusiferError:
        return {"model": model.tokenizer}
    llm = llm_tokenizer(config.llm)
    return {"encoder": model.tokenizer, **({} if llm is None else {"llm": llm})}


def llm_tokenizer(name: str) -> Any:
    """An LLM's tokenizer; None where it cannot be had: a standalone checkpoint may live where its LLM is not."""
    try:
        return load_tokenizer("llm", name)
    except LusiferError:
        return None


def language_profile(embed: Callable[[list[str]], Any], tokenizers: dict[str, Any], prompt: str = "") -> dict[str, Any]:
    """What a model does with languages at large, from the bundled parallel sentences.

    Args:
        embed: From texts to (n, dim) float32.
        tokenizers: By what they are of.
        prompt: Put before every sentence.

    Returns:
        ``bias`` as `lusifer.evaluation.everyday.language_bias`; ``tokens`` by tokenizer and language, a mean.
    """
    sentences = load_everyday().sentences
    vectors = np.asarray(embed([prompt + text for texts in sentences.values() for text in texts]), dtype=np.float32)
    parts = torch.from_numpy(vectors).chunk(len(sentences))
    return {
        "bias": language_bias(dict(zip(sentences, parts, strict=True))),
        "tokens": {
            part: {code: round(pieces(tokenizer, texts)[0], 2) for code, texts in sentences.items()}
            for part, tokenizer in tokenizers.items()
        },
    }


def model_hash(model: str) -> str:
    """Hash of a model's files, or of its name and commit where it is on the hub; 16 hex digits."""
    alone = next((prefix for prefix in ALONE if model.startswith(prefix)), "")
    return fingerprint.model_hash(model.removeprefix(alone) if alone else resolve(model), alone)
