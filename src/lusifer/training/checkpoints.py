"""Which checkpoint a stage goes on from: the newest whose files can all be read and are as they were written.

A damaged one is set aside under another name, where rotation and the checkpoints to come do not meet it.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from transformers import TrainerState

from lusifer.errors import LusiferError, first_line
from lusifer.hooks.trainer import read_random_state
from lusifer.publishing import write_json

logger = logging.getLogger(__name__)

TRAINABLE, OPTIMIZER, SCHEDULER = "learning.safetensors", "optimizer.pt", "scheduler.pt"
RANKS = "ranks"  # In the metadata of the weights: processes that wrote the checkpoint.
_CHECKSUMS, _KIND = "checksums.json", "xxh3_64"
_STATE, _RANDOM, _RANDOM_OF = "trainer_state.json", "rng_state.pth", "rng_state_{}.pth"
_NAME = re.compile(r"checkpoint-(\d+)")


def write_checksums(checkpoint: Path) -> None:
    """Writes down the checksum of every file of a checkpoint, in a file beside them.

    Args:
        checkpoint: The folder; nothing is written into it afterwards.

    Raises:
        OSError: If a file cannot be read or written.
    """
    sums = {path.name: _checksum(path) for path in sorted(checkpoint.iterdir())}
    write_json(checkpoint / _CHECKSUMS, {_KIND: sums})


def last_intact(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; None without one, where the stage starts again.

    Newer ones, damaged, are renamed to ``damaged-checkpoint-STEP``, with one warning each. Checkpoints that a killed
    process had not finished go. No other process may be at work in the folder.

    Args:
        folder: The folder of a stage's checkpoints; need not be there.

    Raises:
        LusiferError: If the disk does not give a file that is there.
    """
    if not folder.is_dir():
        return None
    for unfinished in folder.glob(".saving-*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    found = [path for path in folder.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)]
    found.sort(key=_step)
    while found:
        newest = found.pop()
        if (problem := _damage(newest)) is None:
            return newest
        aside = newest.with_name(f"damaged-{newest.name}")
        shutil.rmtree(aside, ignore_errors=True)
        newest.rename(aside)
        then = f"trying {found[-1].name}" if found else "the stage starts again"
        logger.warning(
            "%s is damaged (%s); %s. It was renamed to %s", newest / problem[0], problem[1], then, aside.name
        )
    return None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _damage(checkpoint: Path) -> tuple[str, str] | None:
    """The first file of a checkpoint that is missing or cannot be read, and why."""
    readers: dict[str, Callable[[Path], Any]] = {
        TRAINABLE: _facts,
        OPTIMIZER: lambda path: _tensors(path)["param_groups"],
        SCHEDULER: lambda path: _tensors(path)["last_epoch"],
        _STATE: lambda path: _check_step(path, _step(checkpoint)),
    }
    for name, read in readers.items():
        if (why := _problem(read, checkpoint / name)) is not None:
            return name, why
    for name in _random_states(checkpoint):
        if (why := _problem(read_random_state, checkpoint / name)) is not None:
            return name, why
    return _changed(checkpoint)


def _changed(checkpoint: Path) -> tuple[str, str] | None:
    """The first file whose content is no longer what was written, and why.

    Checkpoints of earlier versions have no checksums.
    """
    path = checkpoint / _CHECKSUMS
    if not path.exists():
        return None
    if (why := _problem(_sums, path)) is not None:
        return _CHECKSUMS, why
    for name, expected in _sums(path).items():
        if (why := _problem(partial(_check_sum, expected), checkpoint / name)) is not None:
            return name, why
    return None


def _sums(path: Path) -> dict[str, str]:
    sums = json.loads(path.read_text(encoding="utf-8"))[_KIND]
    return {name: str(digest) for name, digest in sums.items()}


def _check_sum(expected: str, path: Path) -> None:
    if _checksum(path) != expected:
        raise ValueError(f"its checksum is not that of {_CHECKSUMS}")


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _problem(read: Callable[[Path], Any], path: Path) -> str | None:
    try:
        path.open("rb").close()
    except FileNotFoundError:
        return "missing"
    except OSError as error:  # Not damage: it is not to be set aside.
        raise LusiferError(f"cannot read the checkpoint file {str(path)!r}: {first_line(error)}") from error
    try:
        read(path)
    except MemoryError:
        raise
    except Exception as error:  # torch raises whatever the bytes lead to, OSError too.
        return "empty" if path.stat().st_size == 0 else first_line(error)[:100]
    return None


def _facts(path: Path) -> dict[str, str]:
    """What the file of the weights says of itself; its length is checked as it is opened."""
    with safe_open(path, "pt") as file:
        facts: dict[str, str] = file.metadata() or {}
    if "loss_sum" not in facts:
        raise SafetensorError("no loss_sum")
    return facts


def _tensors(path: Path) -> Any:
    # Mapped: the file's directory stands at its end, so that a cut one is found without reading gigabytes.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _check_step(path: Path, step: int) -> None:
    found = TrainerState.load_from_json(str(path)).global_step
    if found != step:
        raise ValueError(f"it records step {found}")


def _random_states(checkpoint: Path) -> list[str]:
    """The names of the random generators' states that the checkpoint was written with, one for each process."""
    ranks = _facts(checkpoint / TRAINABLE).get(RANKS)
    if ranks is not None:
        return [_RANDOM] if ranks == "1" else [_RANDOM_OF.format(rank) for rank in range(int(ranks))]
    # Of an earlier version, which did not say how many: at least the first, and no gap.
    numbers = [int(path.stem.removeprefix("rng_state_")) for path in checkpoint.glob("rng_state_*.pth")]
    return [_RANDOM_OF.format(rank) for rank in range(max(numbers) + 1)] if numbers else [_RANDOM]
