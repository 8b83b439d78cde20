"""Cards that a run can be planned for: their memory, and what they compute in bfloat16 without sparsity.

Sources: NVIDIA's data sheets of the L4, A10, A100, L40S, H100, H200 and B200, and its architecture papers of the
GeForce RTX 3090, 4090 and 5090 (dense, float32 accumulation).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from lusifer.errors import LusiferError


@dataclass(frozen=True)
class Card:
    """One accelerator.

    Attributes:
        name: Its name.
        memory: GB (1e9 bytes) that a process can use.
        peak: Operations a second in bfloat16; None where nothing is known.
    """

    name: str
    memory: float
    peak: float | None


_KNOWN = {
    "rtx3090": (24, 71e12),
    "rtx4090": (24, 165e12),
    "rtx5090": (32, 210e12),
    "l4": (24, 121e12),
    "a10": (24, 125e12),
    "l40s": (48, 362e12),
    "a100-40gb": (40, 312e12),
    "a100-80gb": (80, 312e12),
    "h100": (80, 989e12),
    "h200": (141, 989e12),
    "b200": (180, 2250e12),
}
_FREE = 0.95  # Of the memory: the driver, and fragments that an allocator cannot use.


def find_card(name: str | None) -> Card | None:
    """The card of a name, such as ``h100``, or of so many GB, such as ``24``; this machine's own when None.

    Args:
        name: Name or GB.

    Returns:
        None where there is no name and no GPU.

    Raises:
        LusiferError: If there is no such card.
    """
    if name is None:
        if not torch.cuda.is_available():
            return None
        facts = torch.cuda.get_device_properties(torch.cuda.current_device())
        said = facts.name.lower().replace(" ", "")
        # The longest that is in the name: an A100 is no A10.
        fitting = [key for key in _KNOWN if key.split("-")[0] in said]
        peak = _KNOWN[max(fitting, key=lambda key: len(key.split("-")[0]))][1] if fitting else None
        return Card(facts.name, _FREE * facts.total_memory / 1e9, peak)
    key = re.sub(r"[\s_]", "", name.lower()).removeprefix("nvidia")
    if key in _KNOWN:
        memory, peak = _KNOWN[key]
        return Card(key, _FREE * memory, peak)
    if re.fullmatch(r"\d+(\.\d+)?(gb)?", key) and float(key.removesuffix("gb")) > 0:
        return Card(f"{key.removesuffix('gb')} GB", _FREE * float(key.removesuffix("gb")), None)
    raise LusiferError(f"no GPU {name!r} is known; give one of {', '.join(_KNOWN)}, or its memory in GB")
