"""Data types of a run: what ``auto`` means, and float32 for whatever is trained.

``auto`` is decided once a run, by its first process, and kept in ``OUTPUT/precision.json``. What is kept decides when
the run goes on, also on another machine or beside a baseline: the same data types give the same losses. Delete the
file, with the stages' folders, to decide again.

Weights in bfloat16 have 8 bits: most of an optimizer's updates are smaller than half the last one, and lost. So a stage
holds what it trains, and with it the optimizer's moments, in float32 (arXiv 1710.03740, section 3.1).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lusifer.errors import LusiferError, first_line
from lusifer.model.backbones import load_config
from lusifer.model.text_encoder import Choice, choose_dtype
from lusifer.publishing import make_folder, write_json
from lusifer.recipes.schema import GradientStage, Recipe
from lusifer.training.processes import first_process_says

logger = logging.getLogger(__name__)

_FIELDS = {"model": ("encoder_dtype", "llm_dtype"), "align": ("precision",), "contrast": ("precision",)}
_FILE = "precision.json"
_REMEDY = "remove it, with the folders of the stages, to decide again"
_WIDTH, _DEPTH = 4096, 1024  # Of the product measured: larger ones take seconds and have the same ratio.


def settle(recipe: Recipe) -> Recipe:
    """The recipe of a run with data types in place of ``auto``, the same on all processes and whenever it goes on.

    Args:
        recipe: The recipe; it is itself returned if it leaves nothing to decide.

    Raises:
        LusiferError: If the LLM's configuration or what was kept cannot be read, the choice cannot be kept, or the
            data types do not go together on this machine.
    """
    if not _open(recipe):
        return _checked(recipe)
    return _checked(_filled(recipe, first_process_says(lambda: _decide(recipe))))


def foresee(recipe: Recipe) -> tuple[Recipe, Choice | None]:
    """What `settle` would do in this process, keeping nothing: the recipe, and the choice if there is one to make.

    Raises:
        LusiferError: If the LLM's configuration or what was kept cannot be read.
    """
    if not _open(recipe):
        return recipe, None
    choice = _kept(_path(recipe)) or _measured(recipe)
    return _filled(recipe, choice), choice


def data_types(model: nn.Module) -> dict[str, torch.dtype]:
    """The data type of every parameter by name, as `restore_data_types` takes it."""
    return {name: parameter.dtype for name, parameter in model.named_parameters()}


def hold_trained_in_float32(model: nn.Module) -> None:
    """Converts the trainable parameters to float32, in place; frozen ones stay as they are."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def restore_data_types(model: nn.Module, types: Mapping[str, torch.dtype]) -> None:
    """Converts the parameters that are named to these data types, in place; others stay as they are."""
    for name, parameter in model.named_parameters():
        if (dtype := types.get(name, parameter.dtype)) != parameter.dtype:
            parameter.data = parameter.data.to(dtype)


def _path(recipe: Recipe) -> Path:
    return Path(recipe.output) / _FILE


def _open(recipe: Recipe) -> dict[str, list[str]]:
    """The fields that say ``auto``, by section."""
    asked = {}
    for name, fields in _FIELDS.items():
        if found := [field for field in fields if getattr(getattr(recipe, name), field) == "auto"]:
            asked[name] = found
    return asked


def _filled(recipe: Recipe, choice: Choice) -> Recipe:
    sections = {}
    stages = [stage for stage in (recipe.align, recipe.contrast) if stage.enabled]
    for name, fields in _open(recipe).items():
        values = dict.fromkeys(fields, choice.name)
        if "encoder_dtype" in values and any(stage.train_encoder == "full" for stage in stages):
            values["encoder_dtype"] = "float32"  # Saved as it was trained.
        sections[name] = getattr(recipe, name).model_copy(update=values)
    return recipe.model_copy(update=sections)


def _checked(recipe: Recipe) -> Recipe:
    """Refuses what ends in torch's "mixed dtype" at the first step."""
    if recipe.model.encoder_dtype == "float16" and not torch.accelerator.is_available():
        for name in ("align", "contrast"):
            stage: GradientStage = getattr(recipe, name)
            if stage.enabled and stage.precision == "bfloat16":
                what = f"model.encoder_dtype is float16, which a CPU does not support beside {name}.precision: bfloat16"
                raise LusiferError(f"{what}; set model.encoder_dtype to float32 or auto")
    return recipe


def _decide(recipe: Recipe) -> Choice:
    """The choice that this run was begun with, else one that is kept from now on."""
    path = _path(recipe)
    if (choice := _kept(path)) is not None:
        logger.info("precision auto is %s, as when this run began (%s)", choice.name, path)
        return choice
    choice = _measured(recipe)
    try:
        make_folder(path.parent)
        write_json(path, {"auto": choice.name, "reason": choice.reason})
    except OSError as error:
        raise LusiferError(f"cannot write {str(path)!r}: {first_line(error)}") from error
    logger.info("precision auto is %s: %s; kept in %s", choice.name, choice.reason, path)
    return choice


def _kept(path: Path) -> Choice | None:
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        choice = Choice(str(stored["auto"]), str(stored["reason"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LusiferError(
            f"cannot read {str(path)!r}, the precision of this run: {first_line(error)}; {_REMEDY}"
        ) from error
    if choice.name not in ("float32", "bfloat16"):
        raise LusiferError(f"{str(path)!r} says auto: {choice.name!r}; it must be float32 or bfloat16")
    return choice


def _measured(recipe: Recipe) -> Choice:
    config: Any = load_config("llm", recipe.model.llm, revision=recipe.model.llm_revision)
    depth = int(config.hidden_size)
    width = int(getattr(config, "intermediate_size", None) or 4 * depth)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return choose_dtype(device or torch.device("cpu"), (min(width, _WIDTH), min(depth, _DEPTH)), training=True)
