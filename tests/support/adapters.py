"""LoRA adapters as PEFT publishes them."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


def make_adapter(llm, folder, *, loader=AutoModelForCausalLM, seed=0, **fields):
    """An adapter that does something, as PEFT saves it."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **fields}
    model = get_peft_model(loader.from_pretrained(llm), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return str(folder)
