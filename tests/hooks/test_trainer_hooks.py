"""Canaries for the private steps of ``transformers.Trainer`` that `lusifer.hooks.trainer` opens."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from lusifer.hooks.trainer import OpenTrainer

# Private method: the arguments the hook passes, and the public method it is opened under.
STEPS = {
    "_get_train_sampler": (["train_dataset"], "train_sampler"),
    "_prepare_inputs": (["inputs"], None),
    "_clip_grad_norm": (["model"], "clip_gradients"),
    "_load_from_checkpoint": (["resume_from_checkpoint", "model"], "load_weights"),
    "_save_optimizer_and_scheduler": (["output_dir"], "save_optimizer"),
    "_load_optimizer_and_scheduler": (["checkpoint"], "load_optimizer"),
    "_save_checkpoint": (["model", "trial"], "save_checkpoint"),
}


@pytest.mark.parametrize("name", STEPS)
def test_the_private_step_of_the_trainer_is_there(name):
    step = getattr(Trainer, name, None)
    assert step is not None, f"transformers.Trainer has no {name} any more: see lusifer.hooks.trainer"
    found = [parameter for parameter in inspect.signature(step).parameters if parameter != "self"]
    assert found == STEPS[name][0], f"transformers.Trainer.{name} takes {found} now: see lusifer.hooks.trainer"


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"x": torch.ones(2)}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, x):
        return {"loss": self.linear(x).sum()}


def test_the_trainer_takes_every_private_step(tmp_path):
    """An upgrade may keep a method and no longer call it; then training would go on without ours."""
    taken = set()

    def spy(name):
        def step(self, *args):
            taken.add(name)
            return getattr(OpenTrainer, name)(self, *args)

        return step

    opened = [name for _, name in STEPS.values() if name]
    spying = type("Spying", (OpenTrainer,), {name: spy(name) for name in opened})
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, save_steps=1, report_to="none", use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    spying(Model(), arguments, train_dataset=Rows()).train()
    assert set(opened) - taken == {"load_weights", "load_optimizer"}
    spying(Model(), arguments, train_dataset=Rows()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert set(opened) == taken, f"transformers.Trainer no longer calls {set(opened) - taken}"


def test_a_model_that_is_sharded_already_is_left_as_it_is(tmp_path):
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = OpenTrainer(Model(), arguments, train_dataset=Rows())
    assert {"is_distributed_loading_by_transformers", "place_model_on_device"} <= vars(trainer).keys()
    trainer.keep_as_sharded()
    source = inspect.getsource(Trainer._prepare_for_training)
    assert "is_distributed_loading_by_transformers" in source, "transformers would wrap a sharded model in DDP"
