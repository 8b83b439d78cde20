"""The processes of a run: connected, waiting for each other as long as it takes, on one output folder.

Collectives of training time out after minutes, which shows that a process has died. Preparing data, stage 0 and writing
a model take longer than that on one process while the others wait; those waits are a group of their own.
"""

from __future__ import annotations

import os
import platform
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from torch import distributed as dist

from lusifer.errors import LusiferError, first_line
from lusifer.publishing import make_folder
from lusifer.training.gradient_cache import gather, world

_T = TypeVar("_T")
_PATIENCE = timedelta(days=7)
_SIGN = ".lusifer-"
_VISIBLE_WITHIN = 30.0  # Seconds, after which a file on a network disk is seen by every machine.


def processes() -> PartialState:
    """The processes torchrun started, connected; a single one otherwise."""
    return PartialState(cpu=not torch.accelerator.is_available())


@cache
def _waiting() -> Any:
    return dist.new_group(backend="gloo", timeout=_PATIENCE)


def wait_for_all() -> None:
    """Waits until every process is here, however long one of them works on."""
    if world()[1] > 1:
        dist.barrier(group=_waiting())


@contextmanager
def first_process_first() -> Iterator[None]:
    """Runs a block on the first process, then on all others: they find cached what it has downloaded and read."""
    first = processes().is_main_process
    if not first:
        wait_for_all()
    try:
        yield
    finally:
        if first:
            wait_for_all()


def any_process(answer: bool) -> bool:
    """Whether any process says yes; every process must ask."""
    return bool(gather(torch.tensor(answer, device=processes().device)).any())


def from_first(decide: Callable[[], _T]) -> _T:
    """What the first process decides, on every process; so is its LusiferError. Every process must ask."""
    answer: list[Any] = [None]
    if processes().is_main_process:
        try:
            answer = [decide()]
        except LusiferError as error:  # The others wait for an answer.
            answer = [error]
    wait_for_all()
    decided: Any = broadcast_object_list(answer)[0]
    if isinstance(decided, LusiferError):
        raise decided
    return cast(_T, decided)


@contextmanager
def alone_in(output: Path) -> Iterator[None]:
    """Makes a run's folder and keeps other runs out of it while a block runs; what a killed one left of this goes.

    Args:
        output: The folder.

    Raises:
        LusiferError: If it cannot be written to, or another run is at work in it.
    """
    lock = FileLock(output / ".lock")

    def enter() -> None:
        try:
            make_folder(output)
            with suppress(NotImplementedError):  # A disk without locks.
                lock.acquire(timeout=0)
        except Timeout as error:
            raise LusiferError(f"another run is at work in {str(output)!r}; wait for it, or choose another") from error
        except OSError as error:
            raise LusiferError(f"cannot write into output {str(output)!r}: {first_line(error)}") from error
        for left in output.glob(f"{_SIGN}*"):
            left.unlink(missing_ok=True)

    from_first(enter)
    try:
        yield
    finally:
        if lock.is_locked:
            (output / ".lock").unlink(missing_ok=True)
        lock.release()


def on_machine() -> tuple[int, int]:
    """This process's number among those of its machine, and how many they are."""
    return processes().local_process_index, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def check_output(output: Path) -> None:
    """Makes a run's folder, and refuses one that not every process sees: checkpoints are read by all of them.

    Args:
        output: The folder.

    Raises:
        LusiferError: If it cannot be written to, or a process has another folder under this name.
    """
    sign = output / f"{_SIGN}{secrets.token_hex(8)}"

    def leave() -> str:
        try:
            make_folder(output)
            sign.touch()
        except OSError as error:
            raise LusiferError(f"cannot write into output {str(output)!r}: {first_line(error)}") from error
        return sign.name

    name = from_first(leave)
    seen = _appears(output / name)
    alone = any_process(not seen)
    sign.unlink(missing_ok=True)
    if not seen:
        raise LusiferError(
            f"{platform.node()}: output {str(output.absolute())!r} is not the folder that the first process "
            "writes to; give a folder that all machines share"
        )
    if alone:
        raise LusiferError(f"output {str(output)!r} is not shared by all machines; see the message of the others")


def _appears(path: Path) -> bool:
    end = time.monotonic() + _VISIBLE_WITHIN
    while not (path.parent.is_dir() and path.name in os.listdir(path.parent)):  # Listing refreshes network disks.
        if world()[1] == 1 or time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True
