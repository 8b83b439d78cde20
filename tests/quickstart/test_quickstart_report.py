"""Report and plot, from made-up results."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import lusifer.quickstart.report
from lusifer.data.everyday_set import load_everyday
from lusifer.quickstart.report import language_order, markdown, plot, write_report

LANGUAGES = list(load_everyday().sentences)
SEEN = ["ar", "de", "en", "es", "fr"]


def made_up():
    systems = {}
    for number, name in enumerate(("encoder", "llm", "lusifer")):
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
    return {"systems": systems, "seen_languages": SEEN, "seconds": 90.0, "peak_rss_mb": 1234.5, "stages": stages}


def tables(text):
    parts = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    found = {}
    for part in parts:
        title, *lines = part.splitlines()
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
        found[title] = rows
    return found


def test_every_language_is_in_both_tables_and_unseen_ones_are_marked():
    results = made_up()
    found = tables(markdown(results))
    for title, task in (("Translation retrieval", "translation_retrieval"), ("Topic retrieval", "topic_retrieval")):
        header, *rows = found[title]
        assert header == ["language", "encoder alone", "English LLM alone", "LUSIFER"]
        languages = {row[0].removesuffix(" †"): row for row in rows if not row[0].startswith("**")}
        assert set(languages) == set(results["systems"]["lusifer"][task])
        for code, row in languages.items():
            assert row[0].endswith("†") == (code not in SEEN)
            expected = [f"{100 * results['systems'][name][task][code]:.1f}" for name in ("encoder", "llm", "lusifer")]
            assert row[1:] == expected


def test_means_are_those_computed_by_hand():
    results = made_up()
    found = tables(markdown(results))
    for title, task in (("Translation retrieval", "translation_retrieval"), ("Topic retrieval", "topic_retrieval")):
        means = {row[0]: row[1:] for row in found[title] if row[0].startswith("**")}
        assert len(means) == 2
        for label, codes in (
            ("**mean, seen, en aside**", ["ar", "de", "es", "fr"]),
            ("**mean, not seen †**", [code for code in LANGUAGES if code not in SEEN]),
        ):
            expected = []
            for name in ("encoder", "llm", "lusifer"):
                values = [results["systems"][name][task][code] for code in codes]
                expected.append(f"**{100 * sum(values) / len(values):.1f}**")
            assert means[label] == expected


def test_order_is_english_then_seen_then_unseen_each_by_score():
    results = made_up()
    order = language_order(results)
    assert order[0] == "en" and set(order[1:5]) == set(SEEN) - {"en"} and len(order) == 23
    scores = results["systems"]["lusifer"]["translation_retrieval"]
    for group in (order[1:5], order[5:]):
        assert [scores[code] for code in group] == sorted((scores[code] for code in group), reverse=True)


def test_how_the_run_went():
    run = dict(tables(markdown(made_up()))["Run"][1:])
    assert run["training and scoring, all calls together"] == "1.5 minutes"
    assert run["peak memory"] in ("1234 MB", "1235 MB")
    assert run["stage 0: held-out variance explained"] == "43.7 %"
    assert run["stage 1: held-out tokens right with own / another text's / no soft tokens"] == "70.0 / 24.2 / 25.0 %"
    assert run["stage 2: mean loss"] == "0.50"


def test_stages_that_did_not_run_are_left_out():
    results = made_up()
    results["stages"] = {}
    text = markdown(results)
    assert "stage 0" not in text and "stage 1" not in text and "stage 2" not in text
    results["seen_languages"] = LANGUAGES
    assert "**mean, not seen" not in markdown(results) and "†" not in markdown(results)


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
