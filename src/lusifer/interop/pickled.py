"""Weights that a hub has as pickles alone, such as google/mt5-large, as safetensors.

torch's unpickler for weights builds tensors and nothing else: a pickle that asks for more is refused unopened.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from lusifer.errors import LusiferError, first_line
from lusifer.hooks.huggingface_hub import settle_hub, why_not_loaded
from lusifer.locks import alone_at_new
from lusifer.publishing import publish_folder
from lusifer.trust import check_folder

_WEIGHTS, _INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_BESIDE = ("*.json", "*.model", "*.txt", "*/config.json")  # Configurations, tokenizers and the modules' settings.


def convert_pickled(source: str, output: Path) -> dict[str, Any]:
    """Writes a model's tensors as safetensors, its configuration and tokenizer beside them.

    Args:
        source: Folder or hub id of a model with ``pytorch_model.bin``, whole or in parts.
        output: The folder to make.

    Returns:
        ``checkpoint``, the folder, and ``tensors``, their number.

    Raises:
        LusiferError: If the source cannot be read or holds more than tensors, or the folder exists.
    """
    with alone_at_new(output):
        return _convert(source, output)


def _convert(source: str, output: Path) -> dict[str, Any]:
    folder = _fetched(source)
    state: dict[str, Any] = {}
    for path in _parts(source, folder):
        state |= _tensors(path)
    with publish_folder(output, "model") as staging:
        save_torch_state_dict(state, staging, filename_pattern="model{suffix}.safetensors", metadata={"format": "pt"})
        for path in sorted({path for pattern in _BESIDE for path in folder.glob(pattern)} - {folder / _INDEX}):
            target = staging / path.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
    return {"checkpoint": str(output), "tensors": len(state)}


def _fetched(source: str) -> Path:
    if (folder := Path(source).expanduser()).is_dir():
        check_folder(repr(source), str(folder))
        return folder
    settle_hub()
    try:
        return Path(snapshot_download(source, allow_patterns=["pytorch_model*.bin", _INDEX, *_BESIDE]))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        raise LusiferError(f"cannot fetch {source!r}: {why_not_loaded(source, error)}") from error


def _parts(source: str, folder: Path) -> Iterator[Path]:
    names = {_WEIGHTS}
    if (index := folder / _INDEX).is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise LusiferError(f"cannot read {str(index)!r}: {first_line(error)}") from error
    for name in sorted(map(str, names)):
        if Path(name).name != name or not (folder / name).is_file():
            raise LusiferError(f"{source!r} has no {name}; give a model whose weights are pytorch_model.bin")
        yield folder / name


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise LusiferError(f"{str(path)!r} is damaged, or holds more than tensors and is not opened") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise LusiferError(f"{str(path)!r} does not contain the weights of one model")
    return state
