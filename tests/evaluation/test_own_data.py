"""Own data as tasks: mteb's own scores, a score per content, a place in the report."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest

from lusifer import LusiferError
from lusifer.data.everyday_set import load_everyday
from lusifer.evaluation.everyday import score
from lusifer.evaluation.report import read, render
from lusifer.evaluation.systems import Embedder
from support.mteb_folder import Bag, save
from support.own_tasks import labelled, scored, write_csv, write_jsonl, write_own_tasks, write_task

mteb = pytest.importorskip("mteb")
evaluation = pytest.importorskip("lusifer.evaluation.run")

from lusifer.evaluation.own import build, open_tasks  # noqa: E402
from lusifer.evaluation.own import tasks as own_tasks  # noqa: E402
from lusifer.evaluation.results import main_scores  # noqa: E402
from lusifer.evaluation.tasks import choose  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples" / "tasks"


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(own_tasks._Clustering, "max_documents_per_cluster", 256)
    monkeypatch.setattr(own_tasks._Classification, "n_experiments", 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_own_tasks(tmp_path_factory.mktemp("own") / "tasks")


@pytest.fixture
def seen(monkeypatch):
    """Scores with bags of letters; the texts that were embedded."""
    texts = []

    def embed(asked):
        texts.extend(asked)
        return Bag().encode([{"text": asked}])

    monkeypatch.setattr(evaluation, "load_embedder", lambda model, **kwargs: Embedder(embed, 64))
    return texts


def evaluate(tasks, out, **options):
    return evaluation.run("some-model", tasks, out, progress=False, **options)


def rows_of_mteb(own):
    result = mteb.evaluate(Bag(), build(own), cache=None, co2_tracker=False, show_progress_bar=False)
    return {row["hf_subset"]: row for row in result.task_results[0].scores["test"]}


def test_scores_are_mtebs_own_to_the_last_digit(folder, tmp_path, seen):
    tasks = open_tasks([str(folder)])
    assert {task.type for task in tasks} == {
        "Classification", "Clustering", "STS", "PairClassification", "BitextMining", "Retrieval", "Reranking"
    }  # fmt: skip
    records = evaluate(tasks, tmp_path / "out")
    for task in tasks:
        record, expected = records[task.name], rows_of_mteb(task.own)
        assert record["status"] == "done", record.get("error")
        ours = {row["hf_subset"]: row for row in record["scores"]["test"]}
        for subset, row in expected.items():
            assert ours[subset]["main_score"] == row["main_score"], (task.name, subset)
            assert 0 < row["main_score"] < 1, (task.name, "neither perfect nor useless")
            same = [key for key, value in row.items() if isinstance(value, float) and value == value]
            assert len(same) > 2 and all(ours[subset][key] == row[key] for key in same), task.name
        if task.type != "Clustering":
            assert set(record["standard_errors"]["test"]) == set(task.subsets), task.name
    count = len(seen)
    assert evaluate(tasks, tmp_path / "out") == records and len(seen) == count
    # mteb's own tools read the folder.
    results = mteb.ResultCache(tmp_path / "out").load_results()
    assert {row.task_name for row in results.model_results[0].task_results} == {task.name for task in tasks}


def test_a_language_scores_the_same_alone(folder, tmp_path, seen):
    (task,) = open_tasks([str(folder / "clusters.yaml")])
    both = main_scores(evaluate([task], tmp_path / "both"))["clusters"]
    for code in ("de", "en"):
        part, _ = choose(None, None, languages=[code], own=[task])
        joined = evaluate(part, tmp_path / "parts")
    assert main_scores(joined)["clusters"] == both and both["de"] != both["en"]


def test_changed_content_is_scored_again_and_a_changed_file_is_not(tmp_path, seen):
    rows, out = labelled("en"), tmp_path / "out"
    path = write_task(tmp_path, "topics", type="classification", languages={"en": write_csv(tmp_path / "a.csv", rows)})
    first = evaluate(open_tasks([str(path)]), out)["topics"]
    # The same rows in another format, order of columns and name.
    datasets.Dataset.from_list([dict(reversed(row.items())) for row in rows]).to_parquet(tmp_path / "b.parquet")
    write_task(tmp_path, "topics", type="classification", languages={"en": "b.parquet"})
    assert evaluate(open_tasks([str(path)]), out)["topics"] == first
    rows[0]["label"] = "c"
    write_csv(tmp_path / "a.csv", rows)
    write_task(tmp_path, "topics", type="classification", languages={"en": "a.csv"}, metric="f1")
    second = evaluate(open_tasks([str(path)]), out)["topics"]
    assert second["dataset_revision"] != first["dataset_revision"]
    assert second["scores"]["test"][0]["main_score"] == second["scores"]["test"][0]["f1"]
    # A language that the file does not name any more is not missed.
    write_task(tmp_path, "topics", type="classification", languages={"de": "a.csv"})
    evaluate(open_tasks([str(path)]), out)
    assert "not scored" not in render(read([out]), "md")


def test_own_data_stand_beside_public_tasks_in_the_report(folder, tasks_folder, tmp_path, seen):
    own = open_tasks([str(folder / "similar.yaml"), str(folder / "answers.yaml")])
    tasks, lost = choose(None, tasks_folder, names=["KLUE-STS", "similar", "answers"], own=own)
    assert not lost and {task.name for task in tasks} == {"KLUE-STS", "similar", "answers"}
    for name in ("one", "two"):
        evaluate(tasks, tmp_path / name, data=tasks_folder)
    text = render(read([tmp_path / "one", tmp_path / "two"]), "md", "two")
    errors = json.loads(next((tmp_path / "one").rglob("answers.json")).read_text())
    assert errors["own_data"]["file"].endswith("answers.yaml") and errors["type"] == "Retrieval"
    assert {line.split(" | ")[0] for line in text.splitlines() if "±" in line} >= {"| Korean (ko)", "| English (en)"}
    assert "| language | Retrieval | STS |" in text
    assert "## Your tasks\n" in text and "| task | language | metric | one | two |" in text
    row = next(line for line in text.splitlines() if line.startswith("| answers | de > en |")).split(" | ")
    assert row[2] == "ndcg_at_10" and row[3] == row[4].removesuffix(" |") and "±" in row[3]
    assert "- similar: How similar are two lines?" in text


def test_the_everyday_set_scores_as_without_mteb(tmp_path, seen):
    tasks, _ = choose(None, None, languages=["en", "de", "te"], own=open_tasks(["everyday"]))
    scores = main_scores(evaluate(tasks, tmp_path / "out"))
    bag = lambda texts: __import__("torch").from_numpy(Bag().encode([{"text": texts}]))  # noqa: E731
    expected = score(bag, languages=["en", "de", "te"], progress=False)
    found = scores["everyday-translation"]
    for code in ("de", "te"):
        both = (found[f"{code}-en"] + found[f"en-{code}"]) / 2
        assert both == pytest.approx(expected["translation_retrieval"][code], abs=1e-7)
    # mteb rounds retrieval to five places.
    assert scores["everyday-topics"] == pytest.approx(expected["topic_retrieval"], abs=1e-5)
    assert len(load_everyday().sentences) == 23


def test_instructions_of_a_task_hold_where_instructions_are_asked_for(tmp_path, seen):
    data = {"languages": {"en": write_jsonl(tmp_path / "a.jsonl", scored())}}
    path = write_task(tmp_path, "mine", type="sts", instruction="Say it again", **data)
    plain = evaluate(open_tasks([str(path)]), tmp_path / "plain")["mine"]
    assert plain["prefixes"]["symmetric"] == ""
    options = {"prompts": {"STS": "Any"}}
    asked = evaluate(open_tasks([str(path)]), tmp_path / "asked", **options)["mine"]
    assert asked["prefixes"]["symmetric"] == "Instruct: Say it again\nQuery: "
    by_name = evaluate(open_tasks([str(path)]), tmp_path / "named", prompts={"mine": {"query": "q: "}})["mine"]
    assert by_name["prefixes"] == {"query": "q: ", "document": "", "symmetric": "q: "}
    write_task(tmp_path, "mine", type="sts", instruction="Once more", **data)
    again = evaluate(open_tasks([str(path)]), tmp_path / "asked", **options)["mine"]
    assert again["prefixes"]["symmetric"] == "Instruct: Once more\nQuery: "


def test_half_of_every_label_is_learnt_whatever_the_order(tmp_path):
    rows = [*labelled("en"), *labelled("en")[:6]]
    for name, order in (("a", rows), ("b", rows[::-1])):
        write_task(tmp_path, name, type="classification", languages={"en": write_csv(tmp_path / f"{name}.csv", order)})
    one, other = (task.own.subsets["en"] for task in open_tasks([str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")]))
    assert set(one["train"]["text"]) == set(other["train"]["text"])
    assert not set(one["train"]["text"]) & set(one["test"]["text"]), "a text that occurs twice is on one side"
    assert len(set(one["train"]["text"])) == len(set(one["test"]["text"])) == 24
    assert np.bincount(one["test"]["label"]).min() >= 8


def test_rows_of_several_languages_may_share_a_file(tmp_path):
    rows = [{"message": r["text"], "topic": r["label"], "lang": c} for c in ("en", "de") for r in labelled(c)]
    write_csv(tmp_path / "all.csv", rows)
    columns = {"text": "message", "label": "topic", "language": "lang"}
    keys = {"type": "clustering", "columns": columns}
    path = write_task(tmp_path, "mixed", languages={"en": "all.csv", "de": "all.csv"}, **keys)
    (task,) = open_tasks([str(path)])
    assert task.own.subsets["de"]["test"]["text"] == [row["text"] for row in labelled("de")]
    path = write_task(tmp_path, "mixed", languages={"fr": "all.csv"}, **keys)
    with pytest.raises(LusiferError, match="all.csv: no row has the language 'fr'; there are de, en"):
        open_tasks([str(path)])


def test_the_example_of_every_type_is_whole():
    tasks = open_tasks([str(EXAMPLES)])
    assert {task.own.type for task in tasks} == {
        "classification", "pair-classification", "sts", "retrieval", "reranking", "clustering", "bitext"
    }  # fmt: skip
    # Processes of several devices get them so.
    assert [one.own.revision for one in pickle.loads(pickle.dumps(tasks))] == [task.revision for task in tasks]
    assert all({"en", "es"} <= {code for codes in task.subsets.values() for code in codes} for task in tasks)


def test_a_data_set_in_the_layout_of_the_hub_is_read_by_subset_and_split(tmp_path):
    save(tmp_path, "set", {"de": {"test": labelled("de"), "train": labelled("en")}, "en": {"dev": labelled("en")}})
    languages = {
        "de": {"source": "set", "subset": "de", "split": "test"},
        "en": {"data": {"source": "set", "subset": "en", "split": "dev"}},
    }
    (task,) = open_tasks([str(write_task(tmp_path, "mine", type="clustering", languages=languages))])
    assert (
        task.own.subsets["de"]["test"]["text"][0].endswith(" de") and len(task.own.subsets["en"]["test"]["text"]) == 48
    )
    both = {"train": {"source": "set", "subset": "de"}, "test": {"source": "set", "subset": "de"}}
    (task,) = open_tasks([str(write_task(tmp_path, "two", type="classification", languages={"de": both}))])
    sides = task.own.subsets["de"]
    assert sides["train"]["text"][0].endswith(" en") and sides["test"]["text"][0].endswith(" de"), "by the part's name"
    languages["de"]["split"] = "tset"
    with pytest.raises(LusiferError, match="cannot read the dataset '.*set': .*tset"):
        open_tasks([str(write_task(tmp_path, "mine", type="clustering", languages=languages))])
