"""What the benchmarks are made of, and the paper's arithmetic."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

from lusifer.evaluation import benchmarks as suite
from lusifer.evaluation.benchmarks import Mean

# Datasets per language of Figure 2, over the languages the published code scores each on.
COUNTS = {
    "en": 55, "es": 19, "ru": 17, "fr": 25, "vi": 10, "fa": 6, "id": 8, "ar": 7, "fi": 10, "ko": 13, "hi": 16, "bn": 11,
    "te": 12, "sw": 8,
}  # fmt: skip

THREE_LETTERS = {
    "en": "eng", "es": "spa", "ru": "rus", "fr": "fra", "vi": "vie", "fa": "fas", "id": "ind", "ar": "ara", "fi": "fin",
    "ko": "kor", "hi": "hin", "bn": "ben", "te": "tel", "sw": "swa",
}  # fmt: skip


def test_the_main_benchmark_has_the_papers_122_names():
    tasks = suite.tasks(suite.MAIN)
    assert len({task.published_name for task in tasks}) == 122
    assert {language: row["all"] for language, row in suite.counts().items()} == COUNTS
    groups = {task.group for task in tasks}
    assert groups == {"Classification", "Clustering", "Reranking", "Retrieval", "STS"}


def test_a_score_of_one_language_holds_no_pair_of_two_others():
    for task in suite.tasks(suite.MAIN):
        for subset, spoken in task.subsets.items():
            assert len(spoken) == 1, (task.name, subset)
    sts = {task.name: task.subsets for task in suite.tasks(suite.MAIN)}["STS17"]
    assert "es-en" not in sts and sts["es-es"] == ("es",)


# One side of these is English; the published lists leave nothing else for the language.
PAIRS_BY_NECESSITY = {"STS17": {"fr-en"}, "IndicCrosslingualSTS": {"en-bn", "en-hi", "en-te"}}


def test_mteb_agrees_that_a_score_is_of_one_language():
    mteb = pytest.importorskip("mteb")
    for task in suite.tasks(suite.MAIN):
        spoken = mteb.get_task(task.name).metadata.eval_langs
        for subset, (code,) in task.subsets.items():
            names = {name.split("-")[0] for name in (spoken[subset] if isinstance(spoken, dict) else spoken)}
            if subset in PAIRS_BY_NECESSITY.get(task.name, ()):
                assert len(names) == 2, (task.name, subset)
            else:
                assert names == {THREE_LETTERS[code]}, (task.name, subset, names)


def test_counts_by_language_and_type_are_the_table_checked_in():
    table = (Path(__file__).parent / "benchmark_counts.csv").read_text(encoding="utf-8").split()
    groups = table[0].split(",")[1:]
    expected = {row.split(",")[0]: dict(zip(groups, map(int, row.split(",")[1:]), strict=True)) for row in table[1:]}
    counts = {code: {group: row.get(group, 0) for group in groups} for code, row in suite.counts().items()}
    assert counts == expected


def test_cross_lingual_subsets_have_two_languages():
    tasks = suite.tasks(suite.CROSS_LINGUAL)
    assert {task.name for task in tasks} == {
        "MLQARetrieval", "BelebeleRetrieval", "STS17", "STS22.v2", "IndicCrosslingualSTS"
    }  # fmt: skip
    assert all(one != other for task in tasks for one, other in task.subsets.values())


def test_bitext_covers_more_than_a_hundred_languages_into_english_and_pairs_without():
    for task in suite.tasks(suite.BITEXT):
        into = [sides for subset, sides in task.subsets.items() if subset not in task.pivot_free]
        assert len({sides[0] for sides in into}) > 100
        english = {subset for subset, sides in task.subsets.items() if any(side.startswith("eng") for side in sides)}
        assert english == set(task.subsets) - task.pivot_free
        assert len(into) == len(english)
    assert sum(len(task.pivot_free) for task in suite.tasks(suite.BITEXT)) == 60


@pytest.mark.parametrize("table", ["table1", "table2"])
def test_published_means_follow_from_published_rows(table):
    found = suite.published()
    assert found["published"] is True
    columns = found[table]["columns"][:-1]
    for system, row in found[table]["rows"].items():
        means = {column: Mean(value, 1, 1) for column, value in zip(columns, row, strict=False)}
        # Rows are rounded to 0.01, so their mean is right to half of that and the printed mean to another half.
        assert suite.overall(means).score == pytest.approx(row[-1], abs=0.0101), system


def test_a_task_with_a_subset_missing_counts_as_not_scored():
    task = suite.Task("T", "T", "STS", "STS", "r", ("test",), {"a": ("es",), "b": ("es",), "c": ("fr",)})
    other = suite.Task("U", "U", "STS", "STS", "r", ("test",), {"a": ("es",)})
    means = suite.language_means({"T": {"a": 0.5, "c": 0.9}, "U": {"a": 0.3}}, [task, other])
    assert means == {"es": Mean(0.3, 1, 2), "fr": Mean(0.9, 1, 1)}
    means = suite.language_means({"T": {"a": 0.5, "b": 0.7}, "U": {"a": 0.3}}, [task, other])
    assert means["es"].score == pytest.approx(fmean([fmean([0.5, 0.7]), 0.3]))
    assert means["fr"] == Mean(None, 0, 1) and suite.overall(means).of == 2


def test_showing_a_benchmark_imports_neither_mteb_nor_torch():
    code = (
        "import sys; from lusifer.evaluation import benchmarks as suite; suite.counts(); print('mteb' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
