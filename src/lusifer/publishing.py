"""How a file or a folder appears on a disk here: complete and synced, or not at all.

It is written under a hidden name, gets the rights of any new file (0666 less the umask) and is synced; a rename puts it
in its place. A lock beside the hidden name tells that its process is alive: what killed ones left unfinished goes when
the same file or folder is written again.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lusifer.errors import LusiferError, first_line

_HIDDEN = re.compile(r"\.(.+)-[0-9a-f]{8}\.lock")


@contextmanager
def publish_file(path: Path, *, scratch: Path | None = None) -> Iterator[Path]:
    """Yields the path of an empty file to write; when the block ends without an error, it becomes ``path``.

    Args:
        path: Where the file shall stand; its folder exists. An older file is replaced.
        scratch: Folder for the unfinished file, on the same file system; ``path``'s own when None.

    Raises:
        OSError: If the file cannot be written; nothing unfinished stays.
    """
    with _unfinished(path, scratch) as staging:
        mode = _create(staging)
        yield staging
        staging.chmod(mode)
        _sync(staging)
        os.replace(staging, path)
        _sync(path.parent)


@contextmanager
def publish_folder(folder: Path, what: str = "folder") -> Iterator[Path]:
    """Yields the path of a new empty folder to fill; when the block ends without an error, it becomes ``folder``.

    Args:
        folder: Where it shall stand; an older folder there is replaced.
        what: What it holds, for the message.

    Raises:
        LusiferError: If the disk is full or not writable; nothing unfinished stays, an older folder does.
    """
    try:
        make_folder(folder.parent)
        with _unfinished(folder) as staging:
            staging.mkdir()
            yield staging
            put_in_place(staging, folder)
    except OSError as error:
        raise LusiferError(f"cannot write the {what} {str(folder)!r}: {first_line(error)}") from error


def put_in_place(staging: Path, folder: Path) -> None:
    """Syncs a folder that is complete and gives it its name, and its files the rights of new ones.

    Args:
        staging: The folder, on the same file system.
        folder: Where it shall stand; an older folder there is replaced.

    Raises:
        OSError: If it cannot be synced or renamed; an older folder stays.
    """
    old = _old(staging)
    _settle(staging)
    try:
        with suppress(FileNotFoundError):
            os.rename(folder, old)
        os.rename(staging, folder)
    except BaseException:
        if not folder.exists():
            with suppress(FileNotFoundError):
                os.rename(old, folder)
        raise
    _sync(folder.parent)
    _remove(old)


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it that are missing, and syncs their names.

    Args:
        folder: The folder; one that is there stays as it is.

    Raises:
        OSError: If it cannot be made.
    """
    missing = [one for one in (folder, *folder.parents) if not one.is_dir()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:  # The folder, or one above it, is a file.
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), error.filename) from error
    for one in missing:
        _sync(one.parent)


def sync_tree(folder: Path, known: dict[str, object] | None = None) -> None:
    """Syncs every file and folder below a folder, and itself, whoever wrote them.

    Args:
        folder: The folder; what others remove from it meanwhile is passed over.
        known: What earlier calls have synced, kept up to date: files of the same size and time, and folders of the same
            entries, are passed over. Not for files that are rewritten in place within a tick of the clock.

    Raises:
        OSError: If something cannot be synced.
    """
    known = {} if known is None else known
    seen = set[str]()

    def sync(path: str, state: object) -> None:
        seen.add(path)
        if known.get(path) != state:
            _sync(Path(path))
            known[path] = state

    for parent, _, names in os.walk(folder):
        for path in (os.path.join(parent, name) for name in names):
            with suppress(FileNotFoundError):
                status = os.lstat(path)
                if not stat.S_ISLNK(status.st_mode):
                    sync(path, (status.st_ino, status.st_size, status.st_mtime_ns))
        with suppress(FileNotFoundError), os.scandir(parent) as entries:
            # By names: the time of a folder may stand still between two changes.
            sync(parent, (os.stat(parent).st_ino, frozenset((entry.name, entry.inode()) for entry in entries)))
    for path in known.keys() - seen:
        del known[path]


def sweep(path: Path, scratch: Path | None = None) -> None:
    """Removes what killed processes left of ``path``; a folder they had moved away, but not replaced, comes back.

    Args:
        path: The file or folder, which need not be there.
        scratch: As for `publish_file`.

    Raises:
        OSError: If its folder cannot be read.
    """
    from filelock import FileLock, Timeout

    folder = scratch or path.parent
    hidden = re.compile(rf"(\.{re.escape(path.name)}-[0-9a-f]{{8}})(\.old|\.lock)?")
    found = {match[1] for name in os.listdir(folder) if (match := hidden.fullmatch(name))}
    for staging in (folder / name for name in found):
        # Timeout says that its process is alive.
        with suppress(Timeout, OSError, NotImplementedError), FileLock(_lock(staging)).acquire(timeout=0):
            if _old(staging).exists() and not path.exists():
                os.rename(_old(staging), path)
            for left in (staging, _old(staging), _lock(staging)):
                _remove(left)


def sweep_folder(folder: Path) -> None:
    """Removes what killed processes left of every file and folder in a folder, as `sweep` does.

    It is known by its locks, which go last; other hidden files stay.

    Args:
        folder: The folder, which need not be there.

    Raises:
        OSError: If it cannot be read.
    """
    names = os.listdir(folder) if folder.is_dir() else []
    for name in {match[1] for match in map(_HIDDEN.fullmatch, names) if match}:
        sweep(folder / name)


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> None:
    """Writes a value as JSON, complete or not at all.

    Args:
        path: Where the file shall stand; its folder exists.
        value: What ``json.dump`` takes.
        indent: As for ``json.dump``.

    Raises:
        OSError: If it cannot be written.
    """
    with publish_file(path) as staging:
        staging.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _unfinished(path: Path, scratch: Path | None = None) -> Iterator[Path]:
    """A hidden name for what becomes ``path``, locked while this process works on it; nothing is left of it."""
    from filelock import FileLock

    folder = scratch or path.parent
    sweep(path, folder)
    staging = folder / f".{path.name}-{secrets.token_hex(4)}"
    lock = FileLock(_lock(staging))
    with suppress(OSError, NotImplementedError):  # Where a disk knows no locks, nobody sweeps either.
        lock.acquire(timeout=0)
    try:
        yield staging
    finally:
        for left in (staging, _old(staging), _lock(staging)):
            _remove(left)
        lock.release()


def _old(staging: Path) -> Path:
    return Path(f"{staging}.old")


def _lock(staging: Path) -> Path:
    return Path(f"{staging}.lock")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _create(path: Path) -> int:
    """Creates an empty file and returns its rights: what the umask of this process leaves."""
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return os.fstat(handle).st_mode & 0o777
    finally:
        os.close(handle)


def _settle(folder: Path) -> None:
    """Gives every file below a folder the rights of a new one, and syncs files and folders."""
    probe = folder / f".rights-{secrets.token_hex(4)}"
    mode = _create(probe)
    probe.unlink()
    for parent, _, names in os.walk(folder):
        for path in (Path(parent, name) for name in names):
            if not path.is_symlink():
                path.chmod(mode)
    sync_tree(folder)


def _sync(path: Path) -> None:
    """Syncs a file or a folder's entries to the disk; Windows has no way to sync a folder."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
