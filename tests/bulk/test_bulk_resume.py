"""Bulk encoding interrupted: kills, Ctrl-C and several processes, and still the bytes of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace

import psutil
import pytest
import torch

from lusifer.bulk import local_engine
from lusifer.bulk.job import Settings
from lusifer.bulk.run import encode
from lusifer.model.sentence_transformer import save_atomically
from support.forked import context
from support.texts import content, kept_rows, refused, some_texts

ROWS, SHARD = 5_000, 150
KILLS = int(os.environ.get("LUSIFER_KILLS", "2"))


@pytest.fixture(scope="module")
def forks():
    """Starts processes that have imported everything already."""
    forks = context()
    first = forks.Process(target=os.getpid)
    first.start()
    first.join()
    return forks


@pytest.fixture(scope="module")
def finished(forks, tmp_path_factory, tiny_encoder, tiny_llm):
    """A model, an input and what an undisturbed run makes of it, with the seconds it takes."""
    from lusifer import LusiferModel
    from lusifer.model.backbones import load_tokenizer
    from lusifer.model.sentence_transformer import to_sentence_transformer

    folder = tmp_path_factory.mktemp("bulk")
    torch.manual_seed(0)
    inner = LusiferModel.from_backbones(tiny_encoder, tiny_llm, max_seq_length=64)
    save_atomically(to_sentence_transformer(inner, load_tokenizer("encoder", tiny_encoder)), folder / "model")
    rows = [{"text": text, "key": f"k{number}"} for number, text in enumerate(some_texts(ROWS, seed=1))]
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = Settings(precision="float32", shard_rows=SHARD, id_column="key", output_dtype="int8")
    common = (str(folder / "model"), str(folder / "in.jsonl"))
    begin = time.perf_counter()
    process = forks.Process(target=encode, args=(*common, str(folder / "out"), settings), kwargs={"threads": 1})
    process.start()
    process.join()
    assert process.exitcode == 0
    return common, settings, content(folder / "out"), time.perf_counter() - begin


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.glob("part-*")}


def all_end(processes, *, seconds):
    """Whether all of them end in that time; one that only waits for its parent to notice has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(psutil.NoSuchProcess):
            if not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in processes):
                return True
        time.sleep(0.05)
    return not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in processes)


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
        assert all_end(children, seconds=60)
        assert all(expected[name] == found for name, found in shards(out).items())
        counts.append(len(shards(out)))
    assert 0 < counts[0] < len(expected) - 1, "no kill fell into the work"
    encode(*common, str(out), settings, **options)
    assert content(out) == expected


def test_a_process_that_dies_is_named_and_the_rest_stays(finished, tmp_path, monkeypatch):
    common, settings, expected, _ = finished
    real = local_engine.Processes._receive
    received = []

    def receive(self, pipe, work):
        found = real(self, pipe, work)
        received.append(found)
        if sum(not isinstance(one, int) for one in received) == 4:
            for process in self._running.values():
                os.kill(process.pid, signal.SIGKILL)
        return found

    monkeypatch.setattr(local_engine.Processes, "_receive", receive)
    message = refused(*common, str(tmp_path / "out"), settings, processes=2, threads=1)
    assert "died (exit code -9" in message and "run the same command again to resume" in message
    monkeypatch.undo()
    there = {name for name in content(tmp_path / "out") if name.startswith("part")}
    assert 3 <= len(there) < len(expected) - 1
    encode(*common, str(tmp_path / "out"), settings, threads=1)
    assert content(tmp_path / "out") == expected


def test_two_processes_make_the_bytes_of_one_whatever_ctrl_c_does_while_they_start(
    finished, tmp_path, monkeypatch, capfd
):
    common, settings, expected, _ = finished
    real = local_engine.Processes._start

    def start(self, device):
        pipe = real(self, device)
        os.kill(self._running[pipe].pid, signal.SIGINT)
        return pipe

    monkeypatch.setattr(local_engine.Processes, "_start", start)
    encode(*common, str(tmp_path / "out"), settings, processes=2, threads=1)
    assert content(tmp_path / "out") == expected
    assert "Traceback" not in capfd.readouterr().err
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_processes_have_the_environment_of_now(finished, tmp_path, monkeypatch):
    """Not that of when the first ones were started."""
    common, settings, expected, _ = finished
    model = shutil.copytree(common[0], tmp_path / "model")
    (tmp_path / "elsewhere").mkdir()
    (model / "model.safetensors").rename(tmp_path / "elsewhere" / "weights")
    (model / "model.safetensors").symlink_to(tmp_path / "elsewhere" / "weights")
    given = (str(model), common[1], str(tmp_path / "out"), settings)
    assert "elsewhere" in refused(*given, processes=2, threads=1)
    monkeypatch.setenv("LUSIFER_LINKED_FOLDERS", str(tmp_path / "elsewhere"))
    encode(*given, processes=2, threads=1)
    assert shards(tmp_path / "out").keys() == {name for name in expected if name.startswith("part-")}


def test_mistakes_of_a_process_are_told_here(finished, tmp_path):
    common, settings, _, _ = finished
    message = refused(*common, str(tmp_path / "out"), replace(settings, dim=1000), processes=2)
    assert message == "cannot truncate embeddings to 1000 dimensions: the model has 48"


def test_another_command_at_the_same_folder_is_refused(forks, finished, tmp_path):
    common, settings, expected, _ = finished
    process = forks.Process(target=encode, args=(*common, str(tmp_path / "out"), settings), kwargs={"threads": 1})
    process.start()
    while not list((tmp_path).glob("out/part-*")):
        time.sleep(0.01)
        assert process.is_alive()
    os.kill(process.pid, signal.SIGSTOP)  # However fast it is, it is at work still.
    try:
        assert len(shards(tmp_path / "out")) < len(expected) - 1
        assert "another process is using" in refused(*common, str(tmp_path / "out"), settings, threads=1)
    finally:
        os.kill(process.pid, signal.SIGCONT)
    process.join()
    assert process.exitcode == 0 and content(tmp_path / "out") == expected


def test_ctrl_c_says_what_is_kept_and_the_same_command_resumes(finished, tmp_path, call):
    common, settings, expected, _ = finished
    command = [sys.executable, "-m", "lusifer", "encode", *common, str(tmp_path / "out"), "-q", "--processes", "2"]
    command += ["--precision", "float32", "--shard-rows", str(SHARD), "--id-column", "key", "--output-dtype", "int8"]
    command += ["--threads", "1"]
    # A group of its own: Ctrl-C in a terminal reaches all processes of the group.
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not list(tmp_path.glob("out/part-*")):
        time.sleep(0.01)
        assert process.poll() is None, process.stderr.read()
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    # Both processes finish their batch and keep it before they end: the count is true to the row.
    rows = kept_rows(tmp_path / "out")
    assert err.strip() == f"lusifer: interrupted; {rows:,} of {ROWS:,} rows are kept; the same command resumes there"
    assert 0 < len(list(tmp_path.glob("out/part-*"))) < len(expected) - 1
    code, said, err = call(*command[3:])
    assert code == 0 and said == f"{ROWS} texts, 48 dimensions -> {tmp_path / 'out'}\n"
    assert content(tmp_path / "out") == expected
