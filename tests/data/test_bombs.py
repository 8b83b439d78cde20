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
from support.forged import forge

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
    refused(
        path, r"bomb.parquet: 'text[^']*' of row group 1 unpacks from [\d,]+ bytes to [\d,]+; no real data does that"
    )


def test_ordinary_columns_are_read_4096_rows_at_a_time(tmp_path):
    path = tmp_path / "plain.parquet"
    texts = [f"a text of some words {row % 3000}" for row in range(20_000)]
    table = {"text": texts, "lang": ["de"] * 20_000, "vector": [[0.5, float(row)] for row in range(20_000)]}
    parquet.write_table(pa.table(table), path)
    assert [len(block) for block in read_blocks(find_files(str(path)))] == [4096] * 4 + [3616]


# What the end of a file says of it, (rows, unpacked bytes) -> what it says instead.
LIES = {
    "few bytes": lambda rows, unpacked: {unpacked: 100},
    "many rows": lambda rows, unpacked: {rows: 10**9},
    "many rows and few bytes": lambda rows, unpacked: {rows: 10**9, unpacked: 100},
    "one row": lambda rows, unpacked: {rows: 1},
}


@pytest.mark.parametrize(
    ("lie", "coded"), [*((lie, True) for lie in LIES), ("few bytes", False), ("many rows and few bytes", False)]
)
def test_sizes_that_are_not_so_do_not_burst_memory(tmp_path, count, lie, coded):
    path, rows = tmp_path / "bomb.parquet", 4099 if coded else 2111
    table = pa.table({"text": one_value(rows, LENGTH, pa.string()) if coded else pa.array(["a" * LENGTH] * rows)})
    options = {"store_schema": False, "use_dictionary": coded, "write_batch_size": 64}
    parquet.write_table(table, path, compression="zstd", **options)
    del table
    chunk = parquet.read_metadata(path).row_group(0).column(0)
    # What of it stands in the footer more than once, as the rows do, is forged everywhere.
    forge(path, LIES[lie](rows, chunk.total_uncompressed_size))
    pool, read = count(), 0
    try:
        for block in blocks(path):
            read += len(block)
            assert len(block) * LENGTH <= 4 * expansion.MAX_BYTES
    except LusiferError as error:
        assert "bomb.parquet" in str(error) and "\n" not in str(error)
    assert read in (1, 0, rows)
    assert pool.max_memory() < 180e6  # 210 MB, and more by the rows, where the lie is believed.


def test_a_dictionary_that_no_list_of_encodings_names_is_looked_up(tmp_path, count):
    path = tmp_path / "bomb.parquet"
    table = pa.table({"text": one_value(ROWS, LENGTH, pa.string())})
    parquet.write_table(table, path, compression="zstd", store_schema=False)
    forge(path, {}, {bytes([0x35, 0, 6, 16]): bytes([0x35, 0, 6, 6])})
    assert "RLE_DICTIONARY" not in parquet.read_metadata(path).row_group(0).column(0).encodings
    pool = count()
    assert sum(len(block) for block in blocks(path)) == ROWS
    assert pool.max_memory() < 200e6


def test_a_column_that_unpacks_further_than_it_says_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(expansion, "MAX_UNPACKED", 1 << 20)
    path = tmp_path / "bomb.parquet"
    table = pa.table({"text": pa.array(["a" * 1_000_000] * 50)})
    parquet.write_table(table, path, compression="zstd", use_dictionary=False, write_statistics=False)
    forge(path, {parquet.read_metadata(path).row_group(0).column(0).total_uncompressed_size: 100})
    refused(
        path, r"bomb.parquet: 'text' of row group 1 unpacks from [\d,]+ bytes to 50,\d+,\d+; no real data does that"
    )


@pytest.mark.parametrize(("version", "compression"), [("1.0", "none"), ("2.0", "zstd")])
def test_the_pages_of_honest_files_say_what_their_end_says(tmp_path, version, compression):
    path, count = tmp_path / "plain.parquet", 3000
    table = {"text": [f"a text {row % 300}" for row in range(count)], "lang": ["de"] * count}
    table |= {
        "vector": [[0.5, None, float(row)] for row in range(count)],
        "long": ["é" * 900 + str(row) for row in range(count)],
    }
    options = {"data_page_version": version, "compression": compression, "data_page_size": 10_000}
    parquet.write_table(pa.table(table), path, row_group_size=2000, **options)
    with path.open("rb") as raw:
        file = parquet.ParquetFile(raw)
        found = expansion.Expansion("plain", raw, file, None)
        for group in range(2):
            for number in range(4):
                chunk = file.metadata.row_group(group).column(number)
                pages = found._pages(group, "a column", chunk)
                assert pages.values == chunk.num_values and pages.coded == chunk.has_dictionary_page
                # Headers of pages belong to the chunk.
                assert 0 <= chunk.total_uncompressed_size - pages.unpacked < 0.1 * chunk.total_uncompressed_size + 100
                assert pages.stored <= chunk.total_compressed_size


def test_a_page_that_is_none_is_a_broken_file(tmp_path):
    path = tmp_path / "bomb.parquet"
    parquet.write_table(pa.table({"text": ["a"] * 10}), path, use_dictionary=False)
    data = bytearray(path.read_bytes())
    for content in (b"\xff" * 20, b"\x19" * 20, b"\x1c" * 20, b"\x15\x00\x15\x01\x15\x01\x00" + b"\0" * 13):
        data[4:24] = content
        path.write_bytes(data)
        refused(path, "bomb.parquet")


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


def frame(content, *, window=0x50, said=None):
    """A frame of zstd with one raw block, whose header says how much it unpacks to."""
    size = (len(content) if said is None else said).to_bytes(8, "little")
    block = (1 | len(content) << 3).to_bytes(3, "little") + content
    return b"\x28\xb5\x2f\xfd" + bytes([0xC0, window]) + size + block


def test_packed_files_that_lie_about_their_size(tmp_path):
    content = b'{"text": "a"}\n' * 100
    packed = gzip.compress(content)
    (tmp_path / "a.jsonl.gz").write_bytes(packed[:-4] + (2**32 - 1).to_bytes(4, "little"))
    (tmp_path / "b.jsonl.zst").write_bytes(frame(content, said=2**40))
    (tmp_path / "c.jsonl.zst").write_bytes(frame(content, window=0xF8))  # A window of 2 TB.
    (tmp_path / "d.jsonl.zst").write_bytes(frame(content))
    for name in ("a.jsonl.gz", "b.jsonl.zst", "c.jsonl.zst"):
        refused(tmp_path / name, f"{name}: broken ")
    assert sum(len(block) for block in blocks(tmp_path / "d.jsonl.zst")) == 100
