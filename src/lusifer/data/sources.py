"""Where data lie: files, folders, globs and URLs, and which format a name stands for."""

from __future__ import annotations

import glob
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lusifer.errors import LusiferError
from lusifer.recipes.schema import DataRecipe
from lusifer.starter.text import resolve_data
from lusifer.storage import is_remote, locate, storage_errors, version

_PACKINGS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
_ENDING = re.compile(r"(\.parquet)$|(\.txt|\.jsonl|\.ndjson|\.json|\.csv|\.tsv)(\.gz|\.bz2|\.zst)?$")
READABLE = ".txt, .jsonl, .ndjson, .json, .csv, .tsv (these also .gz, .bz2, .zst) or .parquet"
# Files that are no hub ids, and that are not read here.
_OTHER = (".arrow", ".feather", ".xlsx", ".zip", ".xz", ".pq", ".gz", ".bz2", ".zst")
# How names tell a split in the layout of the hub, as in data/train-00000-of-00002.parquet.
_SPLIT = re.compile(r"(?<![a-z])(train|training|test|testing|valid|validation|val|dev|eval|evaluation)(?![a-z])")
_JSON_HEAD = 1 << 16


class Format(NamedTuple):
    """What a file's name says of its content: ``.txt``, ``.csv``, ..., and how it is packed, e.g. ``gzip``."""

    kind: str
    packing: str | None


def format_of(name: str) -> Format | None:
    """The format a file's name stands for, upper or lower case, or None."""
    ending = _ENDING.search(name.lower())
    return ending and Format(ending[1] or ending[2], ending[3] and _PACKINGS[ending[3]])


def unit_of(name: str) -> str:
    """What a number within a file counts: lines, or rows of Parquet, of a JSON array or of a hub data set."""
    known = format_of(name)
    return "row" if known is None or known.kind in (".json", ".parquet") else "line"


@dataclass(frozen=True)
class InputFile:
    """A file of the input: path or URL, size in bytes, and a text that changes with the content."""

    url: str
    size: int
    version: str

    @property
    def format(self) -> Format:
        """Its format; names of other files are refused or passed over."""
        known = format_of(self.url)
        assert known is not None
        return known


def find_files(source: str, *, output: str | None = None) -> list[InputFile]:
    """The files of an input, sorted by path.

    Args:
        source: A file, a folder (all readable files below it, except names that begin with ``.`` or ``_``) or a glob;
            on this machine, ``s3://``, ``gs://``, ``hf://``. What exists under this very name is no glob.
        output: What the command writes: nothing in it is input, even where it lies inside the input folder.

    Raises:
        LusiferError: If there are none, or a name stands for no format that is read here.
    """
    fs, path = locate(source)
    with storage_errors(source):
        if fs.isdir(path):
            names = [name for name in fs.find(path) if _is_data(fs, name, below=path)]
        elif fs.exists(path):
            if format_of(path) is None:
                raise LusiferError(f"unknown format: {source!r}; name it {READABLE}")
            return [_describe(fs, path, source)]
        elif glob.has_magic(path):
            names = [name for name in _glob(fs, path, source) if format_of(name) and fs.isfile(name)]
        else:
            here = "" if is_remote(source) else f" (relative paths start at {str(Path.cwd())!r})"
            raise LusiferError(f"no such file: {source!r}{here}")
        if not (names := sorted(_outside(names, source, output))):
            problem = "no such file: nothing matches" if glob.has_magic(path) and not fs.exists(path) else "no data in"
            raise LusiferError(f"{problem} {source!r}; names end in {READABLE}")
        return [_describe(fs, name, source) for name in names]


def _describe(fs: Any, name: str, source: str) -> InputFile:
    info, url = fs.info(name), fs.unstrip_protocol(name) if is_remote(source) else name
    return InputFile(url, int(info.get("size") or 0), version(info))


def is_unchanged(file: InputFile) -> bool:
    """Whether a file still has the size and the version that it was found with.

    Raises:
        LusiferError: If it is gone, or its store cannot be reached.
    """
    fs, path = locate(file.url)
    with storage_errors(file.url):
        fs.invalidate_cache()  # A store's listing of before would say what was.
        info = fs.info(path)
    return (int(info.get("size") or 0), version(info)) == (file.size, file.version)


def _is_data(fs: Any, name: str, *, below: str) -> bool:
    """Whether a file in a folder is data rather than hidden, of another format, or a configuration in JSON."""
    if any(part.startswith((".", "_")) for part in name.removeprefix(below).split("/") if part):
        return False
    known = format_of(name)
    if known != Format(".json", None):
        return known is not None
    head = fs.cat_file(name, start=0, end=_JSON_HEAD).removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(b"[") or len(head) == 0:
        return bool(head)
    try:
        return isinstance(json.loads(head.split(b"\n", 1)[0]), dict)
    except ValueError:
        return b"\n" not in head and len(head) > _JSON_HEAD // 2  # The first record is longer than what was read.


def _glob(fs: Any, pattern: str, source: str) -> list[str]:
    if is_remote(source):
        return list(fs.glob(pattern))
    # Folders that exist are taken by their names, brackets and all.
    parts = pattern.split("/")
    depth = max(n for n in range(1, len(parts)) if os.path.isdir("/".join(parts[:n]) or "/"))
    base = "/".join(parts[:depth]) or "/"
    return [os.path.join(base, name) for name in glob.glob("/".join(parts[depth:]), root_dir=base, recursive=True)]


def _outside(names: list[str], source: str, output: str | None) -> list[str]:
    if output is None or is_remote(source) != is_remote(output):
        return names
    real = (lambda name: name) if is_remote(source) else os.path.realpath
    written = real(locate(output.rstrip("/"))[1])
    return [name for name in names if real(name) != written and not real(name).startswith(written + "/")]


def files_of_recipe(item: DataRecipe) -> list[InputFile] | None:
    """The files behind a set of a recipe, or None for a hub id or a folder in the layout of the hub.

    Raises:
        LusiferError: As `find_files`.
    """
    source = resolve_data(item.source)
    path = Path(source).expanduser()
    if "://" not in source and path.is_dir():
        return None if _is_hub_folder(path, item) else find_files(source)
    named = format_of(path.name) is not None or path.suffix.lower() in _OTHER or path.is_absolute()
    if named or path.exists() or glob.has_magic(source) or source.startswith(".") or source.count("/") > 1:
        return find_files(source)
    return None


def _is_hub_folder(path: Path, item: DataRecipe) -> bool:
    """Whether a folder has splits or a data card, or holds formats that only `datasets` reads."""
    if item.subset or item.split != "train" or (path / "README.md").is_file():
        return True
    names = [str(name.relative_to(path)) for name in path.rglob("*") if format_of(name.name)]
    return not names or any(_SPLIT.search(name.lower()) for name in names)
