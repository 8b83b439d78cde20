"""What we use of transformers that is not public."""

from __future__ import annotations

from typing import Any

from transformers.utils import cached_file


def cached_or_none(name: str, file: str, **hub: Any) -> str | None:
    """Path of a model's file in its folder or in the hub's cache; None where there is no such file.

    Touches the arguments ``_raise_exceptions_for_*`` of ``transformers.utils.cached_file``: without them a missing
    file and a hub out of reach are exceptions.

    Args:
        name: Folder or hub id.
        file: Name of the file.
        **hub: ``token``, ``revision``, ``cache_dir``, ...

    Raises:
        OSError: If the repository is gated or does not exist.
    """
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    return cached_file(name, file, **{**hub, **quiet})
