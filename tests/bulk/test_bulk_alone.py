"""Workers whose command is gone say nothing, and input that is rewritten meanwhile is noticed."""

from __future__ import annotations

import multiprocessing
import os
import signal

import pytest

from lusifer import LusiferError
from lusifer.bulk import encode, local_engine
from lusifer.bulk.job import Settings
from lusifer.bulk.shard import ShardEncoder
from lusifer.storage import Folder
from support.holding import held


@pytest.fixture
def interrupts():
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_worker_whose_command_is_gone_ends_quietly(interrupts, monkeypatch, tmp_path, capfd):
    ours, theirs = multiprocessing.Pipe()

    class Encoder:
        def __init__(self, job, device):
            pass

        def encode(self, part, prepared, tick):
            ours.close()
            with Folder(str(tmp_path), scratch=None).put("part"):
                tick(1)  # It cannot tell, which is no fault of the disk.

    monkeypatch.setattr(local_engine, "ShardEncoder", Encoder)
    ours.send((None, None))
    local_engine._work(theirs, None, None, dict(os.environ))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("output", ["out", "out.npy"])
def test_input_rewritten_meanwhile_is_noticed(model, tmp_path, monkeypatch, output):
    source = tmp_path / "in.txt"
    source.write_text("one\ntwo\nthree\n")
    real = ShardEncoder._finished

    def rewritten(self, *args):
        source.write_text("eins\nzwei\ndrei\n")
        return real(self, *args)

    monkeypatch.setattr(ShardEncoder, "_finished", rewritten)
    with pytest.raises(LusiferError, match="in.txt' has changed while it was encoded"):
        encode(model, str(source), str(tmp_path / output), Settings())
    assert not list(tmp_path.glob("out/part-*")) and not (tmp_path / "out.npy").exists()


def test_two_at_one_file_are_refused(model, tmp_path):
    (tmp_path / "in.txt").write_text("one\n")
    with held(tmp_path / "out.npy"), pytest.raises(LusiferError, match="another process is using '.*out.npy'"):
        encode(model, str(tmp_path / "in.txt"), str(tmp_path / "out.npy"))
