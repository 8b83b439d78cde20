"""The command line: what it prints, its exit codes, and the quickstart behind it."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from pyarrow import parquet
from sentence_transformers import SentenceTransformer

import lusifer
from lusifer.data.everyday_set import load_everyday
from lusifer.model.sentence_transformer import save_atomically
from lusifer.quickstart import adapted as steps
from lusifer.quickstart import run as quickstart
from lusifer.training.llm_baseline import llm_alone, train_llm_alone
from support import forked
from support.command import mistake
from support.teachers import save_teacher, sentences

COMMANDS = ("fetch", "train", "encode", "evaluate", "info", "merge", "quickstart", "serve")
TEXTS = ["the cat sat on the mat", "a small house near the river", "rain fell all night", "bread and milk"]


@pytest.fixture
def checkpoint(tiny_st, tmp_path):
    save_atomically(tiny_st, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def data(tmp_path):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 5))
    pairs = [{"query": text, "positive": text.upper()} for text in TEXTS * 5]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return tmp_path


def recipe(tmp_path, data, tiny_encoder, tiny_llm, more=""):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"output: {tmp_path / 'run'}\n"
        f"model: {{encoder: {tiny_encoder}, llm: {tiny_llm}, max_seq_length: 32}}\n"
        "warm_start: {enabled: false}\n"
        f"contrast: {{data: [{{source: {data / 'pairs.jsonl'}}}], steps: 2, batch_size: 4}}\n{more}"
    )
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(call, command):
    code, out, err = call(command, "--help")
    assert code == 0 and err == ""
    assert f"lusifer {command}" in out


def test_the_overview_names_every_command(call):
    code, out, _ = call("--help")
    assert code == 0 and all(f" {command} " in out for command in COMMANDS)


def test_an_unknown_command_or_option_is_an_error_code_2(call):
    assert call("encoed")[0] == 2
    assert call("info", "x", "--jsn")[0] == 2


def test_train_then_mistakes_in_recipes(call, tmp_path, data, tiny_encoder, tiny_llm):
    path = recipe(tmp_path, data, tiny_encoder, tiny_llm)
    code, out, _ = call("train", path, "--json", "-q", "--contrast.steps", "1")
    assert code == 0 and json.loads(out) == {"model": str(tmp_path / "run" / "model")}
    assert "contains a run of another recipe" in mistake(*call("train", path, "-q"))
    assert "did you mean 'steps'" in mistake(*call("train", path, "--contrast.step", "1"))
    assert "contrast.steps" in mistake(*call("train", path, "--contrast.steps", "soon"))
    assert "lacks a value" in mistake(*call("train", path, "--contrast.steps"))
    assert "none.yaml" in mistake(*call("train", tmp_path / "none.yaml"))
    assert "/nowhere/encoder" in mistake(*call("train", path, "--model.encoder", "/nowhere/encoder"))
    assert "pairz.jsonl" in mistake(*call("train", path, "--contrast.data.0.source", tmp_path / "pairz.jsonl"))
    blocked = tmp_path / "recipe.yaml" / "inside"
    assert "Not a directory" in mistake(*call("train", path, "--output", blocked, "-q"))


def test_progress_and_losses_stay_off_standard_output(call, tmp_path, data, tiny_encoder, tiny_llm, monkeypatch):
    monkeypatch.setattr("lusifer.progress._FIRST", 0.0)  # Lines at once, also of so short a job.
    path = recipe(tmp_path, data, tiny_encoder, tiny_llm)
    code, out, err = call("train", path, "--json", "--contrast.logging_steps", "1")
    assert code == 0 and json.loads(out) == {"model": str(tmp_path / "run" / "model")}
    assert "stage 2, contrast: " in err and ", loss " in err


def test_encode_to_npy_and_parquet(call, checkpoint, tmp_path):
    model = lusifer.load(str(checkpoint), device="cpu")
    (tmp_path / "in.txt").write_text("\n".join(TEXTS) + "\n")
    exact = ("--precision", "float32")
    code, out, _ = call("encode", checkpoint, tmp_path / "in.txt", tmp_path / "v.npy", "--json", "-q", *exact)
    assert code == 0
    facts = {"texts": 4, "dimension": 48, "cut": 0, "skipped": 0, "output": str(tmp_path / "v.npy")}
    assert json.loads(out) == facts
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), model.encode(TEXTS), atol=1e-5)
    rows = "".join(json.dumps({"body": text}) + "\n" for text in TEXTS)
    (tmp_path / "in.jsonl").write_text(rows)
    arguments = ("--column", "body", "--instruction", "Find it", "--batch-tokens", "30", "-q", "--json", *exact)
    code, out, err = call("encode", checkpoint, tmp_path / "in.jsonl", tmp_path / "v.parquet", *arguments)
    assert code == 0 and err == "" and json.loads(out)["texts"] == 4
    table = parquet.read_table(tmp_path / "v.parquet")
    assert table["text"].to_pylist() == TEXTS
    expected = model.encode([f"Instruct: Find it\nQuery: {text}" for text in TEXTS])
    np.testing.assert_allclose(np.array(table["embedding"].to_pylist()), expected, atol=1e-5)


def test_encode_a_folder_goes_on_and_tells_what_it_left_out(call, checkpoint, tmp_path):
    (tmp_path / "in.txt").write_text("\n".join(TEXTS) + "\n\n")
    arguments = ("encode", checkpoint, tmp_path / "in.txt", tmp_path / "out", "--skip-bad", "--no-text")
    arguments += ("--shard-rows", "2", "--output-dtype", "ubinary", "--dim", "16", "--precision", "float32")
    for _ in range(2):
        code, out, err = call(*arguments, "--json", "-q")
        assert code == 0 and err == "warning: 1 bad rows were left out\n"
        assert json.loads(out) == {
            "texts": 4, "dimension": 16, "cut": 0, "skipped": 1, "shards": 3, "output": str(tmp_path / "out"),
        }  # fmt: skip
    table = parquet.read_table(tmp_path / "out")
    assert table.schema.names == ["id", "embedding"] and len(table["embedding"][0].as_py()) == 2
    message = mistake(*call(*arguments, "--instruction", "Find it", "-q"))
    assert "holds another run: instruction was None and is 'Find it'" in message


def test_encode_says_when_texts_were_cut(call, checkpoint, tmp_path):
    (tmp_path / "in.txt").write_text("cat\n" + "the cat sat on the mat " * 60)
    code, out, err = call("encode", checkpoint, tmp_path / "in.txt", tmp_path / "v.npy", "-q", "--json")
    assert code == 0 and json.loads(out)["cut"] == 1
    assert "1 of 2 texts were longer" in err


def test_encode_mistakes(call, checkpoint, tiny_encoder, tmp_path):
    good = tmp_path / "in.txt"
    good.write_text("one\n")
    (tmp_path / "bad.txt").write_text("one\n\n")
    output = tmp_path / "v.npy"
    assert "none.txt" in mistake(*call("encode", checkpoint, tmp_path / "none.txt", output))
    assert "line 2" in mistake(*call("encode", checkpoint, tmp_path / "bad.txt", output))
    assert "name it .parquet or .npy" in mistake(*call("encode", checkpoint, good, tmp_path / "v.csv"))
    assert "no such folder" in mistake(*call("encode", checkpoint, good, tmp_path / "none" / "v.npy"))
    assert "no checkpoint at" in mistake(*call("encode", tmp_path / "none", good, output))
    assert "no checkpoint at" in mistake(*call("encode", tiny_encoder, good, output))
    assert "no output dtype" in mistake(*call("encode", checkpoint, good, output, "--output-dtype", "int4", "-q"))
    assert not output.exists()


def test_a_checkpoint_whose_backbone_is_gone(call, checkpoint):
    config = next(checkpoint.rglob("config.json"))
    facts = json.loads(config.read_text())
    facts["encoder"] = "/nowhere/encoder"
    config.write_text(json.dumps(facts))
    assert "/nowhere/encoder" in mistake(*call("info", checkpoint))


def test_info(call, checkpoint, tiny_encoder, tiny_llm):
    code, out, err = call("info", checkpoint, "--json")
    facts = json.loads(out)
    assert code == 0 and err == ""
    assert set(facts) == {
        "encoder", "llm", "llm_base_adapters", "llm_layers", "dimension", "max_seq_length", "pooling", "standalone",
        "checkpoint_mb", "parameters", "languages", "provenance",
    }  # fmt: skip
    assert (facts["encoder"], facts["llm"], facts["llm_layers"]) == (tiny_encoder, tiny_llm, 3)
    assert (facts["dimension"], facts["max_seq_length"], facts["standalone"]) == (48, 64, False)
    code, out, _ = call("info", checkpoint)
    assert code == 0 and "connector" in out and "dimension: 48" in out


def test_evaluate(call, checkpoint):
    code, out, err = call("evaluate", checkpoint, "--json", "--langs", "fr", "-q")
    scores = json.loads(out)
    assert code == 0 and err == ""
    assert {task: list(values) for task, values in scores.items()} == {
        "translation_retrieval": ["fr"],
        "topic_retrieval": ["fr"],
    }
    assert all(0 <= value <= 1 for values in scores.values() for value in values.values())
    code, out, _ = call("evaluate", checkpoint, "--langs", "fr, id,en", "-q")
    assert code == 0 and "fr" in out and "id" in out and "-" in out
    assert "no language 'xx'" in mistake(*call("evaluate", checkpoint, "--langs", "fr,xx", "-q"))


def test_merge(call, checkpoint, tmp_path):
    code, out, _ = call("merge", checkpoint, tmp_path / "alone", "-q")
    assert code == 0 and str(tmp_path / "alone") in out
    facts = json.loads(call("info", tmp_path / "alone", "--json")[1])
    assert facts["standalone"]
    one, two = (lusifer.load(str(path), device="cpu").encode(TEXTS) for path in (checkpoint, tmp_path / "alone"))
    np.testing.assert_allclose(one, two, atol=1e-5)
    assert "already exists" in mistake(*call("merge", checkpoint, tmp_path / "alone"))


def test_a_full_disk_is_a_mistake_too(call, checkpoint, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, os.strerror(28))

    (tmp_path / "in.txt").write_text("one\n")
    monkeypatch.setattr(os, "replace", full)
    message = mistake(*call("encode", checkpoint, tmp_path / "in.txt", tmp_path / "v.npy", "-q"))
    assert "No space left on device" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "in.txt"]


def test_ctrl_c_is_130_and_one_line(call, checkpoint, monkeypatch):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("lusifer.loading.describe", interrupted)
    code, out, err = call("info", checkpoint)
    assert code == 130 and out == ""
    assert err.strip().startswith("lusifer: interrupted") and err.strip().count("\n") == 0


def test_a_real_process_prints_one_line_for_broken_data(tmp_path, data, tiny_encoder, tiny_llm):
    """The libraries beneath log and draw progress bars of their own; in a process they would show."""
    (data / "pairs.jsonl").write_text('{"query": "a", "positive": "b"}\n{"query": \n')
    path = recipe(tmp_path, data, tiny_encoder, tiny_llm)
    done = forked.run(["-m", "lusifer", "train", path])
    assert "pairs.jsonl" in mistake(done.returncode, done.stdout, done.stderr)


# The quickstart, with tiny backbones and small data.


@pytest.fixture
def overrides(data, tiny_encoder, tiny_llm, tmp_path, monkeypatch):
    (data / "english.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(80)))
    counts = replace(steps.COUNTS, texts=(str(data / "english.jsonl"),), general=False, head_epochs=1, device="cpu")
    monkeypatch.setattr(steps, "COUNTS", counts)
    monkeypatch.setattr(steps, "TEACHER", save_teacher(tmp_path / "teacher"))
    monkeypatch.setattr(quickstart, "fetch", lambda: {})
    pairs, texts = str(data / "pairs.jsonl"), str(data / "texts.jsonl")
    values = {
        "model.encoder": tiny_encoder, "model.llm": tiny_llm, "model.llm_layers": "null",
        "model.llm_dtype": "float32", "warm_start.data": texts,
        "align.data.0.source": texts, "align.data.1.source": pairs,
        "align.steps": 2, "align.batch_size": 4, "contrast.steps": 2, "contrast.batch_size": 4,
        "contrast.data.0.source": pairs,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in values.items()]


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_quickstart_end_to_end(call, overrides, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    pytest.importorskip("lancedb")
    output, filled = tmp_path / "quickstart", {}
    adapt = quickstart.adapt

    def adapt_and_look(*args, **kwargs):
        filled.update(content(output / "index"))
        return adapt(*args, **kwargs)

    monkeypatch.setattr(quickstart, "adapt", adapt_and_look)
    code, out, _ = call("quickstart", "--output", output, "--json", "-q", *overrides)
    assert code == 0
    results = json.loads(out)
    assert results == json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert set(results) == {"systems", "queries", "index", "adapted", "seconds", "peak_rss_mb", "stages"}
    assert list(results["systems"]) == ["encoder", "llm", "teacher", "adapted", "lusifer"]
    languages = list(load_everyday().sentences)
    for scores in results["systems"].values():
        assert set(scores) == {"translation_retrieval", "topic_retrieval"}
        assert list(scores["topic_retrieval"]) == languages
        assert set(scores["translation_retrieval"]) == set(languages) - {"en"}
    assert results["index"]["texts"] == 64 and results["adapted"]["texts"] == 72
    assert filled and content(output / "index") == filled  # Nobody wrote to the index once it was there.
    assert set(results["seconds"]) == {"index", "adapt", "queries", *results["systems"]}
    assert 50 < results["peak_rss_mb"] < 100_000
    assert list(results["stages"]) == ["warm_start", "align", "contrast"]
    assert all("history" not in stage and stage["seconds"] > 0 for stage in results["stages"].values())
    assert {path.name for path in output.iterdir()} == {
        "index", "adapted", "warm_start", "align", "contrast", "model", "llm_alone", "progress.json", "results.json",
        "report.md", "scores.png",
    }  # fmt: skip

    def never(*args, **kwargs):
        raise AssertionError("worked again")

    for name in ("score", "train", "train_llm_alone", "adapt", "load_for_inference"):
        monkeypatch.setattr(quickstart, name, never)
    monkeypatch.setattr(steps, "load_for_inference", never)
    (output / "report.md").unlink()
    code, out, _ = call("quickstart", "--output", output, "-q", *overrides)
    assert code == 0 and "13 languages" in out and "English teacher alone" in out
    assert "Wie viel" in out and f"lusifer search {output / 'index'}" in out
    assert json.loads((output / "results.json").read_text(encoding="utf-8")) == results
    assert (output / "report.md").is_file()
    # The scores there are of another recipe.
    message = mistake(*call("quickstart", "--output", output, "-q", *overrides, "--contrast.steps=3"))
    assert "contains a run of another recipe" in message


def test_the_baseline_sees_both_directions_and_trains_only_its_adapter(overrides, tmp_path):
    import torch

    recipe = quickstart.quickstart_recipe(tmp_path / "q", overrides)
    learning = [name for name, value in llm_alone(recipe).named_parameters() if value.requires_grad]
    assert learning and all("lora_" in name for name in learning)
    folder = train_llm_alone(recipe, progress=False)
    model = SentenceTransformer(str(folder)).eval()
    untrained = llm_alone(recipe)[0].auto_model.state_dict()
    inner = model[0].auto_model
    assert inner.config.num_hidden_layers == len(inner.layers)
    name = "layers.0.self_attn.q_proj"
    assert not torch.equal(inner.get_submodule(name).weight, untrained[f"{name}.base_layer.weight"])
    assert torch.equal(inner.norm.weight, untrained["norm.weight"])
    ids = torch.tensor([[5, 6, 7, 8]])
    other = torch.tensor([[5, 6, 7, 9]])
    with torch.no_grad():
        one, two = inner(input_ids=ids).last_hidden_state, inner(input_ids=other).last_hidden_state
    # A causal LLM could not tell the first tokens apart.
    assert (one[0, 0] - two[0, 0]).abs().max() > 1e-4


def test_the_version_names_what_it_runs_on(call):
    code, out, err = call("--version")
    assert code == 0 and out.startswith(f"lusifer {lusifer.__version__} (Python 3.") and "torch 2." in out
