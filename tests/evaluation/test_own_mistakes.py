"""Mistakes in own data: one line each that says which file, which row, which column and what to do."""

from __future__ import annotations

import json

import pytest

from lusifer import LusiferError
from support.own_tasks import labelled, scored, write_csv, write_jsonl, write_own_tasks, write_task

pytest.importorskip("mteb")

from lusifer.evaluation.own import open_tasks  # noqa: E402
from support.command import mistake  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_own_tasks(tmp_path_factory.mktemp("mistakes") / "tasks")


def refused(path):
    with pytest.raises(LusiferError) as caught:
        open_tasks([str(path)])
    assert "\n" not in str(caught.value)
    return str(caught.value)


EN = {"en": "labelled-en.csv"}
FILES = {"queries": "queries.jsonl", "corpus": "corpus.jsonl", "qrels": "qrels.tsv"}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"typ": "sts", "languages": EN}, "unknown key 'typ'; did you mean 'type'?"),
        ({"languages": EN}, "type is required"),
        ({"type": "sorting", "languages": EN}, "type: input should be 'classification', "),
        ({"type": "sts", "languages": {}}, "languages: dictionary should have at least 1 item"),
        ({"type": "sts", "languages": {"english": "a.csv"}}, "'english' is no language code; write en, zh-Hant or"),
        ({"type": "sts", "languages": {"xx": "scored.jsonl"}}, "there is no language 'xx'; write its ISO 639 code"),
        ({"type": "sts", "languages": {"en-Zzxx": "scored.jsonl"}}, "the script of 'en-Zzxx' is not known"),
        ({"type": "bitext", "languages": EN}, "'en' is one language; bitext needs two, e.g. en-en"),
        ({"type": "clustering", "languages": {"de-en": "a.csv"}}, "'de-en' is a pair; clustering needs one language"),
        ({"type": "sts", "languages": {"en": {"dat": "a"}}}, "unknown key 'languages.en.dat'; did you mean 'data'?"),
        ({"type": "sts", "languages": {"en": {"data": {"source": "a", "spilt": "x"}}}}, "data.spilt'; did you mean"),
        ({"type": "sts", "languages": {"en": {"train": "a.csv"}}}, "languages.en: sts reads no 'train'; give it data"),
        ({"type": "classification", "languages": {"en": {"train": "a"}}}, "languages.en: test is missing; give it"),
        ({"type": "retrieval", "languages": {"en": {}}}, "give retrieval either data (query, positive), or"),
        ({"type": "sts", "languages": EN, "metric": "spearmen"}, "no metric 'spearmen'; did you mean 'spearman'?"),
        ({"type": "bitext", "languages": EN, "metric": "x"}, "no metric 'x'; there are f1, accuracy, prec"),
        ({"type": "sts", "languages": EN, "columns": {"sentense1": "a"}}, "reads no column 'sentense1'; did you mean"),
        ({"type": "sts", "languages": EN, "name": "a/b"}, "name: string should match pattern"),
        ({"type": "sts", "languages": EN, "name": "KLUE-STS"}, "no column 'sentence1'; it has text, label"),
        ({"type": "sts", "languages": {"en": "scored.jsonl"}, "name": "KLUE-STS"}, "already has a task 'KLUE-STS'"),
        ({"type": "sts", "languages": {"en": "gone.csv"}}, "no such file: "),
        (
            {"type": "retrieval", "languages": {"en": FILES}, "columns": {"language": "lang"}},
            "columns.language is for data, train and test; name files of en alone",
        ),
    ],
)  # fmt: skip
def test_a_mistake_in_the_file_of_a_task(folder, keys, said):
    assert said in refused(write_task(folder, "wrong", **keys))
    (folder / "wrong.yaml").unlink()


def changed(rows, row, **values):
    return [{**one, **values} if number == row else one for number, one in enumerate(rows)]


ROWS = labelled("en", 6)
PAIRS = [{"sentence1": f"a {i}", "sentence2": f"b {i}", "label": i % 2} for i in range(4)]
ASKED = [{"query": "q", "positive": "p", "negative": ["n"]}, {"query": "r", "positive": ["p", "s"], "negative": []}]


@pytest.mark.parametrize(
    ("type_", "rows", "said"),
    [
        ("clustering", [], "is empty; a task needs at least 2 rows"),
        ("clustering", ROWS[:1], "line 1: the only row; a task needs at least 2 rows"),
        ("clustering", [{"text": "a", "topic": 1}] * 2, "no column 'label'; it has text, topic (map it: `col"),
        ("clustering", [{"text": "", "topic": 1}] * 2, "line 1: no column 'label'; it has text, topic"),
        ("clustering", changed(ROWS, 2, text="  "), "line 3: 'text' is empty; remove the row or give it a text"),
        ("clustering", changed(ROWS, 2, text=7), "line 3: 'text' must be text, not a number"),
        ("clustering", changed(ROWS, 4, label=None), "line 5: 'label' must be text or a whole number, not None"),
        ("clustering", changed(ROWS, 4, label=0.5), "line 5: 'label' must be text or a whole number, not 0.5"),
        ("clustering", [{**row, "label": 1} for row in ROWS], "all rows have the label '1'; clustering needs two"),
        ("classification", [{**row, "label": 1} for row in ROWS], "the training texts have one class only ('1'); "),
        ("classification", labelled("en", 3), "the test texts have one class only ('none')"),
        ("sts", changed(scored(), 9, score="high"), "line 10: 'score' must be a number, not 'high'"),
        ("sts", changed(scored(), 9, score=float("nan")), "line 10: 'score' must be a number, not nan"),
        ("sts", [{**row, "score": 1} for row in scored()], "all pairs have the score 1; nothing correlates with that"),
        ("sts", [*scored()[:3], {"sentence1": "a", "score": 1}], "line 4: no 'sentence2'; give it one or remove"),
        ("pair-classification", changed(PAIRS, 1, label=2), "line 2: 'label' must be 1 (a pair) or 0 (none), not '2'"),
        ("pair-classification", [{**row, "label": 1} for row in PAIRS], "all pairs have the label 1; pair clas"),
        ("retrieval", changed(ASKED, 1, positive=[]), "line 2: 'positive' is empty; give it a text or remove the row"),
        ("retrieval", changed(ASKED, 1, positive=["s", 3]), "line 2: 'positive' must be text, not a number"),
        ("retrieval", changed(ASKED, 0, negative=["p"]), "line 1: 'p' is both positive and negative of its query"),
        ("retrieval", [{"query": "q", "positive": "p"}], "the corpus has one document; retrieval needs at least 2"),
        ("reranking", [{**row, "negative": []} for row in ASKED], "no query has an irrelevant candidate, so every"),
        ("bitext", [{"sentence1": "a", "sentence2": "b"}], "line 1: the only row; a task needs at least 2 pairs"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_rows(tmp_path, type_, rows, said):
    languages = {"de-en" if type_ == "bitext" else "en": write_jsonl(tmp_path / "rows.jsonl", rows)}
    line = refused(write_task(tmp_path, "wrong", type=type_, languages=languages))
    assert said in line and "rows.jsonl" in line or "wrong.yaml" in line, line


@pytest.mark.parametrize(
    ("part", "row", "said"),
    [
        ("qrels", {"query-id": "q1", "corpus-id": "dx", "score": 1}, "'corpus-id' is 'dx', which is not an id"),
        ("qrels", {"query-id": "qx", "corpus-id": "d1", "score": 1}, "'query-id' is 'qx', which is not an id"),
        ("qrels", {"query-id": "q1", "corpus-id": "d9", "score": 0.5}, "'score' must be a whole number from 0 on"),
        ("qrels", {"query-id": "q0", "corpus-id": "d0", "score": 1}, "'q0' and 'd0' are judged already; remove one"),
        ("corpus", {"_id": "d3", "text": "again"}, "the id 'd3' is that of"),
        ("queries", {"_id": "", "text": "again"}, "the id in '_id' is empty"),
    ],
)  # fmt: skip
def test_a_mistake_among_the_files_of_a_search(folder, part, row, said):
    before = {"qrels": "qrels.tsv", "corpus": "corpus.jsonl", "queries": "queries.jsonl"}[part]
    rows = [line for line in (folder / before).read_text().splitlines() if line]
    if part == "qrels":
        (folder / "more.tsv").write_text("\n".join([*rows, "\t".join(map(str, row.values()))]))
    else:
        (folder / "more.jsonl").write_text("\n".join([*rows, json.dumps(row)]))
    more = "more.tsv" if part == "qrels" else "more.jsonl"
    line = refused(write_task(folder, "wrong", type="retrieval", languages={"en": {**FILES, part: more}}))
    (folder / "wrong.yaml").unlink()
    assert said in line and f"{more}, line " in line, line


def test_no_document_is_relevant(folder, caplog):
    lines = (folder / "qrels.tsv").read_text().splitlines()
    (folder / "none.tsv").write_text("\n".join([lines[0], "q1\td1\t0"]))
    keys = {"type": "retrieval", "languages": {"en": {**FILES, "qrels": "none.tsv"}}}
    assert "none.tsv: no document is relevant to any query" in refused(write_task(folder, "wrong", **keys))
    (folder / "none.tsv").write_text("\n".join([lines[0], "q1\td1\t1"]))
    open_tasks([str(folder / "wrong.yaml")])
    assert "23 of 24 queries have no relevant document and are left out" in caplog.text
    (folder / "wrong.yaml").unlink()


def test_a_label_that_nothing_teaches_and_a_text_on_both_sides(tmp_path, caplog):
    rows = labelled("en", 12)
    files = {"train": write_csv(tmp_path / "train.csv", rows[:6]), "test": write_csv(tmp_path / "test.csv", rows[5:])}
    path = write_task(tmp_path, "topics", type="classification", languages={"en": files})
    open_tasks([str(path)])
    assert "1 test texts are training texts too" in caplog.text
    write_csv(tmp_path / "test.csv", changed(rows[6:], 3, label="other"))
    said = refused(path)
    assert "test.csv, line 5: the label 'other' does not occur in train.csv; no classifier can learn it" in said


def test_translations_that_do_not_pair_up(tmp_path):
    (tmp_path / "de.txt").write_text("eins\nzwei\n")
    (tmp_path / "en.txt").write_text("one\ntwo\nthree\n")
    files = {"de-en": {"sentence1": "de.txt", "sentence2": "en.txt"}}
    path = write_task(tmp_path, "wrong", type="bitext", languages=files)
    assert "de.txt has 2 sentences, en.txt has 3; row i of one must translate row i of the other" in refused(path)


def test_places_without_a_task(folder, tmp_path):
    assert "no task in" in refused(tmp_path)
    assert "is no YAML file; see examples/tasks" in refused(folder / "scored.jsonl")
    assert "cannot read the task" in refused(tmp_path / "gone.yaml")
    (tmp_path / "no.yaml").write_text("type: sts\nlanguages: {no: a.csv}\n")
    assert "put Norwegian in quotes: 'no'" in refused(tmp_path / "no.yaml")
    (tmp_path / "no.yaml").write_text("- a\n")
    assert "must be a mapping with type and languages" in refused(tmp_path / "no.yaml")
    (tmp_path / "no.yaml").write_text("a: [")
    assert "is not valid YAML" in refused(tmp_path / "no.yaml")
    with pytest.raises(LusiferError, match="two tasks are called 'similar' .*; give one of them another name"):
        open_tasks([str(folder), str(folder / "similar.yaml")])


def test_data_are_refused_before_the_model_loads(folder, tmp_path, call):
    path = write_task(tmp_path, "wrong", type="sts", languages={"en": write_csv(tmp_path / "a.csv", labelled("en"))})
    code, out, err = call("evaluate", tmp_path / "no-model", "--task", folder, "--task", path, "--out", tmp_path / "o")
    mistake(code, out, err)
    assert "a.csv, line 2: no column 'sentence1'; it has text, label" in err and not (tmp_path / "o").exists()
    code, out, err = call("evaluate", tmp_path / "no-model", "--task", folder / "similar.yaml", "--langs", "fr")
    mistake(code, out, err)
    assert "no language 'fr' here; there are en" in err
