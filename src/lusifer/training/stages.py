"""The three stages of a recipe, each as a function of the model that the one before left.

Stages 1 and 2 run on one process or many, and go on from their last checkpoint if there is one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from accelerate.utils import send_to_device
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import PreTrainedTokenizerBase, PrinterCallback, set_seed

from lusifer.data.collate import AlignCollator, ContrastCollator, column_texts, llm_preprocess, source_texts
from lusifer.data.mixture import Mixture
from lusifer.data.prompts import Role, prompt_for
from lusifer.data.records import read_texts
from lusifer.errors import LusiferError
from lusifer.hooks.trainer import OneDevice
from lusifer.loading import load_checkpoint
from lusifer.model.backbone_alone import EncoderAlone, SentenceEncoder, encoder_alone
from lusifer.model.backbones import keep_layers, load_tokenizer, truncate_llm
from lusifer.model.modeling import LusiferModel
from lusifer.model.sentence_transformer import copy_prompts, lusifer_model, to_sentence_transformer
from lusifer.publishing import make_folder
from lusifer.recipes.schema import GradientStage, ModelRecipe, Recipe
from lusifer.training.alignment import AlignmentLoss, held_out_metrics, load_lm_head
from lusifer.training.checkpoints import last_intact
from lusifer.training.contrastive import ContrastiveLoss
from lusifer.training.precision import hold_trained_in_float32
from lusifer.training.processes import first_process_says, processes
from lusifer.training.sharding import shard
from lusifer.training.teaching import vectors_of
from lusifer.training.trainer import AtomicTrainer, Progress, SaveOnSignal
from lusifer.training.warm_start import fit_connector, start_connector

logger = logging.getLogger(__name__)

STAGES = ("warm_start", "align", "contrast")
_HELD_OUT = 32  # Rows that are never trained on.
# Fields of stage 2 that are arguments of its loss, and fields of a stage that are training arguments.
_CONTRASTIVE = {
    "temperature", "symmetric", "matryoshka_dims", "guide_margin", "infonce_weight", "teacher_weight", "distill",
    "distill_temperature", "max_tokens", "graph_tokens",
}  # fmt: skip
_ARGUMENTS = {
    "learning_rate", "weight_decay", "max_grad_norm", "save_steps", "save_total_limit", "logging_steps",
}  # fmt: skip


def build_model(recipe: ModelRecipe, *, device: torch.device | None = None) -> SentenceTransformer:
    """The untrained model of a recipe.

    Args:
        recipe: The recipe's model.
        device: Where it is loaded to; the CPU when None.

    Raises:
        LusiferError: If a backbone cannot be loaded.
    """
    model = LusiferModel.from_backbones(**recipe.architecture(), device=device)
    if recipe.encoder_lora is not None:
        model.add_adapter("encoder", recipe.encoder_lora.fields())
    wrapped = to_sentence_transformer(
        model, load_tokenizer("encoder", recipe.encoder, revision=recipe.encoder_revision)
    )
    if model.config.adapted:
        # Its space is that of texts behind its prompts.
        copy_prompts(wrapped, recipe.encoder, revision=recipe.encoder_revision)
    wrapped.prompts.update(recipe.prompts)
    return wrapped


def _encoder_prompts(model: SentenceTransformer) -> dict[Role, str]:
    """What stands in front of training texts: an adapted encoder's prompts; nothing else but an instruction."""
    if not lusifer_model(model).config.adapted:
        return {}
    return {"query": prompt_for(model, "query"), "document": prompt_for(model, "document")}


def _llm_tokenizer(recipe: ModelRecipe) -> Any:
    return load_tokenizer("llm", recipe.llm, revision=recipe.llm_revision)


def run_warm_start(recipe: Recipe, model: SentenceTransformer, progress: bool) -> dict[str, Any]:
    """Stage 0: ``explained``, the share of held-out variance that the map explains, and the numbers of ``words``.

    Args:
        recipe: The recipe.
        model: The untrained model; its connector is changed in place.
        progress: Whether to show a progress bar.
    """
    settings, source, inner = recipe.warm_start, recipe.warm_start_data(), lusifer_model(model)
    assert source is not None
    texts = read_texts(source, settings.texts)
    options: dict[str, Any] = {"ridge": settings.ridge, "spectrum": settings.spectrum, "progress": progress}
    start = fit_connector(inner, model.tokenizer, _llm_tokenizer(recipe.model), texts, **options)
    start_connector(inner, start, scale=settings.scale)
    logger.info("stage 0: %.1f%% of held-out variance explained, %d words", 100 * start.explained, start.words)
    return {"explained": start.explained, "words": start.words, "held_out_words": start.held_out_words}


def prepare_stage(recipe: Recipe, name: str, model: LusiferModel) -> None:
    """Gives a model the adapters and the depth of a stage, in place, and chooses its trainable parameters.

    These are float32 from then on; whoever saves the model gives them back their data types.

    Args:
        recipe: The recipe.
        name: ``align`` or ``contrast``.
        model: The model as the stage before left it.
    """
    lora, depth, config = recipe.model.llm_lora, recipe.contrast.llm_layers, model.config
    if name == "contrast":
        if depth is not None and depth != config.llm_config.num_hidden_layers:
            truncate_llm(model.llm, depth)
            if model.llm.config is not config.llm_config:
                keep_layers(config.llm_config, depth)
        if lora is not None and not config.llm_adapter:
            model.add_adapter("llm", lora.fields())
    stage: GradientStage = getattr(recipe, name)
    train_llm = name == "contrast" and lora is not None
    model.set_trainable(encoder=stage.train_encoder, connector=stage.train_connector, llm=train_llm)
    if name == "align":
        # Stage 1 reads the states before it, and a parameter without a gradient stops distributed training.
        if model.head is not None:
            model.head.requires_grad_(False)
        if config.adapted and recipe.align.teacher is None:
            model.encoder.head.requires_grad_(False)
    hold_trained_in_float32(model)


def stage_mixture(recipe: Recipe, name: str) -> Mixture:
    """The examples of the stage ``align`` or ``contrast``, with some rows held out of training."""
    stage: GradientStage = getattr(recipe, name)
    steps, batch_size = stage.steps, stage.batch_size
    return Mixture(stage.data, steps=steps, batch_size=batch_size, seed=_seed(recipe, name), held_out=_HELD_OUT)


def _seed(recipe: Recipe, name: str) -> int:
    return recipe.seed + STAGES.index(name)


def run_align(recipe: Recipe, model: SentenceTransformer, folder: Path, progress: bool) -> dict[str, Any]:
    """Stage 1; arguments and result as for `contrast`, and ``held_out_before``: the metrics before the stage."""
    stage, inner = recipe.align, lusifer_model(model)
    prepare_stage(recipe, "align", inner)
    loss = AlignmentLoss(
        load_lm_head(recipe.model.llm, inner.llm, revision=recipe.model.llm_revision),
        inner.llm_embeddings().float().mean(dim=0),
        mask_probability=stage.mask_probability,
        max_tokens=stage.max_tokens,
        teacher_weight=stage.teacher_weight,
        seed=_seed(recipe, "align"),
    )
    limit = stage.max_seq_length or recipe.model.max_seq_length
    target = llm_preprocess(_llm_tokenizer(recipe.model), stage.target_max_seq_length)
    mixture = stage_mixture(recipe, "align")
    teacher = vectors_of(stage.teacher, mixture, source_texts, progress=progress)
    collator = AlignCollator(model.tokenizer, limit, target, _encoder_prompts(model), teacher)
    examples = [example for several in mixture.held_out_examples() for example in several]
    batch = collator(examples) if len(examples) > 1 else None

    def measure(wrapped: Any) -> dict[str, float]:
        return held_out_metrics(loss, wrapped, send_to_device(batch, loss.lm_head.weight.device))

    before = measure(inner) if batch else {}
    metrics = measure if batch else None
    result = _train(recipe, "align", inner, loss, mixture, collator, folder, metrics, progress)
    return {**result, "held_out_before": before}


def run_contrast(recipe: Recipe, model: SentenceTransformer, folder: Path, progress: bool) -> dict[str, Any]:
    """Stage 2; arguments and result as for `contrast`."""
    prepare_stage(recipe, "contrast", lusifer_model(model))
    return contrast(recipe, lusifer_model(model), model.tokenizer, folder, progress, prompts=_encoder_prompts(model))


def _guide(recipe: Recipe, max_seq_length: int) -> EncoderAlone | SentenceEncoder | SentenceTransformer | None:
    name, chosen = recipe.contrast.guide, recipe.model
    if name == "encoder":
        options: dict[str, Any] = {"revision": chosen.encoder_revision, "dtype": chosen.encoder_dtype}
        return encoder_alone(chosen.encoder, max_seq_length=max_seq_length, **options)
    return load_checkpoint(name) if name else None


def _guide_preprocess(guide: EncoderAlone | SentenceEncoder | SentenceTransformer) -> Any:
    """Maps texts and their roles to a guide's features; it reads its own prompts, if it has any."""
    if isinstance(guide, EncoderAlone):
        return lambda texts, roles: guide.preprocess(texts)
    model = guide.model if isinstance(guide, SentenceEncoder) else guide
    prompts = {role: prompt_for(model, role) for role in get_args(Role)}
    return lambda texts, roles: model.preprocess(
        [prompts[role] + text for text, role in zip(texts, roles, strict=True)]
    )


def contrast(
    recipe: Recipe,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    progress: bool,
    *,
    prompts: Mapping[Role, str] | None = None,
) -> dict[str, Any]:
    """Contrastive training of a model whose forward gives ``pooler_output``, also of a baseline.

    Args:
        recipe: Its stage 2 says data, steps and loss.
        model: The model; its trainable parameters have been chosen.
        tokenizer: Its tokenizer.
        folder: Where checkpoints go.
        progress: Whether to show a progress bar.
        prompts: What the model reads in front of a text, by role.

    Returns:
        ``history``, what was logged; ``loss``, the mean over all steps; ``trained``, name to tensor on the CPU;
        ``metrics``, a function of a model that measures held-out rows, or None without such rows;
        ``held_out_before``, what it measured before the stage; with a teacher, ``teacher_hash``.

    Raises:
        LusiferError: If the batch does not divide by the number of processes, a checkpoint cannot be read or
            written, or training has to stop.
    """
    limit = recipe.contrast.max_seq_length or recipe.model.max_seq_length
    guide = _guide(recipe, limit)
    loss = ContrastiveLoss(guide=guide, **recipe.contrast.model_dump(include=_CONTRASTIVE))
    mixture = stage_mixture(recipe, "contrast")
    teacher = vectors_of(recipe.contrast.teacher, mixture, column_texts, progress=progress)
    collator = ContrastCollator(tokenizer, limit, _guide_preprocess(guide) if guide else None, prompts or {}, teacher)
    batches = [collator(examples) for examples in mixture.held_out_examples()]

    def measure(wrapped: Any) -> dict[str, float]:
        device = next(model.parameters()).device
        mode = wrapped.training
        wrapped.eval()
        moved = [send_to_device(batch, device) for batch in batches]
        with torch.no_grad():
            figures = {"loss": [float(loss(wrapped, batch)) for batch in moved]}
        if teacher is not None:
            figures["teacher_cosine"] = [loss.teacher_cosine(wrapped, batch) for batch in moved]
        wrapped.train(mode)
        return {name: sum(values) / len(values) for name, values in figures.items()}

    metrics = measure if batches else None
    loss.to(next(model.parameters()).device)
    before = measure(model) if batches else {}
    result = _train(recipe, "contrast", model, loss, mixture, collator, folder, metrics, progress)
    result["held_out_before"] = before
    return result if teacher is None else {**result, "teacher_hash": teacher.hash}


def _train(
    recipe: Recipe,
    name: str,
    model: nn.Module,
    loss: nn.Module,
    mixture: Mixture,
    collator: Any,
    folder: Path,
    metrics: Callable[[nn.Module], dict[str, float]] | None,
    progress: bool,
) -> dict[str, Any]:
    """Runs a gradient stage, from its last checkpoint if there is one; the result is that of `contrast`."""
    stage: GradientStage = getattr(recipe, name)
    eval_steps = stage.eval_steps if metrics else None
    arguments = _training_arguments(recipe, name, folder, eval_steps)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder.parent.parent / "logs" / folder.parent.name)
    listener, state = SaveOnSignal(), processes()
    if state.is_main_process:  # Before the trainer makes it, which syncs nothing.
        make_folder(folder)
    trainer = AtomicTrainer(
        model, arguments, stage=stage, step_loss=loss, evaluator=metrics, train_dataset=mixture, eval_dataset=[],
        data_collator=collator, callbacks=[listener],
    )  # fmt: skip
    if recipe.scale.strategy == "fsdp2" and state.num_processes > 1:
        shard(model, device=state.device, ranks=state.num_processes, cpu_offload=recipe.scale.cpu_offload)
        trainer.keep_as_sharded()
    # It writes the losses to standard output, which belongs to --json.
    trainer.remove_callback(PrinterCallback)
    set_seed(arguments.seed)
    last = first_process_says(lambda: last_intact(folder))
    if last:
        logger.info("resuming from %s", last)
    shown = Progress(f"stage {STAGES.index(name)}, {name}", stage.steps, show=progress)
    trainer.add_callback(shown)
    with listener.listening(), shown:
        trainer.train(resume_from_checkpoint=last and str(last))
    if listener.asked:
        raise LusiferError("stopped by SIGTERM; a checkpoint is saved; run the same command again to resume")
    history, trained = trainer.state.log_history, trainer.trained_parameters()
    return {"loss": trainer.loss_sum / stage.steps, "history": history, "trained": trained, "metrics": metrics}


def _training_arguments(recipe: Recipe, name: str, folder: Path, eval_steps: int | None) -> OneDevice:
    """A stage's settings as transformers knows them."""
    stage: GradientStage = getattr(recipe, name)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if stage.batch_size % ranks:
        raise LusiferError(f"batch_size is {stage.batch_size}, which is not divisible by {ranks} processes")
    visible = torch.accelerator.device_count()
    if ranks == 1 and visible > 1:
        logger.warning(
            "%d GPUs are visible but only one is used; start with torchrun --nproc-per-node %d", visible, visible
        )
    return OneDevice(
        output_dir=str(folder),
        max_steps=stage.steps,
        per_device_train_batch_size=stage.batch_size // ranks,
        lr_scheduler_type=stage.schedule,
        warmup_steps=stage.warmup_steps or round(stage.warmup_share * stage.steps),
        bf16=stage.precision == "bfloat16",
        gradient_checkpointing=stage.gradient_checkpointing,
        eval_strategy="steps" if eval_steps else "no",
        eval_steps=eval_steps,
        metric_for_best_model=stage.best_metric,
        greater_is_better=stage.best_metric is not None and stage.best_metric.endswith(("accuracy", "cosine")),
        report_to=list(stage.report_to) or "none",
        remove_unused_columns=False,
        dataloader_drop_last=True,
        ddp_find_unused_parameters=False,
        seed=_seed(recipe, name),
        data_seed=_seed(recipe, name),
        use_cpu=not torch.accelerator.is_available(),
        disable_tqdm=True,  # In favour of `Progress`.
        **stage.model_dump(include=_ARGUMENTS),
    )
