"""One reader for all commands: the same records of every format, the same rules, wherever they are read."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import os
import unicodedata

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from lusifer import LusiferError
from lusifer.bulk.plan import make_plan
from lusifer.data.check import evaluation_texts
from lusifer.data.mining import Settings, mine
from lusifer.data.reading import read_blocks
from lusifer.data.records import open_records
from lusifer.data.rows import Columns, RowReader
from lusifer.data.sources import find_files, format_of
from lusifer.recipes.schema import DataRecipe
from lusifer.search.indexing import read_entries

CAFE = "cafe\u0301"
ROWS = [
    {"key": "a/1", "query": "Grüße, Welt", "positive": 'she said "yes"'},
    {"key": "日本", "query": "line one\nline two", "positive": "tab\there"},
    {"key": unicodedata.normalize("NFC", CAFE), "query": " spaces ", "positive": "p"},
    {"key": CAFE, "query": "हिन्दी", "positive": "q: r"},
]
KINDS = ["jsonl", "ndjson", "json", "csv", "tsv", "parquet"]
PACKED = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress}


def zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACKED[".zst"] = zstd
NAMES = [f"d.{kind}{end}" for kind in KINDS for end in PACKED if not (kind == "parquet" and end)]
NAMES += ["D.JSONL", "d.Csv.GZ", "d.PARQUET", "lines.json"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LUSIFER_CACHE", str(tmp_path_factory.mktemp("cache")))


def stored(path, rows):
    """Rows in the format that a file's name stands for."""
    kind, packing = format_of(path.name)
    if kind == ".parquet":
        big = any(value > 2**63 - 1 for row in rows for value in row.values() if isinstance(value, int))
        columns = {
            name: pa.array([row[name] for row in rows], pa.uint64() if big and name == "key" else None)
            for name in rows[0]
        }
        parquet.write_table(pa.table(columns), path, row_group_size=3)
        return str(path)
    if kind in (".csv", ".tsv"):
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), delimiter="," if kind == ".csv" else "\t")
        writer.writeheader()
        writer.writerows(rows)
        content = text.getvalue()
    elif kind == ".json" and path.name != "lines.json":
        content = json.dumps(rows, ensure_ascii=False, indent=1)
    elif kind == ".txt":
        content = "".join(row["query"] + "\n" for row in rows)
    else:
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    ends = {codec: end for end, codec in (("", None), (".gz", "gzip"), (".bz2", "bz2"), (".zst", "zstd"))}
    path.write_bytes(PACKED[ends[packing]](content.encode()))
    return str(path)


def encoded(source, **columns):
    columns = Columns(columns.get("text", "query"), columns.get("id", "key"))
    files = find_files(source)
    plan = make_plan(files, columns, shard_rows=2)
    return [row for part in plan.slices for row in RowReader(files, columns).read(part)]


def indexed(source, **columns):
    entries, _ = read_entries(source, text=columns.get("text", "query"), id=columns.get("id", "key"))
    return [(entry.id, entry.text) for entry in entries]


def trained(source, **columns):
    names = {"query": columns.get("text", "query"), "id": columns.get("id", "key")}
    records = open_records(DataRecipe(source=source, columns=names))
    return [(records.table["id"][row].as_py(), records[row]["query"]) for row in range(len(records))]


def mined(source, tmp_path):
    def embed(texts):
        return np.array([[float(len(text)), 1.0] for text in texts])

    out = tmp_path / "mined.jsonl"
    item = DataRecipe(source=source, columns={"id": "key"})
    mine(item, out, embed, teacher="t", teacher_hash="0", settings=Settings(negatives=1))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return [(row["id"], row["query"]) for row in rows]


COMMANDS = {"encode": encoded, "index": indexed, "train": trained}


@pytest.mark.parametrize("name", NAMES)
def test_every_format_in_every_command(tmp_path, name):
    source = stored(tmp_path / name, ROWS)
    expected = [(row["key"], row["query"]) for row in ROWS]
    for command, read in COMMANDS.items():
        assert read(source) == expected, command
    (tmp_path / "out").mkdir()
    assert mined(source, tmp_path / "out") == expected
    texts = evaluation_texts([source])
    assert sum(file != "the everyday set" for file in texts.values()) == len({row["query"] for row in ROWS}) * 2 + 3


@pytest.mark.parametrize("name", ["d.txt", "d.TXT.zst"])
def test_plain_text_in_every_command(tmp_path, name):
    rows = [{"query": "one"}, {"query": " two\u2028still two "}, {"query": "three"}]
    source = stored(tmp_path / name, rows)
    texts = [row["query"] for row in rows]
    files = find_files(source)
    plan = make_plan(files, Columns("body"), shard_rows=1)
    assert [row for part in plan.slices for row in RowReader(files, Columns("body")).read(part)] == [*enumerate(texts)]
    assert [entry.text for entry in read_entries(source)[0]] == texts
    records = open_records(DataRecipe(source=source, task="reconstruct"))
    assert [records[row]["text"] for row in range(3)] == texts


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv"])
@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([1, 2**64 - 1], None),
        ([-5, 3], None),
        ([2**63, 2**63 + 1], None),
        ([1, 2**64], "beyond 64 bits"),
        ([True, False], "must be text or a whole number, not true or false"),
        ([1.5, 2.0], "must be text or a whole number, not a decimal number"),
        (["x", "y", "x"], "is that of"),
        ([7, 8, 7], "is that of"),
        (["x", ""], "id"),
        (["x", None], "id"),
    ],
)
def test_ids_of_every_kind(tmp_path, kind, ids, words):
    if kind == "parquet" and 2**64 in ids:
        pytest.skip("Parquet has no such numbers")
    rows = [{"key": key, "query": f"q{n}", "positive": f"p{n}"} for n, key in enumerate(ids)]
    source = stored(tmp_path / f"d.{kind}", rows)
    for command, read in COMMANDS.items():
        lenient = kind == "csv" and any(not isinstance(key, str | None) for key in ids)  # All cells are text.
        repeats = words == "is that of" and command == "encode"  # Chunks of one page may share its id.
        if words is None or repeats or (lenient and words != "is that of"):
            got = [key for key, _ in read(source)]
            assert got == (ids if command == "encode" and kind != "csv" else [str(key) for key in ids])
            continue
        if command == "train" and ids[-1] in (None, "") and (ids[-1] is None or kind == "csv"):
            assert read(source)[-1][0] is None  # Ids are optional there.
            continue
        with pytest.raises(LusiferError) as caught:
            read(source)
        assert words in str(caught.value) and f"d.{kind}, " in str(caught.value) and "\n" not in str(caught.value)
        if words == "is that of":
            first, second = {"jsonl": (1, 3), "csv": (2, 4)}.get(kind, (1, 3))
            unit = "row" if kind in ("json", "parquet") else "line"
            assert f"{unit} {second}: " in str(caught.value) and f"{unit} {first} already" in str(caught.value)


@pytest.mark.parametrize("unsigned", [[1, 2], [1, 2**64 - 1]])
def test_unsigned_ids_have_a_type_that_holds_them(tmp_path, unsigned):
    table = pa.table({"key": pa.array(unsigned, pa.uint64()), "query": ["a", "b"], "positive": ["c", "d"]})
    parquet.write_table(table, tmp_path / "d.parquet")
    plan = make_plan(find_files(str(tmp_path / "d.parquet")), Columns("query", "key"), shard_rows=1)
    assert plan.id_type == ("uint64" if unsigned[1] > 2**63 else "int64")
    (tmp_path / "d.jsonl").write_text('{"key": -1, "query": "a"}\n{"key": 18446744073709551615, "query": "b"}\n')
    with pytest.raises(LusiferError, match=r"d\.jsonl, line 1 or before: ids are below 0 and above"):
        make_plan(find_files(str(tmp_path / "d.jsonl")), Columns("query", "key"), shard_rows=1)


TEXT_TYPES = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]


@pytest.mark.parametrize("kind", TEXT_TYPES, ids=str)
def test_every_text_type_of_parquet(tmp_path, kind):
    texts = [row["query"] for row in ROWS]
    column = pa.array(texts).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array(texts).cast(kind)
    table = pa.table({"query": column, "key": column, "positive": column, "negative": pa.nulls(4)})
    parquet.write_table(table, tmp_path / "d.parquet")
    for command, read in COMMANDS.items():
        assert [text for _, text in read(str(tmp_path / "d.parquet"))] == texts, command


LISTS = [pa.list_(pa.string()), pa.large_list(pa.large_string()), pa.list_(pa.string(), 2)]
LISTS += [pa.list_(pa.dictionary(pa.int32(), pa.string()))]


@pytest.mark.parametrize("kind", LISTS, ids=str)
def test_every_list_type_of_parquet(tmp_path, kind):
    lists = [["a", "b"], None, ["c", "d"]]
    table = pa.table({"query": ["q", "r", "s"], "positive": ["x", "y", "z"], "negative": pa.array(lists, kind)})
    parquet.write_table(table, tmp_path / "d.parquet")
    records = open_records(DataRecipe(source=str(tmp_path / "d.parquet")))
    assert [records[row]["negative"] for row in range(3)] == [["a", "b"], [], ["c", "d"]]


BROKEN = {
    "blank.jsonl": (b'{"query": "a"}\n\n{"query": \n', "line 3: not valid JSON"),
    "utf8.jsonl": (b'\n{"query": "caf\xe9"}\n', "line 2: not valid UTF-8"),
    "twice.jsonl": (b'{"query": "a", "query": "b"}\n', "the key 'query' occurs twice"),
    "array.jsonl": (b'[{"query": "a"}]\n', "or name the file .json"),
    "utf8.csv": (b"query,key\na,1\n\ncaf\xe9,2\n", "line 4: not valid UTF-8"),
    "short.csv": (b"query,key\na,1\nb\n", "line 3: 1 values, but the header has 2"),
    "twice.tsv": (b"query\tquery\na\tb\n", "the column 'query' occurs twice"),
    "wide.csv": ("query\na\n".encode("utf-16"), "UTF-16, not UTF-8"),
    "wide.jsonl": ('{"query": "a"}\n'.encode("utf-16-be"), None),
    "torn.json": (b'[{"query": "a"}, {"query"', "row 2: not valid JSON"),
    "torn.jsonl.gz": (gzip.compress(b'{"query": "a"}\n' * 99)[:30], "broken gzip after line"),
    "torn.parquet": (b"PAR1", "broken Parquet"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_told_alike_by_every_command(tmp_path, name):
    content, words = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    messages = set()
    source = str(tmp_path / name)
    commands = [lambda: encoded(source, id=None), lambda: indexed(source, id=None)]
    commands += [lambda: trained(source), lambda: evaluation_texts([source])]
    for read in commands:
        with pytest.raises(LusiferError) as caught:
            read()
        messages.add(str(caught.value))
    assert all((words or "") in message and name in message and "\n" not in message for message in messages), messages
    assert len(messages) == 1 or words is None


@pytest.mark.parametrize("name", ["d.jsonl", "d.csv", "d.json", "d.jsonl.zst", "d.csv.gz", "d.parquet"])
def test_reading_begins_behind_any_record(tmp_path, name, monkeypatch):
    monkeypatch.setattr("lusifer.data.reading.BLOCK_ROWS", 7)
    rows = [{"query": f"text {n}\nmore, ü" + "x" * (n % 5), "key": f"k{n}", "positive": "p"} for n in range(40)]
    files = find_files(stored(tmp_path / name, rows))
    blocks = list(read_blocks(files))
    assert [value for block in blocks for value in block.values("query")] == [row["query"] for row in rows]
    assert [block.begin for block in blocks[1:]] == [block.ends[-1] for block in blocks[:-1]]
    ends = [end for block in blocks for end in block.ends]
    for row, end in enumerate(ends[:-1], start=1):
        later = [value for block in read_blocks(files, start=(0, end)) for value in block.values("key")]
        assert later == [f"k{n}" for n in range(row, 40)]


def test_a_long_array_is_read_piece_by_piece(tmp_path):
    rows = [{"query": "ü" * size, "n": [1, {"a": 2}]} for size in (3, 70_000, 5, 300_000, 0, 65_536)]
    (tmp_path / "d.json").write_text("\ufeff \n" + json.dumps(rows, ensure_ascii=False))
    assert [record for block in read_blocks(find_files(str(tmp_path / "d.json"))) for record in block.data] == rows


def test_an_unclosed_quote_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("lusifer.data.text_files.MAX_RECORD", 200_000)
    (tmp_path / "d.csv").write_text('query\n"a\n' + "text\n" * 100_000)
    previous = csv.field_size_limit(131_072)
    try:
        with pytest.raises(LusiferError, match=r"d\.csv, line 2: not valid CSV"):
            encoded(str(tmp_path / "d.csv"), id=None)
    finally:
        csv.field_size_limit(previous)


# Places


def test_folders_are_read_alike(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "_private").mkdir()
    stored(folder / "b.csv", ROWS[:1])
    stored(folder / "deep" / "er" / "a.jsonl.gz", ROWS[1:2])
    stored(folder / "z.json", ROWS[2:])
    stored(folder / "_private" / "c.jsonl", ROWS)
    stored(folder / ".d.jsonl", ROWS)
    (folder / "config.json").write_text(json.dumps({"a": 1, "b": [2]}, indent=1))
    (folder / "notes.md").write_text("none")
    for source in (str(folder), f"{folder}/", f"file://{folder}", f"{folder}/**/[!c]*.*"):
        for command, read in COMMANDS.items():
            assert [text for _, text in read(source)] == [row["query"] for row in ROWS], (command, source)


def test_a_path_that_exists_is_no_glob(tmp_path, monkeypatch):
    folder = tmp_path / "odd[1] *"
    folder.mkdir()
    stored(folder / "d[2].jsonl", ROWS)
    stored(tmp_path / "odd1 x.jsonl", ROWS[:1])
    monkeypatch.setenv("HOME", str(tmp_path))
    sources = [folder / "d[2].jsonl", folder, folder / "*.jsonl", folder / "d?2?.jsonl"]
    for source in [*map(str, sources), "~/odd[1] */d[2].jsonl", "~/odd[1] *"]:
        for command, read in COMMANDS.items():
            assert len(read(source)) == 4, (command, source)


def test_the_output_inside_the_input_is_no_input(tmp_path):
    (tmp_path / "c" / "vectors").mkdir(parents=True)
    stored(tmp_path / "c" / "a.jsonl", ROWS)
    stored(tmp_path / "c" / "vectors" / "part-00000.parquet", ROWS)
    stored(tmp_path / "c" / "vectors.parquet", ROWS)
    os.symlink(tmp_path / "c", tmp_path / "link")
    corpus = str(tmp_path / "c")

    def names(source, output):
        return sorted(os.path.basename(file.url) for file in find_files(source, output=output))

    assert names(corpus, None) == ["a.jsonl", "part-00000.parquet", "vectors.parquet"]
    for output in (f"{corpus}/vectors", f"{corpus}/vectors/", str(tmp_path / "link" / "vectors")):
        assert names(corpus, output) == names(f"{corpus}/**/*.*", output) == ["a.jsonl", "vectors.parquet"]
    assert names(corpus, f"{corpus}/vectors.parquet") == ["a.jsonl", "part-00000.parquet"]
    assert names(corpus, "s3://bucket/vectors") == names(corpus, None)
    with pytest.raises(LusiferError, match="no data in"):
        find_files(f"{corpus}/vectors", output=f"{corpus}/vectors")


def test_numbers_in_csv_are_metadata_to_filter_by(tmp_path):
    rows = [
        {"text": "a", "year": 1990, "score": 0.5, "seen": True, "code": "007"},
        {"text": "b", "year": None, "score": 2, "seen": False, "code": "11"},
    ]
    found, types = read_entries(stored(tmp_path / "d.csv", rows), metadata=["year", "score", "seen", "code"])
    assert types == {"year": "int", "score": "float", "seen": "bool", "code": "string"}
    assert found[0].metadata == {"year": 1990, "score": 0.5, "seen": True, "code": "007"}
    assert found[1].metadata == {"year": None, "score": 2.0, "seen": False, "code": "11"}
