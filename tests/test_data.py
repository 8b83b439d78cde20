"""Training data: formats, mistakes in rows, mixing, order, batches."""

from __future__ import annotations

import gzip
import json
from collections import Counter

import pyarrow as pa
import pytest
from pyarrow import parquet
from transformers import AutoTokenizer

from lusifer import LusiferError
from lusifer.data import (
    AlignmentCollator,
    alignment_dataset,
    contrastive_dataset,
    llm_preprocess,
    read_pairs,
    read_records,
    read_texts,
)
from lusifer.prompts import with_instruction

PAIRS = [
    {"query": "q one", "positive": "p one", "negative": ["n one", "n two"]},
    {"query": "q two", "positive": "p two", "negative": ["n three", "n four"]},
    {"query": "q three", "positive": "p three", "negative": ["n five", "n six"]},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets-cache")


def jsonl(path, rows):
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return str(path)


def texts(*words):
    return [{"text": word} for word in words]


def refused(function, *args, **kwargs):
    with pytest.raises(LusiferError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.jsonl.gz", "d.v2.jsonl", "d.parquet"])
def test_the_same_texts_from_every_format(tmp_path, name):
    rows = texts("Grüße, Welt", "你好", " spaces kept ")
    path = tmp_path / name
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
        source = str(path)
    else:
        source = jsonl(path, rows)
    assert read_texts(source) == ["Grüße, Welt", "你好", " spaces kept "]


def test_pairs_with_one_or_several_positives(tmp_path):
    one = jsonl(tmp_path / "one.jsonl", PAIRS)
    assert read_pairs(one)[1] == ("q two", ["p two"], ["n three", "n four"])
    several = jsonl(tmp_path / "several.jsonl", [{"query": "q", "positive": ["a", "b"]}])
    assert read_pairs(several) == [("q", ["a", "b"], [])]
    assert read_texts(several) == ["q", "a", "b"]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([*texts("a", "b"), {"text": None}], "row 3: 'text' must be text, not NoneType"),
        (texts("a", ""), "row 2: 'text' is empty"),
        (texts("a", "b", " \t\n\u3000"), "row 3: 'text' is empty"),
        ([{"text": 1}, {"text": 2}], "row 1: 'text' must be text, not int"),
        ([{"text": ["a"]}], "row 1: 'text' must be text, not list"),
        ([{"body": "a"}], "no column 'query'; it has body"),
    ],
)
def test_bad_texts(tmp_path, rows, words):
    source = jsonl(tmp_path / "d.jsonl", rows)
    message = refused(read_texts, source)
    assert words in message and "d.jsonl" in message


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"query": "q"}, "no column 'positive'"),
        ({"positive": "p"}, "no column 'query'"),
        ({"query": "", "positive": "p"}, "row 1: 'query' is empty"),
        ({"query": "q", "positive": ""}, "row 1: 'positive' is empty"),
        ({"query": "q", "positive": []}, "row 1: 'positive' is empty"),
        ({"query": "q", "positive": ["p", " "]}, "row 1: 'positive' is empty"),
        ({"query": 3, "positive": "p"}, "row 1: 'query' must be text, not int"),
        ({"query": "q", "positive": "p", "negative": ["n", ""]}, "row 1: 'negative' is empty"),
        ({"query": "q", "positive": 7}, "row 1: 'positive' must be"),
        ({"query": "q", "positive": "p", "negative": "one text"}, "row 1: 'negative' must be a list"),
    ],
)
def test_bad_pairs(tmp_path, row, words):
    assert words in refused(read_pairs, jsonl(tmp_path / "d.jsonl", [row]))


def test_unreadable_files(tmp_path):
    assert "no such data file" in refused(read_records, str(tmp_path / "none.jsonl"))
    (tmp_path / "d.csv").write_text("text\na\n")
    assert "cannot tell the format" in refused(read_records, str(tmp_path / "d.csv"))
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    assert "broken.jsonl" in refused(read_records, str(tmp_path / "broken.jsonl"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but no more")
    assert "broken.parquet" in refused(read_records, str(tmp_path / "broken.parquet"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    assert "not valid UTF-8" in refused(read_texts, str(tmp_path / "latin.jsonl"))
    (tmp_path / "latin-pairs.jsonl").write_bytes(b'{"query": "q", "positive": "p", "negative": ["caf\xe9"]}\n')
    assert "'negative' is not valid UTF-8" in refused(read_pairs, str(tmp_path / "latin-pairs.jsonl"))
    (tmp_path / "surrogate.jsonl").write_text('{"text": "a\\ud800b"}\n')
    assert "surrogate" in refused(read_texts, str(tmp_path / "surrogate.jsonl"))


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_a_broken_gzip(tmp_path, keep):
    source = jsonl(tmp_path / "d.jsonl.gz", texts(*(f"text {number}" for number in range(500))))
    whole = (tmp_path / "d.jsonl.gz").read_bytes()
    (tmp_path / "d.jsonl.gz").write_bytes(whole[: int(len(whole) * keep)])
    assert "d.jsonl.gz" in refused(read_records, source)


def test_an_empty_data_set(tmp_path):
    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "d.parquet")
    assert "d.parquet" in refused(read_records, str(tmp_path / "d.parquet"))
    for name in ("d.jsonl", "e.jsonl"):
        (tmp_path / name).write_text("" if name == "d.jsonl" else "\n")
        assert "empty" in refused(read_records, str(tmp_path / name))


def test_a_name_that_is_nowhere_is_one_line(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub\nand a second line")

    monkeypatch.setattr("lusifer.data.load_dataset", offline)
    assert "Couldn't reach the Hub" in refused(read_records, "nobody/nothing")


@pytest.fixture
def both(tmp_path):
    words = [f"text {number}" for number in range(10)]
    pairs = [{"query": f"q {number}", "positive": [f"p {number} a", f"p {number} b"]} for number in range(6)]
    return jsonl(tmp_path / "texts.jsonl", texts(*words)), jsonl(tmp_path / "pairs.jsonl", pairs)


@pytest.mark.parametrize(("ratio", "completions"), [(0.0, 0), (0.25, 10), (0.5, 20), (1.0, 40)])
def test_the_mixing_ratio_is_exact(both, ratio, completions):
    data = alignment_dataset(*both, completion_ratio=ratio, rows=40, seed=0)
    assert len(data) == 40 and data.column_names == ["source", "target"]
    different = [row for row in data if row["source"] != row["target"]]
    assert len(different) == completions
    for row in different:
        assert row["source"].startswith("q ") and row["target"].startswith("p " + row["source"][2:])


def test_a_single_source_gets_all_rows_whatever_the_ratio(both):
    alone = alignment_dataset(both[0], None, completion_ratio=0.9, rows=7, seed=0)
    assert all(row["source"] == row["target"] for row in alone) and len(alone) == 7
    alone = alignment_dataset(None, both[1], completion_ratio=0.1, rows=7, seed=0)
    assert all(row["source"].startswith("q ") for row in alone) and len(alone) == 7


def test_the_seed_decides_the_data(both):
    def made(seed):
        return alignment_dataset(*both, completion_ratio=0.5, rows=30, seed=seed).to_dict()

    assert made(1) == made(1)
    assert made(1) != made(2)


def test_every_row_is_used_before_any_repeats(both):
    data = alignment_dataset(both[0], None, completion_ratio=0.0, rows=23, seed=3)
    counts = Counter(data["source"])
    assert len(counts) == 10 and set(counts.values()) == {2, 3}


def test_contrastive_columns_and_instruction(tmp_path):
    source = jsonl(tmp_path / "d.jsonl", PAIRS)
    data = contrastive_dataset(source, instruction=None, hard_negatives=0, seed=0)
    assert data.to_dict() == {"query": ["q one", "q two", "q three"], "positive": ["p one", "p two", "p three"]}
    data = contrastive_dataset(source, instruction="Find it", hard_negatives=0, seed=0)
    assert data["query"][0] == "Instruct: Find it\nQuery: q one"
    assert data["positive"][0] == "p one"
    assert with_instruction(None, "q") == "q" and with_instruction("", "q") == "q"


def test_hard_negatives(tmp_path):
    source = jsonl(tmp_path / "d.jsonl", PAIRS)
    data = contrastive_dataset(source, instruction="I", hard_negatives=2, seed=0)
    assert data.column_names == ["query", "positive", "negative_1", "negative_2"]
    for row, made in zip(PAIRS, data, strict=True):
        assert sorted([made["negative_1"], made["negative_2"]]) == sorted(row["negative"])
    more = contrastive_dataset(source, instruction=None, hard_negatives=3, seed=0)
    for row, made in zip(PAIRS, more, strict=True):
        found = Counter(made[f"negative_{k}"] for k in (1, 2, 3))
        assert set(found) == set(row["negative"]) and sorted(found.values()) == [1, 2]


def test_the_choice_of_positives_and_negatives_follows_the_seed(tmp_path):
    rows = [
        {"query": f"q{i}", "positive": [f"p{i}{j}" for j in range(5)], "negative": [f"n{i}{j}" for j in range(5)]}
        for i in range(8)
    ]
    source = jsonl(tmp_path / "d.jsonl", rows)

    def made(seed):
        return contrastive_dataset(source, instruction=None, hard_negatives=1, seed=seed).to_dict()

    assert made(0) == made(0)
    assert made(0)["positive"] != made(1)["positive"]
    assert made(0)["negative_1"] != made(1)["negative_1"]


def test_a_row_without_a_hard_negative_is_named(tmp_path):
    source = jsonl(tmp_path / "d.jsonl", [*PAIRS, {"query": "q", "positive": "p", "negative": []}])
    assert "row 4: no negatives" in refused(contrastive_dataset, source, instruction=None, hard_negatives=1, seed=0)


def test_the_collator_tokenises_each_side_with_its_own_tokenizer(tiny_st, tiny_llm):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llm)
    collator = AlignmentCollator(preprocess_fn=tiny_st.preprocess, target_preprocess=llm_preprocess(tokenizer, 5))
    rows = [
        {"source": "the cat sat on the mat", "target": "a small house stood near the river in the valley"},
        {"source": "rain", "target": "cat"},
    ]
    batch = collator(rows)
    assert batch["source_input_ids"].shape == batch["source_attention_mask"].shape
    assert batch["target_input_ids"].shape == batch["target_attention_mask"].shape == (2, 5)
    lengths = [len(ids) for ids in tiny_st.tokenizer([row["source"] for row in rows])["input_ids"]]
    assert batch["source_attention_mask"].sum(dim=1).tolist() == lengths
    # No special tokens in targets, padding on the right.
    target = tokenizer("cat", add_special_tokens=False)["input_ids"]
    assert batch["target_input_ids"][1, : len(target)].tolist() == target
    assert batch["target_attention_mask"][1].tolist() == [1] * len(target) + [0] * (5 - len(target))


def test_an_llm_tokenizer_without_padding_token_gets_one(tiny_llm):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llm)
    tokenizer.pad_token = None
    tokenizer.padding_side = "left"
    made = llm_preprocess(tokenizer, 8)(["the cat sat", "a"])
    assert made["attention_mask"][1, 0] == 1 and made["attention_mask"][1, -1] == 0
