"""Memory that a server keeps although nobody needs it: plans of computations, and what the allocator does not return.

In bfloat16, oneDNN keeps a plan for every shape of a batch, 1,024 in all; batches of a server seldom share one.
Beside these, glibc keeps what batches have freed.
"""

from __future__ import annotations

import ctypes
import os
import sys

_PLANS = "128"  # More than all layers need for one batch.


def keep_few_plans() -> None:
    """Has oneDNN keep fewer plans, unless the environment says how many; to be called before anything is computed."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _PLANS)


def return_freed() -> None:
    """Returns freed memory to the system in 20 to 100 ms; does nothing where the C library is not glibc."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
