"""Canary: what `lusifer.hooks.datasets` touches is still where it was."""

from __future__ import annotations

import datasets

from lusifer.hooks.datasets import arrow_cache, fingerprint


def test_the_arrow_cache_is_where_the_configuration_says_at_every_load(tmp_path):
    (tmp_path / "rows").mkdir()
    datasets.Dataset.from_list([{"text": "a"}]).to_parquet(tmp_path / "rows" / "train.parquet")
    before = datasets.config.HF_DATASETS_CACHE
    with arrow_cache(tmp_path / "elsewhere"):
        loaded = datasets.load_dataset(str(tmp_path / "rows"))
    assert loaded["train"].cache_files[0]["filename"].startswith(str(tmp_path / "elsewhere")), (
        "datasets no longer reads datasets.config.HF_DATASETS_CACHE at every load"
    )
    assert before == datasets.config.HF_DATASETS_CACHE
    with arrow_cache(None):
        assert before == datasets.config.HF_DATASETS_CACHE


def test_dataset_fingerprint_follows_the_content():
    first, same, other = (datasets.Dataset.from_dict({"a": values}) for values in ([1, 2], [1, 2], [1, 3]))
    assert fingerprint(first) == fingerprint(same) != fingerprint(other), "datasets moved Dataset._fingerprint"
