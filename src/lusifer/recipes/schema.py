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
    alpha: PositiveInt = 32  # Scale: what the adapter adds counts alpha / r.
    dropout: float = Field(default=0.1, ge=0.0, lt=1.0)  # Share of its inputs dropped in training.
    target_modules: list[str] | None = None  # Names of the linear layers it covers; all that it fits when left out.

    def fields(self) -> dict[str, Any]:
        """The adapter as fields of ``peft.LoraConfig``."""
        targets = {"target_modules": self.target_modules} if self.target_modules else {}
        return {"r": self.r, "lora_alpha": self.alpha, "lora_dropout": self.dropout, **targets}


class DataRecipe(Strict):
    """One data set of a mixture; `lusifer.data.mixture` says how sets are drawn."""

    # A file, folder or glob (.jsonl, .json, .csv, .tsv, .txt, also packed, or .parquet), a starter name or a hub id.
    source: str = Field(min_length=1)
    subset: str | None = None  # Which part of a hub data set.
    split: str = "train"  # Which part of a hub data set.
    revision: str | None = None  # Which part of a hub data set.
    # Our column name -> theirs, e.g. `{query: question}`.
    columns: dict[Literal["query", "positive", "negative", "text", "cluster", "id"], str] = {}
    # What stage 1 does with a record; stage 2 always contrasts.
    task: Literal["reconstruct", "complete", "contrast"] | None = None
    weight: PositiveFloat = 1.0  # How often each record counts: a set is drawn in proportion to weight * rows.
    cap: PositiveInt | None = None  # At most this many rows: a seeded choice, or the first ones of a streamed set.
    streaming: bool = False  # Read in order with bounded memory, instead of from a local table.
    instruction: str | None = None  # Task instruction in front of every query, and of every source in stage 1.
    # The same for positives and negatives; this and the next three are for stage 2.
    document_instruction: str | None = None
    positives: PositiveInt = 1  # Rows that a record makes in a batch, each with another of its positives.
    in_batch_negatives: bool = True  # Whether other rows' texts are negatives; off for classification-like sets.
    # Negatives per row; a row with fewer repeats them, one without any is left out.
    hard_negatives: int = Field(default=0, ge=0)
    # Probability that the passage is the source and the query the target (completion).
    reverse: float = Field(default=0.0, ge=0.0, le=1.0)
    start: float = Field(default=0.0, ge=0.0, lt=1.0)  # The set is drawn between these shares of the stage's steps.
    end: float = Field(default=1.0, gt=0.0, le=1.0)  # The set is drawn between these shares of the stage's steps.

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
    """The two backbones and what joins them."""

    renamed: ClassVar[dict[str, str]] = {"connector_shortcut": "connector_residual"}

    encoder: str  # Multilingual encoder: hub id, folder or starter name (`starter:multilingual-e5-small`).
    llm: str  # Decoder LLM: the same.
    encoder_revision: str | None = None  # Hub revision; the commit it means now is kept in the checkpoint.
    llm_revision: str | None = None  # Hub revision; the commit it means now is kept in the checkpoint.
    # LoRA adapters of PEFT that belong to the LLM as published, merged into it as it loads.
    llm_base_adapters: list[str] = []
    llm_layers: PositiveInt | None = None  # Use only the LLM's first layers.
    # Data type of the backbone's weights, whatever its files hold; `auto` as for a stage's `precision`.
    encoder_dtype: Dtype = "float32"
    # Data type of the backbone's weights, whatever its files hold; `auto` as for a stage's `precision`.
    llm_dtype: Dtype = "float32"
    attn_implementation: str | None = None  # `sdpa`, `flash_attention_2`, `eager`; transformers' choice when left out.
    connector_dim: PositiveInt | None = None  # Width of the connector's hidden layer; the LLM's width when left out.
    connector_residual: bool = True  # A linear map beside the connector's two layers, which stage 0 fills in.
    num_added_tokens: int = Field(default=1, ge=0)  # Trainable soft tokens behind the text's last one.
    use_bos: bool = True  # The LLM's BOS token first, if it has one.
    pooling: Literal["mean", "last_token", "weighted_mean"] = "mean"  # How the LLM's states become one vector.
    head_dim: PositiveInt | None = None  # Width of the embedding behind an MLP head; no head when left out.
    max_seq_length: int = Field(default=512, ge=4)  # Encoder tokens read of a text.
    encoder_lora: Lora | None = None  # LoRA adapter of the encoder, for `train_encoder: lora` in a stage.
    llm_lora: Lora | None = Lora()  # LoRA adapter of the LLM, which stage 2 trains.
    # Load the frozen LLM in 8 or 4 bits (needs bitsandbytes; 4 bits a GPU).
    quantization: Literal["8bit", "4bit"] | None = None
    prompts: dict[str, str] = {}  # `query` and `document`: what stands in front of the texts when the model is used.

    def architecture(self, *left_out: str) -> dict[str, Any]:
        """The fields that `LusiferModel.from_backbones` and `LusiferConfig` take, by their names there."""
        return self.model_dump(exclude={"encoder_lora", "llm_lora", "prompts", *left_out})


class WarmStartRecipe(Strict):
    """Stage 0: the closed-form start of the connector."""

    enabled: bool = True  # Off starts the connector at random.
    data: str | None = None  # English texts; else the first set to reconstruct of stage 1, else the first of stage 2.
    texts: PositiveInt = 3000  # How many of them are read.
    ridge: PositiveFloat = 1000.0  # Strength of the ridge regression.
    # Power of the map's singular values: 1 is plain regression, smaller keeps rare directions louder.
    spectrum: float = Field(default=0.5, ge=0.0, le=1.0)
    scale: PositiveFloat = 1.0  # Loudness of the soft tokens over the LLM's own embeddings.


class GradientStage(Strict):
    """What stages 1 and 2, which train by gradient, share."""

    number: ClassVar[int]
    renamed: ClassVar[dict[str, str]] = {"encoder": "train_encoder", "connector": "train_connector"}

    enabled: bool = True  # Whether the stage runs.
    data: list[DataRecipe] = []  # Its data sets.
    steps: PositiveInt = 1000  # Optimizer steps.
    batch_size: PositiveInt = 32  # Rows of one step, over all ranks.
    learning_rate: PositiveFloat = 2e-4  # Of adapters and, where it is trained, the encoder.
    connector_learning_rate: PositiveFloat | None = None  # Of connector and head; as the others when left out.
    warmup_steps: int = Field(default=0, ge=0)  # Steps in which the rate rises.
    warmup_share: float = Field(default=0.0, ge=0.0, lt=1.0)  # The same as a share of the steps; give one of them.
    schedule: Literal["linear", "cosine"] = "linear"  # How the rate falls from there to zero.
    weight_decay: float = Field(default=0.0, ge=0.0)  # AdamW's.
    max_grad_norm: PositiveFloat = 1.0  # Gradients are clipped to this norm.
    # What of the encoder is trained: nothing, its LoRA adapter, or all of its weights.
    train_encoder: Literal["frozen", "lora", "full"] = "frozen"
    train_connector: bool = True  # Whether connector and head are trained.
    # Encoder tokens of a text in this stage; the model's own limit when left out.
    max_seq_length: PositiveInt | None = None
    max_tokens: PositiveInt = 16384  # Padded tokens of one forward pass.
    # Padded tokens whose activations are kept; what exceeds it goes through the gradient cache.
    graph_tokens: PositiveInt = 65536
    # What it computes in; what is trained, losses and optimizer are float32 anyway. `auto`: decided as the run begins.
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    # Compute activations again in the backward pass: less memory, a third more time.
    gradient_checkpointing: bool = False
    save_steps: PositiveInt = 100  # Steps between checkpoints.
    save_total_limit: PositiveInt = 2  # How many checkpoints stay.
    # Metric of the held-out rows that chooses the checkpoint kept beside the last ones; needs `eval_steps`.
    best_metric: str | None = None
    # Steps between measurements on rows that are never trained on; none when left out.
    eval_steps: PositiveInt | None = None
    logging_steps: PositiveInt = 10  # Steps between lines of the log.
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = []  # Where the log goes too.
    max_loss: PositiveFloat | None = None  # A loss above it stops the run.

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
    """Stage 1: the frozen LLM writes the text again, or goes on with it, from soft tokens."""

    number: ClassVar[int] = 1
    # Share of target tokens masked for the LLM: a number, or two, from the first to the last step.
    mask_probability: float | tuple[float, float] = 0.5
    target_max_seq_length: PositiveInt = 512  # LLM tokens of a target.
    # Sentence Transformers model whose vectors an adapted encoder is held to while it learns.
    teacher: str | None = None
    teacher_weight: PositiveFloat = 1.0  # Weight of the teacher's loss beside the tokens' cross-entropy.

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
    symmetric: bool = False  # Whether each positive must also find its query.
    temperature: PositiveFloat = 0.05  # Divisor of the cosines.
    infonce_weight: NonNegativeFloat = 1.0  # Weight of the contrastive loss; 0 leaves it out.
    # Sentence Transformers model whose vectors of the texts are learnt: hub id, folder or starter name.
    teacher: str | None = None
    teacher_weight: PositiveFloat = 1.0  # Weight of the teacher's loss.
    # Number of the LLM's first layers kept; stage 1 needs the whole LLM, whose head is behind the last.
    llm_layers: PositiveInt | None = None
    # Sentence Transformers model that reads the same texts; `encoder` is the recipe's own encoder alone.
    guide: str | None = None
    # A negative counts only if the guide scores it below the positive minus this margin.
    guide_margin: float | None = Field(default=None, ge=-2.0, le=2.0)
    distill: NonNegativeFloat = 0.0  # Weight of keeping the texts' neighbourhoods as the guide sees them.
    distill_temperature: PositiveFloat = 0.05  # Divisor of the cosines compared.
    # Leading dimensions that must be good embeddings by themselves, increasing.
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
    """How several processes share the work (`torchrun`)."""

    # `ddp` copies the model to every rank; `fsdp2` shards it, backbones included.
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    cpu_offload: bool = False  # Keeps the shards in the host's memory while they are not used (fsdp2).


class Recipe(Strict):
    """One training run: model, stages 0 to 2, where it writes."""

    output: str  # Folder of the run; stages and the final model go below it.
    seed: int = Field(default=0, ge=0, lt=2**32)  # Of everything random.
    model: ModelRecipe  # The two backbones and what joins them.
    warm_start: WarmStartRecipe = WarmStartRecipe()  # Stage 0.
    align: AlignRecipe = AlignRecipe(enabled=False)  # Stage 1.
    contrast: ContrastRecipe = ContrastRecipe(enabled=False)  # Stage 2.
    scale: ScaleRecipe = ScaleRecipe()  # How several processes share the work.

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
