"""Memory that a server keeps although nobody needs it: plans of computations, and what the allocator does not return.

In bfloat16 a plan is kept for every shape of a batch, 1,024 by oneDNN and as many again by torch; batches of a server
seldom share one. Beside these, glibc keeps what batches have freed.
"""

from __future__ import annotations

import ctypes
import os
import sys

# More than all layers need for one batch. Torch reads its own variable when it is imported.
_PLANS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "16"}


def keep_few_plans() -> None:
    """Has oneDNN and torch keep fewer plans, unless the environment says how many; comes before torch is imported."""
    for name, plans in _PLANS.items():
        os.environ.setdefault(name, plans)


def return_freed() -> None:
    """Returns freed memory to the system in 20 to 100 ms; does nothing where the C library is not glibc."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
