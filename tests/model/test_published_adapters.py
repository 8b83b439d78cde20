"""Adapters that belong to an LLM as published: folded in exactly as PEFT does, named by checkpoints, never trained."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import lusifer
from lusifer import LusiferError, LusiferModel
from lusifer.loading import describe
from lusifer.model.backbone_alone import mean_pooled_llm
from lusifer.model.backbones import load_config, load_llm, load_tokenizer
from lusifer.model.sentence_transformer import lusifer_model, save_atomically, to_sentence_transformer
from lusifer.recipes.schema import Recipe
from lusifer.training.alignment import load_lm_head
from lusifer.training.run import check_inputs
from lusifer.training.stages import build_model
from support.adapters import make_adapter
from support.tiny import CORPUS, sharpen

IDS = torch.arange(12).reshape(2, 6) + 5


@pytest.fixture(scope="module")
def adapters(tiny_llm, tmp_path_factory):
    """As LLM2Vec publishes them: the first one trained with the LM head on, the second without."""
    root = tmp_path_factory.mktemp("adapters")
    return [
        make_adapter(tiny_llm, root / "mntp"),
        make_adapter(tiny_llm, root / "supervised", loader=AutoModel, seed=1, use_rslora=True),
    ]


def states(llm):
    with torch.no_grad():
        return llm.eval()(input_ids=IDS, use_cache=False).last_hidden_state


def test_folding_equals_peft(tiny_llm, adapters):
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llm), adapters[0])
    second = PeftModel.from_pretrained(expected.merge_and_unload().model, adapters[1]).merge_and_unload()
    plain = load_llm(tiny_llm, load_config("llm", tiny_llm))
    ours = load_llm(tiny_llm, load_config("llm", tiny_llm), adapters=adapters)
    # The same sums in the same order and float32.
    torch.testing.assert_close(states(ours), states(second), rtol=0, atol=0)
    assert float((states(ours) - states(plain)).abs().max()) > 0.1
    assert ours.state_dict().keys() == plain.state_dict().keys()


def test_order_matters_and_is_kept(tiny_llm, adapters):
    # Sums commute, so the order shows only in which adapter may be missing: with one alone the states differ.
    one, other = (load_llm(tiny_llm, load_config("llm", tiny_llm), adapters=[a]) for a in adapters)
    assert float((states(one) - states(other)).abs().max()) > 0.1


def test_ranks_and_alphas_by_layer_hold(tiny_llm, tmp_path):
    patterns = {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"model.layers.0.mlp.down_proj": 32}}
    adapter = make_adapter(tiny_llm, tmp_path / "a", **patterns)
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llm), adapter).merge_and_unload()
    ours = load_llm(tiny_llm, load_config("llm", tiny_llm), adapters=[adapter])
    torch.testing.assert_close(states(ours), states(expected.model), rtol=0, atol=0)


def test_a_shortened_llm_leaves_the_other_layers_adapters_out(tiny_llm, adapters):
    config = load_config("llm", tiny_llm)
    config.num_hidden_layers = 1
    short = load_llm(tiny_llm, config, adapters=adapters)
    whole = load_llm(tiny_llm, load_config("llm", tiny_llm), adapters=adapters)
    for name, tensor in short.layers.state_dict().items():
        assert torch.equal(tensor, whole.layers.state_dict()[name])


@pytest.fixture(scope="module")
def checkpoint(tiny_encoder, tiny_llm, adapters, tmp_path_factory):
    model = LusiferModel.from_backbones(tiny_encoder, tiny_llm, llm_base_adapters=adapters, max_seq_length=64)
    sharpen(model.connector)
    model.add_adapter("llm", {"r": 4, "lora_alpha": 8})
    wrapped = to_sentence_transformer(model.eval(), load_tokenizer("encoder", tiny_encoder))
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    save_atomically(wrapped, folder)
    return folder, wrapped.encode(CORPUS)


def test_a_checkpoint_names_them_and_folds_them_in_again(checkpoint, adapters, tiny_encoder, tiny_llm):
    folder, expected = checkpoint
    loaded = lusifer.load(str(folder))
    assert lusifer_model(loaded).config.llm_base_adapters == adapters == describe(str(folder))["llm_base_adapters"]
    np.testing.assert_allclose(loaded.encode(CORPUS), expected, atol=1e-6)  # Batches are others.
    stored = load_file(folder / "model.safetensors")
    assert all(name.startswith("connector.") or "lora_" in name for name in stored)
    assert not any("mntp" in name for name in stored)


def test_a_merged_checkpoint_needs_them_no_more(checkpoint, adapters, tmp_path):
    folder, expected = checkpoint
    model = lusifer.load(str(folder))
    lusifer_model(model).merge()
    save_atomically(model, tmp_path / "standalone")
    for adapter in adapters:
        shutil.move(adapter, adapter + "-away")
    try:
        found = lusifer.load(str(tmp_path / "standalone")).encode(CORPUS)
        with pytest.raises(LusiferError, match="cannot read the adapter"):
            lusifer.load(str(folder))
    finally:
        for adapter in adapters:
            shutil.move(adapter + "-away", adapter)
    np.testing.assert_allclose(found, expected, atol=1e-5)  # Our own adapter is folded in, which rounds.


def test_nothing_of_them_learns(tiny_encoder, tiny_llm, adapters):
    model = LusiferModel.from_backbones(tiny_encoder, tiny_llm, llm_base_adapters=adapters)
    model.add_adapter("llm", {"r": 4, "lora_alpha": 8})
    model.set_trainable(encoder="frozen", connector=True, llm=True)
    model.train()
    model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).pooler_output.square().sum().backward()
    for name, parameter in model.llm.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name
    grown = [p.grad.abs().max() for n, p in model.llm.named_parameters() if "lora_B" in n]
    assert grown and all(float(value) > 0 for value in grown)


def recipe(encoder, llm, adapters, **model):
    return Recipe.model_validate(
        {
            "output": "x",
            "model": {"encoder": encoder, "llm": llm, "llm_base_adapters": adapters, "max_seq_length": 64, **model},
            "warm_start": {"data": "starter:english-verses"},
        }
    )


def test_a_recipe_merges_them_and_carries_prompts(tiny_encoder, tiny_llm, adapters, tmp_path):
    prompts = {"query": "Instruct: find it\nQuery: ", "document": "passage: "}
    built = build_model(recipe(tiny_encoder, tiny_llm, adapters, prompts=prompts).model)
    expected = load_llm(tiny_llm, load_config("llm", tiny_llm), adapters=adapters)
    torch.testing.assert_close(states(lusifer_model(built).llm), states(expected), rtol=0, atol=0)
    save_atomically(built, tmp_path / "model")
    loaded = lusifer.load(str(tmp_path / "model"))
    assert {key: loaded.prompts[key] for key in prompts} == prompts
    with_prompt = loaded.encode(["passage: the sea"], prompt="")
    np.testing.assert_allclose(loaded.encode_document(["the sea"]), with_prompt, atol=1e-6)


def test_the_llm_alone_has_them_too(tiny_llm, adapters):
    model = mean_pooled_llm(tiny_llm, adapters=adapters)
    expected = load_llm(tiny_llm, load_config("llm", tiny_llm), adapters=adapters)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, model[0].auto_model.state_dict()[name]), name


def damaged(adapter, folder, *, config=None, rename=None, drop=None, shape=None):
    shutil.copytree(adapter, folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **(config or {})}))
    tensors = load_file(folder / "adapter_model.safetensors")
    first = sorted(tensors)[0]
    if rename:
        tensors[first.replace(*rename)] = tensors.pop(first)
    if drop:
        del tensors[first]
    if shape:
        tensors[first] = torch.zeros(shape)
    save_file(tensors, folder / "adapter_model.safetensors")
    return str(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"config": {"use_dora": True}}, "uses use_dora; merge it"),
        ({"config": {"modules_to_save": ["lm_head"]}}, "uses modules_to_save"),
        ({"config": {"peft_type": "IA3"}}, "not LoRA"),
        ({"rename": ("lora_A", "lora_magnitude")}, "not a LoRA matrix"),
        ({"rename": ("layers.0", "layers.9")}, "does not fit the LLM, which has no layers.9"),
        ({"drop": True}, "lacks"),
        ({"shape": (4, 7)}, r"has shape \(4, 7\)"),
    ],
)
def test_what_does_not_fit_is_named(tiny_llm, adapters, tmp_path, damage, message):
    adapter = damaged(adapters[0], tmp_path / "a", **damage)
    with pytest.raises(LusiferError, match=message):
        load_llm(tiny_llm, load_config("llm", tiny_llm), adapters=[adapter])


def test_pickles_are_not_opened(tiny_encoder, tiny_llm, adapters, tmp_path):
    folder = shutil.copytree(adapters[0], tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(LusiferError, match=r"has no adapter_model\.safetensors"):
        check_inputs(recipe(tiny_encoder, tiny_llm, [str(folder)]))


def test_a_quantised_llm_takes_none(tiny_llm, adapters):
    with pytest.raises(LusiferError, match="in 8 or 4 bits cannot merge adapters"):
        load_llm(tiny_llm, load_config("llm", tiny_llm), adapters=adapters, quantization="8bit")


def test_an_llm_without_head_is_refused_by_stage_1(tiny_llm, tmp_path):
    config = AutoConfig.from_pretrained(tiny_llm, tie_word_embeddings=False)
    AutoModel.from_config(config).save_pretrained(tmp_path / "headless")
    llm = load_llm(str(tmp_path / "headless"), load_config("llm", str(tmp_path / "headless")))
    with pytest.raises(LusiferError, match="has no LM head"):
        load_lm_head(str(tmp_path / "headless"), llm)
