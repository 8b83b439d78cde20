"""A recipe: everything one training run needs, typed, in one YAML file.

Every field has a default or is required here and nowhere else. Unknown keys are refused with the
nearest name, and every value is checked before any weight is loaded.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from lusifer.errors import LusiferError

Dtype = Literal["float32", "bfloat16", "float16"]
Probability = Field(ge=0.0, le=1.0)


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


class ModelRecipe(_Strict):
    """The two backbones and what joins them."""

    encoder: str
    llm: str
    encoder_revision: str | None = None
    llm_revision: str | None = None
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


class WarmStartRecipe(_Strict):
    """Stage 0: the closed-form start of the connector."""

    enabled: bool = True
    data: str | None = None
    texts: PositiveInt = 3000
    ridge: PositiveFloat = 1000.0
    spectrum: float = Field(default=0.5, ge=0.0, le=1.0)
    scale: PositiveFloat = 1.0


class Optimisation(_Strict):
    """What both gradient stages share."""

    enabled: bool = True
    steps: PositiveInt = 1000
    batch_size: PositiveInt = 32
    learning_rate: PositiveFloat = 2e-4
    connector_learning_rate: PositiveFloat | None = None
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0.0)
    max_grad_norm: PositiveFloat = 1.0
    encoder: Literal["frozen", "lora", "full"] = "frozen"
    connector: bool = True
    max_tokens: PositiveInt = 16384
    save_steps: PositiveInt = 100
    logging_steps: PositiveInt = 10


class AlignRecipe(Optimisation):
    """Stage 1: reconstruction and completion through the frozen LLM."""

    reconstruct: str | None = None
    complete: str | None = None
    completion_ratio: float = Field(default=0.5, ge=0.0, le=1.0)
    mask_probability: float = Field(default=0.5, ge=0.0, le=1.0)
    target_max_seq_length: PositiveInt = 512

    @model_validator(mode="after")
    def _has_data(self) -> AlignRecipe:
        if self.enabled and not (self.reconstruct or self.complete):
            raise ValueError("stage 1 needs data: set reconstruct, complete or both (or enabled: false)")
        return self


class ContrastRecipe(Optimisation):
    """Stage 2: contrastive finetuning with bidirectional attention."""

    data: str | None = None
    instruction: str | None = None
    hard_negatives: int = Field(default=0, ge=0)
    in_batch_negatives: bool = True
    symmetric: bool = False
    temperature: PositiveFloat = 0.05

    @model_validator(mode="after")
    def _has_data(self) -> ContrastRecipe:
        if self.enabled and not self.data:
            raise ValueError("stage 2 needs data (or enabled: false)")
        if self.enabled and not self.in_batch_negatives and self.hard_negatives == 0:
            raise ValueError("stage 2 has no negatives: set hard_negatives, or in_batch_negatives: true")
        return self


class Recipe(_Strict):
    """One training run: model, stages 0 to 2, where it writes."""

    output: str
    seed: int = 0
    model: ModelRecipe
    warm_start: WarmStartRecipe = WarmStartRecipe()
    align: AlignRecipe = AlignRecipe(enabled=False)
    contrast: ContrastRecipe = ContrastRecipe(enabled=False)

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.warm_start.enabled and not (self.warm_start.data or self.align.reconstruct):
            raise ValueError("warm_start needs data: set warm_start.data or align.reconstruct (or enabled: false)")
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
    for section in sections:
        child = tree.setdefault(section, {})
        if not isinstance(child, dict):
            raise LusiferError(f"cannot override {name!r}: {section!r} is not a section")
        tree = child
    tree[field] = value


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
        return str(first["ctx"]["error"])
    return f"{where}: {first['msg'][0].lower()}{first['msg'][1:]}, not {first['input']!r}"


def _section(root: type[BaseModel], path: list[str]) -> type[BaseModel] | None:
    owner: type[BaseModel] | None = root
    for part in path:
        annotation = owner.model_fields[part].annotation if owner and part in owner.model_fields else None
        options = [annotation, *getattr(annotation, "__args__", ())]
        owner = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
    return owner
