"""Tokenizers beside tiny backbones, which no model may lack, and encoders that are models of sentences."""

from __future__ import annotations

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
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


def save_sentence_encoder(encoder, folder):
    """An encoder as a Sentence Transformers model: its first state, behind a default prompt. Returns the folder."""
    word = Transformer(encoder)
    model = SentenceTransformer(
        modules=[word, Pooling(word.get_embedding_dimension(), pooling_mode="cls"), Normalize()],
        prompts={"query": "the query: ", "document": "a passage: "},
        default_prompt_name="query",
    )
    model.save_pretrained(str(folder), create_model_card=False)
    return str(folder)
