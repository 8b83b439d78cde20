"""What is published is complete, has ordinary rights and leaves nothing unfinished behind."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import lusifer
from lusifer import LusiferError
from lusifer.errors import first_line
from lusifer.publishing import make_folder, publish_file, publish_folder, write_json
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
        (ValueError("abcd" * 200), "abcd" * 100 + " …"),
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


def started(tmp_path, then):
    """A process that is at work on a file and on a folder, replacing an older one."""
    code = (
        "import sys, os, time\nfrom pathlib import Path\nfrom lusifer.publishing import publish_file, publish_folder\n"
        f"root = Path({str(tmp_path)!r})\n"
        "with publish_file(root / 'a') as a, publish_folder(root / 'b') as b:\n"
        f"    (b / 'x').write_text('half')\n    print('ready', flush=True)\n    {then}\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def hidden(folder):
    return {path.name for path in folder.iterdir() if path.name.startswith(".")}


def write_both(tmp_path):
    write_json(tmp_path / "a", 1)
    with publish_folder(tmp_path / "b") as folder:
        (folder / "x").write_text("whole")


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    process = started(tmp_path, "time.sleep(60)")
    begun = hidden(tmp_path)
    assert len(begun) == 4  # Each with its lock.
    write_both(tmp_path)
    assert hidden(tmp_path) == begun
    process.kill()
    process.wait()
    (tmp_path / ".a-notes").write_text("not ours")
    write_both(tmp_path)
    assert hidden(tmp_path) == {".a-notes"}
    assert (tmp_path / "b" / "x").read_text() == "whole"


def test_a_folder_that_a_killed_process_had_moved_away_comes_back(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").write_text("old")
    # Killed between the two renames.
    code = "rename = os.rename; os.rename = lambda *names: (rename(*names), os._exit(9)); "
    started(tmp_path, code + "from lusifer.publishing import put_in_place; put_in_place(b, root / 'b')").wait()
    assert not (tmp_path / "b").exists()
    with pytest.raises(KeyError), publish_folder(tmp_path / "b"):
        raise KeyError
    assert (tmp_path / "b" / "x").read_text() == "old"
    write_both(tmp_path)
    assert hidden(tmp_path) == set() and (tmp_path / "b" / "x").read_text() == "whole"


def test_the_names_of_new_folders_are_synced_too(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("lusifer.publishing._sync", synced.append)
    make_folder(tmp_path / "a" / "b" / "c")
    assert set(synced) == {tmp_path, tmp_path / "a", tmp_path / "a" / "b"}
    make_folder(tmp_path / "a" / "b" / "c")
    assert len(synced) == 3


def test_nothing_else_gives_what_it_wrote_its_name():
    """Others rename only into a file that is being published, or what is damaged out of the way."""
    source = Path(lusifer.__file__).parent
    found = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*.py")
        if re.search(r"os\.(replace|rename)\(|\.rename\(|shutil\.move\(", path.read_text(encoding="utf-8"))
    }
    others = {"starter/fetch.py", "training/checkpoints.py", "search/lance.py"}
    assert found == {"publishing.py"} | others
