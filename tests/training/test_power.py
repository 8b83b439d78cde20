"""Power cuts and damaged files: a run goes on from what is whole, and ends where an undisturbed one does."""

from __future__ import annotations

import json
import os
import shutil
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lusifer import LusiferError
from lusifer.recipes.schema import Recipe
from lusifer.training.checkpoints import last_intact
from lusifer.training.run import train
from lusifer.training.trainer import AtomicTrainer
from support.crash import difference
from support.holding import held
from support.kill import Killed, kill_in
from support.power import Disk
from support.texts import TEXTS

FILES = ["learning.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth"]


@pytest.fixture(scope="module")
def recipe(tiny_encoder, tiny_llm, tmp_path_factory):
    """Makes a recipe of stage 2 alone, of four steps with dropout."""
    data = tmp_path_factory.mktemp("data")
    pairs = [{"query": text, "positive": text.upper()} for text in TEXTS]
    (data / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

    def make(output, **contrast):
        model = {"encoder": tiny_encoder, "llm": tiny_llm, "max_seq_length": 16}
        stage = {"data": [{"source": str(data / "pairs.jsonl")}], "steps": 4, "batch_size": 4, "learning_rate": 1e-2}
        stage |= {"save_steps": 1, "logging_steps": 1, "save_total_limit": 3}
        return Recipe.model_validate(
            {
                "output": str(output),
                "model": {**model, "llm_lora": {"r": 2, "alpha": 4, "dropout": 0.2}},
                "warm_start": {"enabled": False},
                "contrast": {**stage, **contrast},
            }
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUSIFER_CACHE", str(data / "cache"))
        yield make


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """The folder of an undisturbed run."""
    output = tmp_path_factory.mktemp("whole") / "run"
    train(recipe(output), progress=False)
    return output


def assert_same_weights(output, whole):
    one, two = (load_file(folder / "model" / "model.safetensors") for folder in (output, whole))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in two)


def assert_same(output, whole):
    assert_same_weights(output, whole)
    assert history(output) == history(whole)


def history(output):
    """Everything that was logged and has nothing to do with time or memory."""
    entries = json.loads((output / "contrast" / "stage.json").read_text())["history"]
    kept = ("step", "loss", "train_loss", "grad_norm", "learning_rate", "padding")
    return [{key: entry[key] for key in kept if key in entry} for entry in entries]


def steps(output):
    """Steps of the whole checkpoints."""
    return sorted(int(path.name.split("-")[1]) for path in (output / "contrast" / "checkpoints").glob("checkpoint-*"))


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of the undisturbed run, before its last files were written."""
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "run" / "contrast" / "model")
    (tmp_path / "run" / "contrast" / "stage.json").unlink()
    return tmp_path / "run"


def test_a_power_cut_at_a_checkpoint_costs_no_more_than_that_checkpoint(recipe, whole, monkeypatch, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "vault").mkdir()
    states = []
    with monkeypatch.context() as patch:
        disk = Disk(tmp_path / "disk", tmp_path / "vault", patch)
        rename, save = os.rename, AtomicTrainer.save_checkpoint

        def cut(step, done):
            for kind in (False, True):
                states.append((tmp_path / f"{step}-{done}-{kind}", step, done))
                disk.cut(states[-1][0], kind=kind)

        def renamed(source, target):
            rename(source, target)
            if str(source).endswith("checkpoint-2"):  # The name is new and not synced.
                cut(2, "renamed")

        def saved(self, *args):
            save(self, *args)
            if self.state.global_step > 1:
                cut(self.state.global_step, "saved")

        patch.setattr(os, "rename", renamed)
        patch.setattr(os, "replace", lambda source, target: renamed(source, target))
        patch.setattr(AtomicTrainer, "save_checkpoint", saved)
        train(recipe(tmp_path / "disk" / "run"), progress=False)
    assert len(states) == 8
    for state, step, done in states:
        found = steps(state / "run")
        assert found[-1] >= step - (done == "renamed"), (state, found)
    for state, _, _ in states[::3]:
        train(recipe(state / "run"), progress=False)
        assert_same(state / "run", whole)


def test_a_finished_run_survives_a_power_cut(recipe, whole, monkeypatch, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "vault").mkdir()
    disk = Disk(tmp_path / "disk", tmp_path / "vault", monkeypatch)
    train(recipe(tmp_path / "disk" / "made" / "run"), progress=False)
    disk.cut(tmp_path / "after", kind=False)
    assert_same(tmp_path / "after" / "made" / "run", whole)
    for path in (tmp_path / "after").rglob("*.json"):
        json.loads(path.read_text())
    assert steps(tmp_path / "after" / "made" / "run")[-1] == 4


@pytest.mark.parametrize("how", ["empty", "halved", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(recipe, whole, copy, caplog, name, how):
    caplog.set_level("INFO")  # An earlier test may have left it there.
    path = copy / "contrast" / "checkpoints" / "checkpoint-4" / name
    content = path.read_bytes()
    path.unlink()
    if how != "missing":
        path.write_bytes(content[: len(content) // 2] if how == "halved" else b"")
    train(recipe(copy), progress=False)
    assert_same(copy, whole)
    told = [record.getMessage() for record in caplog.records if record.name == "lusifer.training.checkpoints"]
    assert len(told) == 1
    assert f"checkpoint-4/{name} is damaged" in told[0] and "trying checkpoint-3" in told[0] and "\n" not in told[0]
    assert steps(copy) == [2, 3, 4]  # A new 4 beside what is set aside.
    assert (copy / "contrast" / "checkpoints" / "damaged-checkpoint-4").is_dir()


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_noticed(copy, caplog, name):
    caplog.set_level("INFO")
    path = copy / "contrast" / "checkpoints" / "checkpoint-4" / name
    content = bytearray(path.read_bytes())
    # Inside of a number: a file that can still be read.
    at = content.rindex(b"0") if name.endswith(".json") else len(content) // 2
    content[at] ^= 1
    path.write_bytes(content)
    assert last_intact(path.parents[1]) == path.parents[1] / "checkpoint-3"
    assert f"checkpoint-4/{name} is damaged" in caplog.text and "trying checkpoint-3" in caplog.text


def test_a_run_goes_on_from_the_checkpoint_before_a_flipped_bit(recipe, whole, copy, caplog):
    path = copy / "contrast" / "checkpoints" / "checkpoint-4" / "learning.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 64  # The file can be read, and ends with other weights.
    path.write_bytes(content)
    load_file(path)
    train(recipe(copy), progress=False)
    assert_same(copy, whole)
    assert "checkpoint-4/learning.safetensors is damaged (its checksum is not that of checksums.json)" in caplog.text


@pytest.mark.parametrize("content", [b"", b"[]", b'{"xxh3_64": {"optimizer.pt": "0"}}'])
def test_damaged_checksums_are_damage_too(copy, caplog, content):
    path = copy / "contrast" / "checkpoints" / "checkpoint-4" / "checksums.json"
    path.write_bytes(content)
    assert last_intact(path.parents[1]) == path.parents[1] / "checkpoint-3"
    assert len([record for record in caplog.records if "checkpoint-4/" in record.getMessage()]) == 1


def test_a_checkpoint_without_checksums_goes_on(copy):
    """As earlier versions wrote them."""
    folder = copy / "contrast" / "checkpoints" / "checkpoint-4"
    (folder / "checksums.json").unlink()
    assert last_intact(folder.parent) == folder


def test_with_every_checkpoint_damaged_the_stage_starts_again(recipe, whole, copy, caplog):
    for folder in (copy / "contrast" / "checkpoints").iterdir():
        (folder / "optimizer.pt").write_bytes(b"")
    train(recipe(copy), progress=False)
    assert_same(copy, whole)
    assert "checkpoint-2/optimizer.pt is damaged (empty); the stage starts again" in caplog.text


def test_a_checkpoint_of_an_earlier_version_goes_on(recipe, whole, copy, caplog):
    """Its weights do not say how many processes wrote it, nor has it checksums."""
    path = copy / "contrast" / "checkpoints" / "checkpoint-4" / "learning.safetensors"
    (path.parent / "checksums.json").unlink()
    with safe_open(path, "pt") as file:
        loss_sum = file.metadata()["loss_sum"]
    save_file(load_file(path), path, metadata={"loss_sum": loss_sum})
    train(recipe(copy), progress=False)
    assert_same(copy, whole)
    assert "damaged" not in caplog.text


@pytest.mark.parametrize("missing", [False, True])
def test_every_process_of_a_checkpoint_left_its_random_state(recipe, copy, caplog, missing):
    """Another number of processes goes on without it; none of those that wrote it may lack."""
    folder = copy / "contrast" / "checkpoints" / "checkpoint-4"
    save_file(
        load_file(folder / "learning.safetensors"),
        folder / "learning.safetensors",
        metadata={"loss_sum": "1.0", "ranks": "2"},
    )
    (folder / "checksums.json").unlink()  # They are of one process.
    shutil.copy(folder / "rng_state.pth", folder / "rng_state_0.pth")
    (folder / "rng_state.pth").rename(folder / ("elsewhere" if missing else "rng_state_1.pth"))
    assert last_intact(folder.parent) == folder.with_name("checkpoint-3" if missing else "checkpoint-4")
    assert ("checkpoint-4/rng_state_1.pth is damaged (missing)" in caplog.text) == missing


def test_a_damaged_report_of_a_finished_stage(recipe, whole, tmp_path, caplog):
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    report = output / "contrast" / "stage.json"
    before = json.loads(report.read_text())
    for broken in (b"", report.read_bytes()[:90], b"[]"):
        caplog.clear()
        report.write_bytes(broken)
        train(recipe(output), progress=False)
        assert_same(output, whole)
        assert "stage.json is damaged; its model is written again" in caplog.text
        after = json.loads(report.read_text())
        assert (after["fingerprint"], after["loss"]) == (before["fingerprint"], before["loss"])


@pytest.mark.parametrize("fingerprint", [None, b""])
def test_a_stage_of_which_nothing_says_whose_it_is_stays_as_it_is(recipe, whole, tmp_path, fingerprint):
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    (output / "contrast" / "fingerprint").unlink()
    if fingerprint is not None:
        (output / "contrast" / "fingerprint").write_bytes(fingerprint)
    (output / "contrast" / "stage.json").write_bytes(b"")
    with pytest.raises(LusiferError, match="stage.json' is damaged; remove the folder"):
        train(recipe(output), progress=False)
    assert_same_weights(output, whole)


def test_checkpoints_rotate_by_step_when_the_clock_goes_back(recipe, whole, monkeypatch, tmp_path):
    save = AtomicTrainer.save_checkpoint

    def saved(self, *args):
        # What is there was written in the future.
        for path in (tmp_path / "run" / "contrast" / "checkpoints").glob("checkpoint-*"):
            os.utime(path, times=(time.time() + 1e5,) * 2)
        save(self, *args)

    monkeypatch.setattr(AtomicTrainer, "save_checkpoint", saved)
    train(recipe(tmp_path / "run"), progress=False)
    assert steps(tmp_path / "run") == [2, 3, 4]


def test_a_second_run_in_the_same_folder_is_refused(recipe, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    left = tmp_path / "run" / "contrast" / "checkpoints" / ".saving-3"
    left.mkdir()
    (tmp_path / "run" / ".lusifer-0123456789abcdef").touch()
    with (
        held(tmp_path / "run"),
        pytest.raises(LusiferError, match="another process is using"),
    ):
        train(recipe(tmp_path / "run"), progress=False)
    assert left.is_dir()
    (tmp_path / "run" / "contrast" / "stage.json").unlink()
    train(recipe(tmp_path / "run"), progress=False)
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.startswith(".")]


def test_a_killed_run_lets_the_next_one_in(recipe, whole, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        kill_in(patch, "contrast", 3)
        with pytest.raises(Killed):
            train(recipe(tmp_path / "run"), progress=False)
    train(recipe(tmp_path / "run"), progress=False)
    assert_same(tmp_path / "run", whole)


def test_what_kills_left_goes_also_from_a_stage_that_is_finished(recipe, whole, tmp_path):
    output = shutil.copytree(whole, tmp_path / "run")
    (output / ".notes-01234567").touch()  # Somebody's own.
    before = {path.relative_to(output) for path in output.rglob("*")}
    for place in ("contrast/.stage.json-0123abcd", "contrast/.stage.json-0123abcd.lock", ".model-4567abcd.lock"):
        (output / place).touch()
    (output / ".model-4567abcd").mkdir()
    train(recipe(output), progress=False)
    assert {path.relative_to(output) for path in output.rglob("*")} == before


def test_a_stage_that_goes_on_from_a_folder_leaves_the_files_of_one_that_did_not(recipe, tmp_path):
    stages = recipe(tmp_path / "run").model_dump(exclude_unset=True)
    align = {**stages["contrast"], "data": [{**stages["contrast"]["data"][0], "task": "reconstruct"}], "steps": 1}
    align["data"][0]["columns"] = {"text": "query"}
    both = Recipe.model_validate({**stages, "align": align})
    train(both, progress=False)
    files = ("config.json", "tokenizer.json", "tokenizer_config.json")
    before = [json.loads((tmp_path / "run" / "model" / name).read_text()) for name in files]
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "run" / "contrast")
    train(both, progress=False)
    after = [json.loads((tmp_path / "run" / "model" / name).read_text()) for name in files]
    card = (tmp_path / "run" / "model" / "README.md").read_text().splitlines()
    shutil.rmtree(tmp_path / "run" / "model")
    train(both, progress=False)  # From the last stage's folder.
    again = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert difference(again, after[0]) == {}
    new = (tmp_path / "run" / "model" / "README.md").read_text().splitlines()
    assert new == card
    for one in (before, after):
        one[0]["provenance"]["stages"] = None  # With seconds.
    changed = [difference(*pair) for pair in zip(after, before, strict=True)]
    assert not any(changed), changed
    assert after[1]["truncation"] is after[1]["padding"] is None
