"""The released starter model: trained weights inside the package, backbones and tokenizer from the cache.

The package carries what training changed (connector and adapters, float16) and the configuration.
`assemble` puts them beside the encoder's tokenizer into one checkpoint folder in the cache, which
Sentence Transformers, MTEB and everything else open like any other.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from importlib.resources import as_file, files
from pathlib import Path

from lusifer.errors import LusiferError
from lusifer.starter.fetch import cache_dir, starter_path

NAME = "starter"
_TOKENIZER = "tokenizer.json"


def assemble(source: Path | None = None) -> Path:
    """The released model as a checkpoint folder, made on first use; touches no network.

    Args:
        source: Folder of the release; the one in the package when None.

    Raises:
        LusiferError: If the backbones are not fetched, or the cache cannot be written.
    """
    if source is None:
        with as_file(files("lusifer") / "resources" / NAME) as packaged:
            return assemble(packaged)
    tokenizer = starter_path("use-multilingual")
    starter_path("smollm2-135m")
    released = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
    digest = hashlib.sha256()
    for name in released:
        digest.update(str(name).encode() + (source / name).read_bytes())
    folder = cache_dir() / "models" / f"{NAME}-{digest.hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{NAME}-") as scratch:
            staging = Path(scratch) / "model"
            shutil.copytree(source, staging)
            shutil.copyfile(tokenizer / _TOKENIZER, staging / _TOKENIZER)
            if not folder.is_dir():  # Another process may have been faster.
                os.replace(staging, folder)
    except OSError as error:
        if not folder.is_dir():
            reason = error.strerror or error
            raise LusiferError(f"cannot write the released model into {str(folder.parent)!r}: {reason}") from error
    return folder


def resolve_model(name_or_path: str) -> str:
    """Maps ``starter`` to the released model's folder and returns everything else unchanged.

    Raises:
        LusiferError: If it is the starter and its backbones are not fetched.
    """
    if name_or_path == NAME and not Path(name_or_path).exists():
        return str(assemble())
    return name_or_path
