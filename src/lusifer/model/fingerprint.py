"""Which model is it? One identity for each thing that can be asked.

`model_hash` is of a checkpoint's files, or its name and commit on a hub: outputs made with it. `weights_hash` is of a
loaded model, merged or not and in any precision: an index of its vectors. `files_fingerprint` is of a sample of the
values in a backbone's files: a checkpoint that names it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lusifer.hooks.transformers import cached_or_none
from lusifer.model.checkpoint import WEIGHTS
from lusifer.starter.names import resolve_backbone

_HASHED = (".safetensors", ".json", ".model", ".txt", ".bin")
_SAMPLED = 1024  # Values of a weight that go into `weights_hash`.
_READ = 64  # Values of a tensor that go into `files_fingerprint`.


def model_hash(name: str, salt: str = "") -> str:
    """Hash of a model's files, names included, or of its name and commit on a hub: 16 hexadecimal digits.

    Args:
        name: Folder, hub id or starter backbone.
        salt: Tells uses of the same model apart, such as ``encoder:``.
    """
    digest = hashlib.sha256(salt.encode())
    folder = Path(resolve_backbone(name))
    if folder.is_dir():
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in _HASHED):
            digest.update(str(path.relative_to(folder)).encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    else:
        try:
            config = cached_or_none(name, "config.json")
        except (OSError, ValueError):
            config = None
        digest.update(f"{name} {Path(config).parent.name if config else ''}".encode())
    return digest.hexdigest()[:16]


@torch.no_grad()
def weights_hash(model: nn.Module) -> str:
    """Hash of a loaded model's weights, 16 hexadecimal digits: names, shapes and at most 1024 values of each.

    Rounding to bfloat16 makes a model loaded in float32 and in bfloat16 the same one, as its vectors nearly are.
    Weights that have an adapter beside them are left out: merged in place or not, it is the same model.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        if ".base_layer." in name:
            continue
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        flat = weight.reshape(-1)
        digest.update(_rounded(flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED]))
    return digest.hexdigest()[:16]


def files_fingerprint(name: str, **hub: Any) -> str | None:
    """Hash of the weights a folder or hub id holds: tensor names, shapes and up to 64 values of each, as bfloat16.

    Reads safetensors slices: a model of 14 GB takes a few hundred small reads.

    Args:
        name: Folder or hub id.
        **hub: ``token``, ``revision``, ...

    Returns:
        16 hexadecimal digits; None where there are no readable safetensors, which loading then says.
    """
    samples: dict[str, bytes] = {}
    try:
        for path in set(weight_files(name, **hub).values()):
            with safe_open(path, "pt") as file:
                samples |= {tensor: _sample(file, tensor) for tensor in file.keys()}  # noqa: SIM118  Not a mapping.
    except (OSError, ValueError, KeyError, SafetensorError):
        return None
    content = b"".join(tensor.encode() + samples[tensor] for tensor in sorted(samples))
    return hashlib.sha256(content).hexdigest()[:16] if samples else None


def _sample(file: Any, tensor: str) -> bytes:
    """Shape and first values of the row in the middle of a tensor."""
    view = file.get_slice(tensor)
    shape = view.get_shape()
    middle = tuple(slice(size // 2, size // 2 + 1) for size in shape[:-1])
    values = view[(*middle, slice(0, _READ))] if shape else file.get_tensor(tensor)
    return str(tuple(shape)).encode() + _rounded(values.reshape(-1))


def weight_files(name: str, **hub: Any) -> dict[str, Path]:
    """The safetensors file of every tensor of a model; empty where it has none.

    Args:
        name: Folder, hub id or starter backbone.
        **hub: ``token``, ``revision``, ...

    Raises:
        OSError: If a file that the index names is missing, or the hub refuses.
        SafetensorError: If a file is damaged.
        ValueError: If the index is damaged or names a file elsewhere.
    """
    where = resolve_backbone(name)
    index = cached_or_none(where, f"{WEIGHTS}.index.json", **hub)
    if index is not None:
        weight_map = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        if outside := [file for file in weight_map.values() if Path(file).name != file]:
            raise ValueError(f"its index names {outside[0]!r}, which is outside of its folder")
        paths = {file: Path(cached_or_none(where, file, **hub) or file) for file in set(weight_map.values())}
        return {tensor: paths[file] for tensor, file in weight_map.items()}
    single = cached_or_none(where, WEIGHTS, **hub)
    if single is None:
        return {}
    with safe_open(single, "pt") as file:
        return dict.fromkeys(file.keys(), Path(single))


def _rounded(values: Tensor) -> bytes:
    return values.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes()
