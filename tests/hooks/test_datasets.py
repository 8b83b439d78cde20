"""The private parts of `datasets` that we use are still where they were."""

from __future__ import annotations

from datasets import Dataset

from lusifer.hooks.datasets import fingerprint


def test_dataset_fingerprint_follows_the_content():
    first, same, other = (Dataset.from_dict({"a": values}) for values in ([1, 2], [1, 2], [1, 3]))
    assert fingerprint(first) == fingerprint(same) != fingerprint(other), "datasets moved Dataset._fingerprint"
