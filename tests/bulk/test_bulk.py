"""Bulk encoding: shards that hold the vectors of the model, the same bytes whoever made them and however often."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from sentence_transformers.util import quantize_embeddings

import lusifer
from lusifer.bulk.job import Settings
from lusifer.bulk.run import encode
from lusifer.bulk.shard import ShardEncoder
from lusifer.data.rows import RowReader
from lusifer.model.sentence_transformer import save_atomically
from lusifer.model.text_encoder import TextEncoder
from support.texts import content, refused, some_texts

LONG = "the cat sat on the mat and looked at the dog " * 30
# In float32, whose results do not depend on what this machine measures.
PLAIN = Settings(precision="float32", shard_rows=100)


TEXTS = some_texts(1050)


@pytest.fixture
def source(tmp_path):
    (tmp_path / "in.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    return str(tmp_path / "in.txt")


def vectors(table):
    column = table["embedding"].combine_chunks()
    return column.values.to_numpy(zero_copy_only=False).reshape(len(table), -1)


def test_shards_hold_the_vectors_of_encode_each_row_once(model, source, tmp_path):
    facts = encode(model, source, str(tmp_path / "out"), PLAIN)
    assert facts == {
        "texts": 1050, "dimension": 48, "cut": 0, "skipped": 0, "shards": 11, "output": str(tmp_path / "out"),
    }  # fmt: skip
    names = sorted(os.listdir(tmp_path / "out"))
    assert names == ["_manifest.json", *(f"part-{number:05}.parquet" for number in range(11))]
    sizes = [len(parquet.read_table(tmp_path / "out" / name)) for name in names[1:]]
    assert sizes == [100] * 10 + [50]
    table = parquet.read_table(tmp_path / "out")  # The manifest does not disturb readers of the folder.
    assert table.schema.names == ["id", "text", "embedding"]
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 48)
    assert table["id"].to_pylist() == list(range(1050)) and table["text"].to_pylist() == TEXTS
    # Unit vectors in float32, summed in other batches.
    np.testing.assert_allclose(vectors(table), lusifer.load(model, device="cpu").encode(TEXTS), atol=1e-5)
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert manifest["complete"] and manifest["prepared"]["precision"] == "float32"
    assert [shard["rows"] for shard in manifest["shards"]] == sizes
    assert manifest["columns"]["embedding"].endswith("[48]")


def test_one_file(model, source, tmp_path):
    expected = lusifer.load(model, device="cpu").encode(TEXTS)
    facts = encode(model, source, str(tmp_path / "v.npy"), PLAIN)
    assert facts == {"texts": 1050, "dimension": 48, "cut": 0, "skipped": 0, "output": str(tmp_path / "v.npy")}
    found = np.load(tmp_path / "v.npy")
    assert found.dtype == np.float32 and found.shape == (1050, 48)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    encode(model, source, str(tmp_path / "v.parquet"), replace(PLAIN, text=False))
    table = parquet.read_table(tmp_path / "v.parquet")
    assert table.schema.names == ["id", "embedding"] and len(table) == 1050
    assert np.array_equal(vectors(table), found)
    encode(model, source, str(tmp_path / "b.npy"), replace(PLAIN, output_dtype="ubinary"))
    assert np.array_equal(np.load(tmp_path / "b.npy"), np.packbits(found > 0, axis=1))
    assert sorted(os.listdir(tmp_path)) == ["b.npy", "in.txt", "model", "v.npy", "v.parquet"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        encode("model", "in.txt", "here.npy", PLAIN)
    assert np.array_equal(np.load(tmp_path / "here.npy"), found)


def test_ids_and_instruction(model, tmp_path):
    rows = [{"body": text, "key": f"k{n}"} for n, text in enumerate(TEXTS[:30])]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = replace(PLAIN, column="body", id_column="key", instruction="Find it", shard_rows=7)
    encode(model, str(tmp_path / "in.jsonl"), str(tmp_path / "out"), settings)
    table = parquet.read_table(tmp_path / "out")
    assert table["id"].to_pylist() == [f"k{n}" for n in range(30)] and table["text"].to_pylist() == TEXTS[:30]
    expected = lusifer.load(model, device="cpu").encode([f"Instruct: Find it\nQuery: {text}" for text in TEXTS[:30]])
    np.testing.assert_allclose(vectors(table), expected, atol=1e-5)


@pytest.mark.parametrize("dim", [None, 16])
@pytest.mark.parametrize("kind", ["float16", "int8", "ubinary"])
def test_smaller_embeddings_are_those_of_sentence_transformers(model, source, tmp_path, kind, dim):
    encode(model, source, str(tmp_path / "out"), replace(PLAIN, output_dtype=kind, dim=dim))
    encode(model, source, str(tmp_path / "full"), PLAIN)
    full = vectors(parquet.read_table(tmp_path / "full"))
    if dim is not None:
        full = full[:, :dim] / np.linalg.norm(full[:, :dim], axis=1, keepdims=True)
    found = vectors(parquet.read_table(tmp_path / "out"))
    prepared = json.loads((tmp_path / "out" / "_manifest.json").read_text())["prepared"]
    assert prepared["dimension"] == (dim or 48)
    if kind == "float16":
        assert found.dtype == np.float16
        np.testing.assert_allclose(found, full, atol=5e-4)  # Half of float16's step below 1.
        return
    ranges = None if kind == "ubinary" else np.array(prepared["ranges"], dtype=np.float32)
    assert found.dtype == (np.uint8 if kind == "ubinary" else np.int8)
    assert np.array_equal(found, quantize_embeddings(full, kind, ranges=ranges))
    if kind == "int8":
        low, high = ranges
        restored = low + (found.astype(np.float32) + 128.5) * (high - low) / 255
        # Half a level, for texts within the ranges: all of them here, since the first 4,096 are calibrated on.
        assert (np.abs(restored - full) <= 0.51 * (high - low) / 255).all()
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.parquet"))
    assert size < 0.6 * sum(path.stat().st_size for path in (tmp_path / "full").glob("*.parquet"))


def test_texts_that_are_cut_are_counted(model, tmp_path):
    (tmp_path / "in.txt").write_text("\n".join([LONG, "cat", LONG, "milk", LONG]))
    settings = replace(PLAIN, shard_rows=2)
    assert encode(model, str(tmp_path / "in.txt"), str(tmp_path / "out"), settings)["cut"] == 3
    (tmp_path / "out" / "part-00001.parquet").unlink()
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    (tmp_path / "out" / "_manifest.json").write_text(json.dumps({**manifest, "complete": False}))
    # Two of the three are known from shards made before.
    assert encode(model, str(tmp_path / "in.txt"), str(tmp_path / "out"), settings)["cut"] == 3


def test_bad_rows(model, tmp_path):
    (tmp_path / "in.txt").write_bytes(b"one\n\nthree\n\xff\nfive\n")
    where = (model, str(tmp_path / "in.txt"), str(tmp_path / "out"))
    assert "in.txt, line 2: 'text' is empty" in refused(*where, PLAIN)
    settings = replace(PLAIN, skip_bad=True, shard_rows=2)
    facts = encode(*where, settings)
    assert (facts["texts"], facts["skipped"], facts["shards"]) == (3, 2, 3)
    table = parquet.read_table(tmp_path / "out")
    assert table["id"].to_pylist() == [0, 2, 4] and table["text"].to_pylist() == ["one", "three", "five"]
    encode(model, where[1], str(tmp_path / "v.npy"), settings)
    assert np.load(tmp_path / "v.npy").shape == (3, 48)


def test_a_finished_output_is_left_alone(model, source, tmp_path, monkeypatch):
    first = encode(model, source, str(tmp_path / "out"), PLAIN)
    before = content(tmp_path / "out")

    def never(*args, **kwargs):
        raise AssertionError("worked again")

    monkeypatch.setattr(ShardEncoder, "__init__", never)
    monkeypatch.setattr("lusifer.bulk.run.make_plan", never)
    assert encode(model, source, str(tmp_path / "out"), PLAIN) == first
    assert encode(model, source, f"{tmp_path / 'out'}/", PLAIN, processes=2) == first
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize("complete", [True, False])
def test_another_run_is_refused(model, source, tmp_path, tiny_st, complete):
    out = str(tmp_path / "out")
    encode(model, source, out, PLAIN, threads=1)
    if not complete:
        path = tmp_path / "out" / "_manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "complete": False}))
        (tmp_path / "out" / "part-00003.parquet").unlink()
    before = content(tmp_path / "out")
    assert "shard_rows was 100 and is 99" in refused(model, source, out, replace(PLAIN, shard_rows=99))
    assert "output_dtype was 'float32'" in refused(model, source, out, replace(PLAIN, output_dtype="int8"))
    assert "instruction was None" in refused(model, source, out, replace(PLAIN, instruction="Find"))
    assert "threads was 1 and is 3" in refused(model, source, out, PLAIN, threads=3)
    os.utime(source, (1, 1))
    assert "in.txt has changed" in refused(model, source, out, PLAIN)
    (tmp_path / "other.txt").write_text("one\n")
    assert "is gone" in refused(model, str(tmp_path / "other.txt"), out, PLAIN)
    with torch.no_grad():
        tiny_st[0].auto_model.connector.added_tokens.add_(1)
    save_atomically(tiny_st, tmp_path / "model")
    assert "with other content" in refused(model, source, out, PLAIN)
    assert content(tmp_path / "out") == before


def test_shards_of_unknown_origin_are_refused(model, source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "part-00000.parquet").write_bytes(b"x")
    assert "without a _manifest.json" in refused(model, source, str(tmp_path / "out"), PLAIN)
    (tmp_path / "out" / "_manifest.json").write_text("{")
    assert "_manifest.json is damaged" in refused(model, source, str(tmp_path / "out"), PLAIN)


def test_what_cannot_be_is_refused_before_the_work(model, source, tmp_path, monkeypatch):
    assert "name it .parquet or .npy" in refused(model, source, str(tmp_path / "v.csv"))
    assert "no such folder" in refused(model, source, str(tmp_path / "none" / "v.npy"))
    assert "no output dtype 'int4'" in refused(model, source, str(tmp_path / "out"), Settings(output_dtype="int4"))
    assert "no precision 'int8'" in refused(model, source, str(tmp_path / "out"), Settings(precision="int8"))
    assert "no engine 'spark'" in refused(model, source, str(tmp_path / "out"), engine="spark")
    assert "need a folder" in refused(model, source, str(tmp_path / "v.npy"), processes=2)
    assert "truncate embeddings to 100" in refused(model, source, str(tmp_path / "cut"), replace(PLAIN, dim=100))
    assert "leave --processes out" in refused(model, source, str(tmp_path / "o"), device="cpu,cpu", processes=2)
    assert "no checkpoint at" in refused(str(tmp_path / "none"), source, str(tmp_path / "v.npy"))


def test_a_model_that_overflows_says_so(model, source, tmp_path, monkeypatch):
    def broken(self, texts, tick=None, keeper=None):
        for _ in texts:
            yield np.full((1, 48), np.nan, dtype=np.float32)

    monkeypatch.setattr("lusifer.model.text_encoder.TextEncoder.stream", broken)
    assert "not finite" in refused(model, source, str(tmp_path / "out"), PLAIN)
    assert os.listdir(tmp_path / "out") == ["_manifest.json"]


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("name", ["v.npy", "v.parquet", "out"])
@pytest.mark.parametrize("broken", ["os.replace", "os.fsync"])
def test_a_full_disk_leaves_nothing_half_and_spares_the_old_file(model, source, tmp_path, monkeypatch, name, broken):
    if name != "out":
        (tmp_path / name).write_text("old")
    before = content(tmp_path)
    monkeypatch.setattr(broken, full_disk)
    message = refused(model, source, str(tmp_path / name), PLAIN)
    assert "No space left on device" in message and name in message
    monkeypatch.undo()
    after = content(tmp_path)
    assert after == before


def test_no_more_than_two_windows_of_rows_are_in_memory(model, source, tmp_path, monkeypatch):
    """Of one shard with all rows: neither its texts nor its vectors are collected."""
    state = {"read": 0, "written": 0, "most": 0}
    real_read, real_write = RowReader.read, parquet.ParquetWriter.write_table

    def read(self, part):
        for row in real_read(self, part):
            state["read"] += 1
            state["most"] = max(state["most"], state["read"] - state["written"])
            yield row

    def write(self, table, *args):
        state["written"] += len(table)
        return real_write(self, table, *args)

    monkeypatch.setattr(RowReader, "read", read)
    monkeypatch.setattr(parquet.ParquetWriter, "write_table", write)
    monkeypatch.setattr(TextEncoder.__init__, "__kwdefaults__", {"token_budget": None, "window": 32})
    encode(model, source, str(tmp_path / "out.parquet"), PLAIN)
    assert state == {"read": 1050, "written": 1050, "most": 64}


@pytest.mark.parametrize("ids", [[7, 2**64 - 1, 2**63], [-(2**63), 0, 5], ["a/b", "caf\u00e9", "cafe\u0301"]])
def test_ids_are_stored_as_they_are(model, tmp_path, ids):
    lines = [json.dumps({"key": key, "text": text}) + "\n" for key, text in zip(ids, TEXTS, strict=False)]
    (tmp_path / "in.jsonl").write_text("".join(lines))
    encode(model, str(tmp_path / "in.jsonl"), str(tmp_path / "out"), replace(PLAIN, id_column="key", shard_rows=2))
    table = parquet.read_table(tmp_path / "out")
    assert table["id"].to_pylist() == ids
    assert json.loads((tmp_path / "out" / "_manifest.json").read_text())["columns"]["id"] == str(table["id"].type)


def test_an_output_inside_the_input_is_finished_once(model, tmp_path):
    corpus = tmp_path / "c"
    corpus.mkdir()
    for name, text in (("a", "a cat"), ("b", "rain")):
        (corpus / f"{name}.txt").write_text(text + "\n")
    settings = replace(PLAIN, shard_rows=1)
    facts = encode(model, str(corpus), str(corpus / "vectors"), settings)
    before = {path: path.stat().st_mtime_ns for path in (corpus / "vectors").iterdir()}
    (corpus / "vectors" / "part-00001.parquet").unlink()  # As if interrupted: it goes on with what is missing.
    known = json.loads((corpus / "vectors" / "_manifest.json").read_text())
    (corpus / "vectors" / "_manifest.json").write_text(json.dumps({**known, "complete": False}))
    assert encode(model, str(corpus), str(corpus / "vectors"), settings) == facts
    assert encode(model, str(corpus), str(corpus / "vectors"), settings) == facts
    kept = corpus / "vectors" / "part-00000.parquet"
    assert kept.stat().st_mtime_ns == before[kept]
    for _ in range(2):  # Here the shards are input; the one file is not.
        assert encode(model, str(corpus), str(corpus / "v.parquet"), settings)["texts"] == 4
