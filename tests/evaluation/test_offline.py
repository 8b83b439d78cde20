"""Exported data score as their source does, and an interrupted export goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import datasets
import pytest

mteb = pytest.importorskip("mteb")

from lusifer import LusiferError  # noqa: E402
from lusifer.evaluation import offline as evalexport  # noqa: E402
from lusifer.evaluation.benchmarks import Task  # noqa: E402
from lusifer.evaluation.tasks import choose, mteb_task  # noqa: E402
from support.mteb_folder import Bag, data, save  # noqa: E402, F401


def scores(task, folder):
    result = mteb.evaluate(Bag(), mteb_task(task, folder), cache=None, co2_tracker=False, show_progress_bar=False)
    return {split: [row["main_score"] for row in rows] for split, rows in result.task_results[0].scores.items()}


@pytest.fixture
def hub(data, monkeypatch):  # noqa: F811
    """The folder of the tests in the place of a hub."""
    entries = {entry["name"]: entry for entry in json.loads((data / "tasks.json").read_text())}
    monkeypatch.setattr(evalexport, "source", lambda task: (str(data / entries[task.name]["dir"]), None))
    return choose(None, data)[0]


def test_exported_tasks_give_the_same_scores(hub, data, tmp_path):  # noqa: F811
    assert evalexport.export(hub, tmp_path / "out", progress=False) == {}
    exported, _ = choose(None, tmp_path / "out")
    assert {task.name: task.subsets for task in exported} == {task.name: task.subsets for task in hub}
    for task in hub:
        assert scores(task, tmp_path / "out") == scores(task, data), task.name
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.name.startswith(".")) == []


def test_an_export_goes_on_and_names_what_failed(hub, tmp_path, monkeypatch):
    real, calls, away = datasets.load_dataset, [], [True]

    def load(path, name, **kwargs):
        calls.append(name)
        if away[0] and name.startswith("es-"):
            raise ConnectionError("the hub is away")
        return real(path, name, **kwargs)

    monkeypatch.setattr(evalexport.datasets, "load_dataset", load)
    failed = evalexport.export(hub, tmp_path, progress=False)
    assert failed == {"XQuADRetrieval": "ConnectionError: the hub is away"}
    listed = {entry["name"] for entry in json.loads((tmp_path / "tasks.json").read_text())}
    assert listed == {task.name for task in hub} - {"XQuADRetrieval"}
    assert not (tmp_path / "XQuADRetrieval").exists()
    calls.clear()
    away[0] = False
    assert evalexport.export(hub, tmp_path, progress=False) == {}
    assert all(name.startswith("es-") for name in calls), "a complete task was downloaded again"
    (tmp_path / "tasks.json").write_text('[{"na')
    with pytest.raises(LusiferError, match=r"tasks\.json is damaged"):
        evalexport.export(hub, tmp_path, progress=False)


def test_only_what_the_subsets_need_is_kept():
    names = ["es-corpus", "es-queries", "es-qrels", "de-corpus", "de-queries", "de-qrels"]
    assert evalexport.needed(names, ["es"]) == names[:3]
    assert evalexport.needed(["en", "es", "est"], ["es"]) == ["es"]
    # The subsets are rows of one table, or named otherwise: keep everything.
    assert evalexport.needed(["default"], ["fra-eng"]) == ["default"]
    assert evalexport.needed(["a", "es"], ["es", "fr"]) == ["a", "es"]
    assert evalexport.needed(["queries", "corpus", "default"], ["default"]) == ["default", "queries", "corpus"]
    assert evalexport.needed(["queries", "corpus", "qrels", "top_ranked", "de"], ["default"]) == [
        "queries", "corpus", "qrels", "top_ranked"
    ]  # fmt: skip
    assert evalexport.needed(["es-qrels", "query", "es-corpus"], ["es"]) == ["es-qrels", "es-corpus", "query"]
    assert evalexport.needed(["default", "es-en", "en-en"], ["es-en"], only="default") == ["default"]


def rows(name, count=40):
    """Configurations of a small retrieval data set, each named by what is in front of its parts."""
    text = [f"{['sea', 'tree', 'goal', 'bread'][i % 4]} {i * i}" for i in range(count)]
    judged = [{"query-id": f"q{i}", "corpus-id": f"d{i}", "score": 1} for i in range(count)]
    return {
        f"{name}corpus": {"test": [{"_id": f"d{i}", "title": "", "text": text[i]} for i in range(count)]},
        f"{name}queries": {"test": [{"_id": f"q{i}", "text": text[i][:5]} for i in range(count)]},
        f"{name}qrels": {"test": judged},
    }


def ranked(count=40):
    return [{"query-id": f"q{i}", "corpus-ids": [f"d{(i + j) % count}" for j in range(10)]} for i in range(count)]


def beir():
    found = rows("")
    return {**found, "default": found.pop("qrels")}


def reranking():
    found = {**rows("bn-"), **rows("fi-")}
    return {**found, "bn-top_ranked": {"test": ranked()}, "fi-top_ranked": {"test": ranked()}}


def pairs(*langs):
    values = [{"sentence1": f"rain {i}", "sentence2": "rain " * (i % 4), "score": float(i % 5)} for i in range(30)]
    return [{**row, "lang": lang} for lang in langs for row in values]


def sts17():
    langs = ("es-en", "en-en", "fr-en")
    return {"default": {"test": pairs(*langs)}, **{lang: {"test": pairs(lang)} for lang in langs}}


LAYOUTS = {
    "SciFact": (beir, {"default": ("en",)}),
    "NFCorpus": (lambda: rows(""), {"default": ("en",)}),
    "AskUbuntuDupQuestions": (lambda: {**beir(), "top_ranked": {"test": ranked()}}, {"default": ("en",)}),
    "WikipediaRerankingMultilingual": (reranking, {"bn": ("bn",)}),
    "STS17": (sts17, {"es-en": ("es", "en"), "en-en": ("en",)}),
}


@pytest.fixture
def local_hub(tmp_path, monkeypatch):
    """Writes data sets of several layouts; gives their tasks."""
    monkeypatch.setattr(evalexport, "source", lambda task: (str(tmp_path / "hub" / task.name), None))

    def make(name, **subsets):
        layout, all_subsets = LAYOUTS[name]
        save(tmp_path / "hub", name, layout())
        return Task(name, name, "x", mteb.get_task(name).metadata.type, "x", ("test",), subsets or all_subsets)

    return make


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_scored_from_its_export(local_hub, tmp_path, name):
    task, out = local_hub(name), tmp_path / "out"
    assert evalexport.export([task], out, progress=False) == {}
    found = scores(task, out)["test"]
    assert len(found) == len(task.subsets) and all(0 < abs(score) <= 1 for score in found)
    # Nothing that the task does not read came along.
    assert not list((out / name).glob("fi-*")) and not (out / name / "fr-en").exists()


def test_what_mteb_cannot_load_is_not_listed(local_hub, tmp_path):
    task = local_hub("SciFact")
    save(tmp_path / "hub", "SciFact", {"default": {"test": [{"query-id": "q", "corpus-id": "d", "score": 1}]}})
    failed = evalexport.export([task], tmp_path / "out", progress=False)
    assert list(failed) == ["SciFact"] and not (tmp_path / "out" / "SciFact").exists()
    assert not (tmp_path / "out" / "tasks.json").exists()
    # A fast-loading task drops a language without a word.
    task = local_hub("STS17", **{"ko-ko": ("ko",)})
    assert "'ko-ko'" in evalexport.export([task], tmp_path / "out", progress=False)["STS17"]


def test_another_language_is_added_to_what_is_there(local_hub, tmp_path):
    out = tmp_path / "out"
    name = "WikipediaRerankingMultilingual"
    first, second = local_hub(name, bn=("bn",)), local_hub(name, fi=("fi",))
    assert evalexport.export([first], out, progress=False) == {}
    assert evalexport.export([second], out, progress=False) == {}
    (entry,) = json.loads((out / "tasks.json").read_text())
    assert entry["subsets"] == {"bn": "bn", "fi": "fi"}
    assert len(scores(first, out)["test"]) == len(scores(second, out)["test"]) == 1
    before = (out / name / "README.md").stat().st_mtime_ns
    assert evalexport.export([first], out, progress=False) == {}
    assert (out / name / "README.md").stat().st_mtime_ns == before, "written again though it was there"


def test_the_command_names_what_cannot_be_had(tmp_path):
    command = [sys.executable, "-m", "lusifer", "data", "export-eval", str(tmp_path / "out"), "-q", "--json"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [*command, "--benchmark", "LUSIFER-quick", "--tasks", "KLUE-STS"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "failed: KLUE-STS" in done.stderr and "Traceback" not in done.stderr
    assert json.loads(done.stdout)["tasks"] == 0
    done = subprocess.run([*command, "--tasks", "Nope"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "no task 'Nope' here" in done.stderr
