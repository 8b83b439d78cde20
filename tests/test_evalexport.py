"""Exported data score as their source does, and an interrupted export goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import datasets
import pytest

mteb = pytest.importorskip("mteb")

from lusifer import LusiferError, evalexport  # noqa: E402
from lusifer.evaltasks import choose, mteb_task  # noqa: E402
from mteb_folder import Bag, data  # noqa: E402, F401


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
