"""Two processes at one index: never two rows of one id, and what earlier versions doubled is healed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from lusifer import LusiferError
from lusifer.search import Entry, IndexInfo, open_store
from lusifer.search.indexing import add
from support.command import mistake
from support.forked import TESTS
from support.holding import held
from support.toy_index import DIM, Encoder, entries

pytest.importorskip("lancedb")

from lusifer.search.lance import LanceStore  # noqa: E402

INFO = IndexInfo("some/model", "0123456789abcdef", DIM)
COUNT = 600
# Made and filled once all processes are there, so that they meet.
_ADD = """
import sys
from lusifer import LusiferError
from lusifer.search import open_store
from lusifer.search.indexing import add
from support.toy_index import Encoder, entries

index, rows = sys.argv[1], entries(int(sys.argv[2]))
store = open_store(index)
print("ready", flush=True)
sys.stdin.readline()
try:
    add(store, Encoder(), rows)
except LusiferError as error:
    print(error, file=sys.stderr)
    raise SystemExit(2)
"""


def vectors(count):
    return np.tile(np.eye(DIM, dtype=np.float32)[1], (count, 1))


def ids(path):
    return open_store(str(path))._table.to_arrow()["id"].to_pylist()


def test_two_that_add_at_once_leave_each_id_once(tmp_path):
    LanceStore.create(tmp_path / "index", INFO)
    command = [sys.executable, "-c", _ADD, str(tmp_path / "index"), str(COUNT)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    found = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    two = [subprocess.Popen(command, env={**os.environ, "PYTHONPATH": found}, **pipes) for _ in range(2)]
    for process in two:
        assert process.stdout.readline() == "ready\n"
    for process in two:
        process.stdin.write("\n")
        process.stdin.flush()
    told = [(process.communicate(timeout=120)[1], process.returncode) for process in two]
    assert 0 in [code for _, code in told], told
    for err, code in told:
        assert code == 0 or (code == 2 and "another process is using" in err), err
    assert sorted(ids(tmp_path / "index")) == sorted(f"id{i}" for i in range(COUNT))


def test_the_commands_that_write_name_the_place(call, tmp_path):
    index = tmp_path / "index"
    LanceStore.create(index, INFO).upsert(entries(3), vectors(3))
    (tmp_path / "in.txt").write_text("a\nb\n")
    with held(index):
        for arguments in (("add", index, tmp_path / "in.txt"), ("delete", index, "--ids", "id1"), ("build", index)):
            assert f"another process is using {str(index)!r}" in mistake(*call("index", *arguments))
        assert json.loads(call("index", "info", index, "--json")[1])["texts"] == 3, "reading needs no lock"
    assert json.loads(call("index", "delete", index, "--ids", "id1", "--json")[1])["deleted"] == 1


def test_a_process_that_is_killed_lets_go(tmp_path):
    store = LanceStore.create(tmp_path / "index", INFO)
    with held(tmp_path / "index") as process:
        with pytest.raises(LusiferError, match="another process is using"):
            add(store, Encoder(), entries(3))
        process.kill()
        process.wait()
        assert add(store, Encoder(), entries(3))["added"] == 3


def test_doubled_ids_are_healed_by_the_next_add(tmp_path, caplog):
    store = LanceStore.create(tmp_path / "index", INFO)
    for word in ("old", "new"):  # As two processes at once left them.
        store._table.add(store._rows(entries(40, word), vectors(40)))
    store.upsert([Entry("alone", "alone", "en")], vectors(1))
    assert store.count() == 81
    assert add(store, Encoder(), entries(2, "new"))["unchanged"] == 2
    assert store.count() == 41 and len(set(ids(tmp_path / "index"))) == 41
    assert {entry.text for entry, _ in store.fetch([f"id{i}" for i in range(40)]).values()} == {
        f"new {i}" for i in range(40)
    }
    assert "40 rows of duplicate ids are removed" in caplog.text
    assert store.heal() == 0


SOURCE = "/root/.cargo/registry/src/index.crates.io-1949cf8c6b5b557f/lance-file-13.0.0/src/writer/structural.rs:191:9"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            f"lance error: LanceError(IO): No space left on device (os error 28), {SOURCE}",
            "cannot write the index {index}: No space left on device; no existing data is lost; run the same "
            "command again to resume",
        ),
        (
            "lance error: Retryable commit conflict for version 5: This Update transaction was preempted by concurrent "
            f"transaction Delete at version 5. Please retry., {SOURCE}",
            "the index {index} was changed by another process meanwhile; run the same command again",
        ),
        (
            f"lance error: LanceError(IO): file is truncated, {SOURCE}",
            "the index {index} cannot be used; it may be damaged (lusifer index repair): "
            "lance error: LanceError(IO): file is truncated",
        ),
    ],
)
def test_what_lancedb_says_is_one_clear_line(tmp_path, monkeypatch, said, told):
    store = LanceStore.create(tmp_path / "index", INFO)

    def failing(*args):
        raise RuntimeError(said)

    monkeypatch.setattr(store, "_upsert", failing)
    with pytest.raises(LusiferError) as caught:
        store.upsert(entries(1), vectors(1))
    assert str(caught.value) == told.format(index=repr(str(tmp_path / "index")))
