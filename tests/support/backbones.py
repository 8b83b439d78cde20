"""Tokenizers beside tiny backbones, which no model may lack."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def save_word_tokenizer(folder, size=100):
    """A tokenizer of `size` words, as small as the vocabularies of tiny backbones."""
    special = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3}
    words = special | {f"w{number}": number for number in range(len(special), size)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
