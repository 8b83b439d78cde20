"""What is published is complete, has ordinary rights and leaves nothing unfinished behind."""

from __future__ import annotations

import json
import os
import stat

import pytest

from lusifer import LusiferError
from lusifer.errors import first_line
from lusifer.publishing import publish_file, publish_folder, write_json
from lusifer.storage import Folder


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_files_have_the_rights_of_new_files_whatever_wrote_them(tmp_path, umask):
    with publish_file(tmp_path / "a") as staging:
        staging.chmod(0o600)
    with publish_folder(tmp_path / "b") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "c").write_text("c")
        (folder / "inner" / "c").chmod(0o600)
    write_json(tmp_path / "d.json", {"é": 1})
    expected = 0o666 & ~umask
    assert [mode(tmp_path / name) for name in ("a", "b/inner/c", "d.json")] == [expected] * 3
    assert mode(tmp_path / "b") == 0o777 & ~umask
    assert json.loads((tmp_path / "d.json").read_text()) == {"é": 1}


def test_a_folder_of_files_gives_them_the_same_rights(tmp_path, umask):
    folder = Folder(str(tmp_path))
    folder.make()
    with folder.put("a") as path:
        path.write_text("a")
    folder.write_json("b.json", {"b": 1})
    assert [mode(tmp_path / name) for name in ("a", "b.json")] == [0o666 & ~umask] * 2
    with pytest.raises(KeyError), folder.put("a") as path:
        path.write_text("new")
        raise KeyError
    assert (tmp_path / "a").read_text() == "a" and not list((tmp_path / ".staging").iterdir())


def test_an_error_leaves_the_old_and_nothing_unfinished(tmp_path):
    (tmp_path / "a").write_text("old")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").write_text("old")
    with pytest.raises(KeyError), publish_file(tmp_path / "a") as staging:
        staging.write_text("new")
        raise KeyError
    with pytest.raises(KeyError), publish_folder(tmp_path / "b") as folder:
        (folder / "x").write_text("new")
        raise KeyError
    assert (tmp_path / "a").read_text() == (tmp_path / "b" / "x").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_folder_takes_the_place_of_an_older_one_whole(tmp_path):
    for name in ("one", "two"):
        with publish_folder(tmp_path / "b", "model") as folder:
            (folder / name).write_text(name)
    assert [path.name for path in tmp_path.rglob("*")] == ["b", "two"]


def test_what_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    refused = pytest.raises(LusiferError, match="^cannot write the model '.*': (Not a directory|File exists)$")
    with refused, publish_folder(tmp_path / "file" / "b", "model"):
        pass


def test_content_is_synced_before_the_name_appears_and_the_folder_after(tmp_path, monkeypatch):
    events = []
    sync, replace = os.fsync, os.replace

    def fsync(handle):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda *a: (events.append("rename"), replace(*a)))
    with publish_file(tmp_path / "a") as staging:
        pass
    assert events == [staging.name, "rename", tmp_path.name]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\n\n  what \nmore"), "what"),
        (KeyError(), "KeyError"),
        (OSError(28, "No space left on device", "f"), "No space left on device"),
    ],
)
def test_the_first_line_of_an_error(error, line):
    assert first_line(error) == line


def test_an_interruption_between_the_two_renames_keeps_the_old_folder(tmp_path, monkeypatch):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").write_text("old")
    rename, calls = os.rename, []

    def interrupted(source, target):
        rename(source, target)
        calls.append(target)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), publish_folder(tmp_path / "b") as folder:
        (folder / "x").write_text("new")
    assert (tmp_path / "b" / "x").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
