"""Canaries for the private parts of ``transformers`` that `lusifer.hooks.transformers` touches."""

from __future__ import annotations

from lusifer.hooks.transformers import cached_or_none


def test_a_missing_file_is_none_and_no_error(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert cached_or_none(str(tmp_path), "config.json") == str(tmp_path / "config.json")
    assert cached_or_none(str(tmp_path), "missing.json") is None
    assert cached_or_none("acme/never-fetched", "config.json") is None
