"""Canaries: which private part of PEFT an upgrade has moved."""

from __future__ import annotations

from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from lusifer.hooks.peft import forget_adapter


def test_an_injected_adapter_still_leaves_peft_config():
    module = nn.Sequential(nn.Linear(2, 2))
    inject_adapter_in_model(LoraConfig(target_modules=["0"]), module)
    forget_adapter(module)
    assert not hasattr(module, "peft_config")
