"""Standard errors: of mteb's own main score, of the size theory gives, and none where the metric is not known."""

from __future__ import annotations

import numpy as np
import pytest

mteb = pytest.importorskip("mteb")

from lusifer.evaluation.intervals import ROUNDS, Recorder, standard_error  # noqa: E402
from lusifer.evaluation.tasks import choose, mteb_task  # noqa: E402
from support.mteb_folder import Bag  # noqa: E402

TASKS = ["KLUE-STS", "FarsTail", "SIB200Classification", "Tatoeba", "XQuADRetrieval"]


@pytest.mark.parametrize("name", TASKS)
def test_every_type_of_task_has_a_standard_error_of_its_main_score(tasks_folder, tmp_path, name):
    (task,), _ = choose(None, tasks_folder, names=[name])
    made = mteb_task(task, tasks_folder)
    recorder = Recorder(made)
    result = mteb.evaluate(
        Bag(), made, cache=None, co2_tracker=False, show_progress_bar=False, prediction_folder=tmp_path / "none"
    ).task_results[0]
    errors = recorder.errors(result.scores)
    (split,), (subset,) = task.splits, task.subsets
    (row,) = result.scores[split]
    main = row["main_score"]
    assert 0 < main < 1
    # A mean of n values between 0 and 1 spreads by at most 1 / (2 sqrt(n)), a correlation by about 1 / sqrt(n).
    assert 0.001 < errors[split][subset] < 0.2
    assert not (tmp_path / "none").exists(), "predictions were written"
    # Another number than mteb's gets no interval.
    assert recorder.errors({split: [{**row, "main_score": main + 0.01}]}) == {}


def test_clustering_has_no_standard_error():
    """A spread over mteb's repeats would shrink with their number, the documents being the same."""
    recorder = Recorder(mteb.get_task("SIB200ClusteringS2S"))
    for repeats in (10, 1000):
        levels = list(np.random.default_rng(0).normal(0.5, 0.05, size=repeats))
        row = {"hf_subset": "eng_Latn", "main_score": float(np.mean(levels)), "v_measures": {"Level 0": levels}}
        assert recorder.errors({"test": [row]}) == {}


def test_a_standard_error_is_what_theory_says():
    values = np.random.default_rng(1).normal(size=400)
    found = standard_error(lambda rows: float(values[rows].mean()), 400, main=float(values.mean()))
    # The bootstrap's own relative error is 1 / sqrt(2 * ROUNDS), 4 %; four times that.
    assert found == pytest.approx(values.std() / 20, rel=4 / (2 * ROUNDS) ** 0.5)
    assert found == standard_error(lambda rows: float(values[rows].mean()), 400, main=float(values.mean()))
    assert standard_error(lambda rows: float(values[rows].mean()), 400, main=5.0) is None
    assert standard_error(lambda rows: 1.0, 1, main=1.0) is None
    assert standard_error(lambda rows: float("nan"), 9, main=1.0) is None
