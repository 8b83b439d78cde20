"""Configuration of a LUSIFER model: two backbones, the connector between them, pooling and head."""

from __future__ import annotations

from importlib import import_module
from typing import Any, ClassVar, Literal, get_args

from transformers import AutoConfig, PretrainedConfig

from lusifer.errors import LusiferError
from lusifer.storage import without_paths

Pooling = Literal["mean", "last_token", "weighted_mean"]
_MOST_LAYERS = 1000  # Building more takes longer than anybody waits, before weights are looked at.
POOLINGS: tuple[str, ...] = get_args(Pooling)
ADAPTED_TYPE = "lusifer-adapted"  # ``model_type`` of a model that ``lusifer adapt`` saved.
ADAPTED = "adapted.json"  # In its folder: whose vector space it answers in.


class LusiferConfig(PretrainedConfig):
    """Describes encoder -> connector -> decoder LLM -> pooling -> head (LUSIFER, arXiv 2501.00874, section 3).

    Where the encoder is itself a model that ``lusifer adapt`` saved, the embedding is the encoder's own plus what a
    linear head makes of the LLM's; nothing at the start.

    A checkpoint normally stores only what was trained and names both backbones; with ``standalone=True`` it holds every
    weight and the names are provenance only.

    Args:
        encoder: Hub id, local folder or starter name of the multilingual encoder.
        llm: Hub id, local folder or starter name of the decoder LLM.
        encoder_revision: Hub revision of the encoder.
        llm_revision: Hub revision of the LLM.
        encoder_fingerprint: Fingerprint of the encoder's weights, which loading checks; None where it is not known.
        llm_fingerprint: The same of the LLM.
        llm_base_adapters: LoRA adapters of PEFT that belong to the LLM as published, merged while it loads, in this
            order: folders or hub ids; ``ID@REVISION`` pins.
        encoder_config: The encoder's own configuration (or its dict).
        llm_config: The LLM's own; with fewer ``num_hidden_layers`` than published the first layers are used.
        connector_dim: Width of the connector's hidden layer; the LLM's width when None.
        connector_residual: Adds a linear map beside the two layers, which stage 0 fills in; called
            ``connector_shortcut`` in older config.json files.
        num_added_tokens: Trainable tokens appended after the last soft token (the paper uses 1).
        use_bos: Puts the LLM's BOS embedding before the soft tokens, if the LLM has one.
        pooling: ``mean``, ``last_token`` or ``weighted_mean`` over soft and added tokens; BOS is never pooled.
        head_dim: Width of the embedding after an MLP head; None means no head.
        max_seq_length: Longest input in encoder tokens, special tokens included.
        encoder_adapter: PEFT LoRA configuration of the encoder as a dict; None means no adapter.
        llm_adapter: The same for the LLM.
        encoder_stored: Whether the encoder's weights are in the checkpoint (they were trained in full).
        standalone: Whether all weights are in the checkpoint, adapters merged.
        provenance: Free-form facts about how the weights came to be (stages, data, languages).

    Raises:
        LusiferError: If a value is outside its range.
    """

    model_type = "lusifer"
    sub_configs: ClassVar[dict[str, Any]] = {"encoder_config": AutoConfig, "llm_config": AutoConfig}

    encoder: str | None = None
    llm: str | None = None
    encoder_revision: str | None = None
    llm_revision: str | None = None
    encoder_fingerprint: str | None = None
    llm_fingerprint: str | None = None
    llm_base_adapters: list[str] | None = None
    encoder_config: Any = None
    llm_config: Any = None
    connector_dim: int | None = None
    connector_residual: bool = True
    num_added_tokens: int = 1
    use_bos: bool = True
    pooling: Pooling = "mean"
    head_dim: int | None = None
    max_seq_length: int = 512
    encoder_adapter: dict[str, Any] | None = None
    llm_adapter: dict[str, Any] | None = None
    encoder_stored: bool = False
    standalone: bool = False
    provenance: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.pooling not in POOLINGS:
            raise LusiferError(f"pooling must be one of {', '.join(POOLINGS)}, not {self.pooling!r}")
        for name, least in (("connector_dim", 1), ("head_dim", 1), ("num_added_tokens", 0), ("max_seq_length", 4)):
            if (value := getattr(self, name)) is not None and value < least:
                raise LusiferError(f"{name} must be at least {least}, not {value}")
        self.llm_base_adapters, self.provenance = list(self.llm_base_adapters or []), self.provenance or {}
        self.connector_residual = kwargs.pop("connector_shortcut", self.connector_residual)
        for part in ("encoder", "llm"):
            config = getattr(self, f"{part}_config")
            if isinstance(config, dict):
                config = AutoConfig.for_model(**config)
            layers = getattr(config, "num_hidden_layers", 0)
            if not isinstance(layers, int) or layers > _MOST_LAYERS:
                raise LusiferError(f"{part}_config.num_hidden_layers cannot be {layers!r}")
            if config is not None:
                # A sub-configuration says no more about where its backbone lay than the configuration does.
                config.name_or_path = getattr(self, part) or ""
            setattr(self, f"{part}_config", config)
        if self.adapted and self.head_dim is not None:
            raise LusiferError(
                "head_dim does not apply to an adapted encoder: its embedding has the teacher's dimensions"
            )
        super().__post_init__(**kwargs)
        # Whoever makes a configuration asks for the model next: AutoModel finds its class here.
        import_module("lusifer.model.modeling")

    def make_standalone(self) -> None:
        """Says that all weights are in the checkpoint; from here on names only tell where they came from."""
        self.encoder_adapter = self.llm_adapter = self.encoder_fingerprint = self.llm_fingerprint = None
        self.standalone = True
        self.encoder, self.llm = without_paths(self.encoder), without_paths(self.llm)
        self.encoder_config.name_or_path, self.llm_config.name_or_path = self.encoder or "", self.llm or ""
        self.llm_base_adapters = without_paths(self.llm_base_adapters)

    @property
    def adapted(self) -> bool:
        """Whether the encoder is a model of ``lusifer adapt``, with an embedding of its own."""
        return getattr(self.encoder_config, "model_type", None) == ADAPTED_TYPE

    @property
    def token_config(self) -> Any:
        """Configuration of the encoder whose token states the connector reads: the one inside an adapted encoder."""
        return self.encoder_config.encoder_config if self.adapted else self.encoder_config

    @property
    def hidden_size(self) -> int:
        """Width of the embedding: what Sentence Transformers reads as the embedding dimension."""
        if self.adapted:
            return int(self.encoder_config.dimension)
        if self.head_dim is not None:
            return self.head_dim
        return self.llm_config.hidden_size if self.llm_config is not None else 0


AutoConfig.register("lusifer", LusiferConfig, exist_ok=True)
