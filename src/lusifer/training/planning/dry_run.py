"""What a recipe would cost, without loading a weight: memory and whether it fits, time, disk, data, launch line.

The formulas are those of `lusifer.training.planning.costs`.
"""

from __future__ import annotations

import copy
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

import psutil
import torch

from lusifer.data.mixture import open_strata, steps_of_sets
from lusifer.errors import LusiferError
from lusifer.model.adapters import parameters_by_part
from lusifer.model.backbones import keep_layers
from lusifer.model.configuration import LusiferConfig
from lusifer.model.modeling import LusiferModel
from lusifer.recipes.schema import GradientStage, Recipe
from lusifer.terminal import without_secrets
from lusifer.training.checks import check_model
from lusifer.training.planning.cards import Card, find_card
from lusifer.training.planning.costs import load_of, memory_gb, operations
from lusifer.training.precision import data_types, foresee, restore_data_types
from lusifer.training.stages import prepare_stage

SHARE_OF_PEAK = 0.35
_FRAMEWORK_GB = 1.5  # CUDA, its libraries and the allocator's reserve, on a GPU.
_PROCESS_GB = 3.0  # Of the host's memory: Python, torch, a batch's workers.
_PER_MACHINE = 8


def _model_on_meta(recipe: Recipe) -> LusiferModel:
    chosen = recipe.model
    encoder, llm = check_model(recipe)
    if chosen.llm_layers is not None:
        keep_layers(llm, chosen.llm_layers)
    encoder.dtype, llm.dtype = getattr(torch, chosen.encoder_dtype), getattr(torch, chosen.llm_dtype)
    fields = chosen.architecture("encoder_dtype", "llm_dtype", "llm_layers", "quantization", "attn_implementation")
    with torch.device("meta"):
        model = LusiferModel(LusiferConfig(**fields, encoder_config=encoder, llm_config=llm))
        model.encoder.to(encoder.dtype)
        model.llm.to(llm.dtype)
        if chosen.encoder_lora is not None:
            model.add_adapter("encoder", chosen.encoder_lora.fields())
    return model


def dry_run(
    recipe: Recipe,
    name: str,
    *,
    ranks: int = 1,
    gpu: str | None = None,
    overrides: Sequence[str] = (),
    data: bool = True,
) -> dict[str, Any]:
    """Builds every stage of a recipe on the meta device and adds up what it needs.

    Args:
        recipe: The recipe, overrides applied.
        name: Its file, for the launch line.
        ranks: Processes it would run on.
        gpu: The card of each, as `lusifer.training.planning.cards.find_card` takes it.
        overrides: Those of the command, for the launch line.
        data: Whether to open the sets, for their rows and epochs.

    Returns:
        ``parameters`` by part and ``stages`` (steps, rows and most tokens per step, checkpoints, memory in GB per
        rank and part, whether that ``fits`` and what would, hours), ``sets``, ``host_gb``, ``disk_gb``, ``card``, the
        ``launch`` line, and what ``auto`` means on this machine, if the recipe says it.

    Raises:
        LusiferError: If a backbone's configuration cannot be read, or no such card is known.
    """
    recipe, choice = foresee(recipe)
    card, parts = find_card(gpu), parameters_by_part(_model_on_meta(recipe))
    stages: dict[str, Any] = {}
    for stage, model in _stages_on_meta(recipe):
        stages[stage], parts = _stage_costs(recipe, stage, model, ranks, card), parameters_by_part(model)
    facts: dict[str, Any] = {"parameters": parts, "stages": stages}
    facts["host_gb"] = round(min(ranks, _PER_MACHINE) * _PROCESS_GB, 1)
    # Each stage's model and the last one's, beside the checkpoints.
    facts["disk_gb"] = round(sum(s["checkpoint_gb"] * (s["checkpoints kept"] + 2 / 3) for s in stages.values()), 2)
    facts["card"] = None if card is None else f"{card.name}, {card.memory:.0f} GB"
    if data:
        facts["sets"] = [row for stage in stages for row in _sets(recipe, stage)]
    facts["launch"] = _launch(name, ranks, overrides)
    return facts if choice is None else {**facts, "auto": f"{choice.name}: {choice.reason}"}


def _launch(name: str, ranks: int, overrides: Sequence[str]) -> str:
    command = f"lusifer train {shlex.join([name, *overrides])}"
    if ranks == 1:
        return command
    if ranks <= _PER_MACHINE or ranks % _PER_MACHINE:
        return f"torchrun --nproc-per-node {ranks} -m {command}"
    machines = f"--nnodes {ranks // _PER_MACHINE} --nproc-per-node {_PER_MACHINE}"
    return f"torchrun {machines} --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m {command}"


def needed_gb(
    recipe: Recipe, name: str, model: LusiferModel, ranks: int, *, gpu: bool
) -> tuple[float, dict[str, float]]:
    """Most GB that a process needs in a stage, and its parts; arguments as for the formulas."""
    parts = memory_gb(recipe, name, model, load_of(recipe, name, model, ranks), ranks)
    if gpu:
        parts["framework"] = _FRAMEWORK_GB
    loading = parts.pop("loading") + parts.get("framework", 0.0)
    return max(sum(parts.values()), loading), parts


def _stage_costs(recipe: Recipe, name: str, model: LusiferModel, ranks: int, card: Card | None) -> dict[str, Any]:
    stage: GradientStage = getattr(recipe, name)
    load = load_of(recipe, name, model, ranks)
    total, parts = needed_gb(recipe, name, model, ranks, gpu=card is not None)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    facts = {
        "steps": stage.steps,
        "rows per step": stage.batch_size,
        "rows per rank": stage.batch_size / ranks,
        "tokens per step, at most": load.tokens,
        "trainable parameters": trainable,
        "checkpoints kept": stage.save_total_limit,
        "checkpoint_gb": round(trainable * 12 / 1e9, 3),
        "memory_gb": {key: round(value, 3) for key, value in parts.items()},
        "memory_gb_total": round(total, 2),
    }
    if card is not None:
        facts["fits"] = total <= card.memory
        changes = remedy(recipe, name, model, ranks, memory=card.memory, gpu=True) or {}
        facts["advice"] = " ".join(f"--{field} {str(value).lower()}" for field, value in changes.items())
        if card.peak is not None:
            seconds = operations(recipe, name, model, load) * stage.steps / (ranks * SHARE_OF_PEAK * card.peak)
            facts["hours, at most"] = round(seconds / 3600, 1)
    return facts


def remedy(
    recipe: Recipe, name: str, model: LusiferModel, ranks: int, *, memory: float, gpu: bool
) -> dict[str, Any] | None:
    """The changes, tried one after the other and kept, with which a stage fits into so many GB; None where none does.

    First what costs least time: fewer tokens whose activations are kept, then activations computed again, smaller
    passes, shards, and an LLM in 4 bits.

    Args:
        recipe: The recipe; it is not changed.
        name: ``align`` or ``contrast``.
        model: The model, in the state of that stage.
        ranks: Number of processes.
        memory: GB of one process.
        gpu: Whether that is a GPU's.

    Returns:
        Dotted name of a field to its value; empty if it fits as it is.
    """
    recipe, changes = copy.deepcopy(recipe), dict[str, Any]()
    stage: GradientStage = getattr(recipe, name)
    load = load_of(recipe, name, model, ranks)
    smallest = load.source + load.target

    def fits() -> bool:
        return needed_gb(recipe, name, model, ranks, gpu=gpu)[0] <= memory

    def change(section: str, field: str, value: Any) -> None:
        setattr(getattr(recipe, section), field, value)
        changes[f"{section}.{field}"] = value

    def lower(field: str, least: int) -> None:
        while not fits() and getattr(stage, field) > least:
            change(name, field, max(least, getattr(stage, field) // 2))

    if name == "contrast":
        lower("graph_tokens", max(stage.max_tokens, smallest))
    if not fits() and not stage.gradient_checkpointing:
        change(name, "gradient_checkpointing", True)
    if name == "contrast":
        lower("graph_tokens", smallest)
    lower("max_tokens", smallest)
    if not fits() and ranks > 1 and recipe.scale.strategy != "fsdp2":
        change("scale", "strategy", "fsdp2")
    if not fits() and gpu and recipe.model.quantization is None:
        if recipe.scale.strategy == "fsdp2":
            change("scale", "strategy", "ddp")
        change("model", "quantization", "4bit")
    return changes if fits() else None


def limits_here(recipe: Recipe, *, ranks: int = 1) -> dict[str, dict[str, Any]]:
    """Fields of each stage with which a recipe fits into this machine's GPU or, without one, its memory.

    Args:
        recipe: The recipe.
        ranks: Processes it would run on.

    Raises:
        LusiferError: If a backbone's configuration cannot be read.
    """
    card = find_card(None)
    memory = 0.8 * psutil.virtual_memory().total / 1e9 if card is None else card.memory
    fields: dict[str, dict[str, Any]] = {}
    for name, model in _stages_on_meta(recipe):
        changes = remedy(recipe, name, model, ranks, memory=memory, gpu=card is not None) or {}
        own = {key.removeprefix(f"{name}."): value for key, value in changes.items() if key.startswith(f"{name}.")}
        if own:
            fields[name] = own
    return fields


def _stages_on_meta(recipe: Recipe) -> Iterator[tuple[str, LusiferModel]]:
    """Each enabled stage of 1 and 2, and the model as it trains there; the same one, changed in between."""
    model = _model_on_meta(recipe)
    for name in ("align", "contrast"):
        if getattr(recipe, name).enabled:
            types = data_types(model)
            with torch.device("meta"):
                prepare_stage(recipe, name, model)
            yield name, model
            restore_data_types(model, types)


def _sets(recipe: Recipe, name: str) -> list[dict[str, Any]]:
    """Rows and epochs of a stage's sets, as far as they can be opened."""
    stage: GradientStage = getattr(recipe, name)
    rows: list[dict[str, Any]] = [{"stage": name, "source": without_secrets(item.source)} for item in stage.data]
    opened = []
    for row, item in zip(rows, stage.data, strict=True):
        try:
            strata = open_strata([item], batch_size=stage.batch_size, seed=recipe.seed)
        except LusiferError as error:
            row["problem"] = str(error)
            continue
        row["rows"] = sum(stratum.size for stratum in strata)
        opened.append((row, item, strata))
    if len(opened) < len(rows):
        return rows
    counts = steps_of_sets([strata for *_, strata in opened], steps=stage.steps, seed=recipe.seed)
    for (row, item, _), count in zip(opened, counts, strict=True):
        row["epochs"] = round(count * -(-stage.batch_size // item.positives) / row["rows"], 2)
    return rows
