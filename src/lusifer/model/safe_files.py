"""safe_files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import cached_file

from lusifer.errors import LusiferError

if TYPE_CHECKING:
    pass


WEIGHTS = "model.safetensors"


# Whatever a model's own files say: pickles may run code when they are opened.
SAFE = {"use_safetensors": True, "weights_only": True}


def check_files(what: str, name: str, **hub: Any) -> None:
    """Refuses a model whose own files send transformers elsewhere for its weights, to files of any kind.

    Args:
        what: What it is, for the message.
        name: Its folder or hub id.
        **hub: ``token``, ``revision``, ...

    Raises:
        LusiferError: If its configuration names a file of weights, or its index one outside of its folder.
    """
    config, index = (_mapping(name, file, **hub) for file in ("config.json", f"{WEIGHTS}.index.json"))
    if config.get("transformers_weights"):
        raise LusiferError(f"the configuration of {what} names a file of weights; remove transformers_weights there")
    told = index.get("weight_map")
    for file in set(map(str, told.values())) if isinstance(told, dict) else ():
        if Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise LusiferError(f"the index of {what} names {file!r}, which is no safetensors file in its folder")


def _mapping(name: str, file: str, **hub: Any) -> dict[str, Any]:
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    try:
        path = cached_file(name, file, **{**hub, **quiet})
        found = {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # Whoever loads it says what is wrong.
        return {}
    return found if isinstance(found, dict) else {}
