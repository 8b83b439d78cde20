"""Two processes equal one: same losses, same weights, and either goes on from the other's checkpoint."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from support.launch import run
from support.texts import TEXTS

STEPS = 6
# Sums run in another order over two ranks, and Adam divides each gradient by its own size: a difference of 1e-8 in
# one of 1e-7 moves a weight visibly. That gradients are equal to 1e-6 is tested beside each loss.
TOLERANCE = {"rtol": 1e-2, "atol": 1e-3}


@pytest.fixture(scope="module")
def recipe(tiny_encoder, tiny_llm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    # Dropout draws other numbers on other ranks.
    still = shutil.copytree(tiny_encoder, folder / "encoder")
    config = json.loads((still / "config.json").read_text())
    (still / "config.json").write_text(
        json.dumps({**config, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    )
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    pairs = [{"query": text, "positive": text.upper(), "negative": [text[::-1], "no"]} for text in TEXTS]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    # The size of Adam's first steps does not depend on the gradient's: a short warm-up keeps its noise small.
    shared = {"steps": STEPS, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 4, "save_steps": 3}
    shared |= {"logging_steps": 1, "max_tokens": 64, "graph_tokens": 200}
    tree = {
        "output": "unset",
        "model": {
            "encoder": str(still),
            "llm": tiny_llm,
            "max_seq_length": 32,
            "llm_lora": {"r": 2, "alpha": 4, "dropout": 0.0},
            "encoder_lora": {"r": 2, "alpha": 4, "dropout": 0.0},
        },
        "warm_start": {"texts": 24, "ridge": 1.0},
        "align": {
            **shared,
            "train_encoder": "lora",
            "data": [{"source": str(folder / "texts.jsonl"), "task": "reconstruct"}],
            "target_max_seq_length": 12,
        },
        "contrast": {
            **shared,
            "llm_layers": 2,
            "symmetric": True,
            "train_encoder": "lora",
            "data": [
                {"source": str(folder / "pairs.jsonl"), "hard_negatives": 1},
                {"source": str(folder / "pairs.jsonl"), "hard_negatives": 2, "in_batch_negatives": False},
            ],
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "run"
    done = run(recipe, output)
    assert done.returncode == 0, done.stderr[-2000:]
    return output


def losses(output, stage):
    history = json.loads((output / stage / "stage.json").read_text())["history"]
    return [row["loss"] for row in history if "loss" in row]


def assert_equal_runs(one, other):
    for stage in ("align", "contrast"):
        assert len(losses(other, stage)) == STEPS
        torch.testing.assert_close(losses(other, stage), losses(one, stage), rtol=1e-3, atol=1e-4)
    mine, theirs = (load_file(output / "model" / "model.safetensors") for output in (one, other))
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(theirs[name], value, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_equal_one(recipe, whole, tmp_path, strategy):
    done = run(recipe, tmp_path / "run", ranks=2, overrides=["--scale.strategy", strategy])
    assert done.returncode == 0, done.stderr[-3000:]
    assert_equal_runs(whole, tmp_path / "run")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_head_that_stage_1_does_not_use_stops_no_process(recipe, tmp_path, strategy):
    overrides = ["--model.head_dim", "24", "--contrast.enabled", "false", "--scale.strategy", strategy]
    for ranks in (1, 2):
        done = run(recipe, tmp_path / str(ranks), ranks=ranks, overrides=overrides)
        assert done.returncode == 0, done.stderr[-3000:]
    torch.testing.assert_close(*(losses(tmp_path / ranks, "align") for ranks in "12"), rtol=1e-3, atol=1e-4)
    mine, theirs = (load_file(tmp_path / ranks / "model" / "model.safetensors") for ranks in "12")
    assert any(name.startswith("head.") for name in mine)
    for name, value in mine.items():
        torch.testing.assert_close(theirs[name], value, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("strategy", "before", "after"), [("ddp", 2, 1), ("ddp", 1, 2), ("fsdp2", 2, 1)])
def test_another_number_of_ranks_goes_on(recipe, whole, tmp_path, strategy, before, after):
    overrides = ["--scale.strategy", strategy]
    stage = "contrast" if before == 2 else "align"
    done = run(recipe, tmp_path / "run", ranks=before, cut=stage, overrides=overrides)
    assert done.returncode != 0, done.stderr[-3000:]
    checkpoints = tmp_path / "run" / stage / "checkpoints"
    assert [path.name for path in checkpoints.glob("checkpoint-*")] == ["checkpoint-3"], done.stderr
    done = run(recipe, tmp_path / "run", ranks=after, overrides=overrides)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_equal_runs(whole, tmp_path / "run")


def test_a_batch_that_does_not_divide_is_refused(recipe, tmp_path):
    done = run(recipe, tmp_path / "run", ranks=2, overrides=["--align.batch_size", "7"])
    assert done.returncode != 0
    assert "batch_size is 7, which 2 processes cannot share evenly" in done.stderr


@pytest.mark.parametrize("encoder", ["lora", "full"])
def test_sharding_takes_bfloat16_backbones_beside_float32_adapters(recipe, tmp_path, encoder):
    """FSDP2 shards a group of parameters of one data type; the paper's recipe has two in every layer."""
    outputs = []
    for ranks in (1, 2):
        output = tmp_path / str(ranks)
        overrides = ["--scale.strategy", "fsdp2", "--model.llm_dtype", "bfloat16", "--model.encoder_dtype", "bfloat16"]
        overrides += ["--align.precision", "bfloat16", "--contrast.precision", "bfloat16"]
        overrides += ["--align.train_encoder", encoder]
        overrides += ["--contrast.temperature", "1"]  # A small one magnifies rounding.
        done = run(recipe, output, ranks=ranks, overrides=overrides)
        assert done.returncode == 0, done.stderr[-3000:]
        outputs.append(output)
    stored = [load_file(output / "model" / "model.safetensors") for output in outputs]
    assert {n: v.dtype for n, v in stored[0].items()} == {n: v.dtype for n, v in stored[1].items()}
    for stage in ("align", "contrast"):
        # bfloat16 keeps three digits, and the ranks' passes have other shapes.
        torch.testing.assert_close(losses(outputs[1], stage), losses(outputs[0], stage), rtol=3e-2, atol=3e-2)
