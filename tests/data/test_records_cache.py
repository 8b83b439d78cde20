"""The cache of training records: ordinary rights, and of use to who may only read it."""

from __future__ import annotations

import json
import os

import pytest

from lusifer import LusiferError
from lusifer.data import records as module
from lusifer.data.records import open_records
from lusifer.recipes.schema import DataRecipe


@pytest.fixture
def item(tmp_path, monkeypatch):
    monkeypatch.setenv("LUSIFER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in "abc"))
    return DataRecipe(source=str(tmp_path / "d.jsonl"), task="reconstruct")


@pytest.mark.parametrize(("umask", "rights"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_a_set_has_the_rights_of_any_new_file(item, tmp_path, umask, rights):
    before = os.umask(umask)
    try:
        open_records(item)
    finally:
        os.umask(before)
    (path,) = (tmp_path / "cache" / "data").glob("*.arrow")
    assert path.stat().st_mode & 0o777 == rights


def test_a_cache_that_cannot_be_written_gives_what_it_has(item, tmp_path, monkeypatch):
    open_records(item)

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module, "alone_at", denied)
    monkeypatch.setattr("pathlib.Path.mkdir", denied)
    assert len(open_records(item)) == 3
    (tmp_path / "e.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(LusiferError, match="cannot write the data cache .*Permission denied"):
        open_records(item.model_copy(update={"source": str(tmp_path / "e.jsonl")}))
