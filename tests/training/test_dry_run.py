"""The dry run's estimate of activations against what autograd really keeps."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from transformers import LlamaConfig, XLMRobertaConfig

from lusifer import LusiferConfig, LusiferModel
from lusifer.training.dry_run import _values


def kept_bytes(model, batch, precision):
    """Bytes of all storages the graph of one pass holds, parameters and their casts aside."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = {}

    def pack(tensor):
        # Casts of weights are as wide as a weight and do not grow with the batch.
        if tensor.untyped_storage().data_ptr() not in own and tensor.shape[0] not in (192, 256, 512, 16):
            held[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    context = torch.autocast("cpu", torch.bfloat16) if precision == "bfloat16" else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), context:
        output = model(**batch).pooler_output
    assert output.requires_grad
    return sum(size for size, _ in held.values())


@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 0.15), ("float32", 0.35)])
def test_activations_are_estimated_per_token_and_layer(precision, tolerance):
    """In float32 the norms make no copies, which the formula counts: it errs on the safe side there."""
    torch.manual_seed(0)
    encoder = XLMRobertaConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    llm = LlamaConfig(
        vocab_size=99, hidden_size=192, num_hidden_layers=6, num_attention_heads=3, num_key_value_heads=1,
        intermediate_size=512,
    )  # fmt: skip
    model = LusiferModel(LusiferConfig(encoder_config=encoder, llm_config=llm)).train()
    if precision == "bfloat16":
        model.llm.bfloat16()
    model.add_adapter("llm", {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0})
    model.set_trainable(encoder="frozen", connector=True, llm=True)
    batch = {"input_ids": torch.randint(5, 99, (10, 60)), "attention_mask": torch.ones(10, 60, dtype=torch.long)}
    tokens = 10 * 62
    estimated = tokens * _values(model.config.llm_config, False) * (2 if precision == "bfloat16" else 4)
    assert kept_bytes(model, batch, precision) == pytest.approx(estimated, rel=tolerance)
