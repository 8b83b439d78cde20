"""Tiny backbones, built from configurations: no downloads."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["OMP_NUM_THREADS"] = "1"  # Several processes share the machine.

# Caches of this run alone, before any library reads where they are: what lies in somebody's home neither helps a test
# nor is touched by it. Processes that a run starts inherit them.
OWN_CACHES = not os.environ.get("LUSIFER_TEST_CACHES")  # Else somebody's, who keeps them; or those of a run's worker.
if OWN_CACHES:
    os.environ["LUSIFER_TEST_CACHES"] = tempfile.mkdtemp(prefix="lusifer-")
os.environ.update(
    {
        name: os.path.join(os.environ["LUSIFER_TEST_CACHES"], part)
        for name, part in {
            "XDG_CACHE_HOME": "",
            "HF_HOME": "huggingface",
            "HF_HUB_CACHE": "huggingface/hub",
            "HF_DATASETS_CACHE": "huggingface/datasets",
            "MTEB_CACHE": "mteb",
            "LUSIFER_CACHE": "lusifer",
        }.items()
    }
)

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, XLMRobertaConfig, XLMRobertaModel

from lusifer import LusiferModel
from lusifer.model.backbones import load_tokenizer
from lusifer.model.sentence_transformer import to_sentence_transformer
from support.tiny import save_encoder_tokenizer, save_llm_tokenizer, sharpen

pytest_plugins = ["support.authors_checkpoint", "support.browser", "support.command"]

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    config = XLMRobertaConfig(
        vocab_size=save_encoder_tokenizer(folder),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=130,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    sharpen(XLMRobertaModel(config, add_pooling_layer=False)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llm")
    config = LlamaConfig(
        vocab_size=save_llm_tokenizer(folder),
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=True,
    )
    sharpen(LlamaForCausalLM(config)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tiny_model(tiny_encoder, tiny_llm):
    torch.manual_seed(0)
    model = LusiferModel.from_backbones(tiny_encoder, tiny_llm, max_seq_length=64)
    # The starting soft tokens are as small as real embeddings; here they must move the LLM visibly.
    sharpen(model.connector)
    return model


@pytest.fixture
def tiny_st(tiny_model, tiny_encoder):
    return to_sentence_transformer(tiny_model, load_tokenizer("encoder", tiny_encoder))


@pytest.fixture(autouse=True)
def maps_are_drawn():
    """Waits for maps that a page has asked for: UMAP's compiler puts back standard streams that it saw before."""
    yield
    for thread in threading.enumerate():
        if thread.name == "map":
            thread.join()


# Files that take longest, so that a process of several does not end with one of them alone.
LONGEST = (
    "crash",
    "distributed",
    "rehearsal",
    "bulk_remote",
    "bulk_resume",
    "evaluation",
    "trainer",
    "hub",
    "fuzz_loading",
    "serving",
)


def pytest_unconfigure(config):
    if OWN_CACHES:
        shutil.rmtree(os.environ["LUSIFER_TEST_CACHES"], ignore_errors=True)


def pytest_collection_modifyitems(items):
    rank = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
