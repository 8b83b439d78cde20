"""Whole runs with tiny backbones: what they leave, and that an interruption changes nothing."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lusifer
import lusifer.training.run
import lusifer.training.stages
from lusifer import LusiferError, LusiferModel
from lusifer.data.everyday_set import load_everyday
from lusifer.recipes.schema import Recipe
from lusifer.training.outcome import everyday_embeddings, moved, outcome
from lusifer.training.planning.dry_run import dry_run
from lusifer.training.run import fingerprint, train
from lusifer.training.trainer import AtomicTrainer
from support.holding import held
from support.kill import Killed, kill_in
from support.texts import TEXTS

STEPS = 8


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Data read by these tests is kept beside them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUSIFER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def make(tiny_encoder, tiny_llm, tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    (data / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    pairs = [{"query": text, "positive": text.upper(), "negative": [text[::-1], "no"]} for text in TEXTS]
    (data / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

    def made(output, **changes):
        shared = {"steps": STEPS, "batch_size": 4, "learning_rate": 1e-2, "save_steps": 3, "logging_steps": 3}
        tree = {
            "output": str(output),
            "seed": 5,
            "model": {
                "encoder": tiny_encoder,
                "llm": tiny_llm,
                "llm_layers": 2,
                "max_seq_length": 32,
                "llm_lora": {"r": 2, "alpha": 4, "dropout": 0.2},
                "encoder_lora": {"r": 2, "alpha": 4, "dropout": 0.2},
            },
            "warm_start": {"texts": 24, "ridge": 1.0},
            "align": {
                **shared,
                "train_encoder": "lora",
                "data": [
                    {"source": str(data / "texts.jsonl"), "task": "reconstruct"},
                    {"source": str(data / "pairs.jsonl"), "task": "complete", "reverse": 0.5, "start": 0.25},
                ],
                "target_max_seq_length": 12,
            },
            "contrast": {
                **shared,
                "data": [{"source": str(data / "pairs.jsonl"), "hard_negatives": 1}],
                "warmup_steps": 2,
            },
        }
        for name, value in changes.items():
            tree[name] = {**tree[name], **value} if isinstance(value, dict) else value
        return Recipe.model_validate(tree)

    return made


@pytest.fixture(scope="module")
def finished(make, tmp_path_factory):
    """An uninterrupted run, and every parameter of the model in memory after each stage."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    states = {}
    with pytest.MonkeyPatch.context() as patch:
        real = lusifer.training.run.save_atomically

        def spy(model, folder, **kwargs):
            states[folder.parent.name if folder.parent != output else "final"] = {
                name: value.clone() for name, value in model[0].auto_model.state_dict().items()
            }
            real(model, folder, **kwargs)

        patch.setattr("lusifer.training.run.save_atomically", spy)
        assert train(make(output), progress=False) == output / "model"
    return output, states


def weights(folder):
    return {str(path.relative_to(folder)): load_file(path) for path in sorted(Path(folder).rglob("model.safetensors"))}


def assert_same(folder, other):
    one, two = weights(folder), weights(other)
    assert one.keys() == two.keys() and one
    for name, tensors in one.items():
        assert tensors.keys() == two[name].keys()
        different = [key for key in tensors if not torch.equal(tensors[key], two[name][key])]
        assert not different, different


def test_layout_of_a_finished_run(finished):
    output, _ = finished
    assert sorted(path.name for path in output.iterdir()) == ["align", "contrast", "model", "warm_start"]
    for stage in ("warm_start", "align", "contrast"):
        assert (output / stage / "stage.json").is_file() and (output / stage / "model" / "modules.json").is_file()
    assert not [path for path in output.rglob("*") if path.name.startswith(".")]
    assert (output / "model" / "llm_tokenizer" / "tokenizer.json").is_file()
    assert_same(output / "contrast" / "model", output / "model")
    vectors = lusifer.load(str(output / "model"), device="cpu").encode(["the cat", "the dog"])
    assert vectors.shape == (2, 48)


def test_a_run_says_what_each_stage_did(finished):
    rows = outcome(finished[0])
    assert [row["stage"] for row in rows] == ["0, warm_start", "1, align", "2, contrast"]
    start, align, contrast = (row["held-out rows"] for row in rows)
    assert start.startswith("variance explained: ") and rows[0]["loss"] == rows[0]["English"] == ""
    assert re.fullmatch(r"masked tokens predicted: [\d.]+% -> [\d.]+%", align)
    assert re.fullmatch(r"loss: [\d.]+ -> [\d.]+", contrast)
    for row in rows[1:]:
        assert re.fullmatch(r"[\d.]+ -> [\d.]+", row["loss"]) and re.fullmatch(r"\d+:\d\d", row["time"])
        assert -1 < float(row["English"]) < 0.9999 and -1 < float(row["other languages"]) < 0.9999


def test_how_far_embeddings_moved_is_a_mean_of_english_and_of_the_others(finished):
    model = lusifer.load(str(finished[0] / "model"), device="cpu")
    before = everyday_embeddings(model)
    assert before.shape == (64, 48) and moved(before, before) == (1.0, 1.0)
    english = load_everyday().sentences["en"][3]
    assert torch.allclose(before[3], torch.from_numpy(model.encode([english]))[0], atol=1e-5)
    after = before.clone()
    after[:8] *= -1  # A quarter of the English ones.
    assert moved(before, after) == (0.5, 1.0)


def test_what_each_stage_reports(finished, make):
    output, _ = finished
    reports = {name: json.loads((output / name / "stage.json").read_text()) for name in lusifer.training.run.STAGES}
    for name, report in reports.items():
        assert report["stage"] == name and len(report["fingerprint"]) == 64 and report["seconds"] > 0
    assert len({report["fingerprint"] for report in reports.values()}) == 3
    assert {"explained", "words", "held_out_words"} <= reports["warm_start"].keys()
    assert reports["warm_start"]["words"] > 50
    for name in ("align", "contrast"):
        logged = [entry for entry in reports[name]["history"] if "loss" in entry]
        assert [entry["step"] for entry in logged] == [3, 6] and reports[name]["loss"] > 0
    for name in ("align", "contrast"):
        assert {*reports[name]["held_out"]} == {*getattr(make("unused"), name).metrics()}
    for key in ("held_out", "held_out_before"):
        found = reports["align"][key]
        assert {"hidden_own_accuracy", "hidden_other_cross_entropy", "visible_none_accuracy"} <= found.keys()
    # Learning rate 1e-2 on two dozen texts: it learns.
    entropy = "hidden_own_cross_entropy"
    assert reports["align"]["held_out"][entropy] < reports["align"]["held_out_before"][entropy]
    assert reports["contrast"]["held_out"]["loss"] < reports["contrast"]["held_out_before"]["loss"]
    assert {"loss", "learning_rate", "grad_norm", "tokens_per_second", "padding", "memory_mb"} <= logged[0].keys()
    provenance = json.loads(next((output / "model").rglob("config.json")).read_text())["provenance"]
    assert provenance["seed"] == 5 and set(provenance["stages"]) == set(lusifer.training.run.STAGES)
    assert provenance["stages"]["align"]["held_out"] == reports["align"]["held_out"]
    assert "history" not in provenance["stages"]["contrast"]


def test_frozen_weights_never_move_and_trained_ones_do(finished, make):
    _, states = finished
    recipe = make("unused").model
    fresh = LusiferModel.from_backbones(recipe.encoder, recipe.llm, llm_layers=2, max_seq_length=32).state_dict()
    for stage, state in states.items():
        plain = {name.replace(".base_layer", ""): value for name, value in state.items() if "lora_" not in name}
        for name, value in fresh.items():
            if name.startswith(("encoder.", "llm.")):
                assert torch.equal(plain[name], value), (stage, name)

    def moved(before, after):
        kept = states[before].keys() & states[after].keys()
        return {name for name in kept if not torch.equal(states[before][name], states[after][name])}

    align, contrast = moved("warm_start", "align"), moved("align", "contrast")
    assert any("encoder" in name and "lora_" in name for name in align)
    assert {name for name in states["align"] if name.startswith("connector.")} <= align
    assert not any(name.startswith("llm.") for name in align)
    assert {name for name in contrast if name.startswith("encoder.")} == set()
    assert any(name.startswith("connector.") for name in contrast)
    # B starts at zero, so what differs from it has learned.
    learned = [name for name, value in states["contrast"].items() if "llm" in name and "lora_B" in name]
    assert learned and all(states["contrast"][name].abs().max() > 0 for name in learned)


def test_a_finished_run_trains_no_more(finished, make, monkeypatch, tmp_path):
    output, _ = finished
    shutil.copytree(output, tmp_path / "copy")

    def never(*args, **kwargs):
        raise AssertionError("trained again")

    for name in ("run_warm_start", "run_align", "run_contrast"):
        monkeypatch.setattr(lusifer.training.run, name, never)
    before = (tmp_path / "copy" / "contrast" / "stage.json").read_bytes()
    # Where it writes and how often it saves may change, and only that.
    recipe = make(tmp_path / "copy", contrast={"save_steps": 5, "logging_steps": 1})
    assert train(recipe, progress=False) == tmp_path / "copy" / "model"
    assert (tmp_path / "copy" / "contrast" / "stage.json").read_bytes() == before
    assert_same(tmp_path / "copy" / "model", output / "model")
    shutil.rmtree(tmp_path / "copy" / "model")
    train(recipe, progress=False)
    assert_same(tmp_path / "copy" / "model", output / "model")


@pytest.mark.parametrize(
    ("stage", "call"),
    [("align", 1), ("align", 8), ("contrast", 3), ("contrast", 7)],
)
def test_an_interrupted_run_ends_where_the_uninterrupted_one_does(finished, make, monkeypatch, tmp_path, stage, call):
    output, _ = finished
    recipe = make(tmp_path / "run")
    if stage == "contrast":  # Start from the finished stage 1 of the other run, to save time.
        for name in ("warm_start", "align"):
            shutil.copytree(output / name, tmp_path / "run" / name)
    with monkeypatch.context() as patch:
        kill_in(patch, stage, call)
        with pytest.raises(Killed):
            train(recipe, progress=False)
    checkpoints = sorted((tmp_path / "run" / stage).glob("checkpoints/checkpoint-*"))
    assert len(checkpoints) == (call - 1) // 3
    assert not (tmp_path / "run" / stage / "stage.json").exists()
    torch.manual_seed(999)
    train(recipe, progress=False)
    assert_same(tmp_path / "run" / stage / "model", output / stage / "model")
    assert_same(tmp_path / "run" / "model", output / "model")


def test_a_run_killed_after_its_last_step_does_not_take_another(finished, make, monkeypatch, tmp_path):
    output, _ = finished
    shutil.copytree(output, tmp_path / "run")
    (tmp_path / "run" / "contrast" / "stage.json").unlink()
    shutil.rmtree(tmp_path / "run" / "contrast" / "model")
    kill_in(monkeypatch, "contrast", 1)
    train(make(tmp_path / "run"), progress=False)
    assert_same(tmp_path / "run" / "model", output / "model")


def test_a_resumed_run_reports_the_loss_of_all_its_steps(finished, make, monkeypatch, tmp_path):
    output, _ = finished
    shutil.copytree(output, tmp_path / "run", ignore=shutil.ignore_patterns("contrast"))
    with monkeypatch.context() as patch:
        kill_in(patch, "contrast", 6)
        with pytest.raises(Killed):
            train(make(tmp_path / "run"), progress=False)
    train(make(tmp_path / "run"), progress=False)
    resumed, whole = (json.loads((run / "contrast" / "stage.json").read_text()) for run in (tmp_path / "run", output))
    assert resumed["loss"] == pytest.approx(whole["loss"], rel=1e-6)


def test_checkpoints_hold_what_learns_and_no_pickled_arguments(finished):
    output, states = finished
    for stage in ("align", "contrast"):
        checkpoints = sorted((output / stage / "checkpoints").iterdir())
        assert [path.name for path in checkpoints] == ["checkpoint-6", "checkpoint-8"]
        for checkpoint in checkpoints:
            names = {path.name for path in checkpoint.iterdir()}
            assert names == {
                "learning.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
                "checksums.json",
            }  # fmt: skip
            learning = load_file(checkpoint / "learning.safetensors")
            part = "encoder" if stage == "align" else "llm"
            assert learning and all(name.startswith("connector.") or "lora_" in name for name in learning)
            assert any("lora_" in name for name in learning)
            assert all(name.startswith(f"{part}.") for name in learning if "lora_" in name)


@pytest.mark.parametrize("broken", ["save_file", "save_optimizer", "_save_rng_state"])
def test_a_checkpoint_that_cannot_be_written_does_not_appear(make, monkeypatch, tmp_path, finished, broken):
    def full(*args, **kwargs):
        if broken == "save_file":  # Half a file is there already.
            Path(args[1]).write_bytes(b"half")
        if broken == "_save_rng_state":  # How torch.save reports it.
            raise RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0\nmore")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    shutil.copytree(finished[0] / "align", tmp_path / "run" / "align")
    shutil.copytree(finished[0] / "warm_start", tmp_path / "run" / "warm_start")
    with monkeypatch.context() as patch:
        if broken == "save_file":
            patch.setattr(lusifer.training.trainer, broken, full)
        else:
            patch.setattr(AtomicTrainer, broken, full)
        with pytest.raises(LusiferError, match="cannot write a checkpoint.*No space left"):
            train(make(tmp_path / "run"), progress=False)
    assert list((tmp_path / "run" / "contrast" / "checkpoints").iterdir()) == []
    train(make(tmp_path / "run"), progress=False)
    assert_same(tmp_path / "run" / "model", finished[0] / "model")


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 6},
        {"contrast": {"steps": STEPS + 1}},
        {"align": {"mask_probability": 0.3}},
        {"warm_start": {"ridge": 2.0}},
        {"model": {"max_seq_length": 16}},
        {"model": {"llm_layers": 3}},
    ],
)
def test_another_recipe_in_the_same_folder_is_refused(finished, make, changes):
    output, _ = finished
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    with pytest.raises(LusiferError, match="contains a run of another recipe"):
        train(make(output, **changes), progress=False)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


def test_another_recipe_on_an_unfinished_stage_is_refused_too(finished, make, monkeypatch, tmp_path):
    kill_in(monkeypatch, "align", 5)
    with pytest.raises(Killed):
        train(make(tmp_path / "run"), progress=False)
    with pytest.raises(LusiferError, match="contains a run of another recipe"):
        train(make(tmp_path / "run", align={"learning_rate": 1e-3}), progress=False)


@pytest.mark.parametrize(
    "change",
    [
        {"contrast": {"gradient_checkpointing": True, "max_loss": 1e6, "best_metric": "loss", "eval_steps": 2}},
        {"model": {"attn_implementation": "eager"}},
    ],
)
def test_a_run_goes_on_with_other_settings_of_speed_and_memory(finished, make, monkeypatch, tmp_path, change):
    output, _ = finished
    for name in ("warm_start", "align"):
        shutil.copytree(output / name, tmp_path / "run" / name)
    with monkeypatch.context() as patch:
        kill_in(patch, "contrast", 5)
        with pytest.raises(Killed):
            train(make(tmp_path / "run"), progress=False)
    train(make(tmp_path / "run", **change), progress=False)
    one, two = (weights(run)["model.safetensors"] for run in (tmp_path / "run" / "model", output / "model"))
    for name, value in two.items():  # float32 sums in another order, behind Adam's division.
        torch.testing.assert_close(one[name], value, rtol=1e-2, atol=1e-3)


def test_a_run_of_an_earlier_version_goes_on(finished, make, monkeypatch, tmp_path):
    """Its fingerprints count settings that decide nothing."""
    settings = {"gradient_checkpointing": True, "max_loss": 1e6, "best_metric": "loss", "eval_steps": 4}
    recipe = make(tmp_path / "run", contrast=settings)
    before = fingerprint(recipe, "contrast", earlier=True)
    assert before != fingerprint(recipe, "contrast")
    shutil.copytree(finished[0], tmp_path / "run")
    report = tmp_path / "run" / "contrast" / "stage.json"
    report.write_text(json.dumps({**json.loads(report.read_text()), "fingerprint": before}))
    monkeypatch.setattr(lusifer.training.run, "run_contrast", lambda *_: pytest.fail("trained again"))
    train(recipe, progress=False)
    with pytest.raises(LusiferError, match="contains a run of another recipe"):
        train(make(tmp_path / "run", contrast={**settings, "temperature": 0.1}), progress=False)


def begun(make, finished, monkeypatch, tmp_path):
    """A run of its own pairs, killed in stage 2 behind a checkpoint; its recipe and the pairs."""
    for name in ("warm_start", "align"):
        shutil.copytree(finished[0] / name, tmp_path / "run" / name)
    source = Path(make(tmp_path).contrast.data[0].source)
    shutil.copyfile(source, tmp_path / "pairs.jsonl")
    data = [{"source": str(tmp_path / "pairs.jsonl"), "hard_negatives": 1}]
    recipe = make(tmp_path / "run", contrast={"data": data})
    with monkeypatch.context() as patch:
        kill_in(patch, "contrast", 5)
        with pytest.raises(Killed):
            train(recipe, progress=False)
    return recipe, tmp_path / "pairs.jsonl"


def test_data_that_changed_since_the_stage_began_are_refused(make, finished, monkeypatch, tmp_path):
    recipe, pairs = begun(make, finished, monkeypatch, tmp_path)
    before = pairs.read_bytes()
    pairs.write_bytes(before.replace(b"no", b"on"))
    with pytest.raises(LusiferError, match=r"contrast\.data\.0: .*pairs\.jsonl has changed since .*contrast"):
        train(recipe, progress=False)
    pairs.write_bytes(before)  # Of another time; the content counts.
    train(recipe, progress=False)
    pairs.write_bytes(before.replace(b"no", b"on"))
    with pytest.raises(LusiferError, match="has changed since"):
        train(recipe, progress=False)
    # Versions before this one did not write it down.
    (tmp_path / "run" / "contrast" / "inputs.json").unlink()
    assert train(recipe, progress=False) == tmp_path / "run" / "model"


def test_a_backbone_that_changed_since_the_stage_began_is_refused(make, tiny_llm, monkeypatch, tmp_path):
    shutil.copytree(tiny_llm, tmp_path / "llm")
    recipe = make(tmp_path / "run", model={"llm": str(tmp_path / "llm")}, warm_start={"enabled": False})
    kill_in(monkeypatch, "align", 1)
    with pytest.raises(Killed):
        train(recipe, progress=False)
    tensors = load_file(tmp_path / "llm" / "model.safetensors")
    save_file(
        {name: value * 1.01 for name, value in tensors.items()},
        tmp_path / "llm" / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(LusiferError, match=r"model\.llm: .*llm has changed since .*align"):
        train(recipe, progress=False)


def test_a_finished_run_leaves_its_model_alone(finished, make):
    output, _ = finished
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (output / "model").rglob("*")}
    assert train(make(output), progress=False) == output / "model"
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (output / "model").rglob("*")} == before


def test_a_second_run_in_the_same_output_is_refused(finished, make):
    output, _ = finished
    with held(output), pytest.raises(LusiferError, match="another process is using '.*whole'"):
        train(make(output), progress=False)


def test_a_checkpoint_of_stage_1_that_holds_an_idle_head_goes_on(make, monkeypatch, tmp_path):
    """Earlier versions counted the head among what stage 1 trains."""
    off = {"model": {"head_dim": 24}, "contrast": {"enabled": False}}
    train(make(tmp_path / "whole", **off), progress=False)
    real = lusifer.training.stages.prepare_stage

    def as_before(recipe, name, model):
        real(recipe, name, model)
        model.head.requires_grad_(True)

    recipe = make(tmp_path / "run", **off)
    with monkeypatch.context() as patch:
        patch.setattr(lusifer.training.stages, "prepare_stage", as_before)
        kill_in(patch, "align", 5)
        with pytest.raises(Killed):
            train(recipe, progress=False)
    checkpoint = tmp_path / "run" / "align" / "checkpoints" / "checkpoint-3"
    assert any(name.startswith("head.") for name in load_file(checkpoint / "learning.safetensors"))
    train(recipe, progress=False)
    assert_same(tmp_path / "run" / "model", tmp_path / "whole" / "model")


def test_data_smaller_than_a_batch(make, tmp_path):
    recipe = make(tmp_path / "run", contrast={"batch_size": 25}, align={"enabled": False})
    with pytest.raises(LusiferError, match="24 rows, fewer than the batch of 25"):
        train(recipe, progress=False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"encoder": "/nowhere/encoder"}}, "/nowhere/encoder"),
        ({"model": {"llm": "/nowhere/llm"}}, "/nowhere/llm"),
        ({"contrast": {"data": [{"source": "/nowhere/pairs.jsonl"}]}}, "no such file"),
        ({"align": {"data": [{"source": "/nowhere/texts.jsonl", "task": "reconstruct"}]}}, "no such file"),
        ({"warm_start": {"data": "/nowhere/texts.jsonl"}}, "no such file"),
    ],
)
def test_missing_inputs_are_found_before_any_work(make, tmp_path, changes, words):
    with pytest.raises(LusiferError, match=words):
        train(make(tmp_path / "run", **changes), progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"contrast": {"matryoshka_dims": [16, 64]}}, "matryoshka_dims asks for 64 dimensions, the embedding has 48"),
        ({"model": {"head_dim": 40}, "contrast": {"matryoshka_dims": [48]}}, "the embedding has 40"),
        ({"align": {"max_seq_length": 999}}, "max_seq_length is 999, but the encoder"),
        ({"model": {"llm_layers": 9}}, "model.llm_layers is 9, but the LLM has 3 layers"),
        (
            {"model": {"llm_lora": {"target_modules": ["q_proj", "v_prjo"]}}},
            "llm_lora.target_modules: no layer is .*v_pr",
        ),
        (
            {"model": {"encoder_lora": {"target_modules": ["q_proj"]}}},
            "no layer is called 'q_proj'; there are dense, key",
        ),
    ],
)
def test_what_does_not_fit_the_backbones_is_found_before_any_work(make, tmp_path, monkeypatch, changes, words):
    monkeypatch.setattr(lusifer.training.run, "build_model", lambda *_: pytest.fail("a model was loaded"))
    recipe = make(tmp_path / "run", **changes)
    for work in (lambda: train(recipe, progress=False), lambda: dry_run(recipe, "r")):
        with pytest.raises(LusiferError, match=words) as caught:
            work()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_layers_named_with_their_parents_are_found(make, tmp_path):
    names = {"llm_lora": {"target_modules": ["self_attn.q_proj", "v_proj"]}}
    dry_run(make(tmp_path / "run", model={**names, "encoder_lora": {"target_modules": ["attention.self.query"]}}), "r")


def test_stages_can_be_left_out(make, tmp_path):
    off = {"enabled": False}
    only = make(tmp_path / "two", warm_start=off, align=off, contrast={"steps": 2})
    train(only, progress=False)
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["contrast", "model"]
    train(make(tmp_path / "zero", align=off, contrast=off), progress=False)
    assert sorted(path.name for path in (tmp_path / "zero").iterdir()) == ["model", "warm_start"]


def test_two_learning_rates(make, tmp_path, monkeypatch):
    groups = []
    real = AtomicTrainer.create_optimizer

    def spy(self, *args, **kwargs):
        made = real(self, *args, **kwargs)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        groups.extend((names[id(p)], group["lr"]) for group in made.param_groups for p in group["params"])
        return made

    monkeypatch.setattr(AtomicTrainer, "create_optimizer", spy)
    off = {"enabled": False}
    recipe = make(
        tmp_path / "run",
        warm_start=off,
        align=off,
        contrast={"steps": 1, "warmup_steps": 0, "connector_learning_rate": 3e-3, "learning_rate": 1e-4},
    )
    train(recipe, progress=False)
    rates = {name: rate for name, rate in groups}
    assert {rate for name, rate in rates.items() if name.startswith("connector.")} == {3e-3}
    assert {rate for name, rate in rates.items() if "lora_" in name} == {1e-4}


def test_an_encoder_trained_in_full_is_saved_and_loaded(make, tmp_path):
    off = {"enabled": False}
    recipe = make(
        tmp_path / "run",
        model={"encoder_lora": None},
        warm_start=off,
        align={"train_encoder": "full", "steps": 3},
        contrast={"train_encoder": "full", "steps": 3},
    )
    train(recipe, progress=False)
    fresh = LusiferModel.from_backbones(recipe.model.encoder, recipe.model.llm, llm_layers=2).state_dict()
    trained = lusifer.load(str(tmp_path / "run" / "model"), device="cpu")[0].auto_model.state_dict()
    name = "encoder.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(trained[name], fresh[name])
    kept = [key for key in fresh if key.startswith("llm.")]
    plain = {key.replace(".base_layer", ""): value for key, value in trained.items()}
    assert kept and all(torch.equal(plain[key], fresh[key]) for key in kept)


def test_stage_1_has_the_whole_llm_and_stage_2_its_first_layers(make, tmp_path):
    recipe = make(tmp_path / "run", align={"steps": 1}, contrast={"steps": 1, "llm_layers": 1})
    train(recipe, progress=False)
    depths = []
    for name in ("align/model", "contrast/model", "model"):
        loaded = lusifer.load(str(tmp_path / "run" / name), device="cpu")
        inner = loaded[0].auto_model
        depths.append(len(inner.llm.layers))
        assert inner.config.llm_config.num_hidden_layers == inner.llm.config.num_hidden_layers == depths[-1]
    assert depths == [2, 1, 1]
    assert loaded.encode(["the cat"]).shape == (1, 48)
    with pytest.raises(LusiferError, match="llm_layers is 5, but the LLM has 2"):
        train(make(tmp_path / "deep", contrast={"llm_layers": 5}), progress=False)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_resumed_run_keeps_the_chosen_attention(make, tmp_path, monkeypatch, attention):
    found = []
    real = lusifer.training.run.run_contrast

    def spy(recipe, model, *args):
        inner = model[0].auto_model
        found.append((inner.encoder.config._attn_implementation, inner.llm.config._attn_implementation))
        if len(found) == 1:
            raise Killed
        return real(recipe, model, *args)

    monkeypatch.setattr(lusifer.training.run, "run_contrast", spy)
    recipe = make(
        tmp_path / "run",
        model={"attn_implementation": attention},
        warm_start={"enabled": False},
        align={"steps": 1},
        contrast={"steps": 1},
    )
    with pytest.raises(Killed):
        train(recipe, progress=False)
    train(recipe, progress=False)
    assert found == [(attention, attention)] * 2
