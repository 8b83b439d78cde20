"""Data types of a run: the recipe decides, `auto` is decided once, and a run that goes on keeps them."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

import lusifer
import lusifer.training.planning.dry_run
import lusifer.training.precision
import lusifer.training.run
from lusifer import LusiferError
from lusifer.model.sentence_transformer import lusifer_model
from lusifer.model.text_encoder import Choice
from lusifer.recipes.schema import Recipe
from lusifer.training.contrastive import ContrastiveLoss
from lusifer.training.llm_baseline import train_llm_alone
from lusifer.training.planning.dry_run import dry_run
from lusifer.training.precision import settle
from lusifer.training.run import train
from lusifer.training.stages import _guide
from support.kill import Killed, kill_in
from support.launch import start
from support.texts import TEXTS

BFLOAT16, FLOAT32 = Choice("bfloat16", "it is faster here"), Choice("float32", "it is faster there")


@pytest.fixture(scope="module")
def half_encoder(tiny_encoder, tmp_path_factory):
    """The tiny encoder, stored in float16."""
    folder = str(tmp_path_factory.mktemp("half"))
    AutoModel.from_pretrained(tiny_encoder, add_pooling_layer=False).half().save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(folder)
    assert json.loads((Path(folder) / "config.json").read_text())["dtype"] == "float16"
    return folder


@pytest.fixture(scope="module")
def make(half_encoder, tiny_llm, tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    (data / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    pairs = [{"query": text, "positive": text.upper()} for text in TEXTS]
    (data / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

    def made(output, encoder="float32", llm="float32", precision="float32", **fields):
        shared = {"steps": 4, "batch_size": 4, "save_steps": 2, "logging_steps": 1, "precision": precision}
        shared |= {"learning_rate": 1e-2, "train_encoder": "lora", **fields}
        return Recipe.model_validate(
            {
                "output": str(output),
                "model": {
                    "encoder": half_encoder,
                    "llm": tiny_llm,
                    "llm_layers": 2,
                    "encoder_dtype": encoder,
                    "llm_dtype": llm,
                    "max_seq_length": 32,
                    "encoder_lora": {"r": 2},
                },
                "warm_start": {"texts": 24},
                "align": {**shared, "data": [{"source": str(data / "texts.jsonl"), "task": "reconstruct"}]},
                "contrast": {**shared, "data": [{"source": str(data / "pairs.jsonl")}]},
            }
        )

    return made


@pytest.fixture
def chooses(monkeypatch):
    """Says what a machine would choose."""
    return lambda choice: monkeypatch.setattr(lusifer.training.precision, "choose_dtype", lambda *_, **__: choice)


def cut_in_stage_2(recipe, monkeypatch):
    """Runs a recipe up to the third step of stage 2, behind its first checkpoint."""
    with monkeypatch.context() as patch:
        kill_in(patch, "contrast", 3)
        with pytest.raises(Killed):
            train(recipe, progress=False)


def dtypes(model):
    """By parameter, whether an adapter is around it or not."""
    state = lusifer_model(model).state_dict()
    return {name.replace(".base_layer", ""): str(value.dtype) for name, value in state.items()}


def losses(output, stage):
    return [row["loss"] for row in json.loads((output / stage / "stage.json").read_text())["history"] if "loss" in row]


@pytest.mark.parametrize(
    ("encoder", "llm", "precision", "fields"),
    [
        ("float32", "float32", "float32", {}),
        ("float32", "bfloat16", "bfloat16", {}),
        ("auto", "auto", "auto", {}),
        ("bfloat16", "bfloat16", "bfloat16", {"train_encoder": "full"}),
        ("bfloat16", "float32", "float32", {"train_encoder": "full"}),
    ],
)
def test_a_run_that_goes_on_has_the_data_types_of_one_that_never_stopped(
    make, tmp_path, monkeypatch, chooses, encoder, llm, precision, fields
):
    chooses(BFLOAT16)
    seen = {}
    real = lusifer.training.run._run_stage

    def spy(recipe, name, model, *others):
        seen.setdefault(recipe.output, []).append((name, dtypes(model)))
        return real(recipe, name, model, *others)

    monkeypatch.setattr(lusifer.training.run, "_run_stage", spy)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(make(whole, encoder, llm, precision, **fields), progress=False)
    recipe = make(cut, encoder, llm, precision, **fields)
    cut_in_stage_2(recipe, monkeypatch)
    train(recipe, progress=False)
    expected, found = seen[str(whole)], seen[str(cut)]
    assert [name for name, _ in found] == ["warm_start", "align", "contrast", "contrast"]
    assert found == [*expected, expected[-1]]
    wanted = {"auto": "bfloat16"}
    for part, asked in (("encoder", encoder), ("llm", llm)):
        backbone = {v for n, v in found[-1][1].items() if n.startswith(part) and "lora_" not in n}
        assert backbone == {f"torch.{wanted.get(asked, asked)}"}
    for stage in ("align", "contrast"):
        assert losses(cut, stage) == losses(whole, stage)
        one, two = (load_file(folder / stage / "model" / "model.safetensors") for folder in (whole, cut))
        assert one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())
    # Whoever loads the result gets the weights it was trained with, not those of the encoder's own file.
    loaded = dtypes(lusifer.load(str(cut / "model"), device="cpu"))
    assert found[-1][1].items() <= loaded.items()


def small_steps(make, output, precision, encoder="bfloat16"):
    """A recipe whose updates are far below what bfloat16 tells apart in weights as large as these."""
    return make(output, encoder, "bfloat16", precision, train_encoder="full", learning_rate=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_small_updates_of_a_bfloat16_encoder_are_not_lost(make, half_encoder, tmp_path, precision):
    model = train(small_steps(make, tmp_path / "run", precision), progress=False)
    start = AutoModel.from_pretrained(half_encoder, add_pooling_layer=False).bfloat16().state_dict()
    for stage in ("align", "contrast"):
        checkpoint = tmp_path / "run" / stage / "checkpoints" / "checkpoint-4"
        learned = load_file(checkpoint / "learning.safetensors")
        assert {value.dtype for value in learned.values()} == {torch.float32}
        moments = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
        assert {state[name].dtype for state in moments.values() for name in ("exp_avg", "exp_avg_sq")} == {
            torch.float32
        }
        layer = "encoder.layer.0.attention.self.query"
        moved = learned[f"encoder.{layer}.base_layer.weight"] != start[f"{layer}.weight"].float()
        assert moved.float().mean() > 0.95
    stored = load_file(next(model.rglob("model.safetensors")))
    kept = {value.dtype for name, value in stored.items() if name.startswith("encoder.") and "lora_" not in name}
    assert kept == {torch.bfloat16}


def test_a_checkpoint_of_bfloat16_weights_and_moments_goes_on(make, tmp_path, monkeypatch):
    """Earlier versions wrote such ones."""
    recipe = small_steps(make, tmp_path / "run", "bfloat16")
    cut_in_stage_2(recipe, monkeypatch)
    checkpoint = tmp_path / "run" / "contrast" / "checkpoints" / "checkpoint-2"
    with safe_open(checkpoint / "learning.safetensors", "pt") as file:
        metadata = file.metadata()
    weights = load_file(checkpoint / "learning.safetensors")
    halves = {name: value.bfloat16() if name.startswith("encoder.") else value for name, value in weights.items()}
    save_file(halves, checkpoint / "learning.safetensors", metadata=metadata)
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    for moments in state["state"].values():
        moments |= {name: moments[name].bfloat16() for name in ("exp_avg", "exp_avg_sq")}
    torch.save(state, checkpoint / "optimizer.pt")
    (checkpoint / "checksums.json").unlink()
    train(recipe, progress=False)
    last = tmp_path / "run" / "contrast" / "checkpoints" / "checkpoint-4"
    assert {value.dtype for value in load_file(last / "learning.safetensors").values()} == {torch.float32}
    state = torch.load(last / "optimizer.pt", weights_only=True)["state"]
    assert {moments["exp_avg"].dtype for moments in state.values()} == {torch.float32}


def test_a_frozen_encoder_stays_as_the_recipe_loads_it(make, tmp_path, monkeypatch):
    """Also after a stage that trained it."""
    seen = []
    real = ContrastiveLoss.step

    def step(self, model, *args, **kwargs):
        seen.append({p.dtype for n, p in model.named_parameters() if n.startswith("encoder.") and "lora_" not in n})
        return real(self, model, *args, **kwargs)

    monkeypatch.setattr(ContrastiveLoss, "step", step)
    recipe = small_steps(make, tmp_path / "run", "bfloat16")
    recipe.contrast.train_encoder = "frozen"
    train(recipe, progress=False)
    assert seen == [{torch.bfloat16}] * 4


def test_a_dry_run_counts_what_is_trained_in_float32(make, tmp_path, monkeypatch):
    memory, real = [], lusifer.training.planning.dry_run.memory_gb
    monkeypatch.setattr(lusifer.training.planning.dry_run, "memory_gb", lambda *a: memory.append(real(*a)) or real(*a))
    recipe = small_steps(make, tmp_path / "run", "bfloat16")
    recipe.contrast.train_encoder = "frozen"
    facts = dry_run(recipe, "r")
    parts = facts["parameters"]
    frozen = 2 * (parts["encoder"]["total"] + parts["llm"]["total"])
    own = sum(row["total"] for part, row in parts.items() if part not in ("encoder", "llm"))
    align, contrast = (1e9 * stage["weights"] for stage in memory)
    assert contrast == pytest.approx(frozen + 4 * own)
    # Stage 1 has no adapter on the LLM yet.
    own -= parts["llm adapter"]["total"]
    assert align == pytest.approx(frozen + 2 * parts["encoder"]["total"] + 4 * own)


def test_auto_is_decided_once(make, tmp_path, monkeypatch, chooses, caplog):
    caplog.set_level(logging.INFO, "lusifer")
    recipe, kept = make(tmp_path / "run", "auto", "auto", "auto"), tmp_path / "run" / "precision.json"
    chooses(BFLOAT16)
    cut_in_stage_2(recipe, monkeypatch)
    assert f"precision auto is bfloat16: it is faster here; kept in {kept}" in caplog.messages
    assert json.loads(kept.read_text()) == {"auto": "bfloat16", "reason": "it is faster here"}
    chooses(FLOAT32)  # Another machine.
    model = lusifer.load(str(train(recipe, progress=False)), device="cpu")
    assert f"precision auto is bfloat16, as when this run began ({kept})" in caplog.messages
    assert lusifer_model(model).llm.dtype == torch.bfloat16
    stored = lusifer_model(model).config.provenance["recipe"]
    assert stored["model"]["llm_dtype"] == stored["model"]["encoder_dtype"] == "bfloat16"
    assert stored["align"]["precision"] == stored["contrast"]["precision"] == "bfloat16"
    # What was decided may as well be written down, there and in another place: it is the same run.
    train(make(tmp_path / "run", "bfloat16", "bfloat16", "bfloat16"), progress=False)
    with pytest.raises(LusiferError, match="contains a run of another recipe"):
        train(make(tmp_path / "run", "float32", "float32", "float32"), progress=False)


def test_the_baseline_beside_a_run_computes_as_the_run(make, tmp_path, chooses):
    recipe = make(tmp_path / "run", "auto", "auto", "auto")
    chooses(BFLOAT16)
    assert settle(recipe).model.llm_dtype == "bfloat16"
    chooses(FLOAT32)
    state = load_file(train_llm_alone(recipe, progress=False) / "model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.bfloat16}


def test_nothing_is_decided_that_the_recipe_says(make, tmp_path, chooses):
    chooses(BFLOAT16)
    recipe = make(tmp_path / "run", precision="float32")
    assert settle(recipe) is recipe and not (tmp_path / "run").exists()
    settled = settle(make(tmp_path / "run", encoder="float32", llm="auto", precision="float32"))
    assert (settled.model.encoder_dtype, settled.model.llm_dtype) == ("float32", "bfloat16")
    assert settled.align.precision == settled.contrast.precision == "float32"


def test_weights_that_learn_stay_in_float32(make, tmp_path, chooses):
    chooses(BFLOAT16)
    settled = settle(make(tmp_path / "run", "auto", "auto", "auto", train_encoder="full"))
    assert (settled.model.encoder_dtype, settled.model.llm_dtype) == ("float32", "bfloat16")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"auto": "float8", "reason": "?"}'])
def test_a_damaged_choice_is_one_line(make, tmp_path, content):
    (tmp_path / "precision.json").write_text(content)
    with pytest.raises(LusiferError, match=r"precision\.json") as caught:
        train(make(tmp_path, llm="auto"), progress=False)
    assert "\n" not in str(caught.value)


def test_a_float16_encoder_beside_bfloat16_is_refused_on_a_cpu(make, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(
        LusiferError, match=r"encoder_dtype is float16, which a CPU does not support beside align\.precision"
    ):
        train(make(tmp_path, encoder="float16", precision="bfloat16"), progress=False)


def test_a_dry_run_says_what_auto_would_be_and_keeps_nothing(make, tmp_path, chooses):
    facts = {}
    for choice in (BFLOAT16, FLOAT32):
        chooses(choice)
        facts[choice.name] = dry_run(make(tmp_path / "run", "auto", "auto", "auto"), "r")
    assert facts["bfloat16"]["auto"] == "bfloat16: it is faster here" and not (tmp_path / "run").exists()
    short, long = (facts[name]["stages"]["align"]["memory_gb"]["activations"] for name in ("bfloat16", "float32"))
    assert short < long
    assert "auto" not in dry_run(make(tmp_path / "run"), "r")


def test_the_guide_is_the_encoder_as_the_recipe_loads_it(make, tmp_path):
    recipe = make(tmp_path)
    recipe.contrast.guide = "encoder"
    assert _guide(recipe, 32).encoder.dtype == torch.float32


RANKS = """
import os, sys
import lusifer.training.precision as precision
from lusifer.model.text_encoder import Choice
from lusifer.recipes.schema import Recipe
rank = int(os.environ["RANK"])
precision.choose_dtype = lambda *_, **__: Choice(["bfloat16", "float32"][rank], f"rank {rank}")
recipe = Recipe.model_validate_json(open(sys.argv[1]).read())
# One write: the lines of two processes that share a pipe must not run into each other.
os.write(1, f"{rank} {precision.settle(recipe).model.llm_dtype}\\n".encode())
"""


def test_the_first_rank_decides_for_all(make, tmp_path):
    (tmp_path / "recipe.json").write_text(make(tmp_path / "run", llm="auto").model_dump_json(exclude_defaults=True))
    (tmp_path / "ranks.py").write_text(RANKS)
    done = start([str(tmp_path / "ranks.py"), str(tmp_path / "recipe.json")], ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(done.stdout.split("\n")) == ["", "0 bfloat16", "1 bfloat16"]
    assert json.loads((tmp_path / "run" / "precision.json").read_text())["reason"] == "rank 0"
    (tmp_path / "run" / "precision.json").write_text("[]")
    done = start([str(tmp_path / "ranks.py"), str(tmp_path / "recipe.json")], ranks=2)
    assert done.returncode != 0 and "the precision of this run" in done.stderr
