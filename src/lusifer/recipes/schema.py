"""A recipe's types: everything one training run needs.

Every field has a default or is required here and nowhere else. Unknown keys are refused with the
nearest name, and every value is checked before any weight is loaded.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt

Dtype = Literal["float32", "bfloat16", "float16"]


class _Strict(BaseModel):
    """Refuses unknown keys; a key of an earlier version is refused with its new name."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    renamed: ClassVar[dict[str, str]] = {}  # Earlier name of a key: its name today.

    @pydantic.model_validator(mode="before")
    @classmethod
    def _no_earlier_names(cls, values: Any) -> Any:
        for earlier, today in cls.renamed.items():
            if isinstance(values, dict) and earlier in values:
                raise ValueError(f"{earlier} is now called {today}; rename the key")
        return values


class Lora(_Strict):
    """A LoRA adapter (arXiv 2106.09685); the defaults are the paper's.

    Attributes:
        r: Rank.
        alpha: Scale: what the adapter adds counts alpha / r.
        dropout: Share of its inputs dropped in training.
        target_modules: Names of the linear layers it covers; all of them when left out.
    """

    r: PositiveInt = 16
    alpha: PositiveInt = 32
    dropout: float = Field(default=0.1, ge=0.0, lt=1.0)
    target_modules: list[str] | None = None

    def fields(self) -> dict[str, Any]:
        """The adapter as fields of ``peft.LoraConfig``."""
        targets = {"target_modules": self.target_modules} if self.target_modules else {}
        return {"r": self.r, "lora_alpha": self.alpha, "lora_dropout": self.dropout, **targets}


class DataRecipe(_Strict):
    """One data set of a mixture; `lusifer.data.mixture` says how sets are drawn.

    Attributes:
        source: A file, folder or glob (.jsonl, .json, .csv, .tsv, .txt, also packed, or .parquet), a starter name or
            a hub id.
        subset, split, revision: Which part of a hub data set.
        columns: Our column name -> theirs, e.g. ``{query: question}``.
        task: What stage 1 does with a record; stage 2 always contrasts.
        weight: How often each record counts: a set is drawn in proportion to weight * rows.
        cap: At most this many rows: a seeded choice, or the first ones of a streamed set.
        streaming: Read in order with bounded memory, instead of from a local table.
        instruction: Task instruction in front of every query; this and the next two are for stage 2.
        in_batch_negatives: Whether other rows' texts are negatives; off for classification-like sets.
        hard_negatives: Negatives per row; a row with fewer repeats them, one without any is left out.
        reverse: Probability that the passage is the source and the query the target (completion).
        start, end: The set is drawn between these shares of the stage's steps.
    """

    source: str = Field(min_length=1)
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    columns: dict[Literal["query", "positive", "negative", "text", "cluster", "id"], str] = {}
    task: Literal["reconstruct", "complete", "contrast"] | None = None
    weight: PositiveFloat = 1.0
    cap: PositiveInt | None = None
    streaming: bool = False
    instruction: str | None = None
    in_batch_negatives: bool = True
    hard_negatives: int = Field(default=0, ge=0)
    reverse: float = Field(default=0.0, ge=0.0, le=1.0)
    start: float = Field(default=0.0, ge=0.0, lt=1.0)
    end: float = Field(default=1.0, gt=0.0, le=1.0)

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


class ModelRecipe(_Strict):
    """The two backbones and what joins them.

    Attributes:
        encoder: Multilingual encoder: hub id, folder or starter name (``starter:use-multilingual``).
        llm: Decoder LLM: the same.
        encoder_revision, llm_revision: Hub revision; the commit it means now is kept in the checkpoint.
        llm_base_adapters: LoRA adapters of PEFT that belong to the LLM as published, merged into it as it loads.
        llm_layers: Use only the LLM's first layers.
        encoder_dtype, llm_dtype: Data type of the backbone's weights.
        attn_implementation: ``sdpa``, ``flash_attention_2``, ``eager``; transformers' choice when left out.
        connector_dim: Width of the connector's hidden layer; the LLM's width when left out.
        connector_residual: A linear map beside the connector's two layers, which stage 0 fills in.
        num_added_tokens: Trainable soft tokens behind the text's last one.
        use_bos: The LLM's BOS token first, if it has one.
        pooling: How the LLM's states become one vector.
        head_dim: Width of the embedding behind an MLP head; no head when left out.
        max_seq_length: Encoder tokens read of a text.
        encoder_lora: LoRA adapter of the encoder, for ``train_encoder: lora`` in a stage.
        llm_lora: LoRA adapter of the LLM, which stage 2 trains.
        quantization: Load the frozen LLM in 8 or 4 bits (needs bitsandbytes; 4 bits a GPU).
        prompts: ``query`` and ``document``: what stands in front of the texts when the model is used.
    """

    renamed: ClassVar[dict[str, str]] = {"connector_shortcut": "connector_residual"}

    encoder: str
    llm: str
    encoder_revision: str | None = None
    llm_revision: str | None = None
    llm_base_adapters: list[str] = []
    llm_layers: PositiveInt | None = None
    encoder_dtype: Dtype = "float32"
    llm_dtype: Dtype = "float32"
    attn_implementation: str | None = None
    connector_dim: PositiveInt | None = None
    connector_residual: bool = True
    num_added_tokens: int = Field(default=1, ge=0)
    use_bos: bool = True
    pooling: Literal["mean", "last_token", "weighted_mean"] = "mean"
    head_dim: PositiveInt | None = None
    max_seq_length: int = Field(default=512, ge=4)
    encoder_lora: Lora | None = None
    llm_lora: Lora | None = Lora()
    quantization: Literal["8bit", "4bit"] | None = None
    prompts: dict[str, str] = {}

    def architecture(self, *left_out: str) -> dict[str, Any]:
        """The fields that `LusiferModel.from_backbones` and `LusiferConfig` take, by their names there."""
        return self.model_dump(exclude={"encoder_lora", "llm_lora", "prompts", *left_out})


class WarmStartRecipe(_Strict):
    """Stage 0: the closed-form start of the connector.

    Attributes:
        enabled: Off starts the connector at random.
        data: English texts; else the first set to reconstruct of stage 1, else the first of stage 2.
        texts: How many of them are read.
        ridge: Strength of the ridge regression.
        spectrum: Power of the map's singular values: 1 is plain regression, smaller keeps rare directions louder.
        scale: Loudness of the soft tokens over the LLM's own embeddings.
    """

    enabled: bool = True
    data: str | None = None
    texts: PositiveInt = 3000
    ridge: PositiveFloat = 1000.0
    spectrum: float = Field(default=0.5, ge=0.0, le=1.0)
    scale: PositiveFloat = 1.0


class GradientStage(_Strict):
    """What stages 1 and 2, which train by gradient, share.

    Attributes:
        enabled: Whether the stage runs.
        data: Its data sets.
        steps: Optimizer steps.
        batch_size: Rows of one step, over all ranks.
        learning_rate: Of adapters and, where it is trained, the encoder.
        connector_learning_rate: Of connector and head; as the others when left out.
        warmup_steps: Steps in which the rate rises; then it falls in a line to zero.
        weight_decay: AdamW's.
        max_grad_norm: Gradients are clipped to this norm.
        train_encoder: What of the encoder is trained: nothing, its LoRA adapter, or all of its weights.
        train_connector: Whether connector and head are trained.
        max_seq_length: Encoder tokens of a text in this stage; the model's own limit when left out.
        max_tokens: Padded tokens of one forward pass.
        graph_tokens: Padded tokens whose activations are kept; what exceeds it goes through the gradient cache.
        precision: What it computes in; adapters, losses and optimizer are float32 in any case.
        gradient_checkpointing: Compute activations again in the backward pass: less memory, a third more time.
        save_steps: Steps between checkpoints.
        save_total_limit: How many checkpoints stay.
        best_metric: Name of the metric that chooses the checkpoint kept beside the last ones.
        eval_steps: Steps between measurements on rows that are never trained on; none when left out.
        logging_steps: Steps between lines of the log.
        report_to: Where the log goes too.
        max_loss: A loss above it stops the run.
    """

    renamed: ClassVar[dict[str, str]] = {"encoder": "train_encoder", "connector": "train_connector"}

    enabled: bool = True
    data: list[DataRecipe] = []
    steps: PositiveInt = 1000
    batch_size: PositiveInt = 32
    learning_rate: PositiveFloat = 2e-4
    connector_learning_rate: PositiveFloat | None = None
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0.0)
    max_grad_norm: PositiveFloat = 1.0
    train_encoder: Literal["frozen", "lora", "full"] = "frozen"
    train_connector: bool = True
    max_seq_length: PositiveInt | None = None
    max_tokens: PositiveInt = 16384
    graph_tokens: PositiveInt = 65536
    precision: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    save_steps: PositiveInt = 100
    save_total_limit: PositiveInt = 2
    best_metric: str | None = None
    eval_steps: PositiveInt | None = None
    logging_steps: PositiveInt = 10
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = []
    max_loss: PositiveFloat | None = None

    @pydantic.model_validator(mode="after")
    def _some_set_at_every_step(self) -> GradientStage:
        for moment in sorted({0.0, *(item.end for item in self.data)} - {1.0}):
            if self.data and not any(item.start <= moment < item.end for item in self.data):
                raise ValueError(
                    f"no data set is drawn after {moment:g} of the steps: correct start and end of the sets"
                )
        return self


class AlignRecipe(GradientStage):
    """Stage 1: the frozen LLM writes the text again, or goes on with it, from soft tokens.

    Attributes:
        mask_probability: Share of target tokens masked for the LLM: a number, or two, from the first to the last step.
        target_max_seq_length: LLM tokens of a target.
    """

    mask_probability: float | tuple[float, float] = 0.5
    target_max_seq_length: PositiveInt = 512

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
    def _has_data(self) -> AlignRecipe:
        if self.enabled and not self.data:
            raise ValueError("stage 1 needs data: list a set (or enabled: false)")
        for number, item in enumerate(self.data):
            if item.task not in ("reconstruct", "complete"):
                raise ValueError(f"data.{number}.task must be reconstruct or complete")
            for field in ("instruction", "in_batch_negatives", "hard_negatives"):
                if field in item.model_fields_set:
                    raise ValueError(f"data.{number}.{field} is for stage 2; remove it")
        return self


class ContrastRecipe(GradientStage):
    """Stage 2: contrastive finetuning with bidirectional attention.

    Attributes:
        symmetric: Whether each positive must also find its query.
        temperature: Divisor of the cosines.
        llm_layers: Number of the LLM's first layers kept; stage 1 needs the whole LLM, whose head is behind the last.
        guide: Sentence Transformers model that reads the same texts; ``encoder`` is the recipe's own encoder alone.
        guide_margin: A negative counts only if the guide scores it below the positive minus this margin.
        distill: Weight of keeping the texts' neighbourhoods as the guide sees them.
        distill_temperature: Divisor of the cosines compared.
        matryoshka_dims: Leading dimensions that must be good embeddings by themselves, increasing.
    """

    symmetric: bool = False
    temperature: PositiveFloat = 0.05
    llm_layers: PositiveInt | None = None
    guide: str | None = None
    guide_margin: float | None = Field(default=None, ge=-2.0, le=2.0)
    distill: NonNegativeFloat = 0.0
    distill_temperature: PositiveFloat = 0.05
    matryoshka_dims: list[PositiveInt] = []

    @pydantic.model_validator(mode="after")
    def _has_data(self) -> ContrastRecipe:
        if self.enabled and not self.data:
            raise ValueError("stage 2 needs data: list at least one set (or enabled: false)")
        for number, item in enumerate(self.data):
            if item.task not in (None, "contrast"):
                raise ValueError(f"data.{number}.task must be contrast, or be left out")
        self.data = [item.model_copy(update={"task": "contrast"}) for item in self.data]
        for field in ("guide_margin", "distill"):
            if getattr(self, field) and not self.guide:
                raise ValueError(f"{field} needs guide: the model whose scores it is about (or guide: encoder)")
        if self.guide and self.guide_margin is None and not self.distill:
            raise ValueError("guide is of no use without guide_margin or distill; set one of them")
        if self.matryoshka_dims != (increasing := sorted(set(self.matryoshka_dims))):
            raise ValueError(f"matryoshka_dims must increase: {increasing}")
        return self


class ScaleRecipe(_Strict):
    """How several processes share the work (`torchrun`).

    Attributes:
        strategy: ``ddp`` copies the model to every rank; ``fsdp2`` shards it, backbones included.
        cpu_offload: Keeps the shards in the host's memory while they are not used (fsdp2).
    """

    strategy: Literal["ddp", "fsdp2"] = "ddp"
    cpu_offload: bool = False


class Recipe(_Strict):
    """One training run: model, stages 0 to 2, where it writes.

    Attributes:
        output: Folder of the run; stages and the final model go below it.
        seed: Of everything random.
        model: The two backbones and what joins them.
        warm_start: Stage 0.
        align: Stage 1.
        contrast: Stage 2.
        scale: How several processes share the work.
    """

    output: str
    seed: int = Field(default=0, ge=0, lt=2**32)
    model: ModelRecipe
    warm_start: WarmStartRecipe = WarmStartRecipe()
    align: AlignRecipe = AlignRecipe(enabled=False)
    contrast: ContrastRecipe = ContrastRecipe(enabled=False)
    scale: ScaleRecipe = ScaleRecipe()

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.warm_start.enabled and self.warm_start_data() is None:
            raise ValueError("warm_start needs data: set warm_start.data or align.data (or enabled: false)")
        if self.warm_start.enabled and not self.model.connector_residual:
            raise ValueError("warm_start needs model.connector_residual: true (or enabled: false)")
        for name, stage in (("align", self.align), ("contrast", self.contrast)):
            if stage.enabled and stage.train_encoder == "lora" and self.model.encoder_lora is None:
                raise ValueError(f"{name}.train_encoder is lora, but model.encoder_lora is not set")
            adapts = name == "contrast" and self.model.llm_lora is not None
            if stage.enabled and stage.train_encoder == "frozen" and not stage.train_connector and not adapts:
                raise ValueError(
                    f"{name} has nothing to train: set {name}.train_connector: true or {name}.train_encoder"
                )
        if not (self.align.enabled or self.contrast.enabled or self.warm_start.enabled):
            raise ValueError("nothing to do: every stage is switched off")
        return self

    def warm_start_data(self) -> DataRecipe | None:
        """The set stage 0 reads: its own, else the first to reconstruct of stage 1, else the first of stage 2."""
        if self.warm_start.data:
            return DataRecipe(source=self.warm_start.data)
        return next((d for d in [*self.align.data, *self.contrast.data] if d.task != "complete"), None)
