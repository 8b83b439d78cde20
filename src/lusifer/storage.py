"""Files here and in object stores under one face, through fsspec; what goes wrong there is one line."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from lusifer.errors import LusiferError, first_line
from lusifer.publishing import make_folder, publish_file
from lusifer.terminal import without_secrets

# Libraries behind fsspec whose exceptions tell of the store, not of a defect of ours.
_CLIENTS = {"botocore", "aiobotocore", "s3fs", "gcsfs", "google", "aiohttp", "huggingface_hub", "fsspec", "httpx"}
_SCHEMES = {"s3": "s3fs", "gs": "gcsfs"}


def is_remote(url: str) -> bool:
    """Whether a path names something in a store rather than a file of this machine."""
    return "://" in url and not url.startswith(("file://", "local://"))


def locate(url: str) -> tuple[Any, str]:
    """The fsspec filesystem of a path or URL, and the path there; raises as `storage_errors`."""
    with storage_errors(url):
        return url_to_fs(url if is_remote(url) else str(Path(url).expanduser()))


@contextmanager
def storage_errors(url: str, verb: str = "read") -> Iterator[None]:
    """Turns what a file system or a store refuses into one line.

    Args:
        url: What is worked on.
        verb: ``read`` or ``write``.

    Raises:
        LusiferError: In place of errors of operating system, store or network.
    """
    try:
        yield
    except LusiferError:
        raise
    except Exception as error:
        scheme = url.split("://")[0] if is_remote(url) else ""
        known = isinstance(error, (OSError, ImportError)) or type(error).__module__.split(".")[0] in _CLIENTS
        if not known and not (scheme and isinstance(error, ValueError)):
            raise
        raise LusiferError(f"cannot {verb} {url!r}: {_reason(error, scheme)}") from error


def _reason(error: Exception, scheme: str) -> str:
    if isinstance(error, ImportError):
        return f"{scheme}:// needs {_SCHEMES.get(scheme, 'a library')}: pip install 'lusifer[remote]'"
    if "Credential" in type(error).__name__:
        where = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE" if scheme == "s3" else "your credentials"
        return f"no credentials; set {where}"
    if isinstance(error, FileNotFoundError) and scheme:
        return f"no such bucket or file ({first_line(error)})"
    if isinstance(error, PermissionError) and scheme:
        return f"not allowed ({first_line(error)}); check the credentials and the bucket's rights"
    return first_line(error)


def version(info: dict[str, Any]) -> str:
    """What of a file's facts changes with its content: a store's tag, else the time of its last change."""
    names = ("ETag", "etag", "md5Hash", "blob_id", "generation", "mtime", "LastModified", "last_modified", "updated")
    return str(next((info[name] for name in names if info.get(name) is not None), ""))


class Folder:
    """A folder of whole files, here or in a store; its methods raise as `storage_errors`.

    Args:
        url: Path or URL.
        scratch: Sub-folder for files that are being written; they lie in the folder itself when None.
    """

    def __init__(self, url: str, scratch: str | None = ".staging") -> None:
        self.url = url.rstrip("/")
        self.remote = is_remote(url)
        self.fs, self.root = locate(self.url)
        # A rename is atomic only within one file system.
        self.staging = None if self.remote else Path(self.root) / (scratch or "")

    def make(self) -> None:
        """Creates the folder."""
        with storage_errors(self.url, "write"):
            if self.staging is not None:
                make_folder(self.staging)

    def names(self) -> set[str]:
        """Names of the files in the folder; none where there is no folder."""
        self.fs.invalidate_cache()
        with storage_errors(self.url):
            try:
                return {str(path).rsplit("/", 1)[1] for path in self.fs.ls(self.root, detail=False)}
            except FileNotFoundError:
                return set()

    def path(self, name: str) -> str:
        """Path of a file within ``fs``."""
        return f"{self.root}/{name}"

    @contextmanager
    def put(self, name: str) -> Iterator[Path]:
        """Yields the path of a file to write, which becomes ``name`` when the block ends, complete or not at all."""
        with storage_errors(f"{self.url}/{name}", "write"):
            if not self.remote:
                with publish_file(Path(self.path(name)), scratch=self.staging) as path:
                    yield path
                return
            with tempfile.TemporaryDirectory() as folder:
                yield Path(folder, name)
                # One put, or a multipart upload completed at its end: a reader sees all of it or nothing.
                self.fs.put_file(str(Path(folder, name)), self.path(name))

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A JSON object, or None where there is no such file; anything else is an error."""
        with storage_errors(f"{self.url}/{name}"):
            try:
                value = json.loads(self.fs.cat_file(self.path(name)))
            except FileNotFoundError:
                return None
            except ValueError as error:
                raise LusiferError(f"{self.url}/{name} is damaged ({error}); remove the folder") from error
        if not isinstance(value, dict):
            raise LusiferError(f"{self.url}/{name} is damaged (no JSON object); remove the folder")
        return value

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Writes a JSON object, complete or not at all."""
        with self.put(name) as path:
            path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def open_file(url: str) -> Any:
    """A file to read bytes from, here or in a store."""
    fs, path = locate(url)
    return fs.open(path, "rb")


def without_paths(value: Any) -> Any:
    """A recipe's values, paths of the machine shortened to the file's name, and passwords in URLs masked."""
    if isinstance(value, dict):
        return {key: without_paths(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_paths(part) for part in value]
    if isinstance(value, str) and (value.startswith(("/", "~", "..")) or re.match(r"[A-Za-z]:\\", value)):
        return Path(value.replace("\\", "/")).name
    return without_secrets(value)
