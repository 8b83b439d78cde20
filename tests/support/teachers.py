"""A tiny teacher and English sentences to adapt to it."""

from __future__ import annotations

import random

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import BertConfig, BertModel

from support.tiny import CORPUS, save_encoder_tokenizer, sharpen

WORDS = sorted({word.strip(",") for line in CORPUS for word in line.split()})


def sentences(count, seed=0):
    """English sentences of the tiny tokenizer's words, each once."""
    rng = random.Random(seed)
    made = {}
    while len(made) < count:
        made[" ".join(["the", *rng.choices(WORDS, k=rng.randrange(4, 12))])] = None
    return list(made)


def save_teacher(folder, width=32, **options):
    """A Sentence Transformers model on a random BERT."""
    base = folder / "base"
    config = BertConfig(
        vocab_size=save_encoder_tokenizer(base),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        pad_token_id=1,
    )
    sharpen(BertModel(config, add_pooling_layer=False)).save_pretrained(base)
    module = Transformer(str(base), max_seq_length=options.pop("window", 48))
    model = SentenceTransformer(modules=[module, Pooling(width), Normalize()], **options)
    model.save_pretrained(str(folder / "model"), create_model_card=False)
    return str(folder / "model")
