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
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import distributed as dist

from lusifer.errors import LusiferError, first_line
from lusifer.locks import alone_at
from lusifer.publishing import make_folder
from lusifer.training.gradient_cache import gather, world

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


def first_process_says(work: Callable[[], Any]) -> Any:
    """What a function gives on the first process, told to all; every process must ask.

    Args:
        work: Runs on the first process alone; what it gives can be pickled.

    Raises:
        LusiferError: On every process, if the function raises one.
    """
    answer: list[Any] = [None]
    if processes().is_main_process:
        try:
            answer = [work()]
        except LusiferError as error:
            answer = [LusiferError(str(error))]  # Without its cause, which may not survive pickling.
    wait_for_all()  # A broadcast times out as training's collectives do.
    told = broadcast_object_list(answer)[0]
    if isinstance(told, LusiferError):
        raise told
    return told


@contextmanager
def alone_in(output: Path) -> Iterator[None]:
    """Keeps other runs out of a folder while a block runs; one process of many holds the lock.

    Args:
        output: The folder.

    Raises:
        LusiferError: On every process, if another run is at work there.
    """
    with ExitStack() as stack:
        first_process_says(lambda: stack.enter_context(alone_at(output)))
        yield


def any_process(answer: bool) -> bool:
    """Whether any process says yes; every process must ask."""
    return bool(gather(torch.tensor(answer, device=processes().device)).any())


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
    sign = output / first_process_says(lambda: _sign(output))
    seen = _appears(sign)
    alone = any_process(not seen)
    sign.unlink(missing_ok=True)
    if not seen:
        raise LusiferError(
            f"{platform.node()}: output {str(output.absolute())!r} is not the folder that the first process "
            "writes to; give a folder that all machines share"
        )
    if alone:
        raise LusiferError(f"output {str(output)!r} is not shared by all machines; see the message of the others")


def _sign(output: Path) -> str:
    """Makes the folder and a file in it; returns the file's name."""
    name = f"{_SIGN}{secrets.token_hex(8)}"
    try:
        make_folder(output)
        for left in output.glob(f"{_SIGN}*"):  # Of a run that was killed.
            left.unlink(missing_ok=True)
        (output / name).touch()
    except OSError as error:
        raise LusiferError(f"cannot write into output {str(output)!r}: {first_line(error)}") from error
    return name


def _appears(path: Path) -> bool:
    end = time.monotonic() + _VISIBLE_WITHIN
    while not (path.parent.is_dir() and path.name in os.listdir(path.parent)):  # Listing refreshes network disks.
        if world()[1] == 1 or time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True
