"""One gradient stage: a trainer whose loss runs the passes itself.

1. The mixture is read in order; each rank takes its block of the global batch, so that the batches are the same
   on any number of ranks.
2. A gradient or loss that is NaN or infinite, or a loss above a limit, stops the run before the weights change.
3. A checkpoint is complete or not there. It holds only trainable parameters, and the optimizer's state by parameter
   name: any number of ranks, plain or sharded, can go on from it.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil
import torch
from accelerate.utils import recursively_apply
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from lusifer.errors import LusiferError, first_line
from lusifer.hooks.trainer import OpenTrainer
from lusifer.progress import bar
from lusifer.publishing import make_folder, put_in_place, sync_tree, write_json
from lusifer.recipes.schema import GradientStage
from lusifer.training.checkpoints import OPTIMIZER, RANKS, SCHEDULER, TRAINABLE, write_checksums
from lusifer.training.processes import any_process, wait_for_all
from lusifer.training.sharding import copy_into, in_full, without_reduction

_FULL = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
_SPREAD = dcp.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, ignore_frozen_params=True)


def _memory_mb(device: torch.device) -> float:
    """Peak memory in MB: of the device if it is an accelerator, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return peak_memory_mb()


def peak_memory_mb() -> float:
    """Peak memory of this process in MB."""
    if sys.platform == "win32":
        return float(psutil.Process().memory_info().peak_wset) / 1e6
    import resource  # There is none on Windows.

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3


class Progress(TrainerCallback):
    """A stage's steps as a `lusifer.progress.bar`, with the latest losses and the speed beside them.

    Args:
        what: The stage.
        steps: All its steps.
        show: Whether to show anything.
    """

    _SHOWN = {"loss": "loss {:.3f}", "eval_loss": "held-out {:.3f}", "tokens_per_second": "{:,.0f} tokens/s"}

    def __init__(self, what: str, steps: int, *, show: bool) -> None:
        self._open = partial(bar, steps, what, "step", show=show)
        self._bar: Any = None
        self._figures: dict[str, float] = {}

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begins the bar where the checkpoint stands."""
        self._bar = self._open(done=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves it on."""
        self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Shows what was logged last of losses and speed."""
        self._figures |= {key: value for key, value in (logs or {}).items() if key in self._SHOWN}
        if self._bar is not None:
            shown = [form.format(self._figures[key]) for key, form in self._SHOWN.items() if key in self._figures]
            self._bar.note(", ".join(shown))


class SaveOnSignal(TrainerCallback):
    """On SIGTERM (preemption), saves a checkpoint at the end of the running step and stops."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listens for the signal while a block runs, on the main thread; elsewhere does nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "asked", True))
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Asks for a checkpoint and the end, on every process if the signal reached one of them."""
        self.asked = any_process(self.asked)
        if self.asked:
            control.should_save = control.should_training_stop = True
        return control


class AtomicTrainer(OpenTrainer):
    """A trainer of a `LusiferModel` (or a baseline of the same interface) with one of our losses.

    Args:
        *args, **kwargs: As for ``transformers.Trainer``.
        stage: Its connector's learning rate and greatest loss.
        step_loss: `ContrastiveLoss` or `AlignmentLoss`.
        evaluator: Returns metrics of held-out rows, for ``eval_steps`` and the best checkpoint.
    """

    def __init__(
        self,
        *args: Any,
        stage: GradientStage,
        step_loss: nn.Module,
        evaluator: Callable[[nn.Module], dict[str, float]] | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.step_loss: Any = step_loss.to(self.args.device)
        self.stage, self.evaluator = stage, evaluator
        self.loss_sum = 0.0  # Of all steps, also of those before an interruption.
        self._batch: dict[str, Any] = {}
        self._since, self._tokens, self._paddings = time.monotonic(), 0.0, list[float]()

    def train_sampler(self, dataset: Any) -> SequentialSampler:
        """The mixture has its order already."""
        return SequentialSampler(dataset)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over the trainable parameters, connector and head at their own rate."""
        if self.optimizer is None:
            named = [(n, p) for n, p in (model or self.model).named_parameters() if p.requires_grad]
            own = [p for n, p in named if n.removeprefix("module.").startswith(("connector.", "head."))]
            chosen, rate = {id(p) for p in own}, self.args.learning_rate
            groups = [{"params": [p for _, p in named if id(p) not in chosen], "lr": rate}]
            groups.append({"params": own, "lr": self.stage.connector_learning_rate or rate})
            groups = [group for group in groups if group["params"]]
            self.optimizer = torch.optim.AdamW(groups, weight_decay=self.args.weight_decay)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One step of the loss, forward and backward.

        Args:
            model: The model or its distributed wrapper.
            inputs: This rank's batch, as the loss's ``step`` takes it.
            num_items_in_batch: Ignored.

        Raises:
            LusiferError: If the loss is NaN, infinite or above ``max_loss``.
        """
        model.train()
        self.step_loss.train()
        self._batch = inputs
        metrics = self.step_loss.step(
            model,
            self.to_device(inputs),
            backward=self.accelerator.backward,
            no_sync=without_reduction(model),
            progress=self.state.global_step / self.state.max_steps,
        )
        loss = metrics["loss"]
        if not math.isfinite(loss) or loss > (self.stage.max_loss or math.inf):
            self._stop(f"the loss is {loss:g}")
        self.loss_sum += loss
        self._tokens += metrics["tokens"]
        self._paddings.append(metrics["padding"])
        return torch.tensor(loss, device=self.args.device)

    def clip_gradients(self, model: nn.Module) -> Tensor:
        """Clips the gradients; stops the run if their norm is NaN or infinite."""
        norm = in_full(super().clip_gradients(model))
        if not math.isfinite(float(norm)):
            self._stop(f"the gradient norm is {float(norm):g}")
        return norm

    def _stop(self, reason: str) -> None:
        """Saves the batch and stops; the weights are still those of the step before."""
        path = Path(str(self.args.output_dir)).parent / f"bad-batch-{self.args.process_index}.json"
        parameters = dict(self.model.named_parameters())
        not_finite = [n for n, p in parameters.items() if p.grad is not None and not in_full(p.grad).isfinite().all()]
        state = {"step": self.state.global_step, "reason": reason, "gradients_not_finite": not_finite}
        make_folder(path.parent)
        write_json(path, {**state, "batch": recursively_apply(Tensor.tolist, self._batch)}, indent=None)
        raise LusiferError(
            f"step {self.state.global_step + 1}: {reason}; stopped before the weights changed. The batch is in {path}; "
            "look for broken records there, lower learning_rate or max_grad_norm, then run the same command again"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds tokens per second (all ranks), the share of padding and memory to what is logged."""
        if "loss" in logs:
            now = time.monotonic()
            logs["tokens_per_second"] = round(self._tokens * self.args.world_size / max(now - self._since, 1e-9), 1)
            logs["padding"] = round(fmean(self._paddings), 4) if self._paddings else 0.0
            logs["memory_mb"] = round(_memory_mb(self.args.device), 1)
            self._since, self._tokens, self._paddings = now, 0.0, []
        if "train_loss" in logs:  # transformers sums the losses since an interruption, over the steps of the whole run.
            logs["train_loss"] = self.loss_sum / max(1, self.state.global_step)
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Metrics of the held-out rows, each named ``eval_...``."""
        assert self.evaluator is not None
        metrics = {f"eval_{name}": value for name, value in self.evaluator(self.model_wrapped).items()}
        self.log(dict(metrics))
        return metrics

    def trained_parameters(self) -> dict[str, Tensor]:
        """The trainable parameters by name, in full, on every rank's CPU."""
        return {n: in_full(p).cpu().contiguous() for n, p in self.model.named_parameters() if p.requires_grad}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the trainable parameters: every rank gathers, the first one writes."""
        state = self.trained_parameters()
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            facts = {"loss_sum": repr(self.loss_sum), RANKS: str(self.args.world_size)}
            save_file(state, folder / TRAINABLE, metadata=facts)

    def load_weights(self, checkpoint: str) -> None:
        """Reads the trainable parameters and the sum of the losses.

        Raises:
            LusiferError: If the file is damaged or of another model.
        """
        try:
            with safe_open(Path(checkpoint) / TRAINABLE, "pt") as file:
                self.loss_sum = float(file.metadata()["loss_sum"])
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise LusiferError(f"cannot read the checkpoint {checkpoint!r}: {error}; remove it") from error
        load_trained(self.model, state)

    def save_optimizer(self, folder: str) -> None:
        """Writes the optimizer's state by parameter name, and the scheduler's."""
        state = dcp.get_optimizer_state_dict(self.model, self.optimizer, options=_FULL)
        if self.args.should_save:
            torch.save(state, os.path.join(folder, OPTIMIZER))
            torch.save(self.lr_scheduler.state_dict(), os.path.join(folder, SCHEDULER))

    def load_optimizer(self, checkpoint: str) -> None:
        """Reads the optimizer's state, of any number of ranks, and the scheduler's."""
        state = torch.load(os.path.join(checkpoint, OPTIMIZER), map_location="cpu", weights_only=True)
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        state["state"] = {name: moments for name, moments in state["state"].items() if name in trained}
        for group in state["param_groups"]:
            group["params"] = [name for name in group["params"] if name in trained]
        options = _SPREAD if self.args.world_size > 1 else _FULL
        dcp.set_optimizer_state_dict(self.model, self.optimizer, state, options=options)
        schedule = torch.load(os.path.join(checkpoint, SCHEDULER), map_location="cpu", weights_only=True)
        self.lr_scheduler.load_state_dict(schedule)

    def save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes a checkpoint under another name, syncs and renames it; arguments as for ``Trainer``.

        Raises:
            LusiferError: If it cannot be written.
        """
        output = str(self.args.output_dir)
        folder = f"checkpoint-{self.state.global_step}"
        # The same name on every rank: each writes the state of its own random generators there.
        staging = os.path.join(output, f".saving-{self.state.global_step}")
        try:
            os.makedirs(staging, exist_ok=True)
            self.args.output_dir = staging
            super().save_checkpoint(model, trial)
            sync_tree(Path(staging))  # What this rank wrote; another machine could not.
            wait_for_all()
            if self.args.should_save:
                write_checksums(Path(staging, folder))
                put_in_place(Path(staging, folder), Path(output, folder))
                os.rmdir(staging)
        except (OSError, SafetensorError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk.
            shutil.rmtree(staging, ignore_errors=True)
            raise LusiferError(f"cannot write a checkpoint into {output!r}: {first_line(error)}") from error
        finally:
            self.args.output_dir = output
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = os.path.join(output, folder)
        if self.args.should_save:
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            # By their steps: a clock may go back.
            rotate_checkpoints(output, save_total_limit=limit, best_model_checkpoint=best, use_mtime=False)
        wait_for_all()


def _same(parameter: Tensor, value: Tensor) -> bool:
    return torch.equal(in_full(parameter).cpu(), value)


def load_trained(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copies trained parameters into a model, sharded or not.

    Args:
        model: The model; its trainable parameters have been chosen.
        state: Name to tensor, in full and of the parameter's shape.

    Raises:
        LusiferError: If the names are not those of the trainable parameters.
    """
    named = dict(model.named_parameters())
    parameters = {name: p for name, p in named.items() if p.requires_grad}
    # Earlier versions kept a head in stage 1, which got no gradient.
    idle = [name for name in state if name in named and name not in parameters and name.startswith("head.")]
    state = {name: value for name, value in state.items() if name not in idle or not _same(named[name], value)}
    if parameters.keys() != state.keys():
        odd = sorted(parameters.keys() ^ state.keys())
        raise LusiferError(f"the checkpoint does not fit the model: {len(odd)} tensors differ, {odd[0]} first")
    with torch.no_grad():
        for name, parameter in parameters.items():
            copy_into(parameter, state[name])
