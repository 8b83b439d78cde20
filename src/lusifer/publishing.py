"""How a file or a folder appears on a disk here: complete and synced, or not at all.

It is written under a hidden name, gets the rights of any new file (0666 less the umask) and is synced; a rename puts it
in its place.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lusifer.errors import LusiferError, first_line


@contextmanager
def publish_file(path: Path, *, scratch: Path | None = None) -> Iterator[Path]:
    """Yields the path of an empty file to write; when the block ends without an error, it becomes ``path``.

    Args:
        path: Where the file shall stand; its folder exists. An older file is replaced.
        scratch: Folder for the unfinished file, on the same file system; ``path``'s own when None.

    Raises:
        OSError: If the file cannot be written; nothing unfinished stays.
    """
    staging = _hidden(path, scratch)
    mode = _create(staging)
    try:
        yield staging
        staging.chmod(mode)
        _sync(staging)
        os.replace(staging, path)
        _sync(path.parent)
    finally:
        staging.unlink(missing_ok=True)


@contextmanager
def publish_folder(folder: Path, what: str = "folder") -> Iterator[Path]:
    """Yields the path of a new empty folder to fill; when the block ends without an error, it becomes ``folder``.

    Args:
        folder: Where it shall stand; an older folder there is replaced.
        what: What it holds, for the message.

    Raises:
        LusiferError: If the disk is full or not writable; nothing unfinished stays, an older folder does.
    """
    staging, old = _hidden(folder), _hidden(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        yield staging
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
    except OSError as error:
        raise LusiferError(f"cannot write the {what} {str(folder)!r}: {first_line(error)}") from error
    finally:
        for leftover in (staging, old):
            shutil.rmtree(leftover, ignore_errors=True)


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


def _hidden(path: Path, scratch: Path | None = None) -> Path:
    return (scratch or path.parent) / f".{path.name}-{secrets.token_hex(4)}"


def _create(path: Path) -> int:
    """Creates an empty file and returns its rights: what the umask of this process leaves."""
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return os.fstat(handle).st_mode & 0o777
    finally:
        os.close(handle)


def _settle(folder: Path) -> None:
    """Gives every file below a folder the rights of a new one, and syncs files and folders."""
    probe = _hidden(folder / "rights")
    mode = _create(probe)
    probe.unlink()
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if not path.is_symlink():
                path.chmod(mode)
                _sync(path)
        _sync(Path(parent))


def _sync(path: Path) -> None:
    """Syncs a file or a folder's entries to the disk; Windows has no way to sync a folder."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
