"""Configuration of an adapted encoder: a multilingual encoder that answers in another embedder's vector space."""

from __future__ import annotations

from importlib import import_module
from typing import Any, ClassVar

from transformers import AutoConfig, PretrainedConfig

from lusifer.errors import LusiferError
from lusifer.model.configuration import ADAPTED_TYPE


class AdaptedConfig(PretrainedConfig):
    """Describes encoder -> means of some layers' states -> linear map, and an MLP beside it -> embedding.

    Args:
        encoder_config: The encoder's own configuration (or its dict).
        layers: Layers whose mean states the head reads, side by side; 0 are the token embeddings.
        dimension: Width of the embedding, that of the teacher.
        mlp_dim: Hidden width of the MLP beside the linear map; 0 means no MLP.
        max_seq_length: Longest input in tokens, special tokens included.
        provenance: Free-form facts: teacher, texts, steps.

    Raises:
        LusiferError: If a layer is not in the encoder.
    """

    model_type = ADAPTED_TYPE
    sub_configs: ClassVar[dict[str, Any]] = {"encoder_config": AutoConfig}

    encoder_config: Any = None
    layers: list[int] | None = None
    dimension: int = 384
    mlp_dim: int = 0
    max_seq_length: int = 512
    provenance: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.encoder_config, dict):
            self.encoder_config = AutoConfig.for_model(**self.encoder_config)
        if self.encoder_config is not None:
            self.encoder_config.name_or_path = (
                ""  # A checkpoint holds all weights: where they lay is nobody's business.
            )
        depth = getattr(self.encoder_config, "num_hidden_layers", None)
        self.layers, self.provenance = list(self.layers or ([] if depth is None else [depth])), self.provenance or {}
        if depth is not None and not all(0 <= layer <= depth for layer in self.layers):
            raise LusiferError(f"layers {self.layers} are not all in an encoder of {depth} layers")
        super().__post_init__(**kwargs)
        # Whoever makes a configuration asks for the model next: AutoModel finds its class here.
        import_module("lusifer.adapt.modeling")

    @property
    def hidden_size(self) -> int:
        """Width of the embedding: what Sentence Transformers reads as the embedding dimension."""
        return self.dimension


AutoConfig.register(ADAPTED_TYPE, AdaptedConfig, exist_ok=True)
