"""Data sets for the evaluation tests, and a cache of their own for each test."""

from __future__ import annotations

import pytest

from support.mteb_folder import write_tasks


@pytest.fixture(scope="module")
def tasks_folder(tmp_path_factory):
    """A folder for ``--data`` with one small task of every type."""
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    """Empty caches: ``datasets`` knows a local folder by its last name and card alone, whatever its files hold."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets-cache"))
    monkeypatch.setenv("LUSIFER_CACHE", str(tmp_path / "lusifer-cache"))
