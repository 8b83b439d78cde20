"""Random backbones too small to know anything, and the text that their tokenizers learned."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

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


def give_adapters(model):
    """Puts an adapter that does something on both parts of a model of `tiny_st`."""
    for part in ("encoder", "llm"):
        model.add_adapter(part, {"r": 4, "lora_alpha": 8})
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
