"""What we use of ``transformers.Trainer`` that is not public: its private steps, opened under public names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import safe_globals


class OneDevice(TrainingArguments):
    """Training arguments of a process that computes on one device, whatever else it sees; overrides ``n_gpu``.

    With several GPUs in sight and no torchrun, ``Trainer`` would multiply the batch by their number and split it over
    threads (``DataParallel``).
    """

    @property
    def n_gpu(self) -> int:
        """0 or 1."""
        return min(1, super().n_gpu)


def read_random_state(path: Path) -> dict[str, Any]:
    """The states of a process's random generators that ``Trainer._save_rng_state`` wrote; pickled NumPy arrays."""
    with safe_globals():
        state: dict[str, Any] = torch.load(path, weights_only=True)
    return {name: state[name] for name in ("python", "numpy", "cpu")}


class OpenTrainer(Trainer):
    """A ``Trainer`` whose private steps are public methods, for subclasses to override."""

    optimizer: Any
    lr_scheduler: Any

    def keep_as_sharded(self) -> None:
        """Has the model, sharded since the trainer was made, neither moved nor wrapped.

        Sets what ``Trainer`` sets for models that transformers shards as it loads them; from the start it would refuse
        to save an optimizer's state, which `save_optimizer` does itself.
        """
        self.is_distributed_loading_by_transformers = True
        self.place_model_on_device = False

    def train_sampler(self, dataset: Any) -> Sampler | None:
        """The order of the training set's rows; opens ``Trainer._get_train_sampler``."""
        return super()._get_train_sampler(dataset)

    def to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch on the training device; calls ``Trainer._prepare_inputs``."""
        return self._prepare_inputs(batch)

    def clip_gradients(self, model: nn.Module) -> Tensor:
        """Clips the gradients and returns their norm before it, a scalar; opens ``Trainer._clip_grad_norm``."""
        return super()._clip_grad_norm(model)

    def load_weights(self, checkpoint: str) -> None:
        """Reads a checkpoint's weights into the model; opens ``Trainer._load_from_checkpoint``."""
        super()._load_from_checkpoint(checkpoint)

    def save_optimizer(self, folder: str) -> None:
        """Writes optimizer and scheduler; opens ``Trainer._save_optimizer_and_scheduler``."""
        super()._save_optimizer_and_scheduler(folder)

    def load_optimizer(self, checkpoint: str) -> None:
        """Reads optimizer and scheduler; opens ``Trainer._load_optimizer_and_scheduler``."""
        super()._load_optimizer_and_scheduler(checkpoint)

    def save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes ``checkpoint-STEP`` below ``args.output_dir``; opens ``Trainer._save_checkpoint``."""
        super()._save_checkpoint(model, trial)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        return self.train_sampler(self.train_dataset if train_dataset is None else train_dataset)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        return self.clip_gradients(model)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.load_weights(resume_from_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.save_optimizer(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.load_optimizer(checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.save_checkpoint(model, trial)
