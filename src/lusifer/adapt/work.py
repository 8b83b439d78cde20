"""The folder of unfinished work: what each step leaves, whose it is, and how much time is used."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lusifer.errors import LusiferError, first_line
from lusifer.locks import alone_at
from lusifer.publishing import make_folder, publish_file, write_json

_PLAN = "plan.json"
_LATER = ("encoder_hash",)  # What plans of earlier versions do not have: those go on.
_WORDS = {
    "teacher_hash": "another teacher",
    "encoder": "another encoder",
    "encoder_hash": "an encoder with other content",
    "texts": "other texts",
}


class Clock:
    """Minutes of a command, those of interrupted calls included.

    Args:
        minutes: In all; no limit when None.
        used: Seconds used before.
    """

    def __init__(self, minutes: float | None, used: float = 0.0) -> None:
        self.limit = None if minutes is None else 60 * minutes
        self._began = time.monotonic() - used

    def elapsed(self) -> dict[str, float]:
        """What a later call needs to go on: seconds used."""
        return {"seconds": round(self.used, 1)}

    @property
    def used(self) -> float:
        """Seconds used."""
        return time.monotonic() - self._began

    def until(self, share: float) -> float:
        """Seconds left until a share of the time is used; infinite without a limit."""
        return float("inf") if self.limit is None else share * self.limit - self.used


class Work:
    """Files of one run, each complete or not there.

    Args:
        folder: Where they are; made if it is not there.
        plan: What decides their content. A folder of another plan is refused.
        restart: Throws away what is there.

    Raises:
        LusiferError: If the folder was begun with another plan, or another process is using it.
    """

    def __init__(self, folder: Path, plan: dict[str, Any], *, restart: bool = False) -> None:
        self.folder = folder
        make_folder(folder)
        self._alone = ExitStack()
        self._alone.enter_context(alone_at(folder))
        if restart:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        before = self.read(_PLAN)
        for key in plan if before else ():
            if before.get(key) != plan[key] and (key in before or key not in _LATER):
                why = _WORDS.get(key, f"another value of {key}")
                raise LusiferError(f"{folder} was started with {why}; choose another output folder, or --restart")
        write_json(folder / _PLAN, plan)

    def close(self) -> None:
        """Lets other processes in."""
        self._alone.close()

    def path(self, name: str) -> Path:
        """Where a file is, or is to be."""
        return self.folder / name

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file; empty if it is not there."""
        path = self.folder / name
        if not path.is_file():
            return {}
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise LusiferError(f"{path} is damaged: {first_line(error)}; remove {self.folder}") from error
        return content if isinstance(content, dict) else {}

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Writes a JSON file."""
        write_json(self.folder / name, content)

    def tensors(self, name: str, compute: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The tensors of a file, computed and written if it is not there."""
        path = self.folder / name
        if not path.is_file():
            self.save(name, compute())
        return self.load(name)

    def load(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a file.

        Raises:
            LusiferError: If it is damaged.
        """
        path = self.folder / name
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise LusiferError(f"{path} is damaged: {first_line(error)}; remove {self.folder}") from error

    def save(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Writes tensors to a file."""
        with publish_file(self.folder / name) as path:
            save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, path)

    def rows(self, name: str, count: int, width: int) -> np.memmap[Any, np.dtype[np.float16]]:
        """A memory-mapped table of (count, width) float16, on the disk; what is not written yet is zero."""
        path = self.folder / name
        mode = "r+" if path.is_file() and path.stat().st_size == 2 * count * width else "w+"
        return np.memmap(path, np.float16, mode, shape=(count, width))  # type: ignore[call-overload]
