"""One process at a time on a place that a user names.

The lock is a hidden file beside the place, ``.NAME.lock``, there while somebody works. The system lets go of it when
the process ends, however it ends; what a killed one leaves of it is taken by the next.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from lusifer.errors import LusiferError, first_line
from lusifer.publishing import make_folder, sweep

INSIDE = ".lusifer.lock"  # Its name within a folder whose own parent cannot be written, such as a mounted disk.
_WITHOUT = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

logger = logging.getLogger(__name__)


class BusyError(LusiferError):
    """Another process is at work in a place."""


@contextmanager
def alone_at(place: str | Path, *, wait: bool = False) -> Iterator[None]:
    """Keeps other processes out of a place while a block runs; a block within a block of one thread is let through.

    Args:
        place: A file or a folder, which need not be there; the folder it stands in is made.
        wait: Wait for another process to end, instead of refusing.

    Raises:
        BusyError: If another process is at work there.
        LusiferError: If nothing can be written there.
    """
    lock = _acquired(Path(os.path.realpath(place)), str(place), wait)
    try:
        yield
    finally:
        if lock is not None:
            if lock.lock_counter == 1:
                with suppress(OSError):  # Windows removes nothing that is open.
                    os.unlink(lock.lock_file)
            lock.release()


@contextmanager
def alone_at_new(place: Path) -> Iterator[None]:
    """As `alone_at`, of a place where nothing is yet.

    Args:
        place: The file or folder to be made.

    Raises:
        LusiferError: As there, or if it exists.
    """
    if place.exists():
        tidy(place)
    _refuse_existing(place)  # Before anything is made beside it.
    with alone_at(place):
        _refuse_existing(place)
        yield


def tidy(place: Path, also: Callable[[], None] | None = None) -> None:
    """Removes what a process that was killed in its last moments left beside a place that is finished.

    It is known by its lock; whoever goes on with a place takes that himself. Nothing is done while another process is
    at work there, nor where nothing may be written.

    Args:
        place: The file or folder.
        also: Removes what else it may have left.
    """
    if _beside(Path(os.path.realpath(place))).exists():
        with suppress(LusiferError, OSError), alone_at(place):
            sweep(place)
            if also is not None:
                also()


def _refuse_existing(place: Path) -> None:
    if place.exists():
        raise LusiferError(f"{str(place)!r} already exists; choose a new folder")


def _acquired(place: Path, shown: str, wait: bool) -> FileLock | None:
    """The lock, taken; None where the file system knows no locks."""
    beside = _beside(place)
    try:
        make_folder(place.parent)
        try:
            return _take(beside, shown, wait)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or not place.is_dir():
                raise
            return _take(place / INSIDE, shown, wait)
    except NotImplementedError:
        pass
    except OSError as error:
        if error.errno not in _WITHOUT:
            raise LusiferError(f"cannot write {shown!r}: {first_line(error)}") from error
    logger.warning("the file system of %s does not support locks: run only one command on it at a time", shown)
    return None


def _beside(place: Path) -> Path:
    return place.with_name(f".{place.name}.lock")


def _take(path: Path, shown: str, wait: bool) -> FileLock:
    while True:
        # The same object for the same path, which counts how often its thread has taken it.
        lock = FileLock(path, is_singleton=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                busy = f"another process is using {shown!r}; wait for it, or choose another place"
                raise BusyError(busy) from None
            logger.info("another process is using %s; waiting for it", shown)
            lock.acquire(timeout=-1)
        if lock.lock_counter > 1 or _is_at(path, lock):
            return lock
        lock.release()  # Whoever had it before has removed the file: this one keeps nobody out.


def _is_at(path: Path, lock: FileLock) -> bool:
    """Whether the file that a lock holds is still the one at its path; reads filelock's private descriptor."""
    descriptor = lock._context.lock_file_fd
    try:
        return descriptor is not None and os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False
