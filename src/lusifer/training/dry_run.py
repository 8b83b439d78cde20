"""What a recipe would cost, without loading a weight: parameters, memory per rank, tokens per step, launch line.

Memory of a stage is estimated as

    weights     bytes of every parameter in its data type (8- and 4-bit linear layers of a quantised LLM: 1 and 0.55),
                divided by the ranks under FSDP2
    trainable   12 bytes per trainable parameter: gradient and AdamW's two moments in float32 (shared by FSDP2)
    activations tokens whose graph is kept x layers x (12 h + 5 f) values per layer of width h and feed-forward
                width f: what the backward pass of a transformer layer with adapters reads; 2 bytes each under
                bfloat16, else 4; with gradient checkpointing h per layer and one layer in full. A frozen encoder
                keeps none.
    logits      stage 1: 256 states x vocabulary x 12 bytes

Tokens whose graph is kept: stage 1 one pass (`max_tokens`); stage 2 `graph_tokens`, or all of the rank's tokens
where they are fewer. It leaves out what the framework takes (about 0.5 GB on a CPU, 1 to 2 GB on a GPU).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lusifer.model.adapters import parameters_by_part
from lusifer.model.backbone_pair import check_window
from lusifer.model.backbones import keep_layers, load_config
from lusifer.model.configuration import LusiferConfig
from lusifer.model.modeling import LusiferModel
from lusifer.recipes.schema import GradientStage, Recipe
from lusifer.training.stages import prepare_stage

_PACKED = {"8bit": 1.0, "4bit": 0.55}
_CHUNK = 256


def model_on_meta(recipe: Recipe) -> LusiferModel:
    """The model of a recipe on the meta device, from its backbones' configurations alone.

    Raises:
        LusiferError: If a configuration cannot be read.
    """
    chosen = recipe.model
    encoder = load_config("encoder", chosen.encoder, revision=chosen.encoder_revision)
    check_window(chosen.encoder, encoder, chosen.max_seq_length)
    llm = load_config("llm", chosen.llm, revision=chosen.llm_revision)
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
        rank and part), and the ``launch`` line.

    Raises:
        LusiferError: If a backbone's configuration cannot be read, or the batch does not divide by the ranks.
    """
    model = model_on_meta(recipe)
    stages: dict[str, Any] = {}
    parameters: dict[str, Any] = {}
    for stage in ("align", "contrast"):
        settings: GradientStage = getattr(recipe, stage)
        if not settings.enabled:
            continue
        with torch.device("meta"):
            prepare_stage(recipe, stage, model)
        parameters = parameters_by_part(model)
        stages[stage] = _stage_costs(recipe, stage, settings, model, ranks)
    program = f"lusifer train {name}"
    if ranks > 1:
        program = f"torchrun --nproc-per-node {ranks} -m {program}"
    return {"parameters": parameters or parameters_by_part(model), "stages": stages, "launch": program}


def _stage_costs(recipe: Recipe, name: str, stage: GradientStage, model: LusiferModel, ranks: int) -> dict[str, Any]:
    texts = 1 + 1 + max((item.hard_negatives for item in stage.data), default=0)
    longest = stage.max_seq_length or recipe.model.max_seq_length
    if name == "align":
        tokens = stage.batch_size * (longest + recipe.align.target_max_seq_length)
        kept = min(stage.max_tokens, -(-tokens // ranks))
    else:
        tokens = stage.batch_size * texts * longest
        kept = min(stage.graph_tokens, -(-tokens // ranks))
    memory = memory_gb(recipe, stage, model, kept, ranks)
    if name == "align":
        vocab = model.config.llm_config.vocab_size
        memory["logits"] = _CHUNK * vocab * 12 / 1e9
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


def memory_gb(recipe: Recipe, stage: GradientStage, model: LusiferModel, kept: int, ranks: int) -> dict[str, float]:
    """Estimated GB per rank by part (weights, trainable state, activations); see the module's formulas.

    Args:
        recipe: Says quantisation and strategy.
        stage: Says precision and what of the encoder is trained.
        model: The model on the meta device, its trainable parameters chosen.
        kept: Tokens of a rank whose activations are kept.
        ranks: Number of processes.
    """
    shards = ranks if recipe.scale.strategy == "fsdp2" else 1
    packed = {
        id(module.weight) for module in model.llm.modules() if isinstance(module, nn.Linear)
    } if recipe.model.quantization else set()  # fmt: skip
    weights = 0.0
    for parameter in model.parameters():
        size = _PACKED[str(recipe.model.quantization)] if id(parameter) in packed else parameter.element_size()
        weights += parameter.numel() * size
    trainable = 12 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = 2 if stage.precision == "bfloat16" else 4
    parts = [(model.config.llm_config, kept)]
    if stage.train_encoder != "frozen":
        parts.append((model.config.encoder_config, kept))
    activations = sum(size * tokens * _values(config, stage.gradient_checkpointing) for config, tokens in parts)
    return {"weights": weights / shards / 1e9, "trainable": trainable / shards / 1e9, "activations": activations / 1e9}


def _values(config: Any, checkpointing: bool) -> float:
    """Values kept per token over all layers."""
    layers = getattr(config, "num_hidden_layers", 1)
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * width
    layer = 12 * width + 5 * inner
    return layers * width + layer if checkpointing else layers * layer
