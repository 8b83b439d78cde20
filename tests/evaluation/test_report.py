"""The page of results: right means, and whatever is wrong with the files said on it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lusifer import LusiferError
from lusifer.evaluation.report import read, render, write
from lusifer.evaluation.report.languages import language_name
from support.command import mistake


def page(systems, *baselines, **options):
    return render(systems, "html", baselines, **options)


def markdown(systems, *baselines, **options):
    return render(systems, "md", baselines, **options)


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
    for folder in (ours, theirs):
        (folder / "T3.json").write_text(json.dumps(pairs))
    (theirs / "T4.json").write_text(json.dumps({"task": "T4", "status": "failed", "error": "<b>no</b> network"}))
    (theirs / "T5.json").write_text('{"task": "T5", "sta')
    (theirs / "T6.json").write_text(json.dumps({"task": "T6", "status": "done", "results": []}))
    return ours, theirs


def test_every_baseline_has_a_section(folders, tmp_path, call):
    third = tmp_path / "third"
    shutil.copytree(folders[0], third)
    text = markdown(read([*folders, third]), "theirs", "ours", "theirs")
    assert text.count("## Gain against") == 2 and text.index("against theirs") < text.index("against ours")
    first, second = text.split("## Gain against ")[1:]
    assert "| language | ours | third | resource level |" in first
    assert "| language | theirs | third | resource level |" in second
    assert "| Telugu (te) | -20.0 | +0.0 | 1 |" in second
    given = ("--baseline", "ours", "--baseline", "theirs", "--out", tmp_path / "page")
    code, out, err = call("report", *folders, third, *given)
    assert code == 0, err
    assert (tmp_path / "page" / "report.md").read_text().count("## Gain against") == 2
    code, out, err = call("report", *folders, "--baseline", "ours", "--baseline", "nobody", "--out", tmp_path / "no")
    mistake(code, out, err)
    assert "no system 'nobody' to compare with; there are ours, theirs" in err


def test_only_what_all_have_is_compared(folders):
    text = markdown(read(folders), "theirs")
    # es: mean of T1 and T2; te: T1 alone, since T2's is missing in one.
    assert "| Spanish (es) | 50.0 | 30.0 |" in text
    assert "| Telugu (te) | 50.0 | 30.0 |" in text
    assert "| **mean** | 50.0 | 30.0 |" in text
    assert "| language | ours | resource level |" in text.split("## Gain against theirs\n")[1]
    assert "| Telugu (te) | +20.0 | 1 |\n| Spanish (es) | +20.0 | 5 |" in text


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
    assert "Query language and document language" in text and "25.0" in text
    assert "Gain against theirs" in text and "+20.0" in text
    assert "prefers-color-scheme:dark" in text and "viewport" in text


def test_empty_and_missing_folders(tmp_path, folders):
    (tmp_path / "empty").mkdir()
    text = markdown(read([folders[0], tmp_path / "empty"]))
    assert "empty: no finished task in this folder" in text and "| Spanish (es) | 50.0 |" in text
    with pytest.raises(LusiferError, match="no results at"):
        read([tmp_path / "nowhere"])
    with pytest.raises(LusiferError, match="no system 'x' to compare with; there are ours, theirs"):
        write(read(folders), tmp_path / "out", ["x"])


def test_intervals_are_shown_where_every_score_has_one(folders):
    path = folders[0] / "T1.json"
    known = {**json.loads(path.read_text()), "standard_errors": {"test": {"a": 0.03, "b": 0.04}}}
    path.write_text(json.dumps(known))
    text = markdown(read(folders))
    # te is T1 alone: 1.96 * 4 points. es also has T2, whose standard error is not known.
    assert "| Telugu (te) | 50.0 ±7.8 | 30.0 |" in text and "| Spanish (es) | 50.0 | 30.0 |" in text
    path = folders[0] / "T2.json"
    known = {**json.loads(path.read_text()), "standard_errors": {"test": {"a": 0.04}}}
    path.write_text(json.dumps(known))
    # es is the mean of two: 1.96 * sqrt(3^2 + 4^2) / 2.
    assert "| Spanish (es) | 50.0 ±4.9 | 30.0 |" in markdown(read(folders))
    assert '<s style="left:45.10%;width:9.80%"></s>' in page(read(folders))


def put(folder, task, kind, scores, languages, **changed):
    folder.mkdir(exist_ok=True)
    (folder / f"{task}.json").write_text(json.dumps(record(task, kind, scores, languages, **changed)))


def test_clustering_counts_as_fixed_and_alone_has_no_interval(tmp_path):
    known = {"standard_errors": {"test": {"a": 0.03}}}
    put(tmp_path / "x", "T1", "STS", {"a": 0.5}, {"a": ["es"]}, **known)
    put(tmp_path / "x", "T2", "Clustering", {"a": 0.3, "b": 0.3}, {"a": ["es"], "b": ["te"]}, **known)
    text = markdown(read([tmp_path / "x"]))
    # Half of T1's 1.96 * 3 points, whatever an older version recorded for clustering.
    assert "| Spanish (es) | 40.0 ±2.9 |" in text and "| Telugu (te) | 30.0 |" in text
    assert "count as fixed" in text and "count as fixed" in page(read([tmp_path / "x"]))
    put(tmp_path / "x", "T3", "STS", {"a": 0.5}, {"a": ["es"]})
    assert "| Spanish (es) | 43.3 |" in markdown(read([tmp_path / "x"]))


def test_pairs_have_means_by_task_and_over_tasks_of_what_all_share(tmp_path):
    spoken = {"x": ["en", "te"], "y": ["te", "en"], "z": ["es", "en"]}
    for name, shift in (("a", 0.1), ("b", 0.0)):
        put(tmp_path / name, "P1", "STS", {"x": 0.2 + shift, "y": 0.4 + shift}, spoken)
        put(tmp_path / name, "P2", "Retrieval", {"x": 0.7 + shift}, spoken)
    put(tmp_path / "a", "P1", "STS", {"x": 0.3, "y": 0.5, "z": 0.99}, spoken)
    systems = read([tmp_path / "a", tmp_path / "b"])
    text, html = markdown(systems), page(systems)
    assert "| P1 | 40.0 | 30.0 |" in text and "| P2 | 80.0 | 70.0 |" in text
    assert "| **mean over tasks** | 60.0 | 50.0 |" in text
    assert "<td>P1</td><td>40.0</td><td>30.0</td>" in html and "mean over pairs</span></th>" in html
    # No language has a score of its own: no empty tables.
    assert "**mean** |" not in text and "mean over languages</span>" not in html and "By language" not in html
    assert "99.0" not in text + html
    assert "Gain" not in markdown(systems, "a") + page(systems, "a")
    assert "## Query language and document language\n\n### a\n" in text and "| te | 50.0 |  |" in text


def test_the_text_has_the_tables_of_the_page(folders):
    row = {"same_language": 0.25, "alone": 0.75, "mixed": 0.5}
    profile = {"bias": {"te": row}, "tokens": {"encoder": {"te": 20.0, "en": 10.0}}}
    (folders[0] / "languages.json").write_text(json.dumps(profile))
    text = markdown(read(folders), published=True)
    assert "| language | Retrieval | STS |" in text and "| Spanish (es) | 30.0 | 70.0 |" in text
    assert "| Telugu (te) | 25 | 75 | 50 |" in text and "| Telugu (te) | 20.0 |" in text
    for shown in (text, page(read(folders), published=True)):
        assert "IndicCrosslingualSTS" in shown and "57.89" in shown and "68.05" not in shown.split("Published")[0]
    assert "Published" not in markdown(read(folders))


def test_what_was_set_differently_is_said(tmp_path):
    for name, mteb, tokens, data in (("a", "2.1", 512, "r1"), ("b", "2.2", None, "r2")):
        facts = {"versions": {"mteb": mteb, "torch": "2.0"}, "max_seq_length": tokens, "revision": data}
        put(tmp_path / name, "T1", "STS", {"a": 0.5}, {"a": ["es"]}, **facts)
        settings = {"model": name, "prompts": f"hash-{name}"}
        (tmp_path / name / "run.json").write_text(json.dumps(settings))
    text = markdown(read([tmp_path / "a", tmp_path / "b"]))
    for line in (
        "- not the same: version of mteb: 2.1 (a); 2.2 (b)\n",
        "- not the same: prompts: hash-a (a); hash-b (b)\n",
        "- not the same: most tokens of a text: 512 (a); none (b)\n",
        "- not the same: data revision of T1\n",
    ):
        assert line in text
    assert "torch" not in text and "not the same" not in markdown(read([tmp_path / "a"]))
    assert "set differently" in page(read([tmp_path / "a", tmp_path / "b"]))


def test_what_was_asked_for_and_is_not_there_is_named(tmp_path):
    plan = {f"T{i}": {"splits": ["test"], "subsets": {"a": ["es"], "b": ["te"]}} for i in range(1, 6)}
    spoken = {"a": ["es"], "b": ["te"]}
    for name in ("done", "killed", "nothing"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"model": name, "plan": plan}))
    for task in plan:
        put(tmp_path / "done", task, "STS", {"a": 0.5, "b": 0.5}, spoken)
    put(tmp_path / "killed", "T1", "STS", {"a": 0.5, "b": 0.5}, spoken)
    # Its first subset was finished before it failed.
    put(tmp_path / "killed", "T2", "STS", {"a": 0.9}, spoken, status="failed", error="out of\nmemory")
    (tmp_path / "nothing" / "T1.json").write_text("{")
    systems = read([tmp_path / name for name in ("done", "killed", "nothing")])
    text = markdown(systems)
    assert "- killed: requested, not scored: T3, T4, T5\n" in text
    assert "- killed: T2 failed: out of memory; the 1 scores it had before count\n" in text
    assert "- killed: T2: requested, not scored: b\n" in text
    assert "- killed: has no score of tasks that another system has; left out for all: T3, T4, T5\n" in text
    assert "| Spanish (es) | 50.0 | 70.0 |" in text
    # A system without scores takes nothing away, and does not say so.
    assert "- nothing: requested, not scored: T1, T2, T3, T4, T5\n" in text
    assert not [line for line in text.splitlines() if line.startswith("- nothing") and "left out" in line]


def test_a_failed_task_with_a_split_missing_has_no_mean_over_splits(tmp_path):
    plan = {"T1": {"splits": ["dev", "test"], "subsets": {"a": ["es"]}}}
    put(tmp_path / "x", "T1", "STS", {"a": 0.5}, {"a": ["es"]}, status="failed", error="no")
    (tmp_path / "x" / "run.json").write_text(json.dumps({"plan": plan}))
    assert "| Spanish (es) |" not in markdown(read([tmp_path / "x"]))


def test_what_is_no_number_is_ignored_and_named(tmp_path):
    nan = float("nan")
    spoken = {"a": ["es"], "b": ["te"]}
    put(tmp_path / "x", "T1", "STS", {"a": 0.5, "b": nan}, spoken, standard_errors={"test": {"a": nan, "b": 0.1}})
    put(tmp_path / "x", "T2", "STS", {"a": None}, spoken)
    row = {"same_language": nan, "alone": 0.75, "mixed": 0.5}
    profile = {"bias": {"te": row}, "tokens": {"llm": {"te": nan, "en": 10.0}}}
    (tmp_path / "x" / "languages.json").write_text(json.dumps(profile))
    text, html = markdown(read([tmp_path / "x"])), page(read([tmp_path / "x"]))
    assert "| Spanish (es) | 50.0 |" in text and "nan" not in text + html
    for line in ("T1: NaN, ignored: b", "standard error of T1: NaN, ignored: a", "T2: NaN"):
        assert f"- x: {line}" in text and line in html
    assert "tokens of llm: NaN, ignored: te" in text and "bias of te: NaN" in text


def test_narrow_screens_see_what_matters_first(folders, tmp_path):
    html = page(read(folders), "theirs")
    titles = re.findall('<th scope="col"><span>(.*?)</span></th>', html)
    assert titles[:2] == ["system", "mean over languages"] and "scroll sideways" in html
    gain = html.split("Gain against theirs")[1]
    assert re.findall('<th scope="col"><span>(.*?)</span></th>', gain)[:3] == ["language", "ours", "resource level"]
    # A type whose scores are all of pairs has no column of its own.
    put(folders[0], "P", "BitextMining", {"x": 0.5}, {"x": ["en", "te"]})
    put(folders[1], "P", "BitextMining", {"x": 0.5}, {"x": ["en", "te"]})
    assert "<span>BitextMining</span>" not in page(read(folders))


def test_without_a_baseline_the_page_says_how_to_get_gains(folders):
    for text in (markdown(read(folders)), page(read(folders))):
        assert "name one or more of the systems with --baseline" in text
    assert "--baseline" not in page(read(folders), "theirs") and "--baseline" not in page(read(folders[:1]))


def test_the_folder_one_stands_in_has_a_name(folders, monkeypatch):
    monkeypatch.chdir(folders[0])
    assert [system.name for system in read([Path("."), Path("../theirs")])] == ["ours", "theirs"]


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
    code = "import sys; sys.argv[0] = 'bin/lusifer'\nfrom lusifer import cli\n"
    code += "from lusifer.evaluation.report import render\n"
    code += "render([], 'html')\n"
    code += "print([name for name in ('torch', 'transformers', 'mteb', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def known(scores, error):
    return {"standard_errors": {"test": dict.fromkeys(scores, error)}}


def test_the_first_sentence_is_the_result_and_how_sure_it_is(tmp_path):
    spoken = {"a": ["es"], "b": ["te"]}
    for name, shift in (("ours", 0.2), ("theirs", 0.0), ("third", 0.19)):
        scores = {"a": 0.5 + shift, "b": 0.3 + shift}
        put(tmp_path / name, "T1", "STS", scores, spoken, **known(scores, 0.01), date="2026-11-20T10:00:00Z")
    ours, theirs, third = read([tmp_path / name for name in ("ours", "theirs", "third")])
    # 1.96 points a language, as much for the mean of a task's languages, sqrt(2) times that for a difference.
    lead = "ours scores 60.0 ±2.0 % on average over 2 languages, 1 task"
    alone = markdown([ours])
    assert f"**{lead}.**" in alone
    assert "ours is best in Spanish (es), 70.0 %, and weakest in Telugu (te), 50.0 %." in alone
    assert "Scored on 20 November 2026; report of " in alone and "Tasks: T1." in alone
    assert f"**{lead}: 20.0 ±2.8 points above theirs (40.0 ±2.0 %), more than chance explains.**" in markdown(
        [theirs, ours]
    )
    close = "1.0 ±2.8 points above third (59.0 ±2.0 %), too close to tell from these scores"
    assert f"**{lead}: {close}.**" in markdown([theirs, third, ours])
    text = markdown([theirs, third, ours], "theirs", "third")
    assert f"**{lead}: {close}.** " in text.replace("\n", " ") and "ours is 20.0 ±2.8 points above theirs" in text
    assert "## Gain against theirs" in text and "## Gain against third" in text
    # A baseline that is better than everything else is not hidden.
    assert "theirs scores 40.0 ±2.0 % on average over 2 languages, 1 task: 20.0 ±2.8 points below ours" in markdown(
        [ours, theirs], "ours"
    )
    assert f'<p class="lead">{lead}.</p>' in page([ours])


def test_without_standard_errors_the_first_lines_say_so(folders):
    text = markdown(read(folders), "theirs")
    assert "**ours scores 50.0 % on average over 2 languages, 2 tasks: 20.0 points above theirs (30.0 %).**" in text
    assert "How sure that is cannot be said" in text and "Tasks that are missing: 1 failed" in text


def test_what_only_an_earlier_command_asked_for_is_not_missing(tmp_path):
    put(tmp_path / "x", "T1", "STS", {"a": 0.5}, {"a": ["es"]})
    plan = {f"T{i}": {"splits": ["test"], "subsets": {"a": ["es"], "b": ["te"]}} for i in (1, 2)}
    run = {"plan": plan, "asked": {"T1": ["a"]}}
    (tmp_path / "x" / "run.json").write_text(json.dumps(run))
    assert "asked for" not in markdown(read([tmp_path / "x"]))
    (tmp_path / "x" / "run.json").write_text(json.dumps({**run, "asked": {"T1": ["a", "b"], "T2": ["a"]}}))
    text = markdown(read([tmp_path / "x"]))
    assert "- x: requested, not scored: T2\n" in text and "- x: T1: requested, not scored: b\n" in text
    assert "Tasks that are missing: 1 asked for but not scored; see the end." in text


@pytest.mark.parametrize(
    ("code", "name"),
    [("te", "Telugu (te)"), ("tel-Telu", "Telugu (tel-Telu)"), ("nob", "Norwegian Bokmål (nob)"), ("xyz", "xyz")],
)
def test_languages_have_names(code, name):
    assert language_name(code) == name


@pytest.fixture
def many(tmp_path):
    spoken = {code: [code] for code in ("en", "es", "fr", "de", "ru", "ja", "zh", "ko", "vi", "te", "sw", "th")}
    for number in range(7):
        scores = {code: (30 + 4 * number + place) / 100 for place, code in enumerate(spoken)}
        put(tmp_path / f"system-{number}", "T1", "STS", scores, spoken, **known(scores, 0.01))
    return [tmp_path / f"system-{number}" for number in range(7)]


def test_many_systems_are_rows_of_a_table(many):
    text = markdown(read(many))
    table = text.split("## By language")[1]
    assert [line.split(" | ")[0] for line in table.splitlines()[6:13]] == [
        f"| system-{n}" for n in (6, 5, 4, 3, 2, 1, 0)
    ]
    assert 'class="bars"' not in page(read(many)) and 'class="bars"' in page(read(many[:4]))


def test_the_page_in_a_browser(many, browser, tmp_path):
    for number, folders in enumerate((many, many[:3])):
        path, _ = write(read(folders), tmp_path / f"out{number}", ["system-0", "system-1"])
        for width, scheme in ((1200, "light"), (390, "dark")):
            page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
            page.goto(path.as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") == width  # Tables scroll, the page does not.
            folded = page.locator("summary", has_text="How it was measured")
            assert not page.get_by_text("half of a 95 % interval by bootstrap").is_visible()
            folded.click()
            assert page.get_by_text("half of a 95 % interval by bootstrap").is_visible()
            paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert paper == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(23, 23, 27)")
            page.close()


def test_the_page_prints_to_two_pages_at_most(many, browser, tmp_path):
    for number, folders in enumerate((many, many[:3])):
        path, _ = write(read(folders), tmp_path / f"out{number}", ["system-0", "system-1"], published=True)
        page = browser.new_page()
        page.goto(path.as_uri())
        printed = page.pdf(prefer_css_page_size=True)
        assert 1 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 2
        page.close()


def test_errors_of_tasks_are_independent_those_of_languages_add_up(tmp_path):
    spoken = {"a": ["es"], "b": ["te"]}
    for number in range(4):
        put(tmp_path / "x", f"T{number}", "STS", {"a": 0.5, "b": 0.5}, spoken, **known(spoken, 0.02))
    # One task: 3.92 points; four of them: half of that. Clustering has no error, and thins that of the others.
    assert "x scores 50.0 ±2.0 % on average" in markdown(read([tmp_path / "x"]))
    for number in range(4):
        put(tmp_path / "x", f"C{number}", "Clustering", {"a": 0.5, "b": 0.5}, spoken)
    assert "x scores 50.0 ±1.0 % on average" in markdown(read([tmp_path / "x"]))
