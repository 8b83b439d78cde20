"""Bulk encoding: shards that hold the vectors of the model, the same bytes whoever made them and however often."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from sentence_transformers.util import quantize_embeddings

import lusifer
from conftest import CORPUS
from lusifer import LusiferError, bulk_local
from lusifer.bulk import encode
from lusifer.bulk_input import RowReader
from lusifer.bulk_job import Settings
from lusifer.bulk_shard import ShardEncoder
from lusifer.encoding import save_atomically
from lusifer.textencoder import TextEncoder

KILLS = int(os.environ.get("LUSIFER_KILLS", "5"))
LONG = "the cat sat on the mat and looked at the dog " * 30
# In float32, whose results do not depend on what this machine measures.
PLAIN = Settings(precision="float32", shard_rows=100)


def some_texts(count, seed=0):
    words, rng = " ".join(CORPUS).split(), random.Random(seed)
    return [" ".join(rng.choices(words, k=rng.randint(1, 15))) for _ in range(count)]


TEXTS = some_texts(1050)


@pytest.fixture
def model(tiny_st, tmp_path):
    save_atomically(tiny_st, tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def source(tmp_path):
    (tmp_path / "in.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    return str(tmp_path / "in.txt")


def refused(*args, **kwargs):
    with pytest.raises(LusiferError) as caught:
        encode(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def content(folder):
    """Every file below a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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
    assert "in.txt, row 2: the text is empty" in refused(*where, PLAIN)
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
    monkeypatch.setattr("lusifer.bulk.make_plan", never)
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
    assert "cut embeddings to 100" in refused(model, source, str(tmp_path / "cut"), replace(PLAIN, dim=100))
    assert "leave --processes out" in refused(model, source, str(tmp_path / "o"), device="cpu,cpu", processes=2)
    assert "no checkpoint at" in refused(str(tmp_path / "none"), source, str(tmp_path / "v.npy"))


def test_a_model_that_overflows_says_so(model, source, tmp_path, monkeypatch):
    def broken(self, texts, tick=None):
        for _ in texts:
            yield np.full((1, 48), np.nan, dtype=np.float32)

    monkeypatch.setattr("lusifer.textencoder.TextEncoder.stream", broken)
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


# ------------------------------------------------------------------------------- interruptions and several processes


@pytest.fixture(scope="module")
def forks():
    """Starts processes that have imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lusifer.bulk_local", "lusifer.bulk"])
    first = context.Process(target=os.getpid)
    first.start()
    first.join()
    return context


@pytest.fixture(scope="module")
def finished(forks, tmp_path_factory, tiny_encoder, tiny_llm):
    """A model, an input and what an undisturbed run makes of it, with the seconds it takes."""
    from lusifer import LusiferModel
    from lusifer.backbones import load_tokenizer
    from lusifer.encoding import to_sentence_transformer

    folder = tmp_path_factory.mktemp("bulk")
    torch.manual_seed(0)
    inner = LusiferModel.from_backbones(tiny_encoder, tiny_llm, max_seq_length=64)
    save_atomically(to_sentence_transformer(inner, load_tokenizer("encoder", tiny_encoder)), folder / "model")
    rows = [{"text": text, "key": f"k{number}"} for number, text in enumerate(some_texts(10_000, seed=1))]
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = Settings(precision="float32", shard_rows=300, id_column="key", output_dtype="int8")
    common = (str(folder / "model"), str(folder / "in.jsonl"))
    begin = time.perf_counter()
    process = forks.Process(target=encode, args=(*common, str(folder / "out"), settings), kwargs={"threads": 1})
    process.start()
    process.join()
    assert process.exitcode == 0
    return common, settings, content(folder / "out"), time.perf_counter() - begin


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.glob("part-*")}


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_any_moment_the_same_bytes_come_out(forks, finished, tmp_path, processes):
    common, settings, expected, seconds = finished
    rng, out = random.Random(processes), tmp_path / "out"
    options = {"threads": 1, "processes": processes}
    counts = []
    for kill in range(-(-KILLS // processes)):
        process = forks.Process(target=encode, args=(*common, str(out), settings), kwargs=options)
        process.start()
        if kill % 2:  # Anywhere, also before the first shard of this process.
            process.join(rng.uniform(0, 0.3) * seconds)
        else:
            wanted = len(shards(out)) + rng.randint(1, 5)
            while process.is_alive() and len(shards(out)) < min(wanted, len(expected) - 2):
                time.sleep(0.001)
            process.join(rng.uniform(0, 0.05) * seconds)
        children = psutil.Process(process.pid).children(recursive=True) if process.is_alive() else []
        process.kill()
        process.join()
        # Processes whose command is gone stop by themselves.
        assert not psutil.wait_procs(children, timeout=60)[1]
        assert all(expected[name] == found for name, found in shards(out).items())
        counts.append(len(shards(out)))
    assert 0 < counts[0] < len(expected) - 1, "no kill fell into the work"
    encode(*common, str(out), settings, **options)
    assert content(out) == expected


def test_two_processes_make_the_bytes_of_one(finished, tmp_path):
    common, settings, expected, _ = finished
    facts = encode(*common, str(tmp_path / "out"), settings, processes=2, threads=1)
    assert facts["texts"] == 10_000 and content(tmp_path / "out") == expected


def test_a_process_that_dies_is_named_and_the_rest_stays(finished, tmp_path, monkeypatch):
    common, settings, expected, _ = finished
    real = bulk_local.Processes._receive
    received = []

    def receive(self, pipe, work):
        found = real(self, pipe, work)
        received.append(found)
        if sum(not isinstance(one, int) for one in received) == 4:
            for process in self._running.values():
                os.kill(process.pid, signal.SIGKILL)
        return found

    monkeypatch.setattr(bulk_local.Processes, "_receive", receive)
    message = refused(*common, str(tmp_path / "out"), settings, processes=2, threads=1)
    assert "died (exit code -9" in message and "the same command goes on" in message
    monkeypatch.undo()
    there = {name for name in content(tmp_path / "out") if name.startswith("part")}
    assert 3 <= len(there) < len(expected) - 1
    encode(*common, str(tmp_path / "out"), settings, threads=1)
    assert content(tmp_path / "out") == expected


def test_mistakes_of_a_process_are_told_here(finished, tmp_path):
    common, settings, _, _ = finished
    message = refused(*common, str(tmp_path / "out"), replace(settings, dim=1000), processes=2)
    assert message == "cannot cut embeddings to 1000 dimensions: the model has 48"


def test_another_command_at_the_same_folder_is_refused(forks, finished, tmp_path):
    common, settings, expected, _ = finished
    process = forks.Process(target=encode, args=(*common, str(tmp_path / "out"), settings), kwargs={"threads": 1})
    process.start()
    while not list((tmp_path).glob("out/part-*")):
        time.sleep(0.01)
        assert process.is_alive()
    assert "another command is writing into" in refused(*common, str(tmp_path / "out"), settings, threads=1)
    process.join()
    assert process.exitcode == 0 and content(tmp_path / "out") == expected


def test_ctrl_c_is_one_line_and_the_same_command_goes_on(finished, tmp_path):
    common, settings, expected, _ = finished
    command = [sys.executable, "-m", "lusifer", "encode", *common, str(tmp_path / "out"), "-q", "--processes", "2"]
    command += ["--precision", "float32", "--shard-rows", "300", "--id-column", "key", "--output-dtype", "int8"]
    command += ["--threads", "1"]
    # A group of its own: Ctrl-C in a terminal reaches all processes of the group.
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not list(tmp_path.glob("out/part-*")):
        time.sleep(0.01)
        assert process.poll() is None, process.stderr.read()
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip() == "lusifer: interrupted; the same command goes on from here"
    assert 0 < len(list(tmp_path.glob("out/part-*"))) < len(expected) - 1
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"10000 texts, 48 dimensions -> {tmp_path / 'out'}\n"
    assert content(tmp_path / "out") == expected


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
