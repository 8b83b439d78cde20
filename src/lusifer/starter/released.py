"""The released starter model: what training changed is inside the package, the encoder comes from the cache.

It embeds texts of many languages into the vector space of all-MiniLM-L6-v2. The package carries the changes of the
encoder's weights and the head (`lusifer.starter.packed`) and the configuration. `assemble` adds the changes to the
encoder's weights and puts them beside its tokenizer into one folder, which everything opens like any other model.
"""

from __future__ import annotations

import hashlib
import shutil
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING

from lusifer.errors import LusiferError
from lusifer.locks import alone_at, tidy
from lusifer.publishing import publish_folder
from lusifer.starter.fetch import cache_dir, starter_path

if TYPE_CHECKING:
    from torch import Tensor

NAME = "starter"
BASE = "multilingual-e5-small"
CHANGES = "changes.safetensors"
WEIGHTS = "model.safetensors"
_PREFIX = "encoder."  # Of the encoder's weights in the model.
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def assemble(source: Path | None = None) -> Path:
    """The released model as a folder, made on first use; no network.

    Args:
        source: Folder of the release; the package's own when None.

    Raises:
        LusiferError: If the encoder is not fetched, or the cache cannot be written.
    """
    if source is None:
        with as_file(files("lusifer") / "resources" / NAME) as packaged:
            return assemble(packaged)
    base = starter_path(BASE)
    released = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
    digest = hashlib.sha256()
    for name in released:
        digest.update(str(name).encode() + (source / name).read_bytes())
    folder = cache_dir() / "models" / f"{NAME}-{digest.hexdigest()[:12]}"
    if folder.is_dir():
        tidy(folder)
        return folder
    with alone_at(folder, wait=True):
        if not folder.is_dir():
            _assemble(source, base, folder)
    return folder


def _assemble(source: Path, base: Path, folder: Path) -> None:
    with publish_folder(folder, "released model") as staging:
        shutil.copytree(source, staging, dirs_exist_ok=True, ignore=shutil.ignore_patterns(CHANGES))
        for file in _TOKENIZER:
            shutil.copyfile(base / file, staging / file)
        _add_changes(base / WEIGHTS, source / CHANGES, staging / WEIGHTS)


def _add_changes(base: Path, changes: Path, target: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    from lusifer.starter.packed import unpack

    try:
        tensors = {f"{_PREFIX}{name}": value for name, value in load_file(base).items()}
        for name, value in unpack(load_file(changes)).items():
            tensors[name] = tensors[name].float() + value if name.startswith(_PREFIX) else value
    except (OSError, SafetensorError, KeyError) as error:
        raise LusiferError(f"the released model cannot be assembled: {error}; run `lusifer fetch --force`") from error
    save_file(tensors, target, metadata={"format": "pt"})


def changes_of(base: dict[str, Tensor], model: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `assemble` needs of a trained model's weights: differences from the base, and all that is not in it.

    Args:
        base: Weights of the encoder as it is fetched.
        model: Weights of the trained model, the encoder's as ``encoder.NAME``.
    """
    changes = {}
    for name, value in model.items():
        before = base.get(name.removeprefix(_PREFIX)) if name.startswith(_PREFIX) else None
        difference = value.float() if before is None else value.float() - before.float()
        if before is None or bool(difference.any()):
            changes[name] = difference
    return changes
