"""From a name to a starter's folder: ``starter:NAME``, a fetched backbone, or ``starter``, the released model."""

from __future__ import annotations

from pathlib import Path

from lusifer.hooks.huggingface_hub import settle_hub
from lusifer.starter.fetch import PREFIX, starter_path
from lusifer.starter.released import NAME, assemble


def resolve_backbone(name_or_path: str) -> str:
    """Maps ``starter:...`` and ``starter`` to their folders and returns everything else unchanged.

    With a hub id, asks once whether the hub is there.

    Raises:
        LusiferError: If it is a starter name that is unknown or not fetched.
    """
    if name_or_path.startswith(PREFIX):
        return str(starter_path(name_or_path))
    if Path(name_or_path).expanduser().exists():
        return name_or_path
    if name_or_path == NAME:
        return str(assemble())
    settle_hub()
    return name_or_path
