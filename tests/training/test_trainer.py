"""What stops a run, what is kept, and that a killed process loses nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

import lusifer.training.stages
from lusifer import LusiferError
from lusifer.recipes.schema import Recipe
from lusifer.training.run import check_inputs, train
from support.launch import run
from support.texts import TEXTS


@pytest.fixture
def tree(tiny_encoder, tiny_llm, tmp_path, monkeypatch):
    """A recipe of stage 2 alone, as a dictionary."""
    monkeypatch.setenv("LUSIFER_CACHE", str(tmp_path / "cache"))
    pairs = [{"query": text, "positive": text.upper()} for text in TEXTS]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return {
        "output": str(tmp_path / "run"),
        "model": {
            "encoder": tiny_encoder,
            "llm": tiny_llm,
            "max_seq_length": 32,
            "llm_lora": {"r": 2, "alpha": 4, "dropout": 0.1},
        },
        "warm_start": {"enabled": False},
        "contrast": {
            "data": [{"source": str(tmp_path / "pairs.jsonl")}],
            "steps": 6,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "save_steps": 2,
            "logging_steps": 1,
        },
    }


def spoil(monkeypatch, call, change):
    """Changes what the loss's step number ``call`` gives."""
    loss = lusifer.training.stages.ContrastiveLoss
    real, calls = loss.step, [0]

    def step(self, model, *args, **kwargs):
        calls[0] += 1
        metrics = real(self, model, *args, **kwargs)
        return change(model, metrics) if calls[0] == call else metrics

    monkeypatch.setattr(loss, "step", step)


def no_number(model, metrics):
    return {**metrics, "loss": float("nan")}


def explodes(model, metrics):
    return {**metrics, "loss": 1e4}


def bad_gradient(model, metrics):
    next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("inf"))
    return metrics


@pytest.mark.parametrize(
    ("change", "words"),
    [(no_number, "the loss is nan"), (explodes, "the loss is 10000"), (bad_gradient, "the gradient norm is")],
)
def test_a_run_that_goes_wrong_stops_before_the_weights_change(tree, monkeypatch, tmp_path, change, words):
    tree["contrast"]["max_loss"] = 100.0
    recipe = Recipe.model_validate(tree)
    with monkeypatch.context() as patch:
        spoil(patch, 4, change)
        with pytest.raises(LusiferError, match=f"step 4: {words}.*bad-batch"):
            train(recipe, progress=False)
    stage = tmp_path / "run" / "contrast"
    found = json.loads((stage / "bad-batch-0.json").read_text())
    assert found["step"] == 3 and len(found["batch"]["positions"]) == 4 and found["batch"]["input_ids"]
    assert bool(found["gradients_not_finite"]) == (change is bad_gradient)
    assert [path.name for path in (stage / "checkpoints").iterdir()] == ["checkpoint-2"]
    # Mended, the same command ends where a run without the accident does.
    train(recipe, progress=False)
    tree["output"] = str(tmp_path / "whole")
    train(Recipe.model_validate(tree), progress=False)
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_the_best_checkpoint_stays_beside_the_last(tree, monkeypatch, tmp_path):
    tree["contrast"] |= {"eval_steps": 1, "save_steps": 1, "save_total_limit": 2, "best_metric": "loss"}
    values = iter([5.0, 3.0, 1.0, 2.0, 2.5, 2.0, 4.0, 4.0])  # The first before the stage.
    real = lusifer.training.stages.ContrastiveLoss.forward

    def forward(self, *args, **kwargs):
        real(self, *args, **kwargs)
        return torch.tensor(next(values, 4.0))

    monkeypatch.setattr(lusifer.training.stages.ContrastiveLoss, "forward", forward)
    train(Recipe.model_validate(tree), progress=False)
    kept = {path.name for path in (tmp_path / "run" / "contrast" / "checkpoints").iterdir()}
    assert kept == {"checkpoint-2", "checkpoint-6"}
    report = json.loads((tmp_path / "run" / "contrast" / "stage.json").read_text())
    found = [row["eval_loss"] for row in report["history"] if "eval_loss" in row]
    assert found[:6] == [3.0, 1.0, 2.0, 2.5, 2.0, 4.0]
    assert report["held_out"] == {"loss": 4.0}


def test_the_log_says_how_many_rows_a_best_metric_rests_on(tree, tmp_path, caplog):
    tree["contrast"] |= {"eval_steps": 2, "best_metric": "loss"}
    check_inputs(Recipe.model_validate(tree))
    assert "contrast: 2 rows are held out and measured, and loss on them chooses the best checkpoint" in caplog.text
    caplog.clear()
    del tree["contrast"]["best_metric"]
    check_inputs(Recipe.model_validate(tree))
    assert not caplog.text  # What is only shown needs no warning.


def test_a_best_metric_without_held_out_rows_is_refused(tree, tmp_path):
    tree["contrast"] |= {"eval_steps": 2, "best_metric": "loss", "batch_size": 24}
    with pytest.raises(LusiferError, match="contrast.best_metric: no rows can be held out"):
        check_inputs(Recipe.model_validate(tree))


def test_held_out_rows_are_never_trained_on(tree):
    recipe = Recipe.model_validate(tree)
    mixture = lusifer.training.stages.stage_mixture(recipe, "contrast")
    held = {example["query"] for examples in mixture.held_out_examples() for example in examples}
    assert len(held) == 2
    assert not held & {mixture[position]["query"] for position in range(len(mixture))}


def test_tensorboard_gets_the_figures(tree, tmp_path):
    pytest.importorskip("tensorboard")
    tree["contrast"]["report_to"] = ["tensorboard"]
    train(Recipe.model_validate(tree), progress=False)
    assert list((tmp_path / "run" / "logs" / "contrast").rglob("events.out.*"))


def started(recipe, environment):
    command = [sys.executable, "-m", "lusifer", "train", str(recipe), "-q"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def slow(tree, tmp_path):
    """A recipe file whose run takes seconds, its environment, and where it saves."""
    tree["contrast"] |= {"steps": 60, "save_steps": 5}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return path, environment, tmp_path / "run" / "contrast" / "checkpoints"


def wait_for(process, folder, count):
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        if folder.is_dir() and len([p for p in folder.iterdir() if p.name.startswith("checkpoint-")]) >= count:
            return
        time.sleep(0.02)


def test_kill_at_random_moments_changes_nothing(slow, tmp_path):
    """Set LUSIFER_KILLS for more than the one kill of an ordinary test run."""
    path, environment, folder = slow
    generator = random.Random(0)
    for _ in range(int(os.environ.get("LUSIFER_KILLS", "1"))):
        process = started(path, environment)
        before = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
        wait_for(process, folder, 1 if not before else 0)
        time.sleep(generator.uniform(0, 1.5) if not before else generator.uniform(4, 8))
        process.send_signal(signal.SIGKILL)
        process.wait()
        for checkpoint in folder.glob("checkpoint-*"):  # Whole, whenever it was.
            names = {p.name for p in checkpoint.iterdir()}
            assert {"learning.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"} <= names
            load_file(checkpoint / "learning.safetensors")
            torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert started(path, environment).wait() == 0
    assert not list(folder.glob(".saving-*"))
    done = run(path, tmp_path / "whole")
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_sigterm_saves_before_it_ends(slow):
    path, environment, folder = slow
    process = started(path, environment)
    wait_for(process, folder, 1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and "a checkpoint is saved" in errors
    last = max(int(p.name.split("-")[1]) for p in folder.glob("checkpoint-*"))
    assert last % 5 or last >= 5
    assert (folder / f"checkpoint-{last}" / "learning.safetensors").is_file()
