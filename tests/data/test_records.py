"""Training data: formats, and one clear line for everything that cannot be trained on."""

from __future__ import annotations

import gzip
import json
import pickle
import threading

import pyarrow as pa
import pytest
from pyarrow import parquet

from lusifer import LusiferError
from lusifer.data.records import Records, StreamedRecords, open_records, open_set, read_texts
from lusifer.recipes.schema import DataRecipe

PAIRS = [
    {"query": "q one", "positive": "p one", "negative": ["n one", "n two"]},
    {"query": "q two", "positive": "p two", "negative": ["n three", "n four"]},
    {"query": "q three", "positive": "p three", "negative": ["n five", "n six"]},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LUSIFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets-cache")


def jsonl(path, rows):
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return str(path)


def stored(path, rows):
    if path.suffix != ".parquet":
        return jsonl(path, rows)
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def texts(*words):
    return [{"text": word} for word in words]


def opened(source, **fields):
    return open_records(DataRecipe(source=str(source), **fields))


def listed(source, **fields):
    records = opened(source, **fields)
    return [records[row] for row in range(len(records))]


def refused(source, **fields):
    with pytest.raises(LusiferError) as caught:
        opened(source, **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def refused_texts(source):
    return refused(source, task="reconstruct")


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.jsonl.gz", "d.v2.jsonl", "d.parquet"])
def test_the_same_records_from_every_format(tmp_path, name):
    rows = texts("Grüße, Welt", "你好", " spaces kept ")
    assert listed(stored(tmp_path / name, rows), task="reconstruct") == rows
    pairs = [{"query": "q", "positive": ["a", "b"], "negative": ["c"]}, {"query": "r", "positive": ["d"]}]
    expected = [
        {"query": "q", "positive": ["a", "b"], "negative": ["c"]},
        {"query": "r", "positive": ["d"], "negative": []},
    ]
    assert listed(stored(tmp_path / f"pairs-{name}", pairs)) == expected


def test_one_text_and_a_list_of_one_are_the_same_also_within_a_file(tmp_path):
    rows = [
        {"query": "a", "positive": "x", "negative": "y"},
        {"query": "b", "positive": ["x", "z"], "negative": None},
        {"query": "c", "positive": ["x"], "negative": []},
        {"query": "d", "positive": "x", "negative": ["y", "w"]},
    ]
    found = listed(jsonl(tmp_path / "d.jsonl", rows))
    assert [row["positive"] for row in found] == [["x"], ["x", "z"], ["x"], ["x"]]
    assert [row["negative"] for row in found] == [["y"], [], [], ["y", "w"]]


def test_negatives_that_begin_late_in_the_file(tmp_path):
    # Readers that guess types from the first block take an always empty list for a list of nulls.
    rows = [{"query": f"q{i}", "positive": ["p"], "negative": ["n"] if i > 9000 else []} for i in range(9100)]
    records = opened(jsonl(tmp_path / "d.jsonl", rows))
    assert records[9000]["negative"] == [] and records[9001]["negative"] == ["n"]


def test_columns_are_mapped(tmp_path):
    rows = [{"question": "q", "passage": "p", "query": 7}, {"question": "r", "passage": "s", "query": 8}]
    columns = {"query": "question", "positive": "passage"}
    for name in ("d.jsonl", "d.parquet"):
        found = listed(stored(tmp_path / name, rows), columns=columns)
        assert [(row["query"], row["positive"]) for row in found] == [("q", ["p"]), ("r", ["s"])]


def test_reconstruction_takes_queries_and_positives_of_pairs(tmp_path):
    rows = [{"query": "q", "positive": ["a", "b"], "id": 1}, {"query": "r", "positive": "c", "id": 2}]
    records = opened(jsonl(tmp_path / "d.jsonl", rows), task="reconstruct")
    assert [records[row]["text"] for row in range(len(records))] == ["q", "a", "b", "r", "c"]
    assert records.where(2).endswith("d.jsonl, line 1") and records.where(4).endswith("d.jsonl, line 2")


def test_several_files_by_glob_in_the_order_of_their_names(tmp_path):
    for name in ("b", "a"):
        jsonl(tmp_path / f"{name}.jsonl", texts(f"{name}1", f"{name}2"))
    records = opened(tmp_path / "*.jsonl", task="reconstruct")
    assert [records[row]["text"] for row in range(4)] == ["a1", "a2", "b1", "b2"]
    assert records.where(3).endswith("b.jsonl, line 2")
    assert "nothing matches" in refused_texts(tmp_path / "*.parquet")


def test_a_folder_in_the_layout_of_the_hub(tmp_path):
    (tmp_path / "set").mkdir()
    stored(tmp_path / "set" / "train.parquet", PAIRS)
    assert [row["query"] for row in listed(tmp_path / "set")] == ["q one", "q two", "q three"]
    assert "split" in refused(tmp_path / "set", split="nothing").lower()


def test_windows_files_and_blank_lines(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\r\n{"text": ""}')
    assert "d.jsonl, line 4: 'text' is empty" in refused_texts(tmp_path / "d.jsonl")


@pytest.mark.parametrize("name", ["d.jsonl", "d.parquet"])
@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([*texts("a", "b"), {"text": None}], " 3: 'text' is null; remove"),
        (texts("a", ""), " 2: 'text' is empty; remove"),
        (texts("a", "b", " \t\n\u3000"), " 3: 'text' is empty; remove"),
        (texts("a", "b" * 10_000_000), " 2: 'text' has 10,000,000 characters, over 1,000,000; split"),
        (texts("only"), " 1: the only record of its dataset"),
        ([{"body": "a"}], "no column 'query'; it has body (map it: columns)"),
        ([{"text": "a", "id": "x"}, {"text": "b", "id": "y"}, {"text": "c", "id": "x"}], " 3: the id 'x' is that of"),
        ([{"text": "a", "id": 7}, {"text": "b", "id": 7}], " 2: the id '7' is that of"),
    ],
)
def test_bad_texts(tmp_path, name, rows, words):
    message = refused_texts(stored(tmp_path / name, rows))
    assert words in message and name in message
    if words[0] == " ":
        assert f"{'line' if name == 'd.jsonl' else 'row'}{words}" in message


@pytest.mark.parametrize("name", ["d.jsonl", "d.parquet"])
@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"query": "q"}, "no 'positive'"),
        ({"positive": "p"}, "'query'"),
        ({"query": "", "positive": "p"}, " 3: 'query' is empty"),
        ({"query": None, "positive": "p"}, " 3: 'query' is null"),
        ({"query": "q", "positive": ""}, " 3: 'positive' is empty"),
        ({"query": "q", "positive": "p", "negative": ["n", ""]}, " 3: 'negative' is empty"),
        ({"query": "q", "positive": "p", "negative": ["n", None]}, " 3: 'negative' is null"),
    ],
)
def test_bad_pairs(tmp_path, name, row, words):
    # The texts of other rows are no mistake: 'q one' may be a negative here.
    good = [
        {"query": "q one", "positive": "p one", "negative": ["q"]},
        {"query": "q two", "positive": "p", "negative": []},
    ]
    rows = [*good, {key: row.get(key) for key in ("query", "positive", "negative")}]
    if name == "d.jsonl":
        rows[2] = row
    message = refused(stored(tmp_path / name, rows))
    assert name in message
    assert (
        words in message or (name == "d.parquet" and "3: 'positive' is" in message) or " 3: 'query' is null" in message
    )


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"query": 3, "positive": "p"}, "'query' must be text, not a number"),
        ({"query": ["q"], "positive": "p"}, "'query' must be text, not a list"),
        ({"query": "q", "positive": 7}, "'positive' must be text or a list, not a number"),
        ({"query": "q", "positive": {"a": "p"}}, "'positive' must be text or a list, not an object"),
        ({"query": "q", "positive": ["p", 1.5]}, "'positive' must be text, not a decimal number"),
        ({"query": "q", "positive": []}, "'positive' is empty"),
        ({"query": "q", "positive": "p", "negative": True}, "'negative' must be text or a list, not true or false"),
    ],
)
def test_wrong_types_in_jsonl_name_the_line(tmp_path, row, words):
    assert f"d.jsonl, line 4: {words}" in refused(jsonl(tmp_path / "d.jsonl", [*PAIRS, row]))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"query": 3, "positive": "p"}, "'query' must be text, not int64"),
        ({"query": ["q"], "positive": "p"}, "'query' must be text, not list"),
        ({"query": "q", "positive": [7]}, "'positive' must be text or a list, not list"),
        ({"query": "q", "positive": []}, "row 1: 'positive' is empty"),
        ({"query": "q", "positive": "p", "negative": True}, "'negative' must be text or a list, not bool"),
    ],
)
def test_wrong_types_in_parquet(tmp_path, row, words):
    assert words in refused(stored(tmp_path / "d.parquet", [row, row]))


def test_a_cluster_must_be_everywhere_or_nowhere(tmp_path):
    rows = [{"query": "q", "positive": "p", "cluster": 1}, {"query": "r", "positive": "s"}]
    assert "line 2: 'cluster' must be text or a whole number, not null" in refused(jsonl(tmp_path / "d.jsonl", rows))
    rows[1]["cluster"] = 1.5
    assert "line 2: 'cluster' must be text or a whole number, not a dec" in refused(jsonl(tmp_path / "d.jsonl", rows))
    late = [{"query": f"q{i}", "positive": "p", **({"cluster": "a"} if i >= 4096 else {})} for i in range(4100)]
    assert "line 1: no 'cluster', but other records have one" in refused(jsonl(tmp_path / "e.jsonl", late))


def test_names_that_are_no_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def lookup(*args, **kwargs):
        raise AssertionError("a file name must not be looked up on the hub")

    monkeypatch.setattr("datasets.load_dataset", lookup)
    for name in (
        "none.jsonl",
        "none.jsonl.gz",
        "none.parquet",
        "none.csv.gz",
        "none.feather",
        "./none",
        "/none",
        "a/b/c",
    ):
        assert "no such file" in refused(name)
    (tmp_path / "there.xlsx").write_text("text\na\n")
    (tmp_path / "noextension").write_text("text\na\n")
    for name in ("there.xlsx", "noextension"):
        assert "unknown format" in refused(name) and "name it .txt, .jsonl, .ndjson, .json" in refused(name)


def test_a_name_that_is_nowhere_is_one_line(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub\nand a second line")

    monkeypatch.setattr("datasets.load_dataset", offline)
    assert "the hub cannot be reached" in refused("nobody/nothing-v1.5")


def test_broken_files_name_the_line(tmp_path):
    def written(name, content):
        (tmp_path / name).write_bytes(content)
        return refused_texts(tmp_path / name)

    good = b'{"text": "a"}\n\n'
    assert "d.jsonl, line 3: not valid JSON" in written("d.jsonl", good + b'{"text": \n')
    assert "line 3: not a JSON object" in written("d.jsonl", good + b"[1]\n")
    assert "one JSON object per line" in written("d.jsonl", b'[\n{"text": "a"}]')
    assert "d.jsonl, line 3: not valid UTF-8" in written("d.jsonl", good + b'{"text": "caf\xe9"}\n')
    assert "line 3: 'text' contains the lone surrogate U+D800" in written("d.jsonl", good + b'{"text": "\\ud800b"}\n')
    assert "line 3: not valid JSON" in written("d.jsonl", good + b"[" * 100_000)
    assert "d.parquet: broken Parquet after row 0" in written("d.parquet", b"PAR1 but no more")
    for name in ("d.jsonl", "e.jsonl", "d.jsonl.gz"):
        assert "empty" in written(name, b"\n" if name == "e.jsonl" else b"")


def test_a_line_without_end_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("lusifer.data.text_files.MAX_RECORD", 1000)
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "a"}\n' + b"x" * 2000)
    assert "d.jsonl, line 2: longer than" in refused_texts(tmp_path / "d.jsonl")


def test_invalid_utf8_in_parquet(tmp_path):
    column = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0\5\0\0\0"), pa.py_buffer(b"abx\xe9y")]
    )
    parquet.write_table(pa.table({"text": column}), tmp_path / "d.parquet")
    assert "d.parquet, row 2: 'text' is not valid UTF-8" in refused_texts(tmp_path / "d.parquet")


@pytest.mark.parametrize("keep", [0.5, 0.9])
def test_a_broken_gzip(tmp_path, keep):
    rows = texts(*(f"text {number * 7919 % 1000}" for number in range(5000)))
    source = jsonl(tmp_path / "d.jsonl.gz", rows)
    whole = (tmp_path / "d.jsonl.gz").read_bytes()
    (tmp_path / "d.jsonl.gz").write_bytes(whole[: int(len(whole) * keep)])
    assert "d.jsonl.gz: broken gzip after line" in refused_texts(source)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    (tmp_path / "d.jsonl.gz").write_bytes(damaged)
    assert "d.jsonl.gz" in refused_texts(source)
    (tmp_path / "d.jsonl.gz").write_bytes(b"no gzip at all")
    assert "broken gzip after line 0" in refused_texts(source)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_without_hard_negatives_are_left_out_and_counted(tmp_path, caplog, streaming):
    rows = [{"query": "bare", "positive": "p", "negative": []}, PAIRS[0], PAIRS[1], {**PAIRS[2], "negative": None}]
    source = jsonl(tmp_path / "d.jsonl", rows)
    found = open_set(DataRecipe(source=source, hard_negatives=2, streaming=streaming, cap=2))
    assert [found[row]["query"] for row in range(len(found))] == ["q one", "q two"]
    if not streaming:
        assert found.left_out == 2 and found.where(0).endswith("line 2")
        assert "2 rows have no 'negative' and are left out (hard_negatives is 2)" in caplog.text
        assert len(opened(source)) == 4


def test_hard_negatives_that_are_nowhere(tmp_path):
    source = jsonl(tmp_path / "d.jsonl", [{"query": q, "positive": "p"} for q in "abc"])
    message = refused(source, hard_negatives=2)
    assert "0 rows have a 'negative', but hard_negatives is 2" in message and "lusifer data mine" in message


def test_a_cap_keeps_a_seeded_choice_in_order(tmp_path):
    source = jsonl(tmp_path / "d.jsonl", texts(*(f"t{i}" for i in range(50))))
    item = DataRecipe(source=source, task="reconstruct", cap=10)

    def kept(seed):
        records = open_records(item, seed=seed)
        return [records[row]["text"] for row in range(len(records))]

    assert kept(0) == kept(0) != kept(1)
    assert len(set(kept(0))) == 10
    assert [int(text[1:]) for text in kept(0)] == sorted(int(text[1:]) for text in kept(0))
    records = open_records(item, seed=0)
    assert records.where(3).endswith(f"line {int(records[3]['text'][1:]) + 1}")


def test_a_changed_file_is_read_again_and_an_unchanged_one_is_not(tmp_path, monkeypatch):
    source = jsonl(tmp_path / "d.jsonl", texts("a", "b"))
    assert len(opened(source, task="reconstruct")) == 2
    with monkeypatch.context() as patch:
        patch.setattr("lusifer.data.records.read_blocks", lambda item: pytest.fail("read twice"))
        assert len(opened(source, task="reconstruct")) == 2
    jsonl(tmp_path / "d.jsonl", texts("a", "b", "c"))
    assert len(opened(source, task="reconstruct")) == 3
    assert "no column 'query'" in refused(source)


def test_a_refused_set_leaves_nothing_in_the_cache(tmp_path):
    source = jsonl(tmp_path / "d.jsonl", texts("a", "b", ""))
    assert "line 3" in refused_texts(source)
    assert list((tmp_path / "cache" / "data").iterdir()) == []
    assert "line 3" in refused_texts(source)


def test_records_travel_to_workers_by_path(tmp_path):
    rows = texts(*(f"a rather long text number {i}" for i in range(5000)))
    records = opened(jsonl(tmp_path / "d.jsonl", rows), task="reconstruct")
    packed = pickle.dumps(records)
    assert len(packed) < 2000
    assert pickle.loads(packed)[4999] == rows[4999]


def test_two_ranks_may_open_the_same_set_at_once(tmp_path):
    source = jsonl(tmp_path / "d.jsonl", texts(*(f"t{i}" for i in range(3000))))
    found = []
    threads = [threading.Thread(target=lambda: found.append(len(opened(source, task="reconstruct")))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [3000] * 4


def test_clusters_are_lists_of_rows(tmp_path):
    rows = [{"query": f"q{i}", "positive": f"p{i}", "cluster": "ab"[i % 2]} for i in range(5)]
    found = opened(jsonl(tmp_path / "d.jsonl", rows)).clusters()
    assert {name: rows.tolist() for name, rows in found.items()} == {"a": [0, 2, 4], "b": [1, 3]}
    assert opened(jsonl(tmp_path / "e.jsonl", PAIRS)).clusters() is None


@pytest.mark.parametrize("name", ["d.jsonl.gz", "d.parquet"])
def test_streaming_reads_the_same_and_keeps_one_block(tmp_path, name):
    rows = [{"query": f"q{i}", "positive": [f"p{i}"], "negative": [f"n{i}"]} for i in range(10_000)]
    source = stored(tmp_path / name, rows)
    streamed = open_set(DataRecipe(source=source, cap=9_000, streaming=True))
    assert isinstance(streamed, StreamedRecords) and len(streamed) == 9_000
    assert [streamed[row] for row in range(9_000)] == rows[:9_000]
    assert streamed._batch.num_rows <= 4096
    assert streamed[3] == rows[3]
    again = pickle.loads(pickle.dumps(streamed))
    assert again[8_999] == rows[8_999]
    assert not (tmp_path / "cache").exists()
    assert isinstance(open_set(DataRecipe(source=source)), Records)


def test_streaming_mistakes(tmp_path):
    source = jsonl(tmp_path / "d.jsonl", PAIRS)
    with pytest.raises(LusiferError, match="holds only 3 rows, fewer than its cap of 5; lower the cap"):
        StreamedRecords(DataRecipe(source=source, cap=5, streaming=True))[3]
    with pytest.raises(LusiferError, match=r"line 1: 'text' is empty"):
        StreamedRecords(
            DataRecipe(source=jsonl(tmp_path / "e.jsonl", texts("")), cap=5, streaming=True, task="reconstruct")
        )
    rows = [{**row, "cluster": 1} for row in PAIRS]
    with pytest.raises(LusiferError, match="clusters, which need streaming: false"):
        StreamedRecords(DataRecipe(source=jsonl(tmp_path / "f.jsonl", rows), cap=2, streaming=True))


def test_the_first_texts_for_stage_0(tmp_path):
    source = jsonl(tmp_path / "d.jsonl", PAIRS)
    assert read_texts(DataRecipe(source=source, hard_negatives=2, weight=3), 3) == ["q one", "p one", "q two"]
    assert len(read_texts(DataRecipe(source=source), 100)) == 6
