"""Changes of weights in 4 bits: what training added to a public model, small enough for a package.

A matrix is stored in blocks of 32 values of a row: a float16 scale and a code of four bits each, as in GGUF's Q4_0.
Everything else is stored as it is, in float16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 32
_CODES, _SCALE = ".codes", ".scale"


def pack(tensors: Mapping[str, Tensor], *, whole: str = "") -> dict[str, Tensor]:
    """Packs matrices.

    Args:
        tensors: By name; matrices (n, m) with m a multiple of 32 are packed, others become float16.
        whole: Name of a matrix that is not packed.

    Returns:
        ``NAME.codes`` (n, m / 2) uint8 and ``NAME.scale`` (n, m / 32) float16 for each matrix, and the others.
    """
    import torch

    packed = {}
    for name, value in tensors.items():
        if value.dim() != 2 or value.shape[1] % BLOCK or name == whole:
            packed[name] = value.half().contiguous()
            continue
        blocks = value.float().unflatten(1, (-1, BLOCK))
        # The value of largest magnitude becomes code -8, the one code without a counterpart.
        scale = (blocks.gather(2, blocks.abs().argmax(2, keepdim=True)) / -8).half()
        divisor = torch.where(scale == 0, 1, scale).float()
        codes = (torch.round(blocks / divisor).clamp(-8, 7) + 8).to(torch.uint8)
        half = BLOCK // 2
        packed[name + _CODES] = (codes[..., :half] | (codes[..., half:] << 4)).flatten(1).contiguous()
        packed[name + _SCALE] = scale.squeeze(2).contiguous()
    return packed


def unpack(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The float32 tensors of what `pack` gave."""
    import torch

    tensors = {name: value.float() for name, value in packed.items() if not name.endswith((_CODES, _SCALE))}
    for name in (name.removesuffix(_CODES) for name in packed if name.endswith(_CODES)):
        codes = packed[name + _CODES].unflatten(1, (-1, BLOCK // 2))
        values = torch.cat([codes & 15, codes >> 4], dim=2).float() - 8
        tensors[name] = (values * packed[name + _SCALE].float().unsqueeze(2)).flatten(1)
    return tensors
