"""Runs one gradient stage on one process or many, from its last checkpoint if there is one."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, ProgressCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from lusifer.data.mixture import Mixture
from lusifer.errors import LusiferError
from lusifer.hooks.trainer import layer_class_names
from lusifer.recipes.schema import GradientStage, ScaleRecipe
from lusifer.training.trainer import AtomicTrainer, Bar, SaveOnSignal

logger = logging.getLogger(__name__)


def run_gradient_stage(
    model: nn.Module,
    loss: nn.Module,
    mixture: Mixture,
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]],
    stage: GradientStage,
    folder: Path,
    *,
    seed: int,
    scale: ScaleRecipe | None = None,
    evaluator: Callable[[nn.Module], dict[str, float]] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Runs one gradient stage, from its last checkpoint if there is one.

    Args:
        model: The model; its trainable parameters have been chosen.
        loss: Its loss.
        mixture: Its examples, ``steps * batch_size`` of them.
        collator: Makes a batch of examples.
        stage: Steps, batch size, learning rates.
        folder: Where checkpoints go.
        seed: Seed of dropout.
        scale: How several processes share the work.
        evaluator: Returns metrics of held-out rows.
        progress: Whether to show a progress bar.

    Returns:
        ``history``, what was logged; ``loss``, the mean over all steps; ``trained``, name to tensor on the CPU.

    Raises:
        LusiferError: If the batch does not divide by the number of processes, a checkpoint cannot be read or
            written, or training has to stop.
    """
    arguments = training_arguments(model, stage, folder, seed=seed, scale=scale, evaluate=evaluator is not None)
    arguments.disable_tqdm = not progress
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder.parent.parent / "logs" / folder.parent.name)
    listener = SaveOnSignal()
    trainer = AtomicTrainer(
        model=model,
        args=arguments,
        train_dataset=mixture,
        eval_dataset=[],
        data_collator=collator,
        callbacks=[listener],
        step_loss=loss,
        connector_learning_rate=stage.connector_learning_rate,
        max_loss=stage.max_loss,
        evaluator=evaluator,
    )
    # Both write the losses to standard output, which belongs to --json.
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(Bar)
    set_seed(seed)
    if trainer.args.should_save:
        for stale in folder.glob(".saving-*"):  # Left by a process that was killed.
            shutil.rmtree(stale, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if last:
        logger.info("resuming from %s", last)
    with listener.listening():
        trainer.train(resume_from_checkpoint=last)
    if listener.asked:
        raise LusiferError("stopped by SIGTERM; a checkpoint is saved, and the same command goes on from it")
    return {
        "loss": trainer.loss_sum / stage.steps,
        "history": trainer.state.log_history,
        "trained": trainer.trained_parameters(),
    }


def training_arguments(
    model: nn.Module, stage: GradientStage, folder: Path, *, seed: int, scale: ScaleRecipe | None, evaluate: bool
) -> TrainingArguments:
    """A stage's settings as transformers knows them.

    Args:
        model: The model, whose layers are the shards of FSDP2.
        stage: Steps, batch size, learning rates.
        folder: Where checkpoints go.
        seed: Seed of dropout.
        scale: How several processes share the work.
        evaluate: Whether there are held-out rows to measure.

    Raises:
        LusiferError: If the batch does not divide by the number of processes.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if stage.batch_size % ranks:
        raise LusiferError(f"batch_size is {stage.batch_size}, which {ranks} processes cannot share evenly")
    sharded: dict[str, Any] = {}
    if scale is not None and scale.strategy == "fsdp2" and ranks > 1:
        sharded = {"fsdp": "full_shard", "fsdp_config": fsdp_config(model, scale)}
    eval_steps = stage.eval_steps if evaluate else None
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=stage.steps,
        per_device_train_batch_size=stage.batch_size // ranks,
        learning_rate=stage.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=stage.warmup_steps,
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        bf16=stage.precision == "bfloat16",
        gradient_checkpointing=stage.gradient_checkpointing and not sharded,
        save_strategy="steps",
        save_steps=stage.save_steps,
        save_total_limit=stage.save_total_limit,
        eval_strategy="steps" if eval_steps else "no",
        eval_steps=eval_steps,
        metric_for_best_model=stage.best_metric,
        greater_is_better=stage.best_metric is not None and "accuracy" in stage.best_metric,
        logging_steps=stage.logging_steps,
        report_to=list(stage.report_to) or "none",
        remove_unused_columns=False,
        dataloader_drop_last=True,
        ddp_find_unused_parameters=False,
        seed=seed,
        data_seed=seed,
        use_cpu=not torch.accelerator.is_available(),
        **sharded,
    )


def fsdp_config(model: nn.Module, scale: ScaleRecipe) -> dict[str, Any]:
    """FSDP2 settings: one shard per layer of encoder and LLM.

    Args:
        model: A `LusiferModel`, or a baseline with an ``llm``.
        scale: Whether shards are kept in the host's memory.
    """
    parts = [getattr(model, name, None) for name in ("encoder", "llm")]
    named = set().union(*(layer_class_names(part) for part in parts if part is not None))
    present = {type(module).__name__ for module in model.modules()}
    return {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": sorted(named & present),
        "reshard_after_forward": True,
        "cpu_offload": scale.cpu_offload,
        "state_dict_type": "FULL_STATE_DICT",
    }
