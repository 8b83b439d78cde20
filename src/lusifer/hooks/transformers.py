"""Private parts of ``transformers`` that lusifer reads or passes."""

from __future__ import annotations

from torch import nn
from transformers.utils import cached_file


def layer_class_names(model: nn.Module) -> set[str]:
    """Class names of a backbone's layers; reads ``PreTrainedModel._no_split_modules``."""
    return set(getattr(model, "_no_split_modules", None) or [])


def cached_or_none(repo: str, name: str, *, revision: str | None = None) -> str | None:
    """Path of one file of a folder or hub repository, None where it has none or the hub is out of reach.

    Passes ``_raise_exceptions_for_missing_entries`` and ``_raise_exceptions_for_connection_errors`` to
    ``transformers.utils.cached_file``.

    Args:
        repo: Folder or hub id.
        name: The file's path in it.
        revision: Branch, tag or commit of a hub repository.

    Raises:
        OSError: If the repository does not exist or is gated.
    """
    return cached_file(
        repo,
        name,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
