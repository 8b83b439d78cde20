"""One process at a time: who is refused, who waits, who is let through."""

from __future__ import annotations

import os
import shutil
import threading
import time

import pytest

from lusifer import LusiferError, locks
from lusifer.locks import BusyError, alone_at, alone_at_new, tidy
from support.holding import held


def test_another_process_is_refused_until_it_ends_however_it_ends(tmp_path):
    with held(tmp_path / "x") as process:
        for name in ("x", "./x", "y/../x"):
            (tmp_path / "y").mkdir(exist_ok=True)
            with (
                pytest.raises(BusyError, match="another process is using '.*x'; wait"),
                alone_at(f"{tmp_path}/{name}"),
            ):
                pass
        with alone_at(tmp_path / "y"):
            pass
        process.kill()
        process.wait()
        with alone_at(tmp_path / "x"):
            pass


def test_a_link_is_the_place_it_leads_to(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with held(tmp_path / "link"), pytest.raises(BusyError), alone_at(tmp_path / "real"):
        pass


def test_who_waits_goes_on_when_the_other_ends(tmp_path):
    with held(tmp_path / "x") as process:
        threading.Timer(0.3, process.kill).start()
        began = time.monotonic()
        with alone_at(tmp_path / "x", wait=True):
            assert time.monotonic() - began > 0.2


def test_a_block_within_a_block_is_let_through_and_another_thread_is_not(tmp_path):
    told = []

    def other():
        try:
            with alone_at(tmp_path / "x"):
                told.append("in")
        except LusiferError as error:
            told.append(str(error))

    with alone_at(tmp_path / "x"):
        with alone_at(tmp_path / "x"):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(told) == 1 and "is using" in told[0]


def test_a_folder_whose_parent_cannot_be_written_is_locked_inside(tmp_path, monkeypatch):
    real = locks._take

    def take(path, shown, wait):
        if path.parent == tmp_path:
            raise PermissionError(13, os.strerror(13))
        return real(path, shown, wait)

    monkeypatch.setattr(locks, "_take", take)
    (tmp_path / "disk").mkdir()
    with alone_at(tmp_path / "disk"):
        assert (tmp_path / "disk" / locks.INSIDE).exists()
    with pytest.raises(LusiferError, match="cannot write .*Permission denied"), alone_at(tmp_path / "file"):
        pass


def test_a_file_system_without_locks_is_told_and_works(tmp_path, monkeypatch, caplog):
    def without(*args):
        raise OSError(locks._WITHOUT[0], "No locks available")

    monkeypatch.setattr(locks, "_take", without)
    with alone_at(tmp_path / "x"):
        pass
    assert "does not support locks" in caplog.text


def test_a_new_place_must_be_new(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(LusiferError, match="already exists"), alone_at_new(tmp_path / "x"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_what_a_process_killed_in_its_last_moments_left_goes_though_the_place_is_finished(tmp_path):
    def left():
        (tmp_path / "x").mkdir(exist_ok=True)
        for name in (".x.lock", ".x-0123abcd.lock", "mine"):
            (tmp_path / name).touch()
        (tmp_path / ".x-0123abcd").mkdir()

    left()
    with held(tmp_path / "x"):
        tidy(tmp_path / "x")
        assert (tmp_path / ".x-0123abcd").is_dir(), "that of a living process stays"
    assert (tmp_path / ".x-0123abcd").is_dir(), "without a lock, whoever goes on sees to it"
    for clear in (lambda: tidy(tmp_path / "x", (tmp_path / "mine").unlink), lambda: new(tmp_path / "x")):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        left()
        clear()
        assert {path.name for path in tmp_path.iterdir()} <= {"x", "mine"}


def new(place):
    with pytest.raises(LusiferError, match="already exists"), alone_at_new(place):
        pass
