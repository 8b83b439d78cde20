"""All columns of the input go into the output."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import date

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from lusifer.bulk import encode
from lusifer.bulk.job import Settings, output_names
from support.bert import save_bert
from support.texts import refused

PLAIN = Settings(precision="float32", shard_rows=2)
RECORDS = [
    {"text": "the cat", "lang": "en", "year": 1999, "score": 1, "draft": True, "tags": ["a", "b"], "code": "07"},
    {"text": "le chat", "lang": "fr", "year": None, "score": 0.5, "draft": False, "tags": [], "code": "8"},
    {"text": "die Katze", "lang": None, "year": 2001, "score": None, "draft": None, "tags": {"ä": 1}},
]
KEPT = {
    "lang": ["en", "fr", None],
    "year": [1999, None, 2001],
    "score": [1.0, 0.5, None],
    "draft": [True, False, None],
    "tags": ['["a", "b"]', "[]", '{"ä": 1}'],
    "code": ["07", "8", None],
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return str(save_bert(tmp_path_factory.mktemp("columns") / "bert"))


def lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def made(bert, source, folder, settings=PLAIN):
    encode(bert, source, str(folder), settings)
    return parquet.read_table(folder)


def columns(table):
    return {name: table[name].to_pylist() for name in table.schema.names if name not in ("id", "text", "embedding")}


def test_columns_of_records_keep_their_types(bert, tmp_path):
    table = made(bert, lines(tmp_path / "in.jsonl", RECORDS), tmp_path / "out")
    assert columns(table) == KEPT
    kinds = {name: str(table.schema.field(name).type) for name in KEPT}
    assert kinds == dict.fromkeys(("lang", "tags", "code"), "string") | {
        "year": "int64",
        "score": "double",
        "draft": "bool",
    }
    assert list(table.schema.names) == ["id", "text", *KEPT, "embedding"]
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert manifest["columns"]["year"] == "int64"


def test_cells_that_look_like_numbers_are_numbers(bert, tmp_path):
    (tmp_path / "in.csv").write_text("text,year,mixed,code\none,1999,1,007\ntwo,,x,1\nthree,2001,2,2\n")
    found = columns(made(bert, str(tmp_path / "in.csv"), tmp_path / "out"))
    assert found == {"year": [1999, None, 2001], "mixed": ["1", "x", "2"], "code": ["007", "1", "2"]}


def test_columns_of_parquet(bert, tmp_path):
    table = pa.table({
        "text": ["one", "two", "three"], "n": pa.array([1, None, 3], pa.int16()),
        "day": [date(2024, 1, day) for day in (1, 2, 3)],
        "lang": pa.array(["en", "fr", "en"]).dictionary_encode(), "blob": [b"1", b"2", b"3"],
        "vector": pa.array([[0.5], [1.0], [2.0]], pa.list_(pa.float32())), "big": pa.array([1, 2, 2**63], pa.uint64()),
    })  # fmt: skip
    parquet.write_table(table, tmp_path / "in.parquet", row_group_size=2)
    found = columns(made(bert, str(tmp_path / "in.parquet"), tmp_path / "out"))
    days = [f"2024-01-0{day}" for day in (1, 2, 3)]
    assert found == {"n": [1, None, 3], "day": days, "lang": ["en", "fr", "en"], "big": ["1", "2", str(2**63)]}
    message = refused(bert, str(tmp_path / "in.parquet"), str(tmp_path / "no"), replace(PLAIN, metadata=["blob"]))
    assert "'blob' holds bytes or vectors" in message


def test_files_of_different_columns_go_together(bert, tmp_path):
    (tmp_path / "in").mkdir()
    lines(tmp_path / "in" / "a.jsonl", [{"text": "one", "year": 1999}])
    parquet.write_table(pa.table({"text": ["two"], "topic": ["food"], "year": [2.5]}), tmp_path / "in" / "b.parquet")
    found = columns(made(bert, str(tmp_path / "in"), tmp_path / "out"))
    assert found == {"year": [1999.0, 2.5], "topic": [None, "food"]}


def test_columns_called_as_ours_are_renamed(bert, tmp_path):
    source = lines(
        tmp_path / "in.jsonl", [{"body": f"text {n}", "id": f"k{n}", "text": "t", "key": n} for n in range(3)]
    )
    table = made(bert, source, tmp_path / "out", replace(PLAIN, column="body"))
    assert table["id"].to_pylist() == [0, 1, 2] and table["text"].to_pylist() == ["text 0", "text 1", "text 2"]
    assert columns(table) == {"input_id": ["k0", "k1", "k2"], "input_text": ["t"] * 3, "key": [0, 1, 2]}
    table = made(bert, source, tmp_path / "by-id", replace(PLAIN, column="body", id_column="id", metadata=["key"]))
    assert table["id"].to_pylist() == ["k0", "k1", "k2"] and columns(table) == {"key": [0, 1, 2]}
    assert output_names(["id", "input_id"]) == {"id": "input_input_id", "input_id": "input_id"}


def test_columns_can_be_chosen(bert, tmp_path):
    source = lines(tmp_path / "in.jsonl", RECORDS)
    assert list(columns(made(bert, source, tmp_path / "one", replace(PLAIN, metadata=["lang"])))) == ["lang"]
    assert columns(made(bert, source, tmp_path / "none", replace(PLAIN, metadata=[]))) == {}
    message = refused(bert, source, str(tmp_path / "no"), replace(PLAIN, metadata=["title"]))
    assert message.startswith("the column 'title' is not there; there are lang, year")


def test_one_file_has_them_and_a_matrix_has_none(bert, tmp_path):
    source = lines(tmp_path / "in.jsonl", RECORDS)
    encode(bert, source, str(tmp_path / "v.parquet"), PLAIN)
    assert columns(parquet.read_table(tmp_path / "v.parquet")) == KEPT
    encode(bert, source, str(tmp_path / "v.npy"), PLAIN)
    assert np.load(tmp_path / "v.npy").shape == (3, 32)


def test_rows_left_out_take_their_values_with_them(bert, tmp_path):
    source = lines(tmp_path / "in.jsonl", [RECORDS[0], {"text": " ", "year": 1}, RECORDS[2]])
    table = made(bert, source, tmp_path / "out", replace(PLAIN, skip_bad=True))
    assert table["id"].to_pylist() == [0, 2] and table["year"].to_pylist() == [1999, 2001]


def test_text_that_is_no_unicode_is_kept_readably(bert, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "one", "title": "half \\\\ud83d"}\n'.replace("\\\\", "\\"))
    assert columns(made(bert, str(tmp_path / "in.jsonl"), tmp_path / "out")) == {"title": ["half \\ud83d"]}
