"""One gradient stage: a trainer whose checkpoints are small, whole or not there, and can be gone on from."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from torch import nn
from transformers import PrinterCallback, ProgressCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from lusifer.errors import LusiferError
from lusifer.recipes import Optimisation

logger = logging.getLogger(__name__)

_LEARNING = "learning.safetensors"


class _Bar(ProgressCallback):
    """The progress bar, with the loss beside it instead of lines of figures."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=logs["loss"])


class AtomicTrainer(SentenceTransformerTrainer):
    """A trainer whose checkpoints appear whole or not at all, and hold only what learns.

    A resumed run has built its model already, so reading the frozen backbones back from a
    checkpoint would only cost time and memory.

    Attributes:
        loss_sum: Sum of the losses of all steps, also of those before an interruption.
    """

    loss_sum = 0.0

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One step, its loss counted."""
        loss = super().training_step(*args, **kwargs)
        self.loss_sum += float(loss)
        return loss

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Gathers nothing: checkpoints carry their provenance in the configuration, not in a generated card."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        learning = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        save_file(learning, folder / _LEARNING, metadata={"loss_sum": repr(self.loss_sum)})

    def _load_from_checkpoint(self, checkpoint_path: str) -> None:
        try:
            with safe_open(Path(checkpoint_path) / _LEARNING, "pt") as file:
                self.loss_sum = float(file.metadata()["loss_sum"])
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise LusiferError(f"cannot read the checkpoint {checkpoint_path!r}: {error}; remove it") from error
        self.model.load_state_dict(state, strict=False)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        output = str(self.args.output_dir)
        try:
            os.makedirs(output, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=output, prefix=".saving-") as staging:
                self.args.output_dir = staging
                super()._save_checkpoint(model, trial)
                for checkpoint in Path(staging).iterdir():
                    os.replace(checkpoint, Path(output) / checkpoint.name)
        except (OSError, SafetensorError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk.
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise LusiferError(f"cannot write a checkpoint into {output!r}: {reason}") from error
        finally:
            self.args.output_dir = output
        rotate_checkpoints(output_dir=output, save_total_limit=self.args.save_total_limit, use_mtime=True)


def optimise(
    model: SentenceTransformer,
    loss: nn.Module,
    dataset: Dataset,
    stage: Optimisation,
    folder: Path,
    *,
    seed: int,
    collator: Any = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Runs one gradient stage, from its last checkpoint if there is one.

    Args:
        model: The model; what learns has been chosen already.
        loss: Its loss.
        dataset: One column per loss input.
        stage: Steps, batch size, learning rates.
        folder: Where checkpoints go.
        seed: Seed of data order, masking and dropout.
        collator: Replaces Sentence Transformers' own.
        progress: Whether to show a progress bar.

    Returns:
        The logged history and the final mean loss.

    Raises:
        LusiferError: If the data holds less than one batch.
    """
    if len(dataset) < stage.batch_size:
        raise LusiferError(f"the data has {len(dataset)} rows, fewer than one batch of {stage.batch_size}")
    mapping = {}
    if stage.connector_learning_rate is not None and stage.connector:
        mapping[r"\.(connector|head)\."] = stage.connector_learning_rate
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        max_steps=stage.steps,
        per_device_train_batch_size=stage.batch_size,
        learning_rate=stage.learning_rate,
        learning_rate_mapping=mapping,
        warmup_steps=stage.warmup_steps,
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        save_strategy="steps",
        save_steps=stage.save_steps,
        save_total_limit=2,
        logging_steps=stage.logging_steps,
        dataloader_drop_last=True,
        report_to="none",
        disable_tqdm=not progress,
        seed=seed,
        data_seed=seed,
    )
    trainer = AtomicTrainer(model=model, args=arguments, train_dataset=dataset, loss=loss, data_collator=collator)
    # Both write the losses to standard output, which belongs to --json.
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(_Bar)
    set_seed(seed)
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if last:
        logger.info("resuming from %s", last)
    trainer.train(resume_from_checkpoint=last)
    return {"loss": trainer.loss_sum / stage.steps, "history": trainer.state.log_history}
