"""What a recipe asks of its backbones, checked by their configurations alone: before any work, and in a dry run."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PretrainedConfig

from lusifer.errors import LusiferError
from lusifer.model.backbone_pair import check_adapted, check_window
from lusifer.model.backbones import build_encoder, build_llm, load_config
from lusifer.model.configuration import ADAPTED_TYPE
from lusifer.model.direction.families import check_family
from lusifer.recipes.schema import GradientStage, Lora, ModelRecipe, Recipe


def check_model(recipe: Recipe) -> tuple[PretrainedConfig, PretrainedConfig]:
    """The configurations of encoder and LLM, after all checks that need no weights.

    Args:
        recipe: The recipe.

    Raises:
        LusiferError: If a backbone is missing or of the wrong kind, or a length, number of layers, Matryoshka dimension
            or name of a LoRA adapter's layer does not fit it.
    """
    chosen = recipe.model
    encoder = load_config("encoder", chosen.encoder, revision=chosen.encoder_revision)
    llm = load_config("llm", chosen.llm, revision=chosen.llm_revision)
    check_family(chosen.llm, llm)
    stages: list[GradientStage] = [stage for stage in (recipe.align, recipe.contrast) if stage.enabled]
    check_window(
        chosen.encoder, encoder, max(chosen.max_seq_length, *(stage.max_seq_length or 0 for stage in stages), 0)
    )
    check_adapted(chosen.encoder, encoder, revision=chosen.encoder_revision)
    depth = llm.num_hidden_layers
    if (chosen.llm_layers or 0) > depth:
        raise LusiferError(f"model.llm_layers is {chosen.llm_layers}, but the LLM has {depth} layers")
    depth, wanted = chosen.llm_layers or depth, recipe.contrast.llm_layers
    if recipe.contrast.enabled and (wanted or 0) > depth:
        raise LusiferError(f"contrast.llm_layers is {wanted}, but the LLM has {depth} layers")
    if recipe.contrast.enabled:
        check_matryoshka(recipe, embedding_dimension(chosen, encoder, llm))
    for part, lora, config in (("encoder", chosen.encoder_lora, encoder), ("llm", chosen.llm_lora, llm)):
        if lora is not None and lora.target_modules:
            _check_targets(part, lora, config)
    return encoder, llm


def embedding_dimension(chosen: ModelRecipe, encoder: PretrainedConfig, llm: PretrainedConfig) -> int:
    """Width of the embedding that a model of these backbones gives."""
    if encoder.model_type == ADAPTED_TYPE:
        return int(encoder.dimension)
    return chosen.head_dim or int(llm.hidden_size)


def check_matryoshka(recipe: Recipe, dimension: int) -> None:
    """Refuses Matryoshka dimensions beyond the embedding's, ``dimension``.

    Raises:
        LusiferError: If one is.
    """
    if (largest := max(recipe.contrast.matryoshka_dims, default=0)) > dimension:
        raise LusiferError(f"contrast.matryoshka_dims asks for {largest} dimensions, the embedding has {dimension}")


def _check_targets(part: str, lora: Lora, config: PretrainedConfig) -> None:
    """Refuses a name that no layer has: PEFT takes the rest without a word."""
    config = copy.deepcopy(getattr(config, "encoder_config", config))  # Of an adapted encoder, the one inside.
    with torch.device("meta"):
        module = (build_encoder if part == "encoder" else build_llm)(config)
    names = [name for name, _ in module.named_modules()]
    linear = {name.rsplit(".", 1)[-1] for name, child in module.named_modules() if isinstance(child, nn.Linear)}
    for target in lora.target_modules or []:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            known = ", ".join(sorted(linear))
            raise LusiferError(f"model.{part}_lora.target_modules: no layer is called {target!r}; there are {known}")
