"""Canaries: what `lusifer.hooks.mteb` touches is still where it was."""

from __future__ import annotations

import inspect

import pytest

mteb = pytest.importorskip("mteb")

from mteb.abstasks import AbsTask, AbsTaskClustering  # noqa: E402
from mteb.abstasks.retrieval import AbsTaskRetrieval  # noqa: E402

from lusifer import LusiferError  # noqa: E402
from lusifer.hooks.mteb import DrawsAlone, add_benchmark, language_script, listen, restrict  # noqa: E402


def test_tasks_save_predictions_by_the_method_we_replace():
    parameters = inspect.signature(AbsTask._save_task_predictions).parameters
    assert list(parameters) == ["self", "predictions", "model", "prediction_folder", "hf_split", "hf_subset"]


def test_retrieval_tasks_give_query_scores_to_the_method_we_wrap():
    task, heard = mteb.get_task("SQuADKorV1Retrieval"), []
    assert {"hf_split", "hf_subset"} <= set(inspect.signature(AbsTaskRetrieval.task_specific_scores).parameters)
    listen(task, lambda *args, **kwargs: None, lambda *scores: heard.append(scores))
    answer = task.task_specific_scores({"q": {}}, {}, {}, hf_split="test", hf_subset="default")
    assert heard == [({"q": {}}, "test", "default")] and answer == {}
    other = mteb.get_task("SQuADKorV1Retrieval")
    assert "task_specific_scores" not in vars(other) and "_save_task_predictions" not in vars(other)


def test_splits_of_a_task_are_what_we_set():
    task = mteb.get_task("KLUE-STS")
    restrict(task, splits=["mine"], subsets=["some"])
    assert task.eval_splits == ["mine"] and task.hf_subsets == ["some"], "AbsTask._eval_splits has moved"


def test_a_benchmark_is_found_by_its_name_after_the_registry_was_read():
    mteb.get_benchmarks()
    name = "LUSIFER-canary"
    add_benchmark(name, mteb.Benchmark(name=name, tasks=[mteb.get_task("KLUE-STS")]))
    assert mteb.get_benchmark(name).name == name, "mteb.benchmarks no longer reads its registry from a module"


def test_clustering_draws_from_the_state_we_set_for_each_subset():
    source = inspect.getsource(AbsTaskClustering)
    assert "self.rng_state" in source and callable(AbsTask._evaluate_subset)
    task = type(
        "Drawing", (DrawsAlone, type("Base", (), {"_evaluate_subset": lambda self: self.rng_state.random()})), {}
    )()
    task.seed = 3
    assert task._evaluate_subset() == task._evaluate_subset()


def test_languages_have_a_short_code_and_a_script():
    assert language_script("de") == language_script("deu") == ("de", "deu-Latn")
    assert language_script("zh-Hant") == ("zh", "zho-Hant") and language_script("swa")[0] == "sw"
    known = {language for key in ("en", "ru", "ar", "hi", "te") for language in [language_script(key)[1]]}
    assert {code.partition("-")[2] for code in known} == {"Latn", "Cyrl", "Arab", "Deva", "Telu"}
    for wrong in ("xx", "qqq", "de-Abcd"):
        with pytest.raises(LusiferError, match="there is no language|is not known"):
            language_script(wrong)
