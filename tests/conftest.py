"""Tiny backbones, built from configurations: no downloads."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

from lusifer import LusiferModel
from lusifer.backbones import load_tokenizer
from lusifer.sentence import to_sentence_transformer

torch.set_num_threads(1)

CORPUS = [
    "the cat sat on the mat and looked at the dog",
    "a small house stood near the river in the green valley",
    "she reads a long book about the history of the sea",
    "they went to the market to buy bread, milk and apples",
    "my brother plays football with his friends every evening",
    "the train arrives at the station at nine in the morning",
    "rain fell on the roof all night while we slept",
    "he wrote a letter to his mother and sent it by post",
]


def sharpen(model, std=0.25):
    """Weights large enough that every part of a tiny random model matters to its output."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return model


def bpe(special, *, byte_level):
    if byte_level:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def save_encoder_tokenizer(folder):
    inner = bpe(["<s>", "<pad>", "</s>", "<unk>"], byte_level=False)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def save_llm_tokenizer(folder):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe(["<bos>", "<eos>", "<pad>"], byte_level=True),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
    )
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


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


# Files that take longest, so that a process of several does not end with one of them alone.
LONGEST = ("distributed", "bulk_remote", "bulk_resume", "evaluation", "trainer", "hub", "fuzz_loading", "serving")


def pytest_collection_modifyitems(items):
    rank = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
