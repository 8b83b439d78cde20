"""A recipe's types: every field, its default and its rules. The comment of a field is its line in the reference."""

from __future__ import annotations

from abc import abstractmethod
from itertools import product
from typing import Any, ClassVar, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class Strict(BaseModel):
    """Refuses unknown keys; a key of an earlier version is refused with its new name."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)
    renamed: ClassVar[dict[str, str]] = {}  # Earlier name of a key: its name today.

    @pydantic.model_validator(mode="before")
    @classmethod
    def _no_earlier_names(cls, values: Any) -> Any:
        for earlier, today in cls.renamed.items():
            if isinstance(values, dict) and earlier in values:
                raise ValueError(f"{earlier} is now called {today}; rename the key")
        return values


class Lora(Strict):
    """A LoRA adapter (arXiv 2106.09685); the defaults are the paper's."""

    r: PositiveInt = 16  # Rank.
    alpha: PositiveInt = 32  # Scaling: the adapter's output is multiplied by alpha / r.
    dropout: float = Field(default=0.1, ge=0.0, lt=1.0)  # Dropout on its input during training.
    target_modules: list[str] | None = None  # Names of the linear layers to adapt; all of them if omitted.

    def fields(self) -> dict[str, Any]:
        """The adapter as fields of ``peft.LoraConfig``."""
        targets = {"target_modules": self.target_modules} if self.target_modules else {}
        return {"r": self.r, "lora_alpha": self.alpha, "lora_dropout": self.dropout, **targets}


class DataRecipe(Strict):
    """One data set of a mixture; `lusifer.data.mixture` says how sets are drawn."""

    # File, folder or glob (.jsonl, .json, .csv, .tsv, .txt, also compressed, or .parquet), starter name or hub id.
    source: str = Field(min_length=1)
    subset: str | None = None  # Configuration (subset) of a hub data set.
    split: str = "train"  # Split of a hub data set.
    revision: str | None = None  # Revision (branch, tag or commit) of a hub data set.
    # lusifer's column name: the data set's own, e.g. `{query: question}`.
    columns: dict[Literal["query", "positive", "negative", "text", "cluster", "id"], str] = {}
    # What stage 1 does with a record (`reconstruct`, `complete`); in stage 2 always `contrast`.
    task: Literal["reconstruct", "complete", "contrast"] | None = None
    weight: PositiveFloat = 1.0  # Sampling weight per row: a set is drawn in proportion to weight * rows.
    cap: PositiveInt | None = None  # Use at most this many rows: a seeded sample, or the first rows of a streamed set.
    streaming: bool = False  # Read in order with bounded memory instead of through a local table.
    instruction: str | None = None  # Instruction prepended to every query, and to every source text in stage 1.
    # Instruction prepended to positives and negatives (this and the next three: stage 2 only).
    document_instruction: str | None = None
    positives: PositiveInt = 1  # Rows made from one record in a batch, each with a different positive.
    in_batch_negatives: bool = True  # Use the other rows' texts as negatives; switch off for classification-like sets.
    # Hard negatives per row; a row with fewer repeats them, a row with none is skipped.
    hard_negatives: int = Field(default=0, ge=0)
    # For `complete`: probability of swapping the two, so that the passage is the source and the query the target.
    reverse: float = Field(default=0.0, ge=0.0, le=1.0)
    start: float = Field(default=0.0, ge=0.0, lt=1.0)  # Fraction of the stage's steps after which the set is used.
    end: float = Field(default=1.0, gt=0.0, le=1.0)  # Fraction of the stage's steps after which it is no longer used.

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> DataRecipe:
        if self.streaming and self.cap is None:
            raise ValueError("a streaming set needs cap: the number of rows to read of it")
        if self.start >= self.end:
            raise ValueError(f"start ({self.start:g}) must be less than end ({self.end:g})")
        if self.reverse and self.task != "complete":
            raise ValueError("reverse is for task: complete")
        if not self.in_batch_negatives and self.hard_negatives == 0:
            raise ValueError("no negatives: set hard_negatives, or in_batch_negatives: true")
        return self


class ModelRecipe(Strict):
    """The encoder, the LLM and the connector between them."""

    renamed: ClassVar[dict[str, str]] = {"connector_shortcut": "connector_residual"}

    encoder: str  # Multilingual encoder: hub id, folder or starter name (`starter:multilingual-e5-small`).
    llm: str  # Decoder LLM: hub id, folder or starter name.
    encoder_revision: str | None = None  # Hub revision; the checkpoint records the commit it resolved to.
    llm_revision: str | None = None  # Hub revision; the checkpoint records the commit it resolved to.
    # PEFT LoRA adapters that are part of the published LLM; merged into its weights on loading.
    llm_base_adapters: list[str] = []
    llm_layers: PositiveInt | None = None  # Keep only this many of the LLM's first layers.
    # Data type in which the encoder's weights are loaded; `auto` as for a stage's `precision`.
    encoder_dtype: Dtype = "float32"
    # Data type in which the LLM's weights are loaded; `auto` as for a stage's `precision`.
    llm_dtype: Dtype = "float32"
    attn_implementation: str | None = None  # `sdpa`, `flash_attention_2` or `eager`; transformers chooses if omitted.
    connector_dim: PositiveInt | None = None  # Width of the connector's hidden layer; the LLM's hidden size if omitted.
    connector_residual: bool = True  # Add a linear map in parallel to the connector's MLP; stage 0 sets its weights.
    num_added_tokens: int = Field(default=1, ge=0)  # Trainable soft tokens appended to each text.
    use_bos: bool = True  # Start the LLM's input with its BOS token, if it has one.
    pooling: Literal["mean", "last_token", "weighted_mean"] = "mean"  # Pooling of the LLM's last hidden states.
    head_dim: PositiveInt | None = None  # Embedding dimension of an MLP head after pooling; no head if omitted.
    max_seq_length: int = Field(default=512, ge=4)  # Texts are truncated to this many encoder tokens.
    encoder_lora: Lora | None = None  # LoRA adapter of the encoder, needed by `train_encoder: lora`.
    llm_lora: Lora | None = Lora()  # LoRA adapter of the LLM, trained in stage 2.
    # Load the frozen LLM in 8 or 4 bits (needs bitsandbytes; 4 bits also need a GPU).
    quantization: Literal["8bit", "4bit"] | None = None
    prompts: dict[str, str] = {}  # Prompts `query` and `document` that the finished model prepends to texts.

    def architecture(self, *left_out: str) -> dict[str, Any]:
        """The fields that `LusiferModel.from_backbones` and `LusiferConfig` take, by their names there."""
        return self.model_dump(exclude={"encoder_lora", "llm_lora", "prompts", *left_out})


class WarmStartRecipe(Strict):
    """Stage 0: the closed-form start of the connector."""

    enabled: bool = True  # false initialises the connector at random.
    data: str | None = None  # English texts; if omitted, stage 1's first `reconstruct` set, else stage 2's first set.
    texts: PositiveInt = 3000  # Number of texts to read.
    ridge: PositiveFloat = 1000.0  # Strength of the ridge regression.
    # Exponent on the map's singular values: 1 is plain ridge regression; smaller amplifies rare directions.
    spectrum: float = Field(default=0.5, ge=0.0, le=1.0)
    scale: PositiveFloat = 1.0  # Norm of the soft tokens relative to the LLM's token embeddings.


class GradientStage(Strict):
    """Settings shared by stages 1 and 2, which train by gradient descent."""

    number: ClassVar[int]
    renamed: ClassVar[dict[str, str]] = {"encoder": "train_encoder", "connector": "train_connector"}

    enabled: bool = True  # false skips the stage.
    data: list[DataRecipe] = []  # Training data sets.
    steps: PositiveInt = 1000  # Optimizer steps.
    batch_size: PositiveInt = 32  # Rows per optimizer step, over all ranks.
    learning_rate: PositiveFloat = 2e-4  # For the adapters, and the encoder if it is trained.
    connector_learning_rate: PositiveFloat | None = None  # For connector and head; `learning_rate` if omitted.
    warmup_steps: int = Field(default=0, ge=0)  # Steps of linear learning-rate warm-up.
    warmup_share: float = Field(default=0.0, ge=0.0, lt=1.0)  # Warm-up as a fraction of `steps`; set one of the two.
    schedule: Literal["linear", "cosine"] = "linear"  # Learning-rate decay to zero after warm-up.
    weight_decay: float = Field(default=0.0, ge=0.0)  # Weight decay of AdamW.
    max_grad_norm: PositiveFloat = 1.0  # Gradient clipping norm.
    # How the encoder is trained: not at all, through its LoRA adapter, or all weights.
    train_encoder: Literal["frozen", "lora", "full"] = "frozen"
    train_connector: bool = True  # Train connector and head.
    # Truncation length in encoder tokens for this stage; the model's own limit if omitted.
    max_seq_length: PositiveInt | None = None
    max_tokens: PositiveInt = 16384  # Padded tokens per forward pass; larger batches are split.
    # Padded tokens whose activations are kept; larger batches use the gradient cache.
    graph_tokens: PositiveInt = 65536
    # Compute precision; trained weights, losses and optimizer stay float32. `auto` is resolved when the run starts.
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    # Recompute activations in the backward pass: less memory, about a third more time.
    gradient_checkpointing: bool = False
    save_steps: PositiveInt = 100  # Steps between checkpoints.
    save_total_limit: PositiveInt = 2  # Checkpoints to keep.
    # Held-out metric that selects a best checkpoint, kept in addition to the latest; needs `eval_steps`.
    best_metric: str | None = None
    # Steps between evaluations on held-out rows; no evaluation if omitted.
    eval_steps: PositiveInt | None = None
    logging_steps: PositiveInt = 10  # Steps between log entries.
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = []  # Experiment trackers that also receive the log.
    max_loss: PositiveFloat | None = None  # Stop the run if the loss exceeds this value.

    @pydantic.model_validator(mode="after")
    def _some_set_at_every_step(self) -> GradientStage:
        if self.enabled and not self.data:
            raise ValueError(f"stage {self.number} needs data: list at least one set (or enabled: false)")
        self._check_best_metric()
        if self.warmup_steps and self.warmup_share:
            raise ValueError("warmup_steps and warmup_share are alternatives: set only one")
        for moment in sorted({0.0, *(item.end for item in self.data)} - {1.0}):
            if self.data and not any(item.start <= moment < item.end for item in self.data):
                gap = f"no dataset is used after {moment:g} of the steps"
                raise ValueError(f"{gap}: correct start and end of the datasets")
        return self

    @abstractmethod
    def metrics(self) -> list[str]:
        """Names of what is measured on held-out rows."""

    def _check_best_metric(self) -> None:
        if self.best_metric is None or not self.enabled:
            return
        if self.best_metric.removeprefix("eval_") not in self.metrics():
            raise ValueError(
                f"best_metric: nothing measures {self.best_metric!r}; there are {', '.join(self.metrics())}"
            )
        if self.eval_steps is None:
            raise ValueError("best_metric needs eval_steps: how often held-out rows are measured")


class AlignRecipe(GradientStage):
    """Stage 1: from the soft tokens, the frozen LLM reconstructs the text or completes it."""

    number: ClassVar[int] = 1
    # Fraction of the LLM's input tokens masked: one number, or [at the first step, at the last].
    mask_probability: float | tuple[float, float] = 0.5
    target_max_seq_length: PositiveInt = 512  # Truncation length of targets, in LLM tokens.
    # Sentence Transformers model whose embeddings the trained encoder must keep matching.
    teacher: str | None = None
    teacher_weight: PositiveFloat = 1.0  # Weight of the teacher's loss relative to the cross-entropy.

    def metrics(self) -> list[str]:
        """Names of what is measured on held-out rows, see `lusifer.training.alignment.held_out_metrics`."""
        kinds = product(("visible", "hidden"), ("own", "other", "none"), ("accuracy", "cross_entropy"))
        return ["_".join(kind) for kind in kinds]

    @pydantic.field_validator("mask_probability", mode="before")
    @classmethod
    def _probabilities(cls, value: Any) -> Any:
        several = isinstance(value, list | tuple)
        try:
            numbers = tuple(float(number) for number in (value if several else [value]))
        except (TypeError, ValueError):
            numbers = ()
        if len(numbers) != (2 if several else 1) or not all(0.0 <= number <= 1.0 for number in numbers):
            raise ValueError(f"must be a probability or two, [at the start, at the end], not {value!r}")
        return numbers if several else numbers[0]

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> AlignRecipe:
        for number, item in enumerate(self.data):
            if item.task not in ("reconstruct", "complete"):
                raise ValueError(f"data.{number}.task must be reconstruct or complete")
            for field in ("document_instruction", "positives", "in_batch_negatives", "hard_negatives"):
                if field in item.model_fields_set:
                    raise ValueError(f"data.{number}.{field} is for stage 2; remove it")
        _check_teacher(self)
        if self.teacher and self.train_encoder == "frozen":
            raise ValueError("teacher needs train_encoder: lora or full; a frozen encoder's vectors do not change")
        return self


class ContrastRecipe(GradientStage):
    """Stage 2: contrastive finetuning with bidirectional attention."""

    number: ClassVar[int] = 2
    symmetric: bool = False  # Also contrast each positive against all queries.
    temperature: PositiveFloat = 0.05  # InfoNCE temperature.
    infonce_weight: NonNegativeFloat = 1.0  # Weight of the contrastive loss; 0 switches it off.
    # Sentence Transformers model whose embedding space is learnt: hub id, folder or starter name.
    teacher: str | None = None
    teacher_weight: PositiveFloat = 1.0  # Weight of the teacher's loss.
    # Keep only this many of the LLM's first layers from here on; stage 1 needs all of them and the LM head.
    llm_layers: PositiveInt | None = None
    # Sentence Transformers model used as guide; `encoder` means the recipe's own encoder.
    guide: str | None = None
    # Ignore a negative unless the guide scores it below the positive's score minus this margin.
    guide_margin: float | None = Field(default=None, ge=-2.0, le=2.0)
    distill: NonNegativeFloat = 0.0  # Weight of a loss that keeps similarities within the batch close to the guide's.
    distill_temperature: PositiveFloat = 0.05  # Temperature of that loss.
    # Matryoshka: prefix lengths trained as embeddings of their own, increasing.
    matryoshka_dims: list[PositiveInt] = []

    def metrics(self) -> list[str]:
        """Names of what is measured on held-out rows."""
        return ["loss", *(["teacher_cosine"] if self.teacher else [])]

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> ContrastRecipe:
        for number, item in enumerate(self.data):
            if item.task not in (None, "contrast"):
                raise ValueError(f"data.{number}.task must be contrast, or be left out")
        self.data = [item.model_copy(update={"task": "contrast"}) for item in self.data]
        for field in ("guide_margin", "distill"):
            if getattr(self, field) and not self.guide:
                raise ValueError(f"{field} needs guide: the model whose scores it is about (or guide: encoder)")
        if self.guide and self.guide_margin is None and not self.distill:
            raise ValueError("guide has no effect without guide_margin or distill; set one of them")
        _check_teacher(self)
        if not self.infonce_weight and not self.teacher and not self.distill:
            raise ValueError("infonce_weight is 0: nothing to learn from without teacher or distill")
        if self.infonce_weight and self.batch_size == 1 and any(not item.hard_negatives for item in self.data):
            raise ValueError("batch_size is 1: a row has no negatives; raise it, or set hard_negatives")
        if self.matryoshka_dims != (increasing := sorted(set(self.matryoshka_dims))):
            raise ValueError(f"matryoshka_dims must increase: {increasing}")
        return self


def _check_teacher(stage: AlignRecipe | ContrastRecipe) -> None:
    if not stage.teacher and "teacher_weight" in stage.model_fields_set:
        raise ValueError("teacher_weight needs teacher: the model whose vectors are learnt")


class ScaleRecipe(Strict):
    """Training on several processes (`torchrun`)."""

    # `ddp` replicates the model on every rank; `fsdp2` shards it, backbones included.
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    cpu_offload: bool = False  # Keep idle shards in host memory (fsdp2 only).


class Recipe(Strict):
    """One training run: model, stages 0 to 2, and the output folder."""

    output: str  # Folder of the run; it holds the stages and the final model.
    seed: int = Field(default=0, ge=0, lt=2**32)  # Random seed.
    model: ModelRecipe  # The encoder, the LLM and the connector between them.
    warm_start: WarmStartRecipe = WarmStartRecipe()  # Stage 0.
    align: AlignRecipe = AlignRecipe(enabled=False)  # Stage 1.
    contrast: ContrastRecipe = ContrastRecipe(enabled=False)  # Stage 2.
    scale: ScaleRecipe = ScaleRecipe()  # Training on several processes.

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.warm_start.enabled and self.warm_start_data() is None:
            raise ValueError("warm_start needs data: set warm_start.data or align.data (or enabled: false)")
        if self.warm_start.enabled and not self.model.connector_residual:
            raise ValueError("warm_start needs model.connector_residual: true (or enabled: false)")
        if self.scale.strategy == "fsdp2" and self.model.quantization is not None:
            raise ValueError("model.quantization: an LLM in 8 or 4 bits cannot be sharded; use scale.strategy: ddp")
        for name, stage in (("align", self.align), ("contrast", self.contrast)):
            if stage.enabled and stage.train_encoder == "lora" and self.model.encoder_lora is None:
                raise ValueError(f"{name}.train_encoder is lora, but model.encoder_lora is not set")
            adapts = name == "contrast" and self.model.llm_lora is not None
            if stage.enabled and stage.train_encoder == "frozen" and not stage.train_connector and not adapts:
                hint = f"set {name}.train_connector: true or {name}.train_encoder"
                raise ValueError(f"{name} has nothing to train: {hint}")
        if not (self.align.enabled or self.contrast.enabled or self.warm_start.enabled):
            raise ValueError("nothing to do: every stage is disabled")
        return self

    def warm_start_data(self) -> DataRecipe | None:
        """The set stage 0 reads: its own, else the first to reconstruct of stage 1, else the first of stage 2."""
        if self.warm_start.data:
            return DataRecipe(source=self.warm_start.data)
        return next((d for d in [*self.align.data, *self.contrast.data] if d.task != "complete"), None)
