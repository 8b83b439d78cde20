"""What we use of ``datasets`` that it does not promise to keep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def fingerprint(records: Any) -> str:
    """A text that changes when the content of a ``datasets.Dataset`` does; touches ``Dataset._fingerprint``."""
    return str(records._fingerprint)


@contextmanager
def arrow_cache(folder: Path | None) -> Iterator[None]:
    """Has ``datasets`` keep what it converts in ``folder`` while the block runs; None changes nothing.

    It finds a local folder in its cache by the folder's last name and card, so changed files would be answered from
    what was read of them before. Touches ``datasets.config.HF_DATASETS_CACHE``, read at every load.
    """
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = before if folder is None else str(folder)
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = before
