"""The hash of a set: of its content and nothing else."""

from __future__ import annotations

import json
import os

import pyarrow as pa
import pytest
from pyarrow import parquet

from lusifer.data.content import set_hash
from lusifer.recipes.schema import DataRecipe

ROWS = [{"query": f"q{n}", "positive": [f"p{n}", "ü" * (n + 1)], "negative": ["x"] * (n % 3)} for n in range(50)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LUSIFER_CACHE", str(tmp_path / "cache"))


def written(path, rows, **options):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return set_hash(DataRecipe(source=str(path), **options))


def test_names_times_formats_and_blocks_do_not_count(tmp_path):
    expected = written(tmp_path / "a.jsonl", ROWS)
    assert written(tmp_path / "b.jsonl", ROWS) == expected
    os.utime(tmp_path / "a.jsonl", (1, 1))
    assert set_hash(DataRecipe(source=str(tmp_path / "a.jsonl"))) == expected
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "c.parquet", row_group_size=7)
    assert set_hash(DataRecipe(source=str(tmp_path / "c.parquet"))) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"query": "Q7"},
        {"positive": ["p7", "ü" * 7, "ü"]},
        {"positive": ["p7ü", "ü" * 7]},
        {"negative": []},
        {"negative": ["y"]},
        {"cluster": "c"},
    ],
    ids=str,
)
def test_every_text_counts_and_where_it_stands(tmp_path, change):
    rows = [{**row, "cluster": "k"} for row in ROWS]
    before = written(tmp_path / "a.jsonl", rows)
    rows[7] = {**rows[7], **change}
    assert written(tmp_path / "a.jsonl", rows) != before


def test_a_streamed_set_is_known_by_sizes_and_samples(tmp_path):
    expected = written(tmp_path / "a.jsonl", ROWS, streaming=True, cap=10)
    os.utime(tmp_path / "a.jsonl", (1, 1))
    assert set_hash(DataRecipe(source=str(tmp_path / "a.jsonl"), streaming=True, cap=10)) == expected
    assert written(tmp_path / "a.jsonl", ROWS[::-1], streaming=True, cap=10) != expected
