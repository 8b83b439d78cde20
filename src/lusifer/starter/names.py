"""From a name to a starter's folder: ``starter:NAME``, a fetched backbone, or ``starter``, the released model."""

from __future__ import annotations

from pathlib import Path

from lusifer.starter.fetch import PREFIX, starter_path
from lusifer.starter.released import NAME, assemble


def resolve_backbone(name_or_path: str) -> str:
    """Maps ``starter:...`` and ``starter`` to their folders and returns everything else unchanged.

    Raises:
        LusiferError: If it is a starter name that is unknown or not fetched.
    """
    if name_or_path.startswith(PREFIX):
        return str(starter_path(name_or_path))
    return str(assemble()) if name_or_path == NAME and not Path(name_or_path).exists() else name_or_path
