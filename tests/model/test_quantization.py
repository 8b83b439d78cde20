"""A frozen LLM in few bits: what is refused, and that adapters beside it learn."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from lusifer import LusiferError, LusiferModel
from lusifer.model.backbones import quantized


def test_without_bitsandbytes_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LusiferError, match="lusifer\\[quantization\\]"):
        quantized("8bit", "float32")
    assert quantized(None, "float32") == {}


def test_four_bits_are_refused_on_a_cpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(LusiferError, match="needs a GPU; on a CPU use 8bit"):
        quantized("4bit", "bfloat16")


def test_eight_bits_stay_close_and_adapters_learn(tiny_encoder, tiny_llm):
    pytest.importorskip("bitsandbytes")
    batch = {"input_ids": torch.arange(5, 25).view(2, 10), "attention_mask": torch.ones(2, 10, dtype=torch.long)}
    vectors = []
    for kind in (None, "8bit"):
        torch.manual_seed(0)
        model = LusiferModel.from_backbones(tiny_encoder, tiny_llm, quantization=kind).eval()
        vectors.append(model(**batch).pooler_output)
    assert torch.cosine_similarity(*vectors).min() > 0.99  # Eight bits of rounding in every linear layer.
    model.add_adapter("llm", {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0})
    model.set_trainable(encoder="frozen", connector=True, llm=True)
    model.train()(**batch).pooler_output.square().mean().backward()
    learned = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("lora_B" in name for name in learned)
    assert all("lora" in name or "connector" in name for name in learned)
