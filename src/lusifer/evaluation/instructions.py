"""Instructions in front of texts, by task or type of task."""

from __future__ import annotations

from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

import mteb
import yaml

from lusifer.errors import LusiferError, first_line

Prompts = dict[str, str | dict[str, str]]


def load_prompts(path: Path | None = None) -> Prompts:
    """What stands in front of texts, by task name or mteb type.

    Args:
        path: YAML file, the bundled one when None. A text is an instruction, put before queries and before both sides
            of symmetric tasks; a mapping gives what stands before a ``query`` and a ``document``, to the letter.

    Raises:
        LusiferError: If it cannot be read, is no such mapping, or names a task or type that does not exist.
    """
    where = path or (files("lusifer") / "resources" / "prompts.yaml")
    try:
        found = yaml.safe_load(where.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise LusiferError(f"cannot read instructions from {where}: {first_line(error)}") from None
    if not isinstance(found, dict) or not all(_is_prompt(value) for value in found.values()):
        raise LusiferError(
            f"{where} must map task names or types to instructions, each a line of text or 'query' and 'document'"
        )
    tasks = mteb.get_tasks(exclude_superseded=False, exclude_private=False, exclude_beta=False)
    known = {kind for task in tasks for kind in (task.metadata.name, task.metadata.type)}
    for key in found:
        if str(key) not in known:
            close = get_close_matches(str(key), known, 1)
            raise LusiferError(f"{where}: mteb has no task or type {key!r}" + (f"; {close[0]}?" if close else ""))
    return {str(key): value for key, value in found.items()}


def _is_prompt(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value) and set(value) <= {"query", "document"} and all(isinstance(v, str) for v in value.values())
    return isinstance(value, str) and bool(value.strip())
