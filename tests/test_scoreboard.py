"""The page of results: right means, and whatever is wrong with the files said on it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from lusifer import LusiferError
from lusifer.scoreboard import markdown, read
from lusifer.webpage import page, write


def record(task, kind, scores, languages, **changed):
    return {
        "task": task, "type": kind, "status": "done", "main_scores": {"test": scores}, "languages": languages, **changed
    }  # fmt: skip


@pytest.fixture
def folders(tmp_path):
    """Two systems: the second lacks a subset, has a failed and a damaged task and one of another version."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    spoken = {"a": ["es"], "b": ["te"]}
    for folder, shift in ((ours, 0.2), (theirs, 0.0)):
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps({"model": folder.name, "model_hash": "abc"}))
        sts = record("T1", "STS", {"a": 0.5 + shift, "b": 0.3 + shift}, spoken)
        (folder / "T1.json").write_text(json.dumps(sts))
        retrieval = record("T2", "Retrieval", {"a": 0.1 + shift, "b": 0.4}, spoken)
        if folder == theirs:
            del retrieval["main_scores"]["test"]["b"]
        (folder / "T2.json").write_text(json.dumps(retrieval))
    pairs = record("T3", "STS", {"x": 0.25, "y": 0.75}, {"x": ["en", "te"], "y": ["te", "en"]})
    (ours / "T3.json").write_text(json.dumps(pairs))
    (theirs / "T4.json").write_text(json.dumps({"task": "T4", "status": "failed", "error": "<b>no</b> network"}))
    (theirs / "T5.json").write_text('{"task": "T5", "sta')
    (theirs / "T6.json").write_text(json.dumps({"task": "T6", "status": "done", "results": []}))
    return ours, theirs


def test_only_what_all_have_is_compared(folders):
    text = markdown(read(folders), "theirs")
    # es: mean of T1 and T2; te: T1 alone, since T2's is missing in one.
    assert "| es | 50.0 | 30.0 |" in text
    assert "| te | 50.0 | 30.0 |" in text
    assert "| **mean** | 50.0 | 30.0 |" in text
    assert "- ours: te +20.0, es +20.0" in text


def test_what_is_wrong_is_said_and_the_rest_is_shown(folders):
    for text in (markdown(read(folders)), page(read(folders))):
        assert "T4 failed" in text
        assert "T5.json: damaged" in text
        assert "T6.json: not in this version" in text
        assert "T2: 1 scores missing" in text
    assert "<b>no</b> network" not in page(read(folders))


def test_the_page_loads_nothing_and_has_matrix_and_heat_map(folders):
    text = page(read(folders), "theirs")
    assert "http" not in text and "<script" not in text and "url(" not in text
    assert "Query language and document language: ours" in text and "25.0" in text
    assert "Gain against theirs" in text and "+20.0" in text
    assert "prefers-color-scheme:dark" in text and "viewport" in text


def test_empty_and_missing_folders(tmp_path, folders):
    (tmp_path / "empty").mkdir()
    text = markdown(read([folders[0], tmp_path / "empty"]))
    assert "empty: no finished task in this folder" in text and "| es | 50.0 |  |" in text
    with pytest.raises(LusiferError, match="no results at"):
        read([tmp_path / "nowhere"])
    with pytest.raises(LusiferError, match="no system 'x' to compare with; there are ours, theirs"):
        write(read(folders), tmp_path / "out", "x")


def test_intervals_are_shown_where_every_score_has_one(folders):
    path = folders[0] / "T1.json"
    known = {**json.loads(path.read_text()), "standard_errors": {"test": {"a": 0.03, "b": 0.04}}}
    path.write_text(json.dumps(known))
    text = markdown(read(folders))
    # te is T1 alone: 1.96 * 4 points. es also has T2, whose standard error is not known.
    assert "| te | 50.0 ±7.8 | 30.0 |" in text and "| es | 50.0 | 30.0 |" in text
    path = folders[0] / "T2.json"
    known = {**json.loads(path.read_text()), "standard_errors": {"test": {"a": 0.04}}}
    path.write_text(json.dumps(known))
    # es is the mean of two: 1.96 * sqrt(3^2 + 4^2) / 2.
    assert "| es | 50.0 ±4.9 | 30.0 |" in markdown(read(folders))
    assert '<s style="left:45.10%;width:9.80%"></s>' in page(read(folders))


def test_bias_tokens_and_published_rows_have_their_own_sections(folders):
    row = {"same_language": 0.25, "alone": 0.75, "mixed": 0.5}
    profile = {"bias": {"te": row, "es": row}, "tokens": {"encoder": {"te": 20.0, "en": 10.0}}}
    (folders[0] / "languages.json").write_text(json.dumps(profile))
    (folders[1] / "languages.json").write_text('{"bias": {"te": {}}}')
    text = page(read(folders), published=True)
    assert "Language bias" in text and "<td>75</td><td>50</td><td>-25</td>" in text
    assert "ours: encoder" in text and "languages.json: not in this version" in text
    assert "Published, not measured here" in text and "Multilingual-E5-large*" in text
    assert "Published" not in page(read(folders))


def test_the_command_writes_both_files_and_reading_needs_no_torch(folders, tmp_path):
    command = [sys.executable, "-m", "lusifer", "report", *map(str, folders), "--out", str(tmp_path / "out"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["files"] == [str(tmp_path / "out" / name) for name in ("report.html", "report.md")]
    assert (tmp_path / "out" / "report.html").read_text().startswith("<!doctype html>")
    code = "import sys; sys.argv[0] = 'bin/lusifer'\nfrom lusifer import cli\nfrom lusifer.webpage import write\n"
    code += "print([name for name in ('torch', 'transformers', 'mteb', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
