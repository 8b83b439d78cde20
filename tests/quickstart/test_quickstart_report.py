"""Report and plot, from made-up results."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import lusifer.quickstart.report
from lusifer.data.everyday_set import load_everyday
from lusifer.quickstart.report import NAMES, groups, markdown, means, plot, right, write_report

LANGUAGES = list(load_everyday().sentences)
PAPER = ["es", "ru", "fr", "vi", "fa", "id", "ar", "fi", "ko", "hi", "bn", "te", "sw"]
OTHERS = ["de", "it", "ja", "nl", "pl", "pt", "th", "tr", "zh"]


def made_up():
    systems = {}
    for number, name in enumerate(NAMES):
        values = {code: ((7 * row + 13 * number) % 23) / 23 for row, code in enumerate(LANGUAGES)}
        systems[name] = {
            "topic_retrieval": values,
            "translation_retrieval": {code: value / 2 for code, value in values.items() if code != "en"},
        }
    stages = {
        "warm_start": {"explained": 0.437},
        "align": {
            "held_out": {
                "visible_own_accuracy": 0.7004,
                "visible_other_accuracy": 0.242,
                "visible_none_accuracy": 0.25,
            }
        },  # fmt: skip
        "contrast": {"loss": 0.5},
    }
    queries = [
        {"language": "de", "query": "Wo | wann?", "found": "Where is it?", "wanted": "Where is it?"},
        {"language": "sw", "query": "Habari", "found": "Snow fell.", "wanted": "How are you?"},
    ]
    seconds = {"index": 3.0, "adapt": 180.0, "queries": 3.0, "teacher": 1.0, "lusifer": 240.0, "llm": 72.0}
    return {
        "systems": systems, "queries": queries, "index": {"texts": 64, "model": "a|teacher"},
        "adapted": {"english": {"cosine": 0.612, "texts": 500}}, "seconds": seconds, "peak_rss_mb": 1234.5,
        "stages": stages,
    }  # fmt: skip


def tables(text):
    parts = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    found = {}
    for part in parts:
        title, *lines = part.splitlines()
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
        found[title] = rows
    return found


TITLES = (("Translation retrieval", "translation_retrieval"), ("Topic retrieval", "topic_retrieval"))


def test_every_language_is_in_both_tables_in_the_papers_order():
    results = made_up()
    found = tables(markdown(results))
    for title, task in TITLES:
        header, *rows = found[title]
        assert header == ["language", *NAMES.values()]
        rows = [row for row in rows if not row[0].startswith("**")]
        english = ["en"] if task == "topic_retrieval" else []
        assert [row[0] for row in rows] == [*english, *PAPER, *OTHERS]
        for code, *cells in rows:
            assert cells == [f"{100 * results['systems'][name][task][code]:.1f}" for name in NAMES]


def test_means_are_those_computed_by_hand_and_come_first():
    results = made_up()
    found = tables(markdown(results))
    for title, task in TITLES:
        rows = found[title][1:3]
        assert [row[0] for row in rows] == ["**mean, 13 languages of the paper**", "**mean, 9 others**"]
        for row, codes in zip(rows, (PAPER, OTHERS), strict=True):
            expected = []
            for name in NAMES:
                values = [results["systems"][name][task][code] for code in codes]
                expected.append(f"**{100 * sum(values) / len(values):.1f}**")
            assert row[1:] == expected


def test_a_group_without_languages_has_no_mean():
    scores = {"en": 1.0, "de": 0.5, "tr": 0.7}
    assert list(groups(scores).values()) == [[], ["de", "tr"]]
    assert means(scores) == {"2 others": pytest.approx(0.6)}


def test_queries_say_what_they_found():
    results = made_up()
    assert right(results["queries"]) == 1
    text = markdown(results)
    assert "1 of 2 find their translation" in text
    assert "| de | Wo \\| wann? | Where is it? | right |" in text
    assert "| sw | Habari | Snow fell. | wrong |" in text


def test_how_the_run_went():
    run = dict(tables(markdown(made_up()))["Run"][1:])
    assert run["total, all calls"] == "8.3 minutes"
    assert run["index, adapting, six languages"] == "3.1 minutes"
    assert run["LUSIFER"] == "4.0 minutes" and run["English LLM alone"] == "1.2 minutes"
    assert run["peak memory"] in ("1234 MB", "1235 MB")
    assert run["adapted: cosine with the teacher on 500 held-out English texts"] == "0.61"
    assert run["LUSIFER, stage 0: held-out variance explained"] == "43.7 %"
    tokens = run["LUSIFER, stage 1: held-out tokens right with own / another text's / no soft tokens"]
    assert tokens == "70.0 / 24.2 / 25.0 %"
    assert run["LUSIFER, stage 2: mean loss"] == "0.50"


def test_stages_that_did_not_run_are_left_out():
    results = made_up()
    results["stages"] = {}
    text = markdown(results)
    assert "stage 0" not in text and "stage 1" not in text and "stage 2" not in text


def test_plot_and_report_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    write_report(made_up(), tmp_path)
    image = (tmp_path / "scores.png").read_bytes()
    assert image.startswith(b"\x89PNG\r\n\x1a\n") and len(image) > 10_000
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text == markdown(made_up()) and "scores.png" in text


def test_plot_of_one_system(tmp_path):
    pytest.importorskip("matplotlib")
    results = made_up()
    results["systems"] = {"lusifer": results["systems"]["lusifer"]}
    plot(results, tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 10_000


def test_the_report_itself_imports_no_torch():
    # By path, because the package's __init__ registers the model with transformers.
    code = (
        "import runpy, sys; made = runpy.run_path(sys.argv[1]); assert 'markdown' in made;"
        "print([name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    path = Path(lusifer.quickstart.report.__file__)
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
