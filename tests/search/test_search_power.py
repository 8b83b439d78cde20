"""An index after a power cut: what an add had finished is there; what it had not, `repair` takes back."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from lusifer import LusiferError
from lusifer.cli.app import app
from lusifer.search import Entry, IndexInfo, open_store
from lusifer.search.locations import repair_store
from support.power import Disk

pytest.importorskip("lancedb")

from lusifer.search.lance import LanceStore  # noqa: E402

INFO = IndexInfo("some/model", "0123456789abcdef", 16)


def texts(begin, end):
    vectors = np.random.default_rng(0).normal(size=(end, 16)).astype(np.float32)[begin:]
    return [Entry(f"id{i}", f"text number{i} common", "en") for i in range(begin, end)], vectors / np.linalg.norm(
        vectors, axis=1, keepdims=True
    )


@pytest.fixture
def disk(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "vault").mkdir()
    return Disk(tmp_path / "disk", tmp_path / "vault", monkeypatch)


def assert_holds(path, count):
    store = open_store(str(path))
    store.read_all()
    assert store.count() == count
    entries, vectors = texts(0, count)
    assert [hit.entry.id for hit in store.search(vectors[0], k=1)] == ["id0"]
    assert {hit.entry.id for hit in store.bm25(f"number{count - 1}", k=1)} == {entries[-1].id}


@pytest.mark.parametrize("kind", [False, True])
def test_what_was_added_survives_a_power_cut(disk, tmp_path, kind):
    path = tmp_path / "disk" / "new" / "index"
    store = LanceStore.create(path, INFO)
    disk.cut(tmp_path / "fresh", kind=kind)
    store.upsert(*texts(0, 20))
    disk.cut(tmp_path / "first", kind=kind)
    store.tidy()
    disk.cut(tmp_path / "tidied", kind=kind)
    store = open_store(str(path))
    store.upsert(*texts(20, 40))
    disk.cut(tmp_path / "second", kind=kind)
    assert store.delete(ids=["id39"]) == 1
    store.tidy()
    disk.cut(tmp_path / "deleted", kind=kind)
    assert open_store(str(tmp_path / "fresh" / "new" / "index")).count() == 0
    for name, count in (("first", 20), ("tidied", 20), ("second", 40), ("deleted", 39)):
        assert_holds(tmp_path / name / "new" / "index", count)


@pytest.mark.parametrize("kind", [False, True])
def test_every_add_of_one_process_survives(disk, tmp_path, kind):
    path = tmp_path / "disk" / "index"
    store = LanceStore.create(path, INFO)
    for step in range(3):
        store.upsert(*texts(20 * step, 20 * step + 20))
        disk.cut(tmp_path / f"cut{step}", kind=kind)
        if step == 1:
            store.tidy()
            disk.cut(tmp_path / "tidied", kind=kind)
    for name, count in (("cut0", 20), ("cut1", 40), ("tidied", 40), ("cut2", 60)):
        assert_holds(tmp_path / name / "index", count)


def test_an_add_syncs_what_is_new(tmp_path, monkeypatch):
    calls = []
    store = LanceStore.create(tmp_path / "index", INFO)
    monkeypatch.setattr("lusifer.publishing._sync", calls.append)
    counts = []
    for step in range(6):
        store.upsert(*texts(10 * step, 10 * step + 10))
        counts.append(len(calls))
        calls.clear()
    assert len(list((tmp_path / "index").rglob("*"))) > 30
    assert max(counts[1:]) <= 12, counts


@pytest.mark.parametrize("kind", [False, True])
def test_a_power_cut_within_an_add_leaves_the_texts_of_before(disk, tmp_path, monkeypatch, kind):
    path = tmp_path / "disk" / "index"
    LanceStore.create(path, INFO).upsert(*texts(0, 20))
    store = open_store(str(path))
    monkeypatch.setattr("lusifer.search.lance.sync_tree", lambda *_: None)  # The power goes before it.
    store.upsert(*texts(20, 40))
    disk.cut(tmp_path / "cut", kind=kind)
    monkeypatch.undo()
    index = tmp_path / "cut" / "index"
    if kind:  # The new version has its name and no content.
        with pytest.raises(LusiferError, match="lusifer index repair"):
            open_store(str(index)).read_all()
    done = CliRunner().invoke(app, ["index", "repair", str(index)])
    assert done.exit_code == 0, done.output
    assert ("went back 1 versions" in done.output) == kind and "20 texts" in done.output
    assert_holds(index, 20)
    store = open_store(str(index))
    store.upsert(*texts(20, 40))
    store.tidy()
    assert_holds(index, 40)


@pytest.mark.parametrize("part", ["_versions", "data", "_indices"])
def test_repair_goes_behind_whatever_was_damaged(tmp_path, part):
    store = LanceStore.create(tmp_path / "index", INFO)
    store.upsert(*texts(0, 20))
    store._table.optimize()  # An index over all of its texts.
    before = {file for file in (tmp_path / "index").rglob("*") if file.is_file()}
    store.upsert(*texts(20, 40))
    store._table.optimize()
    count = 0
    for file in (tmp_path / "index" / "lance" / "texts.lance" / part).rglob("*"):
        if file.is_file() and file not in before:
            file.write_bytes(b"")
            count += 1
    assert count
    repaired, back = repair_store(str(tmp_path / "index"))
    assert back >= 1
    assert_holds(tmp_path / "index", repaired.count())
    assert repaired.count() in (20, 40)


def test_an_index_of_which_nothing_can_be_read_stays_as_it_is(tmp_path):
    LanceStore.create(tmp_path / "index", INFO).upsert(*texts(0, 5))
    for file in (tmp_path / "index").rglob("*.manifest"):
        file.write_bytes(b"")
    before = sorted(path.name for path in (tmp_path / "index").rglob("*.manifest"))
    with pytest.raises(LusiferError, match="no version of the index .* can be read; rebuild it"):
        repair_store(str(tmp_path / "index"))
    assert sorted(path.name for path in (tmp_path / "index" / "lance").rglob("*.manifest")) == before
    with pytest.raises(LusiferError, match="only a folder is repaired"):
        repair_store("qdrant+http://localhost:6333/texts")
    (tmp_path / "index" / "facts.json").write_text("")
    with pytest.raises(LusiferError, match=r"facts.json is not JSON; rebuild it"):
        repair_store(str(tmp_path / "index"))


def test_a_creation_cut_by_a_power_cut_is_made_again(tmp_path):
    LanceStore.create(tmp_path / "index", INFO)
    (tmp_path / "index" / "facts.json").unlink()
    for file in (tmp_path / "index").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    LanceStore.create(tmp_path / "index", INFO).upsert(*texts(0, 5))
    assert_holds(tmp_path / "index", 5)
    shutil.rmtree(tmp_path / "index")
