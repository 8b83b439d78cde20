"""mteb tasks from a folder: scores, resume, failures, the cache of embeddings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest

from lusifer import LusiferError, suite
from lusifer.embedcache import EmbeddingCache
from lusifer.embedders import Embedder, load_embedder
from lusifer.encoding import save_atomically
from lusifer.everyday import load_everyday

mteb = pytest.importorskip("mteb")
evaluation = pytest.importorskip("lusifer.evaluation")

from lusifer.evaltasks import choose, mteb_task  # noqa: E402

EVAL_DATA = Path(__file__).parents[2] / "shared" / "eval-data"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two small tasks in the layout of an offline folder."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "klue").mkdir()
    rows = [
        {
            "guid": str(i),
            "sentence1": f"text {i}",
            "sentence2": f"text {i // 2} and {i}",
            "labels": {"label": i / 4, "real-label": i / 4, "binary-label": int(i > 8)},
        }
        for i in range(16)
    ]
    datasets.Dataset.from_list(rows).to_parquet(folder / "klue" / "validation.parquet")
    # mteb asks for this configuration by name.
    card = (
        "---\nconfigs:\n- config_name: sts\n  data_files:\n  - split: validation\n    path: validation.parquet\n---\n"
    )
    (folder / "klue" / "README.md").write_text(card)
    (folder / "farstail").mkdir()
    rows = [{"sentence1": f"one {i}", "sentence2": f"two {i}", "labels": i % 2} for i in range(16)]
    datasets.Dataset.from_list(rows).to_parquet(folder / "farstail" / "test.parquet")
    entries = [
        {"name": "KLUE-STS", "dir": "klue", "eval_splits": ["validation"], "subsets": {"default": "ko"}},
        {"name": "FarsTail", "dir": "farstail", "eval_splits": ["test"], "subsets": {"default": "fa"}},
    ]
    (folder / "tasks.json").write_text(json.dumps(entries))
    return folder


def counting(monkeypatch):
    """Hashed bags of letters in place of a model; returns the texts it was given."""
    seen = []

    def embed(texts):
        seen.extend(texts)
        return np.stack([np.bincount([ord(c) % 32 for c in text + "."], minlength=32) for text in texts]).astype("f4")

    monkeypatch.setattr(evaluation, "load_embedder", lambda model, **kwargs: Embedder(embed, 64))
    return seen


@pytest.fixture
def cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("LUSIFER_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", suite.BENCHMARKS)
def test_mteb_knows_the_benchmarks_and_every_task_resolves(name):
    found = {task.metadata.name: task for task in mteb.get_benchmark(name).tasks}
    for task in suite.tasks(name):
        made = found[task.name]
        assert set(made.hf_subsets) == set(task.subsets), task.name
        assert set(made.eval_splits) == set(task.splits), task.name
        assert made.metadata.type == task.type


def test_what_is_done_is_not_embedded_again(data, tmp_path, monkeypatch, cache_dir):
    seen = counting(monkeypatch)
    tasks, missing = choose(None, data)
    assert not missing and {task.name for task in tasks} == {"KLUE-STS", "FarsTail"}
    first = evaluation.run("some-model", tasks[:1], tmp_path / "out", data=data, progress=False)
    name = tasks[0].name
    assert first[name]["status"] == "done" and seen
    for fact in ("model_hash", "versions", "max_seq_length", "instructions", "seconds", "revision"):
        assert fact in first[name]
    count = len(seen)
    again = evaluation.run("some-model", tasks, tmp_path / "out", data=data, progress=False)
    assert again[name] == first[name] and len(again) == 2
    new = set(seen[count:])
    assert new and not new & set(seen[:count])
    count = len(seen)
    # In another folder everything is scored anew, and nothing embedded.
    third = evaluation.run("some-model", tasks, tmp_path / "other", data=data, progress=False)
    assert len(seen) == count and third[name]["embedded"] == 0
    assert evaluation.main_scores(third) == evaluation.main_scores(again)


def test_scores_are_mtebs_own(data, tmp_path, monkeypatch, cache_dir):
    counting(monkeypatch)
    tasks, _ = choose(None, data)
    found = evaluation.main_scores(evaluation.run("m", tasks, tmp_path / "out", data=data, progress=False))
    embed = evaluation.load_embedder("m").embed

    class Plain(mteb.models.abs_encoder.AbsEncoder):
        mteb_model_meta = mteb.models.ModelMeta.create_empty(overwrites={"name": "local/plain", "revision": "x"})

        def encode(self, inputs, **kwargs):
            return embed([text for batch in inputs for text in batch["text"]])

    for task in tasks:
        result = mteb.evaluate(Plain(), mteb_task(task, data), cache=None, co2_tracker=False, show_progress_bar=False)
        ((row,),) = result.task_results[0].scores.values()
        assert found[task.name]["default"] == pytest.approx(row["main_score"], abs=1e-6)


def test_instructions_stand_before_queries_and_are_recorded(data, tmp_path, monkeypatch, cache_dir):
    seen = counting(monkeypatch)
    tasks, _ = choose(None, data, names=["KLUE-STS"])
    prompts = evaluation.load_prompts()
    records = evaluation.run("m", tasks, tmp_path / "out", data=data, prompts=prompts, progress=False)
    own = {text for texts in load_everyday().sentences.values() for text in texts}  # Of the profile of languages.
    assert all(text.startswith(f"Instruct: {prompts['STS']}\nQuery: ") for text in set(seen) - own)
    assert records["KLUE-STS"]["instructions"] == {"query": prompts["STS"], "document": None}
    with pytest.raises(LusiferError, match="holds results of another run \\(prompts"):
        evaluation.run("m", tasks, tmp_path / "out", data=data, progress=False)


def test_a_failing_task_is_recorded_and_tried_again(data, tmp_path, monkeypatch, cache_dir):
    counting(monkeypatch)
    tasks, _ = choose(None, data)
    real, broken, calls = evaluation.mteb_task, [True], []

    def make(task, folder):
        calls.append(task.name)
        if broken[0] and task.name == "FarsTail":
            raise ConnectionError("the hub is away")
        return real(task, folder)

    monkeypatch.setattr(evaluation, "mteb_task", make)
    records = evaluation.run("m", tasks, tmp_path / "out", data=data, progress=False)
    assert records["FarsTail"]["status"] == "failed" and calls.count("FarsTail") == 2
    assert "the hub is away" in records["FarsTail"]["error"]
    assert records["KLUE-STS"]["status"] == "done"
    broken[0] = False
    records = evaluation.run("m", tasks, tmp_path / "out", data=data, progress=False)
    assert records["FarsTail"]["status"] == "done" and calls.count("KLUE-STS") == 1


def test_a_damaged_result_is_scored_again(data, tmp_path, monkeypatch, cache_dir):
    counting(monkeypatch)
    tasks, _ = choose(None, data, names=["KLUE-STS"])
    first = evaluation.run("m", tasks, tmp_path / "out", data=data, progress=False)
    (tmp_path / "out" / "KLUE-STS.json").write_text('{"task": "KLUE-')
    again = evaluation.run("m", tasks, tmp_path / "out", data=data, progress=False)
    assert evaluation.main_scores(again) == evaluation.main_scores(first)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "LUSIFR", "data": None}, "there is no benchmark 'LUSIFR'"),
        ({"name": None, "data": None}, "say which --benchmark"),
        ({"name": None, "languages": ["xx"]}, "no language 'xx' here; there are fa, ko"),
        ({"name": None, "types": ["Poetry"]}, "no type 'Poetry'"),
        ({"name": None, "names": ["KLUE"]}, "no task 'KLUE'"),
        ({"name": None, "types": ["STS"], "languages": ["fa"]}, "no task is left"),
    ],
)
def test_wrong_choices_are_one_clear_line(data, arguments, message):
    with pytest.raises(LusiferError, match=message):
        choose(**{"data": data, **arguments})


def test_a_folder_holds_part_of_a_benchmark(data):
    tasks, missing = choose(suite.MAIN, data)
    assert {task.name for task in tasks} == {"KLUE-STS", "FarsTail"} and len(missing) == 121
    with pytest.raises(LusiferError, match="is no list of tasks"):
        choose(None, data / "klue")


def test_the_command_says_what_failed_and_exits_with_1(data, tmp_path, tiny_encoder):
    (tmp_path / "data").mkdir()
    entries = json.loads((data / "tasks.json").read_text())
    entries[1]["dir"] = "nowhere"
    (tmp_path / "data" / "tasks.json").write_text(json.dumps(entries))
    os.symlink(data / "klue", tmp_path / "data" / "klue")
    command = [sys.executable, "-m", "lusifer", "evaluate", f"encoder:{tiny_encoder}", "-q"]
    command += ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--json"]
    environment = {**os.environ, "LUSIFER_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "failed: FarsTail" in done.stderr and "Traceback" not in done.stderr
    told = json.loads(done.stdout)
    assert set(told["scores"]) == {"KLUE-STS"} and set(told["failed"]) == {"FarsTail"}


def test_backbones_alone_and_ours_are_scored_with_a_profile_of_languages(
    data, tmp_path, cache_dir, tiny_encoder, tiny_llm, tiny_st
):
    tasks, _ = choose(None, data, names=["KLUE-STS"])
    encoder, llm, ours = str(tiny_encoder), str(tiny_llm), str(tmp_path / "model")
    save_atomically(tiny_st, tmp_path / "model")
    parts = {f"encoder:{encoder}": ["encoder"], f"llm:{llm}": ["llm"], ours: ["encoder", "llm"]}
    hashes = set()
    for number, (model, tokenizers) in enumerate({**parts, f"llm-causal:{llm}": ["llm"]}.items()):
        out = tmp_path / str(number)
        record = evaluation.run(model, tasks, out, data=data, progress=False)["KLUE-STS"]
        assert record["status"] == "done", record
        hashes.add(record["model_hash"])
        profile = json.loads((out / "languages.json").read_text())
        assert list(profile["tokens"]) == tokenizers
        assert all(count > 5 for row in profile["tokens"].values() for count in row.values())
        assert set(profile["bias"]["te"]) == {"same_language", "alone", "mixed"} and "en" not in profile["bias"]
    assert len(hashes) == 4
    both, causal = (
        load_embedder(f"{kind}:{llm}").embed(["the cat sat", "on the mat"]) for kind in ("llm", "llm-causal")
    )
    assert np.abs(both - causal).max() > 1e-3
    with pytest.raises(LusiferError, match="is not a decoder LLM"):
        load_embedder(f"llm:{encoder}")


def test_several_devices_share_the_tasks(data, tmp_path, tiny_encoder):
    command = [sys.executable, "-m", "lusifer", "evaluate", f"encoder:{tiny_encoder}", "--device", "cpu,cpu"]
    command += ["--data", str(data), "--out", str(tmp_path / "out"), "--json", "-q"]
    environment = {**os.environ, "LUSIFER_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["scores"]) == {"KLUE-STS", "FarsTail"}
    # Once each, by one of the workers; the command itself found them done.
    dates = [json.loads(path.read_text())["date"] for path in (tmp_path / "out").glob("[KF]*.json")]
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(again.stdout) == json.loads(done.stdout)
    assert dates == [json.loads(path.read_text())["date"] for path in (tmp_path / "out").glob("[KF]*.json")]


def test_the_cache_keeps_order_and_computes_each_text_once(tmp_path):
    given = []

    def embed(texts):
        given.extend(texts)
        return np.array([[len(text), ord(text[0])] for text in texts])

    cache = EmbeddingCache(tmp_path / "c.sqlite", embed)
    texts = ["bb", "a", "bb", "ccc"]
    expected = [[2, 98], [1, 97], [2, 98], [3, 99]]
    assert cache(texts).tolist() == expected
    assert sorted(given) == ["a", "bb", "ccc"]
    other = EmbeddingCache(tmp_path / "c.sqlite", embed)
    assert other([*texts, "d"]).tolist() == [*expected, [1, 100]]
    assert given[3:] == ["d"] and other.computed == 1 and other.reused == 4
    assert cache([]).shape[0] == 0


@pytest.mark.skipif(not EVAL_DATA.is_dir(), reason="needs the evaluation data beside the repository")
def test_every_task_of_the_real_folder_is_known():
    tasks, missing = choose(None, EVAL_DATA)
    assert len(tasks) == 12 and not missing
