"""backbone_alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from torch import Tensor, nn
from torch.nn.functional import normalize

from lusifer.errors import LusiferError
from lusifer.model.backbones import load_config, load_encoder, load_tokenizer
from lusifer.model.published_adapters import fold_in
from lusifer.model.safe_files import SAFE, check_files
from lusifer.starter.fetch import resolve_backbone


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
    """A decoder LLM as it comes, its states mean pooled: the baseline that has learned nothing.

    Args:
        name: Hub id, local folder or starter name.
        layers: Use only the first layers; all when None.
        dtype: Data type of the weights, as transformers names it.
        max_seq_length: Tokens read of a text.
        causal: Direction of the attention; both ways when False.
        revision: Hub revision.
        device: Torch device; the best there is when None.
        adapters: LoRA adapters of PEFT to fold into it, in this order.

    Raises:
        LusiferError: If it cannot be loaded, or is no decoder LLM.
    """
    config = load_config("llm", name, revision=revision)
    check_files(f"the llm {name!r}", resolve_backbone(name), **({"revision": revision} if revision else {}))
    try:
        module = Transformer(
            resolve_backbone(name),
            config_kwargs={"num_hidden_layers": layers or config.num_hidden_layers},
            model_kwargs={"dtype": dtype, **SAFE, **({"revision": revision} if revision else {})},
            max_seq_length=max_seq_length,
        )
    except (OSError, ValueError) as error:
        raise LusiferError(f"cannot load the llm {name!r}: {str(error).splitlines()[0]}") from error
    for adapter in adapters:
        fold_in(module.auto_model, adapter, depth=config.num_hidden_layers)
    # Not in config_kwargs, which drop what the configuration does not have already.
    module.auto_model.config.is_causal = causal
    if module.tokenizer.pad_token is None:
        module.tokenizer.pad_token = module.tokenizer.eos_token
    modules = [module, Pooling(module.get_embedding_dimension()), Normalize()]
    return SentenceTransformer(modules=modules, device=device)


class EncoderGuide(nn.Module):
    """The multilingual encoder alone as a guide: the mean of its states, joined with its own embedding if it has one.

    Args:
        encoder: An encoder of transformers.
        tokenizer: Its tokenizer.
        max_seq_length: Tokens of a text it reads.
    """

    def __init__(self, encoder: nn.Module, tokenizer: Any, max_seq_length: int) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.max_seq_length = max_seq_length

    @classmethod
    def from_name(cls, name: str, *, max_seq_length: int, revision: str | None = None) -> EncoderGuide:
        """Loads hub id, local folder or starter name.

        Raises:
            LusiferError: If it cannot be loaded.
        """
        encoder = load_encoder(name, load_config("encoder", name, revision=revision), revision=revision)
        return cls(encoder, load_tokenizer("encoder", name, revision=revision), max_seq_length)

    def preprocess(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask``, (texts, seq)."""
        found = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_seq_length, return_tensors="pt"
        )
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Embeds texts.

        Args:
            features: ``input_ids`` and ``attention_mask``, (batch, seq).

        Returns:
            ``sentence_embedding`` (batch, dim) float32; each of its one or two parts has unit length.
        """
        mask = features["attention_mask"]
        with torch.autocast(mask.device.type, enabled=False):
            output = self.encoder(input_ids=features["input_ids"], attention_mask=mask)
        weights = mask.unsqueeze(-1).float()
        mean = (output.last_hidden_state.float() * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
        own = getattr(output, "pooler_output", None)
        # A pooler that next-sentence prediction left behind, or none at all, is no sentence embedding.
        parts = [mean] if own is None or not getattr(self.encoder, "embeds_sentences", False) else [mean, own.float()]
        return {"sentence_embedding": torch.cat([normalize(part, dim=-1) for part in parts], dim=-1)}


Embed = Callable[[Sequence[str]], Tensor]


def encoder_alone(name: str, *, device: str = "cpu") -> tuple[Embed, int | None]:
    """The multilingual encoder by itself: its own sentence embedding if it has one, else the mean of its states.

    Args:
        name: Hub id, local folder or starter name.
        device: Torch device.

    Returns:
        From texts to (n, dim), and how many tokens it reads of a text, if there is a limit.

    Raises:
        LusiferError: If it cannot be loaded.
    """
    from lusifer.model.backbones import load_config, load_encoder, load_tokenizer

    config: Any = load_config("encoder", name)
    encoder = load_encoder(name, config).eval().to(torch.device(device))
    tokenizer = load_tokenizer("encoder", name)
    limits = [tokenizer.model_max_length]
    if (positions := getattr(config, "max_position_embeddings", None)) is not None:
        # RoBERTa and its kin count positions from behind the padding index.
        embeddings: Any = getattr(encoder, "embeddings", None)
        shifted = hasattr(embeddings, "create_position_ids_from_input_ids")
        limits.append(positions - (embeddings.padding_idx + 1 if shifted else 0))
    limit = min(limits) if min(limits) < 1_000_000 else None

    @torch.inference_mode()
    def embed(texts: Sequence[str]) -> Tensor:
        cut: dict[str, Any] = {} if limit is None else {"truncation": True, "max_length": limit}
        batch = tokenizer(list(texts), padding=True, return_tensors="pt", **cut).to(device)
        mask = batch["attention_mask"]
        output = encoder(input_ids=batch["input_ids"], attention_mask=mask)
        own = getattr(output, "pooler_output", None)
        if own is not None:
            return own
        weights = mask.unsqueeze(-1).to(output.last_hidden_state.dtype)
        return (output.last_hidden_state * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)

    return embed, limit
