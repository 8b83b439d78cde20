"""What docs/evaluation.md says of machines without a network: the hub's cache is enough."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mteb")

from support.dataset_hub import DatasetHandler
from support.hub_server import Hub

TASKS = {
    "XQuADRetrieval": ("xquad", "es"),
    "KLUE-STS": ("klue", "default"),
    "SIB200Classification": ("sib", "eng_Latn"),
}
# The two calls of the guide, for tasks whose data sets are on the stand-in.
CODE = """
import json, sys
import mteb
from support.mteb_folder import Bag

tasks = []
for name, (repository, subset, revision) in json.loads(sys.argv[1]).items():
    task = mteb.get_task(name, hf_subsets=[subset])
    place = {"path": f"acme/{repository}", "revision": revision}
    task.metadata = task.metadata.model_copy(update={"dataset": {**task.metadata.dataset, **place}})
    tasks.append(task)
if sys.argv[2] == "load":
    for task in tasks:
        task.load_data()
else:
    results = mteb.evaluate(Bag(), tasks, cache=None, co2_tracker=False, show_progress_bar=False).task_results
    print(json.dumps({result.task_name: result.main_score for result in results}))
"""


@pytest.fixture
def hub():
    server = Hub(DatasetHandler)
    yield server
    server.close()


def run(hub, tmp_path, what, *, offline):
    revisions = {
        task: (name, subset, hub.repos[f"acme/{name}"]["branches"]["main"]) for task, (name, subset) in TASKS.items()
    }
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    places = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(paths)}
    kept = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_CACHE", "HF_DATASETS_CACHE")}
    return subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(revisions), what],
        env={**kept, **places, "HF_HUB_OFFLINE": str(int(offline))},
        capture_output=True,
        text=True,
        check=False,
    )


def test_tasks_loaded_once_are_scored_without_a_network(hub, tasks_folder, tmp_path):
    for name, _ in TASKS.values():
        hub.put(f"acme/{name}", tasks_folder / name)
    assert run(hub, tmp_path, "score", offline=True).returncode != 0, "nothing is in the cache yet"
    assert not hub.requests
    done = run(hub, tmp_path, "load", offline=False)
    assert done.returncode == 0, done.stderr
    before = len(hub.requests)
    done = run(hub, tmp_path, "score", offline=True)
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)
    assert set(scores) == set(TASKS) and all(0 < score < 1 for score in scores.values())
    assert len(hub.requests) == before
