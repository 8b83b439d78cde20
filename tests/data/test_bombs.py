"""Small files that unpack to far more than memory: read in bounded memory, or refused in one line."""

from __future__ import annotations

import bz2
import csv
import gzip
import io

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from lusifer import LusiferError
from lusifer.data import expansion
from lusifer.data.reading import read_blocks
from lusifer.data.sources import find_files

ROWS, LENGTH = 4096, 100_000  # 400 MB of text.


POOLS = []  # What Arrow took from a pool it gives back to it, however late.


@pytest.fixture
def count():
    """Begins to count, with a pool that knows the most that Arrow took at once."""
    before = pa.default_memory_pool()

    def begin():
        POOLS.append(pa.proxy_memory_pool(before))
        pa.set_memory_pool(POOLS[-1])
        return POOLS[-1]

    yield begin
    pa.set_memory_pool(before)


def one_value(rows, length, kind):
    """A column of one value, written once."""
    return pa.DictionaryArray.from_arrays(np.zeros(rows, np.int32), pa.array(["a" * length], kind))


def blocks(path):
    return read_blocks(find_files(str(path)), ["text"])


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary()], ids=str)
@pytest.mark.parametrize("stored", [True, False], ids=["a dictionary", "plain"])
def test_a_value_meant_by_all_rows_is_read_a_few_at_a_time(tmp_path, count, kind, stored):
    path = tmp_path / "bomb.parquet"
    table = pa.table({"text": one_value(ROWS, LENGTH, kind)})
    parquet.write_table(table, path, compression="zstd", store_schema=stored)
    assert path.stat().st_size < 2000
    rows, pool = 0, count()
    for block in blocks(path):
        rows += len(block)
        assert len(block) * LENGTH <= expansion.MAX_BYTES
    assert rows == ROWS
    assert pool.max_memory() < 200e6  # 410 MB where it is read 4,096 rows at a time.


def test_prefixes_of_the_value_before_are_read_a_few_at_a_time(tmp_path, count):
    path, texts = tmp_path / "bomb.parquet", pa.array(["a" * LENGTH] * ROWS)
    options = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}, "compression": "zstd"}
    parquet.write_table(pa.table({"text": texts}), path, **options)
    del texts
    pool = count()
    assert sum(len(block) for block in blocks(path)) == ROWS
    assert pool.max_memory() < 200e6


def test_long_texts_are_read_a_few_at_a_time(tmp_path, count):
    path = tmp_path / "long.parquet"
    texts = [chr(97 + row % 26) * 50_000 + str(row) for row in range(3000)]
    parquet.write_table(pa.table({"text": texts}), path, use_dictionary=False, compression="none")
    pool = count()
    assert [text for block in blocks(path) for text in block.values("text")] == texts
    assert pool.max_memory() < 180e6  # 205 MB where all are read at once.


def refused(path, match):
    with pytest.raises(LusiferError, match=match) as caught:
        for _ in blocks(path):
            pass
    assert "\n" not in str(caught.value)


def test_a_value_that_is_too_long_is_refused(tmp_path):
    path = tmp_path / "bomb.parquet"
    parquet.write_table(pa.table({"text": one_value(10, 70_000_000, pa.string())}), path, compression="zstd")
    refused(path, "bomb.parquet: 'text' of row group 1 holds a value of 66 MB, more than 64")


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["a" * 1_000_000] * 50),
        pa.array([["a"] * 2_000_000]),
        pa.array([[0] * 2_000_000]),
        pa.array([["a" * 1000] * 5000, ["b"]]),
    ],
    ids=["pages", "list of texts", "list of numbers", "list of long texts"],
)
def test_a_column_that_unpacks_too_far_is_refused(tmp_path, monkeypatch, column):
    monkeypatch.setattr(expansion, "MAX_UNPACKED", 1 << 20)
    path = tmp_path / "bomb.parquet"
    options = {"use_dictionary": pa.types.is_nested(column.type), "compression": "zstd", "write_statistics": False}
    parquet.write_table(pa.table({"text": column}), path, **options)
    refused(path, r"bomb.parquet: 'text[^']*' of row group 1 unpacks from [\d,]+ bytes to [\d,]+; no data do that")


def test_ordinary_columns_are_read_4096_rows_at_a_time(tmp_path):
    path = tmp_path / "plain.parquet"
    texts = [f"a text of some words {row % 3000}" for row in range(20_000)]
    table = {"text": texts, "lang": ["de"] * 20_000, "vector": [[0.5, float(row)] for row in range(20_000)]}
    parquet.write_table(pa.table(table), path)
    assert [len(block) for block in read_blocks(find_files(str(path)))] == [4096] * 4 + [3616]


PACK = {"gz": gzip.compress, "bz2": bz2.compress, "zst": lambda data: zstd(data)}


def zstd(data):
    out = io.BytesIO()
    with pa.CompressedOutputStream(pa.PythonFile(out, mode="w"), "zstd") as stream:
        stream.write(data)
        stream.flush()
        return out.getvalue()


CONTENT = {
    "txt": b"a" * 3_000_000,
    "jsonl": b'{"text": "' + b"a" * 3_000_000,
    "json": b'[{"text": "' + b"a" * 3_000_000,
    "csv": b"text\n" + b'"a\na",' * 600_000,
}


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("kind", CONTENT)
def test_a_packed_record_without_end_is_refused(tmp_path, monkeypatch, kind, packing):
    monkeypatch.setattr("lusifer.data.text_files.MAX_RECORD", 1 << 20)
    path = tmp_path / f"bomb.{kind}.{packing}"
    path.write_bytes(PACK[packing](CONTENT[kind]))
    assert path.stat().st_size < 10_000
    before = csv.field_size_limit()
    try:
        refused(path, "not valid JSON" if kind == "json" else "longer than 1 MB; write one record per line")
    finally:
        csv.field_size_limit(before)
