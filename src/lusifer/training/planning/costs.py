"""Formulas of what a stage costs: memory of a process by part, and floating-point operations.

    weights     bytes of every parameter, in float32 what is trained (quantised linear layers of the LLM: 1 or 0.55
                each), shared by FSDP2's ranks
    trainable   12 bytes per trainable parameter: gradient and AdamW's two moments in float32, shared likewise
    gathered    FSDP2: the two largest units in full, and the gradients that wait for the last pass of a step
    activations tokens whose graph is kept x layers x (12 h + 5 f) values per layer of width h and feed-forward width
                f; with gradient checkpointing h per layer and one layer in full; 2 bytes each in bfloat16, else 4
    logits      stage 1: 256 states x vocabulary x 12 bytes, and an LM head of its own
    embeddings  stage 2: those of the global batch, their gradients, and 256 rows of scores
    loading     what a process holds before it shards: the weights as they are loaded

A pass takes 2 operations for each weight of a layer and token, a backward pass the same for the states and again for
weights that are trained (arXiv 2001.08361, section 2.1); attention scores are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from lusifer.model.modeling import LusiferModel
from lusifer.recipes.schema import GradientStage, Recipe
from lusifer.training.sharding import units

_PACKED = {"8bit": 1.0, "4bit": 0.55}
_CHUNK = 256


@dataclass(frozen=True)
class Load:
    """What one step of a stage reads.

    Attributes:
        texts: Texts of the global batch.
        source: Most encoder tokens of a text.
        target: Most target tokens of a text, in stage 1.
        kept: Most tokens of one process whose activations are alive at once.
        again: Share of the tokens that the gradient cache reads twice.
        dimension: Width of the embedding.
    """

    texts: int
    source: int
    target: int
    kept: int
    again: float
    dimension: int

    @property
    def tokens(self) -> int:
        """Most tokens that the LLM reads in a step, over all ranks."""
        return self.texts * (self.source + self.target)


def load_of(recipe: Recipe, name: str, model: LusiferModel, ranks: int) -> Load:
    """What a step of ``align`` or ``contrast`` reads at most, with every text of full length."""
    stage: GradientStage = getattr(recipe, name)
    source, target, texts = stage.max_seq_length or recipe.model.max_seq_length, 0, stage.batch_size
    if name == "align":
        target, limit = recipe.align.target_max_seq_length, stage.max_tokens
    else:
        texts, limit = texts * (2 + max(item.hard_negatives for item in stage.data)), stage.graph_tokens
    own = -(-texts // ranks) * (source + target)
    group = max(min(stage.max_tokens, own), source + target)  # A longer text is a group of its own.
    kept = max(min(limit, own), group)
    again = 0.0 if name == "align" else max(0.0, 1 - limit / own)
    return Load(texts, source, target, kept, again, model.config.hidden_size)


def memory_gb(recipe: Recipe, name: str, model: LusiferModel, load: Load, ranks: int) -> dict[str, float]:
    """Estimated GB of a process by part; see the module's formulas. ``loading`` is not there at the same time."""
    stage: GradientStage = getattr(recipe, name)
    shards = ranks if recipe.scale.strategy == "fsdp2" else 1
    packed = _PACKED.get(str(recipe.model.quantization))
    linear = {id(module.weight) for module in model.llm.modules() if isinstance(module, nn.Linear)}

    def size(parameter: nn.Parameter) -> float:
        return parameter.numel() * (packed if packed and id(parameter) in linear else parameter.element_size())

    weights = sum(map(size, model.parameters()))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    configs: list[Any] = [model.config.llm_config]
    configs += [model.config.token_config] if stage.train_encoder != "frozen" else []
    wide = 2 if stage.precision == "bfloat16" else 4
    values = sum(_values(config, stage.gradient_checkpointing) for config in configs)
    parts = {
        "weights": weights / shards,
        "trainable": 12 * trainable / shards,
        "activations": wide * load.kept * values,
    }
    if shards > 1:
        largest = sorted((sum(map(size, unit.parameters())) for unit in units(model)), reverse=True)[:2]
        parts["gathered"] = sum(largest) + 4 * trainable
    if name == "align":
        llm = model.config.llm_config
        parts["logits"] = _CHUNK * llm.vocab_size * 12
        if not llm.tie_word_embeddings:
            parts["logits"] += llm.vocab_size * llm.hidden_size * _bytes(llm)
    else:
        parts["embeddings"] = 8 * load.texts * load.dimension + 8 * _CHUNK * load.texts
    return {part: value / 1e9 for part, value in parts.items()} | {"loading": weights / 1e9}


def _bytes(config: Any) -> int:
    return int(getattr(config.dtype, "itemsize", 4))


def _values(config: Any, checkpointing: bool) -> float:
    """Values kept per token over all layers."""
    layers, width = getattr(config, "num_hidden_layers", 1), config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * width
    layer = 12 * width + 5 * inner
    return layers * width + layer if checkpointing else layers * layer


def operations(recipe: Recipe, name: str, model: LusiferModel, load: Load) -> float:
    """Floating-point operations of one step over all ranks, every text of full length."""
    stage: GradientStage = getattr(recipe, name)
    encoder, llm = (_layer_weights(part) for part in (model.encoder, model.llm))
    ahead = 2.0 * load.texts * (encoder * load.source + llm * (load.source + load.target))
    back = 2.0 * load.texts * llm * (load.source + load.target)
    back += {"frozen": 0.0, "lora": 2.0, "full": 4.0}[stage.train_encoder] * load.texts * encoder * load.source
    again = ahead * (load.again + float(stage.gradient_checkpointing))
    config: Any = model.config.llm_config
    head = 4.0 * load.texts * load.target * config.vocab_size * config.hidden_size
    return ahead + back + again + head


def _layer_weights(part: nn.Module) -> int:
    """Weights that every token is multiplied with: all but tables."""
    tables = {id(module.weight) for module in part.modules() if isinstance(module, nn.Embedding)}
    return sum(p.numel() for p in part.parameters() if id(p) not in tables and p.dim() > 1)
