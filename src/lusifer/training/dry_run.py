"""What a recipe would cost, without loading a weight: parameters, memory per rank, tokens per step, launch line.

    weights     bytes of every parameter, in float32 what is trained (quantised linear layers of the LLM: 1 or 0.55
                each), shared by FSDP2's ranks
    trainable   12 bytes per trainable parameter: gradient and AdamW's two moments in float32, shared likewise
    activations tokens whose graph is kept x layers x (12 h + 5 f) values per layer of width h and feed-forward width
                f; with gradient checkpointing h per layer and one layer in full; 2 bytes each in bfloat16, else 4
    logits      stage 1: 256 states x vocabulary x 12 bytes

What the framework takes is left out (about 0.5 GB on a CPU, 1 to 2 GB on a GPU).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lusifer.model.adapters import parameters_by_part
from lusifer.model.backbones import keep_layers
from lusifer.model.configuration import LusiferConfig
from lusifer.model.modeling import LusiferModel
from lusifer.recipes.schema import GradientStage, Recipe
from lusifer.training.checks import check_model
from lusifer.training.precision import data_types, foresee, restore_data_types
from lusifer.training.stages import prepare_stage

_PACKED = {"8bit": 1.0, "4bit": 0.55}
_CHUNK = 256


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


def dry_run(recipe: Recipe, name: str, *, ranks: int = 1) -> dict[str, Any]:
    """Builds every stage of a recipe on the meta device and adds up what it needs.

    Args:
        recipe: The recipe.
        name: Its file, for the launch line.
        ranks: Processes it would run on.

    Returns:
        ``parameters`` by part and ``stages`` (steps, rows and most tokens per step, checkpoints, memory in GB per
        rank and part), the ``launch`` line, and what ``auto`` means on this machine, if the recipe says it.

    Raises:
        LusiferError: If a backbone's configuration cannot be read, or the batch does not divide by the ranks.
    """
    recipe, choice = foresee(recipe)
    model = _model_on_meta(recipe)
    stages: dict[str, Any] = {}
    for stage in ("align", "contrast"):
        if getattr(recipe, stage).enabled:
            types = data_types(model)
            with torch.device("meta"):
                prepare_stage(recipe, stage, model)
            stages[stage] = _stage_costs(recipe, stage, model, ranks)
            restore_data_types(model, types)
    launcher = f"torchrun --nproc-per-node {ranks} -m " if ranks > 1 else ""
    facts = {"parameters": parameters_by_part(model), "stages": stages, "launch": f"{launcher}lusifer train {name}"}
    return facts if choice is None else {**facts, "auto": f"{choice.name}: {choice.reason}"}


def _stage_costs(recipe: Recipe, name: str, model: LusiferModel, ranks: int) -> dict[str, Any]:
    stage: GradientStage = getattr(recipe, name)
    longest = stage.max_seq_length or recipe.model.max_seq_length
    if name == "align":
        row, limit = longest + recipe.align.target_max_seq_length, stage.max_tokens
    else:
        row, limit = longest * (2 + max(item.hard_negatives for item in stage.data)), stage.graph_tokens
    tokens = stage.batch_size * row
    memory = _memory_gb(recipe, stage, model, min(limit, -(-tokens // ranks)), ranks)
    if name == "align":
        memory["logits"] = _CHUNK * model.config.llm_config.vocab_size * 12 / 1e9
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "steps": stage.steps,
        "rows per step": stage.batch_size,
        "rows per rank": stage.batch_size / ranks,
        "tokens per step, at most": tokens,
        "trainable parameters": trainable,
        "checkpoints kept": stage.save_total_limit,
        "checkpoint_gb": round(trainable * 12 / 1e9, 3),
        "memory_gb": {key: round(value, 3) for key, value in memory.items()},
        "memory_gb_total": round(sum(memory.values()), 2),
    }


def _memory_gb(recipe: Recipe, stage: GradientStage, model: LusiferModel, kept: int, ranks: int) -> dict[str, float]:
    """Estimated GB per rank by part, where the activations of ``kept`` tokens are alive; see the module's formulas."""
    shards = ranks if recipe.scale.strategy == "fsdp2" else 1
    packed = _PACKED.get(str(recipe.model.quantization))
    linear = {id(module.weight) for module in model.llm.modules() if isinstance(module, nn.Linear)}
    weights = 0.0
    for parameter in model.parameters():
        weights += parameter.numel() * (packed if packed and id(parameter) in linear else parameter.element_size())
    trainable = 12 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    configs = [model.config.llm_config] + [model.config.token_config] * (stage.train_encoder != "frozen")
    size = 2 if stage.precision == "bfloat16" else 4
    activations = size * kept * sum(_values(config, stage.gradient_checkpointing) for config in configs)
    return {"weights": weights / shards / 1e9, "trainable": trainable / shards / 1e9, "activations": activations / 1e9}


def _values(config: Any, checkpointing: bool) -> float:
    """Values kept per token over all layers."""
    layers, width = getattr(config, "num_hidden_layers", 1), config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * width
    layer = 12 * width + 5 * inner
    return layers * width + layer if checkpointing else layers * layer
