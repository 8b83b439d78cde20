"""`lusifer data check` and `lusifer data mine`: what they find, and how they say it."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
import yaml
from pyarrow import parquet
from transformers import AutoTokenizer
from typer.testing import CliRunner

from lusifer import LusiferError
from lusifer.cli.app import app
from lusifer.data.check import check, evaluation_texts, lengths, normalise, scan
from lusifer.data.records import open_set
from lusifer.recipes.schema import DataRecipe, Recipe


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LUSIFER_CACHE", str(tmp_path / "cache"))


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(path, count=20, **extra):
    return jsonl(path, [{"query": f"query {i}", "positive": f"passage {i}", **extra} for i in range(count)])


@pytest.fixture
def recipe(tmp_path, tiny_encoder, tiny_llm):
    texts = jsonl(tmp_path / "texts.jsonl", [{"text": f"text number {i}"} for i in range(30)])
    return {
        "output": str(tmp_path / "run"),
        "model": {"encoder": tiny_encoder, "llm": tiny_llm, "max_seq_length": 64},
        "align": {
            "steps": 10,
            "batch_size": 4,
            "data": [
                {"source": texts, "task": "reconstruct"},
                {"source": pairs(tmp_path / "pairs.jsonl"), "task": "complete", "weight": 1.5},
            ],
        },
        "contrast": {"steps": 5, "batch_size": 4, "data": [{"source": str(tmp_path / "pairs.jsonl")}]},
    }


def checked(tree, **options):
    return check(Recipe.model_validate(tree), **options)


def test_texts_are_compared_without_case_and_punctuation():
    assert normalise("  Hello,\tWORLD! ") == normalise("hello world") == "hello world"
    assert normalise("don\u2019t") == normalise("don't")
    assert normalise("Straße") == normalise("STRASSE")
    assert normalise("ﬁne") == "fine"
    # Vowel signs of Hindi are no letters to Unicode, but no punctuation either.
    assert normalise("कि") != normalise("क")
    assert normalise("...") == "..." != normalise("!!!")
    assert normalise("a-b") != normalise("ab")


def test_rows_shares_and_epochs_follow_the_plan(recipe):
    report = checked(recipe)
    assert report["ok"] and report["errors"] == [] and report["warnings"] == []
    first, second, third = report["sets"]
    assert [fact["stage"] for fact in report["sets"]] == ["align", "align", "contrast"]
    assert [fact["task"] for fact in report["sets"]] == ["reconstruct", "complete", "contrast"]
    assert (first["rows"], second["rows"], third["rows"]) == (30, 20, 20)
    assert (first["share"], second["share"], third["share"]) == (0.5, 0.5, 1.0)
    assert first["epochs"] == pytest.approx(5 * 4 / 30) and third["epochs"] == 1.0
    assert first["clusters"] is None and first["negatives_per_row"] == 0


def test_lengths_are_those_of_the_tokenizers(tmp_path, tiny_encoder, tiny_llm):
    rows = [{"query": "cat", "positive": ["the cat sat on the mat", "rain"], "negative": ["dog " * 30]}] * 2
    item = DataRecipe(source=jsonl(tmp_path / "d.jsonl", rows), instruction="Find it")
    tokenizers = {
        "encoder": AutoTokenizer.from_pretrained(tiny_encoder),
        "llm": AutoTokenizer.from_pretrained(tiny_llm),
    }
    texts = ["Instruct: Find it\nQuery: cat", "the cat sat on the mat", "rain", "dog " * 30]
    found = lengths(open_set(item), tokenizers, {"encoder": 20}, seed=0)
    for name, special in (("encoder", True), ("llm", False)):
        counts = [len(tokenizers[name](text, add_special_tokens=special)["input_ids"]) for text in texts]
        assert found[f"{name}_tokens"]["mean"] == pytest.approx(sum(counts) / 4)
        assert found[f"{name}_tokens"]["max"] == max(counts)
    counts = [len(tokenizers["encoder"](text)["input_ids"]) for text in texts]
    assert found["truncated"] == sum(count > 20 for count in counts) / 4 > 0
    assert "targets_truncated" not in found and found["sampled_rows"] == 2


def test_lengths_use_a_seeded_sample(tmp_path, tiny_encoder, monkeypatch):
    monkeypatch.setattr("lusifer.data.check.SAMPLE", 5)
    rows = [{"query": "cat " * (i + 1), "positive": "p"} for i in range(40)]
    records = open_set(DataRecipe(source=jsonl(tmp_path / "d.jsonl", rows)))
    tokenizers = {"encoder": AutoTokenizer.from_pretrained(tiny_encoder)}
    made = [lengths(records, tokenizers, {"encoder": 64}, seed=seed) for seed in (0, 0, 1)]
    assert made[0] == made[1] != made[2] and made[0]["sampled_rows"] == 5


def test_repeated_rows_warn(tmp_path, recipe):
    rows = [{"query": "A cat.", "positive": ["x", "y"]}, {"query": "b", "positive": "x"}]
    # The same row in other words' clothes, and rows that share only one side.
    rows += [{"query": "a CAT", "positive": ["Y!", "x"]}, {"query": "A cat.", "positive": "z"}]
    item = DataRecipe(source=jsonl(tmp_path / "d.jsonl", rows))
    assert scan(open_set(item), {})["duplicates"] == 1
    recipe["contrast"]["data"] = [{"source": item.source}]
    report = checked(recipe)
    assert report["ok"]
    assert any("d.jsonl): 1 rows repeat an earlier row" in line for line in report["warnings"])


def test_clusters_and_negatives_are_counted(tmp_path, recipe):
    rows = [{"query": f"q{i}", "positive": "p", "negative": ["n"] * (1 + i % 2), "cluster": i % 3} for i in range(30)]
    source = jsonl(tmp_path / "d.jsonl", rows)
    recipe["contrast"]["data"] = [{"source": source, "hard_negatives": 2}]
    report = checked(recipe)
    assert report["sets"][2]["clusters"] == 3 and report["sets"][2]["negatives_per_row"] == 1.5
    assert any("hard_negatives is 2, rows have 1.5" in line for line in report["warnings"])


def test_negatives_that_are_the_query_or_the_positive_are_left_out_and_counted(tmp_path, recipe, caplog):
    rows = [{"query": f"q{i}", "positive": f"p{i}", "negative": ["n", "m"]} for i in range(9)]
    rows[2]["negative"] = ["n", "p2", "q2"]
    rows[5]["negative"] = "p5"
    source = jsonl(tmp_path / "d.jsonl", rows)
    recipe["contrast"]["data"] = [{"source": source, "hard_negatives": 1}]
    report = checked(recipe)
    assert report["ok"] and (report["sets"][2]["copies"], report["sets"][2]["left_out"]) == (3, 1)
    line = "3 texts of 'negative' are the query or a positive of their own row and are left out"
    assert any(line in warning for warning in report["warnings"]) and line in caplog.text
    assert any("1 rows have no 'negative'" in warning for warning in report["warnings"])
    options = ({"hard_negatives": 1}, {"hard_negatives": 1, "streaming": True, "cap": 8})
    for opened in (open_set(DataRecipe(source=source, **fields)) for fields in options):
        assert [opened[row]["query"] for row in range(8)] == [f"q{i}" for i in range(9) if i != 5]
        assert opened[2]["negative"] == ["n"] and opened[3]["negative"] == ["n", "m"] and opened.copies == 3
    assert len(open_set(DataRecipe(source=source))) == 9


@pytest.mark.parametrize("column", ["query", "positive", "negative"])
def test_a_text_of_the_everyday_set_is_a_leak(tmp_path, recipe, column):
    row = {"query": "q", "positive": "p", "negative": ["n"]}
    from lusifer.data.everyday_set import load_everyday

    leaked = load_everyday().sentences["fr"][3].upper() + " ?!"
    row[column] = leaked if column == "query" else [leaked]
    source = jsonl(tmp_path / "d.jsonl", [{"query": f"q{i}", "positive": "p"} for i in range(9)] + [row])
    recipe["contrast"]["data"] = [{"source": source}]
    report = checked(recipe)
    assert not report["ok"]
    assert report["sets"][2]["leaks"] == 1
    assert f"d.jsonl, line 10: '{column}' is a text of the everyday set" in report["errors"][0]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv", "tsv"])
def test_evaluation_data_of_every_format(tmp_path, kind):
    folder = tmp_path / "eval" / "task" / "default"
    folder.mkdir(parents=True)
    rows = [{"id": "query 7", "sentence1": "Passage 3!", "label": "query 5", "query-id": "query 6", "score": 1.0}]
    if kind == "parquet":
        rows[0]["sentences"] = ["one", "PASSAGE 4"]
        parquet.write_table(pa.Table.from_pylist(rows), folder / "test.parquet")
    elif kind == "jsonl":
        rows[0]["sentences"] = ["one", "PASSAGE 4"]
        jsonl(folder / "test.jsonl", rows)
    else:
        sign = "," if kind == "csv" else "\t"
        lines = [sign.join(rows[0]), sign.join(map(str, rows[0].values()))]
        (folder / f"test.{kind}").write_text("\n".join(lines) + "\n")
    known = evaluation_texts([tmp_path / "eval"])
    found = scan(open_set(DataRecipe(source=pairs(tmp_path / "d.jsonl"))), known)
    # Identifiers and labels are no texts: queries 5 to 7 are no leaks.
    assert found["leaks"] == (2 if kind in ("parquet", "jsonl") else 1)
    assert found["leak_examples"][0].endswith(f"d.jsonl, line 4: 'positive' is a text of task/default/test.{kind}")


def test_evaluation_data_that_is_not_there(tmp_path):
    with pytest.raises(LusiferError, match="no such file"):
        evaluation_texts([tmp_path / "none"])
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(LusiferError, match=r"broken\.parquet: broken Parquet"):
        evaluation_texts([tmp_path])


def test_every_bad_set_is_named_not_only_the_first(tmp_path, recipe):
    bad = jsonl(tmp_path / "bad.jsonl", [{"query": "q", "positive": "p"}, {"query": "", "positive": "p"}])
    recipe["align"]["data"].append({"source": bad, "task": "complete"})
    recipe["contrast"]["data"] = [{"source": str(tmp_path / "none.jsonl")}]
    report = checked(recipe)
    assert not report["ok"] and len(report["errors"]) == 2
    assert report["errors"][0].startswith("align.data.2: ") and "bad.jsonl, line 2" in report["errors"][0]
    assert report["errors"][1].startswith("contrast.data.0: no such file")
    assert len(report["sets"]) == 2


def test_a_streamed_set_and_a_set_that_is_never_drawn(tmp_path, recipe):
    recipe["contrast"]["data"][0] |= {"streaming": True, "cap": 12}
    recipe["align"]["data"][1]["weight"] = 1e-9
    report = checked(recipe)
    assert report["sets"][2]["rows"] == 12
    assert any("align.data.1" in line and "never sampled" in line for line in report["warnings"])


def run(*arguments):
    return CliRunner().invoke(app, ["data", *map(str, arguments)])


def test_the_command_prints_a_table_or_json_and_tells_by_its_exit_code(tmp_path, recipe):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    result = run("check", path, "-q")
    assert result.exit_code == 0
    assert "texts.jsonl" in result.output and "reconstruct" in result.output and "no problems found" in result.output
    result = run("check", path, "--json", "-q", "--align.steps", "20")
    report = json.loads(result.stdout)
    assert report["ok"] and report["sets"][0]["epochs"] == pytest.approx(10 * 4 / 30)
    jsonl(tmp_path / "eval.jsonl", [{"text": "QUERY 3"}])
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval.jsonl").rename(tmp_path / "eval" / "eval.jsonl")
    result = run("check", path, "-q", "--against", tmp_path / "eval")
    assert result.exit_code == 1
    assert "line 4: 'query' is a text of eval.jsonl" in result.output
    result = run("check", path, "-q", "--align.data.0.wieght", "2")
    assert isinstance(result.exception, LusiferError) and "did you mean 'weight'" in str(result.exception)


def test_mining_with_a_checkpoint_from_the_command_line(tmp_path, tiny_st):
    tiny_st.save_pretrained(str(tmp_path / "model"))
    source = pairs(tmp_path / "pairs.jsonl")
    arguments = ("mine", source, tmp_path / "out.jsonl", "--model", tmp_path / "model", "-q", "--relative-margin", "0")
    result = run(*arguments, "--negatives", "2", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert (facts["rows"], facts["passages"], facts["negatives"]) == (20, 20, 2)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert facts["mean_negatives"] == sum(len(row["negative"]) for row in rows) / 20 > 0
    assert isinstance(run(*arguments).exception, LusiferError)
    missing = run("mine", source, tmp_path / "o.jsonl", "--model", tmp_path / "nothing", "-q")
    assert "no checkpoint at" in str(missing.exception)
