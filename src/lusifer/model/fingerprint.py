"""fingerprint."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import nn

_HASHED = (".safetensors", ".json", ".model", ".txt", ".bin")


def files_hash(folder: Path, salt: str = "") -> str:
    """Hash of what a model's folder holds, names included; 16 hex digits.

    Args:
        folder: The folder.
        salt: Tells uses of the same files apart.
    """
    digest = hashlib.sha256(salt.encode())
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in _HASHED):
        digest.update(str(path.relative_to(folder)).encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


_SAMPLED = 1024  # Values of a weight that go into its hash.


@torch.no_grad()
def weights_hash(model: nn.Module) -> str:
    """Hash of a model's weights: names, shapes and at most 1024 values of each, rounded to bfloat16.

    Rounding makes a model loaded in float32 and in bfloat16 the same one, as its vectors nearly are. Weights that have
    an adapter beside them are left out: folded or not, and on whatever machine, it is the same model.

    Args:
        model: The loaded model, on any device.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        if ".base_layer." in name:
            continue
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        flat = weight.reshape(-1)
        part = flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED].to(torch.bfloat16)
        digest.update(part.view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
