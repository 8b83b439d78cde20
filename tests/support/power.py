"""A disk that loses what was not synced when the power goes.

Only files whose last change was synced keep their content; the others are empty. Of the names in a folder, a cut keeps
at least those of its last sync; a kind one keeps also what was made, renamed or removed since.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path


class Disk:
    """What is safe below a folder, seen through ``os.fsync``; libraries may write by whatever way.

    Args:
        root: The folder; what it holds now is safe.
        vault: An empty folder on the same disk, where content is kept that a cut brings back.
        monkeypatch: Of the test.
    """

    def __init__(self, root, vault, monkeypatch):
        self.root, self.vault = root, vault
        self.content, self.names, self.held = {}, {}, {}
        for folder, _, files in os.walk(root):
            for file in files:
                self.sync(Path(folder, file))
            self.sync(Path(folder))
        real = os.fsync

        def fsync(handle):
            real(handle)
            path = Path(os.readlink(f"/proc/self/fd/{handle}"))
            if path == root or root in path.parents:
                self.sync(path)

        monkeypatch.setattr(os, "fsync", fsync)

    def sync(self, path):
        """Notes that a file's content or a folder's names are safe."""
        status = path.stat()
        if path.is_dir():
            self.names[status.st_ino] = {entry.name: entry.inode() for entry in os.scandir(path)}
            self._hold(status.st_ino, path)
            for entry in os.scandir(path):
                self._hold(entry.inode(), Path(entry.path))
        else:
            self.content[status.st_ino] = (status.st_mtime_ns, status.st_size)

    def _hold(self, inode, path):
        """Keeps what may be removed, and the removal be lost; nor does its number go to another file."""
        if inode in self.held:
            return
        self.held[inode] = self.vault / str(inode)
        if path.is_dir():
            os.open(path, os.O_RDONLY)  # As long as the test's process lives.
        else:
            os.link(path, self.held[inode])

    def cut(self, target, *, kind):
        """Writes into a new folder what is there after a power cut at this moment."""
        self._folders = {os.stat(folder).st_ino: Path(folder) for folder, _, _ in os.walk(self.root)}
        self._restore(self.root.stat().st_ino, target, kind)

    def _restore(self, inode, target, kind):
        target.mkdir()
        folder = self._folders.get(inode)
        now = {entry.name: entry.inode() for entry in os.scandir(folder)} if folder else {}
        for name, number in (now if kind else self.names.get(inode, {})).items():
            if number in self._folders or number in self.names:
                self._restore(number, target / name, kind)
                continue
            there = folder / name if now.get(name) == number else self.held[number]
            status = there.stat()
            if self.content.get(number) == (status.st_mtime_ns, status.st_size):
                shutil.copy2(there, target / name)
            else:
                (target / name).touch()
