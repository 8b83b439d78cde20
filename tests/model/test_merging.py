"""Merged adapters are a matter of speed: no caller ever sees them in a model that it holds."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer
from sentence_transformers import SentenceTransformer

import lusifer
from lusifer import LusiferError
from lusifer.loading import load_for_inference
from lusifer.model.adapters import inference_copy
from lusifer.model.fingerprint import weights_hash
from lusifer.model.sentence_transformer import lusifer_model, save_atomically
from lusifer.model.text_encoder import set_precision, token_ids
from support.tiny import CORPUS, give_adapters

# W + BA is one float32 product where it was two before.
TOLERANCE = 1e-5


@pytest.fixture
def checkpoint(tiny_st, tmp_path):
    """A checkpoint whose adapters do something."""
    give_adapters(lusifer_model(tiny_st))
    save_atomically(tiny_st.eval(), tmp_path / "model")
    return str(tmp_path / "model")


def together(work, threads=10):
    """Runs the same work in several threads that start at once."""
    gate = threading.Barrier(threads)

    def start(number):
        gate.wait()
        return work(number)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(start, range(threads)))


def test_encoding_changes_nothing_that_a_caller_holds(checkpoint):
    model = lusifer.load(checkpoint, device="cpu")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    model.encode(CORPUS)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trainable


def test_first_use_from_many_threads(checkpoint):
    expected = SentenceTransformer(checkpoint, device="cpu").encode(CORPUS)
    model = lusifer.load(checkpoint, device="cpu")
    for found in together(lambda _: model.encode(CORPUS)):
        np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    np.testing.assert_allclose(model.encode(CORPUS), expected, atol=TOLERANCE)


def test_long_and_short_texts_from_many_threads(checkpoint):
    model = lusifer.load(checkpoint, device="cpu")
    texts = ["the cat sat " * (1 if number % 2 else model.max_seq_length) for number in range(10)]
    expected = [model.encode([text])[0] for text in texts]

    def work(number):
        return [model.encode([texts[number]])[0] for _ in range(20)]

    for number, vectors in enumerate(together(work)):
        for vector in vectors:
            np.testing.assert_allclose(vector, expected[number], atol=TOLERANCE)


def test_tokenizing_leaves_the_tokenizer_as_it_is(tiny_st):
    tokenizer = tiny_st.tokenizer
    tokenizer(["cat"], truncation=True, max_length=7, padding=True)
    before = (tokenizer.backend_tokenizer.truncation, tokenizer.backend_tokenizer.padding)
    ids, longer = token_ids(tokenizer, ["cat", "the cat sat on the mat " * 9], 16)
    assert (tokenizer.backend_tokenizer.truncation, tokenizer.backend_tokenizer.padding) == before
    assert longer == [False, True]
    assert ids == tokenizer(["cat", "the cat sat on the mat " * 9], truncation=True, max_length=16)["input_ids"]
    tokenizer.add_tokens(["sat on"])  # Seen, though copies were made before.
    assert token_ids(tokenizer, ["sat on"], 16)[0] == [tokenizer("sat on")["input_ids"]]


def perturbed(model):
    return {name: tensor + 0.05 if "lora_B" in name else tensor for name, tensor in model.state_dict().items()}


def loaded(model):
    model.load_state_dict(perturbed(model))


def stepped(model):
    for optimizer in (torch.optim.SGD, torch.optim.AdamW):
        parameters = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer(parameters, lr=0.05).step()


def replaced(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = parameter.data + 0.05


def written(model):
    model.train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.add_(0.05)


def moved(model):
    model.to(torch.bfloat16)


def switched_off(model):
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.enable_adapters(False)


@pytest.mark.parametrize("change", [loaded, stepped, replaced, written, moved, switched_off])
def test_a_change_after_encoding_counts(checkpoint, change):
    model = lusifer.load(checkpoint, device="cpu")
    first = model.encode(CORPUS)
    change(lusifer_model(model))
    plain = SentenceTransformer(checkpoint, device="cpu")
    change(lusifer_model(plain))
    second = model.encode(CORPUS)
    tolerance = 0.1 if change is moved else TOLERANCE  # Eight bits of mantissa.
    np.testing.assert_allclose(second, plain.encode(CORPUS), atol=tolerance)
    assert np.abs(second - first).max() > 1e-4


def test_weights_travel_between_models_that_have_encoded(checkpoint):
    expected = lusifer.load(checkpoint, device="cpu").encode(CORPUS)
    one, other = lusifer.load(checkpoint, device="cpu"), lusifer.load(checkpoint, device="cpu")
    one.encode(CORPUS)
    other.load_state_dict({name: tensor.clone() for name, tensor in one.state_dict().items()})
    np.testing.assert_allclose(other.encode(CORPUS), expected, atol=TOLERANCE)
    np.testing.assert_allclose(copy.deepcopy(one).encode(CORPUS), expected, atol=TOLERANCE)


def test_a_merged_copy_shares_what_has_no_adapter(checkpoint):
    model = lusifer_model(lusifer.load(checkpoint, device="cpu"))
    merged = inference_copy(model)
    assert merged is inference_copy(model) and not merged.training
    assert not any("lora_" in name for name in merged.state_dict())
    assert merged.connector.up.weight is model.connector.up.weight
    assert merged.encoder.get_input_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    model.train()
    assert inference_copy(model) is not merged


def test_a_model_for_inference_is_the_same_model_and_no_more_to_train(checkpoint, tmp_path):
    plain, merged = lusifer.load(checkpoint, device="cpu"), load_for_inference(checkpoint, device="cpu")
    assert weights_hash(plain) == weights_hash(merged)
    assert inference_copy(lusifer_model(merged)) is lusifer_model(merged)
    np.testing.assert_allclose(merged.encode(CORPUS), plain.encode(CORPUS), atol=TOLERANCE)
    for refused in (merged.train, lambda: merged.save_pretrained(str(tmp_path / "saved"))):
        with pytest.raises(LusiferError, match="merged for inference"):
            refused()


def test_rounding_comes_after_merging(checkpoint):
    exact = lusifer.load(checkpoint, device="cpu")
    rounded = lusifer.load(checkpoint, device="cpu")
    set_precision(rounded, "bfloat16")
    for one, other in zip(
        inference_copy(lusifer_model(exact)).llm.layers, lusifer_model(rounded).llm.layers, strict=True
    ):
        weight = other.self_attn.q_proj.get_base_layer().weight
        assert torch.equal(one.self_attn.q_proj.weight.to(torch.bfloat16), weight)
