"""The three stages of a recipe, each as a function of the model that the one before left."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from sentence_transformers import SentenceTransformer
from transformers import PreTrainedTokenizerBase

from lusifer.data.collate import AlignCollator, ContrastCollator, llm_preprocess
from lusifer.data.mixture import Mixture
from lusifer.data.records import read_texts
from lusifer.loading import load_checkpoint
from lusifer.model.backbone_alone import EncoderAlone
from lusifer.model.backbones import keep_layers, load_tokenizer, truncate_llm
from lusifer.model.modeling import LusiferModel
from lusifer.model.sentence_transformer import lusifer_model, to_sentence_transformer
from lusifer.recipes.schema import AlignRecipe, ContrastRecipe, GradientStage, ModelRecipe, Recipe
from lusifer.training.alignment import AlignmentLoss, held_out_metrics
from lusifer.training.contrastive import ContrastiveLoss
from lusifer.training.gradient_stage import run_gradient_stage
from lusifer.training.lm_head import load_lm_head
from lusifer.training.warm_start import fit_connector, start_connector

logger = logging.getLogger(__name__)

STAGES = ("warm_start", "align", "contrast")
_HELD_OUT = 32  # Rows that are never trained on.
# Fields of stage 2 that are arguments of its loss.
_CONTRASTIVE = {
    "temperature", "symmetric", "matryoshka_dims", "guide_margin", "distill", "distill_temperature", "max_tokens",
    "graph_tokens",
}  # fmt: skip


def build_model(recipe: ModelRecipe) -> SentenceTransformer:
    """The untrained model of a recipe.

    Raises:
        LusiferError: If a backbone cannot be loaded.
    """
    model = LusiferModel.from_backbones(**recipe.architecture())
    if recipe.encoder_lora is not None:
        model.add_adapter("encoder", recipe.encoder_lora.fields())
    tokenizer = load_tokenizer("encoder", recipe.encoder, revision=recipe.encoder_revision)
    wrapped = to_sentence_transformer(model, tokenizer)
    wrapped.prompts.update(recipe.prompts)
    return wrapped


def run_warm_start(recipe: Recipe, model: SentenceTransformer, llm_tokenizer: Any, progress: bool) -> dict[str, Any]:
    """Stage 0.

    Args:
        recipe: The recipe.
        model: The untrained model; its connector is changed in place.
        llm_tokenizer: The LLM's tokenizer.
        progress: Whether to show a progress bar.

    Returns:
        ``explained``, the share of held-out variance that the map explains, and the numbers of ``words``.
    """
    settings, source = recipe.warm_start, recipe.warm_start_data()
    assert source is not None
    inner = lusifer_model(model)
    texts = read_texts(source, settings.texts)
    options: dict[str, Any] = {"ridge": settings.ridge, "spectrum": settings.spectrum, "progress": progress}
    start = fit_connector(inner, model.tokenizer, llm_tokenizer, texts, **options)
    start_connector(inner, start, scale=settings.scale)
    logger.info("stage 0: %.1f%% of held-out variance explained, %d words", 100 * start.explained, start.words)
    return {"explained": start.explained, "words": start.words, "held_out_words": start.held_out_words}


def prepare_stage(recipe: Recipe, name: str, model: LusiferModel) -> None:
    """Gives a model the adapters and the depth of a stage, and chooses its trainable parameters.

    Args:
        recipe: The recipe.
        name: ``align`` or ``contrast``.
        model: The model as the stage before left it; changed in place.
    """
    lora = recipe.model.llm_lora
    if name == "contrast":
        depth = recipe.contrast.llm_layers
        if depth is not None and depth != model.config.llm_config.num_hidden_layers:
            truncate_llm(model.llm, depth)
            if model.llm.config is not model.config.llm_config:
                keep_layers(model.config.llm_config, depth)
        if lora is not None and not model.config.llm_adapter:
            model.add_adapter("llm", lora.fields())
    stage = recipe.align if name == "align" else recipe.contrast
    train_llm = name == "contrast" and lora is not None
    model.set_trainable(encoder=stage.train_encoder, connector=stage.train_connector, llm=train_llm)


def stage_mixture(recipe: Recipe, name: str) -> Mixture:
    """The examples of the stage ``align`` or ``contrast``, with some rows held out of training."""
    stage: GradientStage = getattr(recipe, name)
    steps, batch_size = stage.steps, stage.batch_size
    return Mixture(stage.data, steps=steps, batch_size=batch_size, seed=_seed(recipe, name), held_out=_HELD_OUT)


def _seed(recipe: Recipe, name: str) -> int:
    return recipe.seed + STAGES.index(name)


def run_align(
    recipe: Recipe, model: SentenceTransformer, llm_tokenizer: Any, folder: Path, progress: bool
) -> dict[str, Any]:
    """Stage 1.

    Args:
        recipe: The recipe.
        model: The model of stage 0; trained in place.
        llm_tokenizer: The LLM's tokenizer.
        folder: Where checkpoints go.
        progress: Whether to show a progress bar.

    Returns:
        What `run_gradient_stage` does, ``held_out_before``, metrics of held-out texts before the stage, and
        ``metrics``, the function of a model that measures them, or None without held-out rows.
    """
    stage: AlignRecipe = recipe.align
    inner = lusifer_model(model)
    prepare_stage(recipe, "align", inner)
    loss = AlignmentLoss(
        load_lm_head(recipe.model.llm, inner.llm, revision=recipe.model.llm_revision),
        inner.llm_embeddings().float().mean(dim=0),
        mask_probability=stage.mask_probability,
        max_tokens=stage.max_tokens,
        seed=_seed(recipe, "align"),
    )
    limit = stage.max_seq_length or recipe.model.max_seq_length
    collator = AlignCollator(model.tokenizer, limit, llm_preprocess(llm_tokenizer, stage.target_max_seq_length))
    mixture = stage_mixture(recipe, "align")
    examples = [example for several in mixture.held_out_examples() for example in several]
    batch = collator(examples) if len(examples) > 1 else None

    def measure(wrapped: Any) -> dict[str, float]:
        return held_out_metrics(loss, wrapped, send_to_device(batch, loss.lm_head.weight.device))

    metrics = measure if batch else None
    before = measure(inner) if batch else {}
    options: dict[str, Any] = {"seed": _seed(recipe, "align"), "scale": recipe.scale, "progress": progress}
    result = run_gradient_stage(inner, loss, mixture, collator, stage, folder, evaluator=metrics, **options)
    return {**result, "held_out_before": before, "metrics": metrics}


def run_contrast(
    recipe: Recipe, model: SentenceTransformer, llm_tokenizer: Any, folder: Path, progress: bool
) -> dict[str, Any]:
    """Stage 2 of a model; arguments and result are those of `run_align` and `contrast`."""
    inner = lusifer_model(model)
    prepare_stage(recipe, "contrast", inner)
    limit = recipe.contrast.max_seq_length or recipe.model.max_seq_length
    return contrast(recipe, inner, model.tokenizer, limit, folder, progress)


def _guide(recipe: Recipe) -> EncoderAlone | SentenceTransformer | None:
    name, chosen = recipe.contrast.guide, recipe.model
    if name == "encoder":
        limit = recipe.contrast.max_seq_length or chosen.max_seq_length
        return EncoderAlone.from_name(chosen.encoder, revision=chosen.encoder_revision, max_seq_length=limit)
    return load_checkpoint(name) if name else None


def contrast(
    recipe: Recipe,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    folder: Path,
    progress: bool,
) -> dict[str, Any]:
    """Contrastive training of a model whose forward gives ``pooler_output``, also of a baseline.

    Args:
        recipe: Its stage 2 says data, steps and loss.
        model: The model; its trainable parameters have been chosen.
        tokenizer: Its tokenizer.
        max_seq_length: Tokens of a text.
        folder: Where checkpoints go.
        progress: Whether to show a progress bar.

    Returns:
        What `run_gradient_stage` does, and ``metrics``, a function of a model, or None without held-out rows.
    """
    stage: ContrastRecipe = recipe.contrast
    guide = _guide(recipe)
    loss = ContrastiveLoss(guide=guide, **stage.model_dump(include=_CONTRASTIVE))
    collator = ContrastCollator(tokenizer, max_seq_length, guide.preprocess if guide else None)
    mixture = stage_mixture(recipe, "contrast")
    batches = [collator(examples) for examples in mixture.held_out_examples()]

    def measure(wrapped: Any) -> dict[str, float]:
        device = next(model.parameters()).device
        mode = wrapped.training
        wrapped.eval()
        with torch.no_grad():
            losses = [float(loss(wrapped, send_to_device(batch, device))) for batch in batches]
        wrapped.train(mode)
        return {"loss": sum(losses) / len(losses)}

    metrics = measure if batches else None
    options: dict[str, Any] = {"seed": _seed(recipe, "contrast"), "scale": recipe.scale, "progress": progress}
    result = run_gradient_stage(model, loss, mixture, collator, stage, folder, evaluator=metrics, **options)
    return {**result, "metrics": metrics}
