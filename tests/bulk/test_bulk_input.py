"""Rows of files: every format, from any position on, and mistakes named by file and row."""

from __future__ import annotations

import bz2
import gzip
import json
import random

import pyarrow as pa
import pytest
from pyarrow import parquet

from lusifer import LusiferError
from lusifer.bulk.plan import make_plan
from lusifer.data.rows import Columns, RowReader
from lusifer.data.sources import find_files

TEXTS = ["Grüße", "你好 世界", " two  spaces ", "one\u2028still one\x0cand on", "x" * 5000, "last"]


def refused(function, *args, **kwargs):
    with pytest.raises(LusiferError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(source, *names, shard_rows=None, skip_bad=False):
    """Ids and texts of an input, shard by shard."""
    columns = Columns(*names)
    files = find_files(str(source))
    plan = make_plan(files, columns, shard_rows=shard_rows, skip_bad=skip_bad)
    assert sum(part.rows for part in plan.slices) == plan.rows
    reader = RowReader(files, columns)
    found = [row for part in plan.slices for row in reader.read(part)]
    # A reader that begins anywhere finds the same rows.
    for part in random.Random(0).sample(plan.slices, min(5, len(plan.slices))):
        begin = sum(1 for number, _ in found if isinstance(number, int) and number < part.first)
        if names[1:] == ():
            rows = list(RowReader(files, columns).read(part))
            assert rows == found[begin : begin + len(rows)] and len(rows) <= part.rows
    assert len(found) == plan.rows - plan.bad
    return found


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("shard_rows", [None, 1, 2, 4, 100])
def test_every_format_in_shards_of_any_size(tmp_path, shard_rows):
    plain, records = "\n".join(TEXTS).encode(), lines({"body": text, "n": 1} for text in TEXTS).encode()
    expected = list(enumerate(TEXTS))
    assert read(write(tmp_path / "a.txt", plain), shard_rows=shard_rows) == expected
    assert read(write(tmp_path / "b.txt", "\r\n".join(TEXTS) + "\r\n"), shard_rows=shard_rows) == expected
    for name, pack in (("gz", gzip.compress), ("bz2", bz2.compress), ("zst", zstd)):
        assert read(write(tmp_path / f"a.txt.{name}", pack(plain)), shard_rows=shard_rows) == expected
        assert read(write(tmp_path / f"a.jsonl.{name}", pack(records)), "body", shard_rows=shard_rows) == expected
    assert read(write(tmp_path / "a.jsonl", records), "body", shard_rows=shard_rows) == expected
    for size in (1, 4, 1000):
        table = pa.table({"n": [1] * len(TEXTS), "body": TEXTS})
        parquet.write_table(table, tmp_path / "a.parquet", row_group_size=size)
        assert read(tmp_path / "a.parquet", "body", shard_rows=shard_rows) == expected
    # Several members, as `cat a.gz b.gz` makes them.
    double = gzip.compress(plain + b"\n") + gzip.compress(b"more\n", mtime=0)
    assert read(write(tmp_path / "c.txt.gz", double), shard_rows=shard_rows) == [*expected, (6, "more")]


def test_many_rows_in_row_groups_of_many_sizes(tmp_path):
    texts = [f"text {number}" for number in range(12_000)]
    schema = pa.schema([("text", pa.dictionary(pa.int32(), pa.string()))])
    with parquet.ParquetWriter(tmp_path / "a.parquet", schema) as writer:
        for begin, end in ((0, 5000), (5000, 5001), (5001, 12_000)):
            writer.write_table(pa.table({"text": pa.array(texts[begin:end]).dictionary_encode()}, schema=schema))
    for shard_rows in (999, 4096, 7000):
        assert read(tmp_path / "a.parquet", shard_rows=shard_rows) == list(enumerate(texts))


def test_folders_and_globs_in_the_order_of_paths(tmp_path):
    write(tmp_path / "b.txt", "three\nfour\n")
    write(tmp_path / "a" / "one.jsonl", lines([{"text": "one"}, {"text": "two"}]))
    write(tmp_path / "empty.txt", "")
    parquet.write_table(pa.table({"text": ["five"]}), tmp_path / "z.parquet")
    write(tmp_path / "notes.md", "not data")
    write(tmp_path / ".hidden" / "c.txt", "no\n")
    write(tmp_path / "_SUCCESS.txt", "no\n")
    expected = list(enumerate(["one", "two", "three", "four", "five"]))
    for shard_rows in (None, 1, 2, 3):
        assert read(tmp_path, shard_rows=shard_rows) == expected
    assert [text for _, text in read(tmp_path / "[bz].*")] == ["three", "four", "five"]
    assert [text for _, text in read(tmp_path / "**" / "*.jsonl")] == ["one", "two"]
    assert "nothing matches" in refused(find_files, str(tmp_path / "*.xml"))
    (tmp_path / "none").mkdir()
    assert "no data in" in refused(find_files, str(tmp_path / "none"))
    write(tmp_path / "odd[1].txt", "literal\n")
    assert read(tmp_path / "odd[1].txt") == [(0, "literal")]


def test_ids_of_a_column(tmp_path):
    path = write(tmp_path / "a.jsonl", lines({"text": text, "key": f"k{n}"} for n, text in enumerate(TEXTS)))
    assert read(path, "text", "key", shard_rows=2) == [(f"k{n}", text) for n, text in enumerate(TEXTS)]
    parquet.write_table(pa.table({"key": range(7, 13), "text": TEXTS}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", "text", "key", shard_rows=4) == list(enumerate(TEXTS, start=7))
    assert make_plan(find_files(str(path)), Columns("text", "key"), shard_rows=2).id_type == "string"
    mixed = write(tmp_path / "b.jsonl", lines([{"text": "a", "key": 1}, {"text": "b", "key": "x"}]))
    assert "b.jsonl, line 2: ids are numbers and text" in refused(read, mixed, "text", "key")
    none = write(tmp_path / "c.jsonl", lines([{"text": "a", "key": 1.5}]))
    assert "line 1: the id in 'key' must be text or a whole number, not a decimal number" in refused(
        read, none, "text", "key"
    )
    assert "line 1: no 'id'; give it one" in refused(read, none, "text", "id")
    assert "no column 'id'" in refused(read, tmp_path / "a.parquet", "text", "id")


def test_a_byte_order_mark_is_not_text(tmp_path):
    assert read(write(tmp_path / "a.txt", b"\xef\xbb\xbfone\ntwo\n"), shard_rows=1) == [(0, "one"), (1, "two")]
    assert read(write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "one"}\n')) == [(0, "one")]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", "", "holds no texts"),
        ("a.txt", "one\n\nthree\n", "line 2: 'text' is empty; remove"),
        ("a.txt", "one\n \t\u3000\n", "line 2: 'text' is empty"),
        ("a.txt", b"one\ncaf\xe9\n", "line 2: not valid UTF-8"),
        ("a.txt", b"one\n\xed\xa0\x80\n", "line 2: not valid UTF-8"),
        ("a.jsonl", "", "holds no texts"),
        ("a.jsonl", '{"text": "a"}\n{"text": ""}\n', "line 2: 'text' is empty"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": "b"\n', "line 3: not valid JSON"),
        ("a.jsonl", '{"text": "a"}\n{"other": "b"}\n', "line 2: no 'text'"),
        ("a.jsonl", '["text"]\n', "line 1: not a JSON object"),
        ("a.jsonl", '{"text": null}\n', "line 1: 'text' is null"),
        ("a.jsonl", '{"text": 5}\n', "line 1: 'text' must be text, not a number"),
        ("a.jsonl", '{"text": "ab\\ud83d"}\n', "line 1: 'text' contains the lone surrogate U+D83D at character 3"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "line 1: not valid UTF-8"),
        ("a.jsonl", '{"text": "a", "text": "b"}\n', "line 1: not valid JSON (the key 'text' occurs twice)"),
        ("a.jsonl", '{"text": "a", "text" : "b"}\n', "line 1: not valid JSON (the key 'text' occurs twice)"),
        (
            "a.json",
            '[{"text": "a"}, {"text": "b", "text": "c"}]',
            "row 2: not valid JSON (the key 'text' occurs twice)",
        ),
        ("a.json", '[{"text": "a"}, {"text": ""}]', "row 2: 'text' is empty"),
        ("a.json", '[{"text": "a"}, 5]', "row 2: not a JSON object"),
        ("a.json", '[{"text": "a"}, {"text": "b"', "row 2: not valid JSON"),
        ("a.json", b'[{"text": "caf\xe9"}]', "row 1: not valid UTF-8"),
        ("a.csv", "text,n\na,1\n,2\n", "line 3: no 'text'"),
        ("a.csv", "text,n\na,1\nb\n", "line 3: 1 values, but the header has 2"),
        ("a.csv", 'text,n\n"a\nb",1\n"c"d,2\n', "line 4: not valid CSV"),
        ("a.csv", 'text,n\n"a,1\n', "line 2: not valid CSV"),
        ("a.csv", b"text\na\ncaf\xe9\n", "line 3: not valid UTF-8"),
        ("a.csv", "text,n,text\na,1,b\n", "the column 'text' occurs twice"),
        ("a.tsv", "body\tn\na\t1\n", "no column 'text'; it has body, n"),
        ("a.txt", "text".encode("utf-16"), "UTF-16, not UTF-8; convert it"),
        ("a.csv", "text\na\n".encode("utf-16"), "UTF-16, not UTF-8; convert it"),
        ("a.parquet", b"not parquet", "broken Parquet"),
        ("a.parquet", b"", "broken Parquet"),
        ("a.txt.gz", b"not gzip", "broken gzip after line 0"),
        ("a.csv.zst", b"not zstd", "broken zstd after line 0"),
        ("a.txt.gz", gzip.compress(random.Random(0).randbytes(99).hex().encode(), mtime=0)[:60], "broken gzip"),
        ("a", "a\n", "name it .txt, .jsonl, .ndjson, .json, .csv, .tsv"),
    ],
)
def test_bad_inputs(tmp_path, name, content, words):
    message = refused(read, write(tmp_path / name, content))
    assert words in message and str(tmp_path / name) in message


def test_bad_parquet_columns(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"body": ["a"], "n": [1]}), path)
    assert "no column 'text'; it has body, n" in refused(read, path)
    assert "row 1: 'n' must be text" in refused(read, path, "n")
    parquet.write_table(pa.table({"text": ["a", None]}), path)
    assert "row 2: 'text' is null" in refused(read, path)
    broken = pa.array([b"a", b"caf\xe9"], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"text": broken}), path)
    assert "row 2: not valid UTF-8" in refused(read, path)
    path.write_bytes(path.read_bytes()[:60])
    assert "broken Parquet" in refused(read, path)
    parquet.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), path)
    assert "the column 'text' occurs twice" in refused(read, path)


def test_bad_rows_are_left_out_on_demand_and_keep_their_numbers(tmp_path):
    path = write(tmp_path / "a.txt", b"\n\none\n\xff\ntwo\n \n")
    for shard_rows in (None, 1, 2, 4):
        assert read(path, shard_rows=shard_rows, skip_bad=True) == [(2, "one"), (4, "two")]
    broken = pa.array([b"a", b"caf\xe9", None, b"d"], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", shard_rows=2, skip_bad=True) == [(0, "a"), (3, "d")]
    assert "no texts (2 bad rows)" in refused(read, write(tmp_path / "b.txt", "\n\n"), skip_bad=True)


def test_an_input_that_shrinks_while_it_is_read(tmp_path):
    path = write(tmp_path / "a.txt", "one\ntwo\nthree\n")
    files = find_files(str(path))
    plan = make_plan(files, Columns(), shard_rows=2)
    write(path, "one\n")
    assert "changed while it was read" in refused(lambda: list(RowReader(files, Columns()).read(plan.slices[0])))


def test_the_whole_size_is_told(tmp_path):
    write(tmp_path / "a.txt", "a text\n" * 9000)
    write(tmp_path / "b.txt.gz", gzip.compress(b"a text\n" * 9000, mtime=0))
    parquet.write_table(pa.table({"text": ["a text"] * 9000}), tmp_path / "c.parquet")
    files, told = find_files(str(tmp_path)), []
    make_plan(files, Columns(), shard_rows=100, tick=told.append)
    assert sum(told) == sum(file.size for file in files) and min(told) >= 0 and len(told) > 3


def test_a_file_that_is_not_there(tmp_path):
    assert "no such file" in refused(find_files, str(tmp_path / "none.txt"))
    assert "cannot read 'ftpx://a/b.txt'" in refused(find_files, "ftpx://a/b.txt")
