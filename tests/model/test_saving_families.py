"""Families whose names transformers changes, or whose layers are unlike Llama's: trained, saved, loaded again."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf

from lusifer import LusiferModel
from lusifer.model.backbones import build_encoder, build_llm
from support.backbones import save_word_tokenizer

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
BERT = tf.BertConfig(**SHAPE, vocab_size=100)
LLAMA = tf.LlamaConfig(**SHAPE, vocab_size=100, bos_token_id=1, eos_token_id=2)
RENAMED = ["esm", "gte", "jina_embeddings_v3", "nomic_bert"]
# The first ones are renamed; then experts with layers beside them, GPT-2's layers, modules that are numbered, a linear
# class of their own, routers, state-space layers, and scales that no module of its own has.
DECODERS = ["exaone", "mixtral", "dots1", "gpt2", "ctrl", "falcon", "phimoe", "llama4_text", "nemotron_h", "falcon_h1"]


def tiny_config(family):
    spec = importlib.util.spec_from_file_location("families", Path(__file__).parents[2] / "tools" / "families.py")
    tool = sys.modules.setdefault("families", importlib.util.module_from_spec(spec))
    spec.loader.exec_module(tool)
    return tool.tiny_config(family)


def saved(folder, build, config):
    torch.manual_seed(1)
    build(config).save_pretrained(folder)
    save_word_tokenizer(folder)
    return str(folder)


def assert_comes_back(encoder, llm, folder):
    torch.manual_seed(0)
    model = LusiferModel.from_backbones(encoder, llm, max_seq_length=16)
    for part in ("encoder", "llm"):
        model.add_adapter(part, {"r": 2})
    model.set_trainable(encoder="full", connector=True, llm=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    ids = torch.tensor([[4, 5, 6, 7, 8]])
    for kind in ("small", "standalone"):
        wanted = (model if kind == "small" else model.merge()).eval()(ids, torch.ones_like(ids)).pooler_output
        model.save_pretrained(folder / kind)
        again = LusiferModel.from_pretrained(folder / kind)(ids, torch.ones_like(ids)).pooler_output
        torch.testing.assert_close(again, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", RENAMED)
def test_an_encoder_of_the_family_comes_back(family, tmp_path):
    encoder = saved(tmp_path / "encoder", build_encoder, tiny_config(family))
    assert_comes_back(encoder, saved(tmp_path / "llm", build_llm, LLAMA), tmp_path)


@pytest.mark.parametrize("family", DECODERS)
def test_an_llm_of_the_family_comes_back(family, tmp_path):
    llm = saved(tmp_path / "llm", build_llm, tiny_config(family))
    assert_comes_back(saved(tmp_path / "encoder", build_encoder, BERT), llm, tmp_path)


@pytest.mark.parametrize("family", ["t5", "mt5"])
def test_a_folder_with_the_encoder_of_a_pair_alone_comes_back(family, tmp_path):
    """Saved by its own class, which notes in the configuration that it is no encoder-decoder."""
    encoder = saved(tmp_path / "encoder", build_encoder, tiny_config(family))
    assert not tf.AutoConfig.from_pretrained(encoder).is_encoder_decoder
    assert_comes_back(encoder, saved(tmp_path / "llm", build_llm, LLAMA), tmp_path)
