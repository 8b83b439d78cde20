"""The released starter model: trained weights inside the package, backbones and tokenizer from the cache.

The package carries what training changed (connector and adapters, float16) and the configuration. `assemble` puts them
beside the encoder's tokenizer into one checkpoint folder, which everything opens like any other.
"""

from __future__ import annotations

import hashlib
import shutil
from importlib.resources import as_file, files
from pathlib import Path

from lusifer.publishing import publish_folder
from lusifer.starter.fetch import cache_dir, starter_path

NAME = "starter"
_TOKENIZER = "tokenizer.json"


def assemble(source: Path | None = None) -> Path:
    """The released model as a checkpoint folder, made on first use from ``source``, the package's own when None; no
    network.

    Raises:
        LusiferError: If the backbones are not fetched, or the cache cannot be written.
    """
    if source is None:
        with as_file(files("lusifer") / "resources" / NAME) as packaged:
            return assemble(packaged)
    tokenizer = starter_path("multilingual-e5-small")
    starter_path("smollm2-135m")
    released = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
    digest = hashlib.sha256()
    for name in released:
        digest.update(str(name).encode() + (source / name).read_bytes())
    folder = cache_dir() / "models" / f"{NAME}-{digest.hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    with publish_folder(folder, "released model") as staging:
        shutil.copytree(source, staging, dirs_exist_ok=True)
        shutil.copyfile(tokenizer / _TOKENIZER, staging / _TOKENIZER)
    return folder
