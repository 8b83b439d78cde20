"""What we use of PEFT that is not public."""

from __future__ import annotations

from typing import Any

from torch import nn


def forget_adapter(module: nn.Module) -> None:
    """Removes the record of an adapter that has been merged, so that PEFT does not warn when the next one comes.

    Touches the attribute ``peft_config``, which ``inject_adapter_in_model`` leaves on the module.
    """
    touched: Any = module
    del touched.peft_config
