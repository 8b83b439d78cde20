"""One backbone by itself: the baselines that a LUSIFER model is compared with, and the guide of stage 2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from torch import Tensor, nn
from torch.nn.functional import normalize

from lusifer.errors import LusiferError
from lusifer.hooks.huggingface_hub import why_not_loaded
from lusifer.hooks.sentence_transformers import no_pickled_modules
from lusifer.hooks.transformers import cached_or_none, no_panics
from lusifer.model.backbone_pair import position_table
from lusifer.model.backbones import load_config, load_encoder, load_tokenizer
from lusifer.model.direction.families import check_family
from lusifer.model.direction.measured import check_alone
from lusifer.model.pooling import mean_pool
from lusifer.model.published_adapters import merge_in
from lusifer.starter.names import resolve_backbone
from lusifer.trust import SAFE, check_files, check_modules

Embed = Callable[[Sequence[str]], Tensor]
_NO_LIMIT = 1_000_000  # Tokenizers without a limit have one of 1e30.


def mean_pooled_llm(
    name: str,
    *,
    layers: int | None = None,
    dtype: str = "auto",
    max_seq_length: int = 512,
    causal: bool = False,
    revision: str | None = None,
    device: str | None = None,
    adapters: Sequence[str] = (),
) -> SentenceTransformer:
    """A decoder LLM as it comes, its states mean pooled: the untrained baseline.

    Args:
        name: Hub id, local folder or starter name.
        layers: Use only the first layers; all when None.
        dtype: Data type of the weights, as transformers names it.
        max_seq_length: Tokens read of a text.
        causal: Direction of the attention; both ways when False.
        revision: Hub revision.
        device: Torch device; the best there is when None.
        adapters: LoRA adapters of PEFT to merge into it, in this order.

    Raises:
        LusiferError: If it cannot be loaded, is no decoder LLM, or does not read in that direction by itself.
    """
    config = load_config("llm", name, revision=revision)
    if not causal:
        check_family(name, config)
    tokenizer = load_tokenizer("llm", name, revision=revision, config=config)
    check_files(f"the llm {name!r}", resolve_backbone(name), **({"revision": revision} if revision else {}))
    try:
        module = Transformer(
            resolve_backbone(name),
            config_kwargs={"num_hidden_layers": layers or config.num_hidden_layers},
            model_kwargs={"dtype": dtype, **SAFE, **({"revision": revision} if revision else {})},
            max_seq_length=max_seq_length,
        )
    except (OSError, ValueError) as error:
        raise LusiferError(f"cannot load the llm {name!r}: {why_not_loaded(name, error)}") from error
    for adapter in adapters:
        merge_in(module.auto_model, adapter, depth=config.num_hidden_layers)
    # Not in config_kwargs, which drop what the configuration does not have already.
    module.auto_model.config.is_causal = causal
    module.tokenizer.pad_token = tokenizer.pad_token
    modules = [module, Pooling(module.get_embedding_dimension()), Normalize()]
    model = SentenceTransformer(modules=modules, device=device)
    check_alone(name, module.auto_model.eval(), is_causal=causal)
    return model


class EncoderAlone(nn.Module):
    """A multilingual encoder by itself: the mean of its states.

    BERT's pooler, left behind by next-sentence prediction, is no sentence embedding.

    Args:
        encoder: An encoder of transformers.
        tokenizer: Its tokenizer.
        max_seq_length: Tokens of a text it reads; all when None.
    """

    def __init__(self, encoder: nn.Module, tokenizer: Any, max_seq_length: int | None) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.max_seq_length = max_seq_length

    @classmethod
    def from_name(
        cls,
        name: str,
        *,
        max_seq_length: int | None = None,
        revision: str | None = None,
        device: str = "cpu",
        dtype: str = "auto",
    ) -> EncoderAlone:
        """Loads an encoder with its tokenizer.

        Args:
            name: Hub id, local folder or starter name.
            max_seq_length: Tokens of a text it reads; as many as tokenizer and positions allow when None.
            revision: Hub revision.
            device: Torch device.
            dtype: Data type of the weights, as transformers names it.

        Raises:
            LusiferError: If it cannot be loaded.
        """
        config = load_config("encoder", name, revision=revision)
        tokenizer = load_tokenizer("encoder", name, revision=revision, config=config)
        encoder = load_encoder(name, config, revision=revision, dtype=dtype).to(torch.device(device))
        table = position_table(encoder)
        longest = min(max_seq_length or _NO_LIMIT, tokenizer.model_max_length, table.window if table else _NO_LIMIT)
        return cls(encoder, tokenizer, longest if longest < _NO_LIMIT else None)

    def preprocess(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` of texts, (texts, seq) int64."""
        limit = {"truncation": self.max_seq_length is not None, "max_length": self.max_seq_length}
        batch = self.tokenizer(list(texts), padding=True, return_tensors="pt", **limit)
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Embeds a batch.

        Args:
            features: ``input_ids`` and ``attention_mask``, (batch, seq).

        Returns:
            ``sentence_embedding`` (batch, dim) float32, unit vectors.
        """
        mask = features["attention_mask"]
        with torch.autocast(mask.device.type, enabled=False):
            output = self.encoder(input_ids=features["input_ids"], attention_mask=mask)
        return {"sentence_embedding": normalize(mean_pool(output.last_hidden_state, mask), dim=-1)}

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embeds texts: (n, dim) float32 unit vectors on the encoder's device."""
        device = next(self.encoder.parameters()).device
        features = {name: tensor.to(device) for name, tensor in self.preprocess(texts).items()}
        return self(features)["sentence_embedding"]


class SentenceEncoder(nn.Module):
    """A multilingual encoder that is a Sentence Transformers model, by itself: its own pooling and default prompt.

    Args:
        model: The model.
        max_seq_length: Tokens of a text it reads, prompt included; as many as it does by itself when None.
    """

    def __init__(self, model: SentenceTransformer, max_seq_length: int | None = None) -> None:
        super().__init__()
        self.model: Any = model.requires_grad_(False).eval()
        self.prompt = (model.prompts or {}).get(model.default_prompt_name or "")
        if max_seq_length is not None:
            self.model.max_seq_length = min(max_seq_length, model.get_max_seq_length() or max_seq_length)

    @classmethod
    def from_name(
        cls,
        name: str,
        *,
        max_seq_length: int | None = None,
        revision: str | None = None,
        device: str | None = "cpu",
        dtype: str = "auto",
    ) -> SentenceEncoder:
        """Loads it; arguments and errors as for `encoder_alone`."""
        config = load_config("encoder", name, revision=revision)
        load_tokenizer("encoder", name, revision=revision, config=config)  # Refuses one that does not fit.
        path = resolve_backbone(name)
        check_modules(f"the encoder {name!r}", path, **({"revision": revision} if revision else {}))
        try:
            with no_pickled_modules(f"the encoder {name!r}"), no_panics(f"the encoder {name!r}"):
                model = SentenceTransformer(
                    path, revision=revision, device=device, model_kwargs={"dtype": dtype, **SAFE}
                )
        except LusiferError:
            raise
        except Exception as error:  # Whatever a library says of files that it cannot make sense of.
            raise LusiferError(f"cannot load the encoder {name!r}: {why_not_loaded(name, error)}") from error
        return cls(model, max_seq_length)

    @property
    def max_seq_length(self) -> int | None:
        """Tokens of a text it reads; None where the model does not say."""
        limit: int | None = self.model.get_max_seq_length()
        return limit

    def preprocess(self, texts: Sequence[str]) -> dict[str, Any]:
        """The model's features of texts behind its default prompt, among them ``input_ids`` (texts, seq) int64."""
        features: dict[str, Any] = self.model.preprocess(list(texts), prompt=self.prompt)
        return features

    def forward(self, features: dict[str, Any]) -> dict[str, Tensor]:
        """Embeds a batch.

        Args:
            features: As `preprocess` makes them.

        Returns:
            ``sentence_embedding`` (batch, dim) float32, unit vectors.
        """
        with torch.autocast(self.model.device.type, enabled=False):
            output = self.model(dict(features))
        return {"sentence_embedding": normalize(output["sentence_embedding"].float(), dim=-1)}

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embeds texts: (n, dim) float32 unit vectors on the model's device."""
        options: Any = {"convert_to_tensor": True, "normalize_embeddings": True, "show_progress_bar": False}
        vectors: Tensor = self.model.encode(list(texts), **options)
        return vectors.float()


def is_sentence_model(name: str, *, revision: str | None = None) -> bool:
    """Whether a backbone, by hub id, folder or starter name, is itself a Sentence Transformers model.

    Raises:
        LusiferError: If it is a starter that is not fetched.
    """
    try:
        found = cached_or_none(resolve_backbone(name), "modules.json", **({"revision": revision} if revision else {}))
    except (OSError, ValueError):  # Whoever loads it says what is wrong.
        return False
    return found is not None


def encoder_alone(
    name: str,
    *,
    max_seq_length: int | None = None,
    revision: str | None = None,
    device: str = "cpu",
    dtype: str = "auto",
) -> EncoderAlone | SentenceEncoder:
    """A multilingual encoder by itself, as its makers meant it: with its own pooling and prompt if it has them.

    Args:
        name: Hub id, local folder or starter name.
        max_seq_length: Tokens of a text it reads; as many as it can when None.
        revision: Hub revision.
        device: Torch device.
        dtype: Data type of the weights, as transformers names it.

    Raises:
        LusiferError: If it cannot be loaded.
    """
    kind = SentenceEncoder if is_sentence_model(name, revision=revision) else EncoderAlone
    return kind.from_name(name, max_seq_length=max_seq_length, revision=revision, device=device, dtype=dtype)
