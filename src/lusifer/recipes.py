"""A recipe: everything one training run needs, typed, in one YAML file.

Every field has a default or is required here and nowhere else. Unknown keys are refused with the
nearest name, and every value is checked before any weight is loaded.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError

from lusifer.errors import LusiferError

Dtype = Literal["float32", "bfloat16", "float16"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Lora(_Strict):
    """A LoRA adapter (arXiv 2106.09685); the defaults are the paper's."""

    r: PositiveInt = 16
    alpha: PositiveInt = 32
    dropout: float = Field(default=0.1, ge=0.0, lt=1.0)
    target_modules: list[str] | None = None

    def fields(self) -> dict[str, Any]:
        """The adapter as fields of ``peft.LoraConfig``."""
        targets = {"target_modules": self.target_modules} if self.target_modules else {}
        return {"r": self.r, "lora_alpha": self.alpha, "lora_dropout": self.dropout, **targets}


class DataRecipe(_Strict):
    """One data set of a mixture; `lusifer.mixture` says how sets are drawn.

    Attributes:
        source: A file (.jsonl, .jsonl.gz, .json, .parquet or a glob of them), a starter name or a hub id.
        subset, split, revision: Which part of a hub data set.
        columns: Our column name -> theirs, e.g. ``{query: question}``.
        task: What stage 1 does with a record; stage 2 always contrasts.
        weight: How often each record counts: a set is drawn in proportion to weight * rows.
        cap: At most this many rows: a seeded choice, or the first ones of a streamed set.
        streaming: Read in order with bounded memory, instead of from a local table.
        instruction: Task instruction in front of every query; this and the next two are for stage 2.
        in_batch_negatives: Whether other rows' texts are negatives; off for classification-like sets.
        hard_negatives: Negatives per row; a row with fewer repeats them.
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
        llm_base_adapters: LoRA adapters of PEFT that belong to the LLM as published, folded in while it loads.
        prompts: ``query`` and ``document``: what stands in front of the texts when the model is used.
    """

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
    connector_shortcut: bool = True
    num_added_tokens: int = Field(default=1, ge=0)
    use_bos: bool = True
    pooling: Literal["mean", "last_token", "weighted_mean"] = "mean"
    head_dim: PositiveInt | None = None
    max_seq_length: int = Field(default=512, ge=4)
    encoder_lora: Lora | None = None
    llm_lora: Lora | None = Lora()
    quantization: Literal["8bit", "4bit"] | None = None
    prompts: dict[str, str] = {}


class WarmStartRecipe(_Strict):
    """Stage 0: the closed-form start of the connector."""

    enabled: bool = True
    data: str | None = None
    texts: PositiveInt = 3000
    ridge: PositiveFloat = 1000.0
    spectrum: float = Field(default=0.5, ge=0.0, le=1.0)
    scale: PositiveFloat = 1.0


class Optimisation(_Strict):
    """What both gradient stages share.

    Attributes:
        batch_size: Rows of one step, over all ranks.
        max_seq_length: Encoder tokens of a text in this stage; the model's own limit when None.
        max_tokens: Padded tokens of one forward pass.
        graph_tokens: Padded tokens whose activations are kept; what exceeds it goes through the gradient cache.
        best_metric: Name of the metric that chooses the checkpoint kept beside the last ones.
    """

    enabled: bool = True
    data: list[DataRecipe] = []
    steps: PositiveInt = 1000
    batch_size: PositiveInt = 32
    learning_rate: PositiveFloat = 2e-4
    connector_learning_rate: PositiveFloat | None = None
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0.0)
    max_grad_norm: PositiveFloat = 1.0
    encoder: Literal["frozen", "lora", "full"] = "frozen"
    connector: bool = True
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
    def _some_set_at_every_step(self) -> Optimisation:
        for moment in sorted({0.0, *(item.end for item in self.data)} - {1.0}):
            if self.data and not any(item.start <= moment < item.end for item in self.data):
                raise ValueError(f"no data set is drawn after {moment:g} of the steps: mend start and end of the sets")
        return self


class AlignRecipe(Optimisation):
    """Stage 1; ``mask_probability`` hides target tokens: one number, or two between which it moves linearly."""

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


class ContrastRecipe(Optimisation):
    """Stage 2: contrastive finetuning with bidirectional attention.

    Attributes:
        llm_layers: The LLM's first layers to go on with; stage 1 needs the whole LLM, whose head is behind the last.
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
    """One training run: model, stages 0 to 2, where it writes."""

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
        if self.warm_start.enabled and not self.model.connector_shortcut:
            raise ValueError("warm_start needs model.connector_shortcut: true (or enabled: false)")
        for name, stage in (("align", self.align), ("contrast", self.contrast)):
            if stage.enabled and stage.encoder == "lora" and self.model.encoder_lora is None:
                raise ValueError(f"{name}.encoder is lora, but model.encoder_lora is not set")
            adapts = name == "contrast" and self.model.llm_lora is not None
            if stage.enabled and stage.encoder == "frozen" and not stage.connector and not adapts:
                raise ValueError(f"{name} has nothing to train: set {name}.connector: true or {name}.encoder")
        if not (self.align.enabled or self.contrast.enabled or self.warm_start.enabled):
            raise ValueError("nothing to do: every stage is switched off")
        return self

    def warm_start_data(self) -> DataRecipe | None:
        """The set stage 0 reads: its own, else the first to reconstruct of stage 1, else the first of stage 2."""
        if self.warm_start.data:
            return DataRecipe(source=self.warm_start.data)
        return next((d for d in [*self.align.data, *self.contrast.data] if d.task != "complete"), None)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and applies command-line overrides.

    Args:
        path: A YAML file.
        overrides: Alternating ``--section.field`` and value, or ``--section.field=value``.

    Raises:
        LusiferError: If the file cannot be read, a key is unknown, or a value is not valid.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise LusiferError(f"cannot read the recipe {str(path)!r}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LusiferError(f"the recipe {str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise LusiferError(f"the recipe {str(path)!r} must be a mapping of sections, see recipes/quickstart.yaml")
    for name, value in parse_overrides(overrides):
        _set(tree, name, value)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise LusiferError(f"recipe {str(path)!r}: {explain(error, Recipe)}") from None


def parse_overrides(arguments: Sequence[str]) -> list[tuple[str, Any]]:
    """Splits ``--a.b value`` and ``--a.b=value`` into names and YAML values.

    Raises:
        LusiferError: If an argument is no option or lacks its value.
    """
    pairs, rest = [], list(arguments)
    while rest:
        option = rest.pop(0)
        if not option.startswith("--"):
            raise LusiferError(f"unexpected argument {option!r}; overrides look like --align.steps 100")
        name, equals, text = option[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise LusiferError(f"the override {option!r} lacks a value")
            text = rest.pop(0)
        try:
            pairs.append((name.replace("-", "_"), yaml.safe_load(text)))
        except yaml.YAMLError as error:
            raise LusiferError(f"the value of {option!r} is not valid YAML: {text!r}") from error
    return pairs


def _set(tree: dict[str, Any], name: str, value: Any) -> None:
    *sections, field = name.split(".")
    node: Any = tree
    for section in sections:
        node = node[_index(node, section, name)] if isinstance(node, list) else node.setdefault(section, {})
        if not isinstance(node, dict | list):
            raise LusiferError(f"cannot override {name!r}: {section!r} is not a section")
    node[_index(node, field, name) if isinstance(node, list) else field] = value


def _index(items: list[Any], text: str, name: str) -> int:
    if not text.isdecimal() or int(text) >= len(items):
        raise LusiferError(f"cannot override {name!r}: the list has {len(items)} items, counted from 0, not {text!r}")
    return int(text)


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """One line that says what is wrong with the first bad field, where, and how to mend it."""
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    where = ".".join(location)
    if first["type"] == "extra_forbidden":
        owner = _section(root, location[:-1])
        known = sorted(owner.model_fields) if owner else []
        near = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {where!r}; {hint}"
    if first["type"] == "missing":
        return f"{where} is required"
    if first["type"] == "value_error":
        return ": ".join(part for part in (where, str(first["ctx"]["error"])) if part)
    return f"{where}: {first['msg'][0].lower()}{first['msg'][1:]}, not {first['input']!r}"


def _section(root: type[BaseModel], path: list[str]) -> type[BaseModel] | None:
    owner: type[BaseModel] | None = root
    for part in path:
        if part.isdecimal():  # An item of a list; the class of the items is the owner already.
            continue
        annotation = owner.model_fields[part].annotation if owner and part in owner.model_fields else None
        options = [annotation, *getattr(annotation, "__args__", ())]
        owner = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
    return owner
