"""A Sentence Transformers model of an ordinary kind: a random BERT, mean pooling, perhaps unit vectors."""

from __future__ import annotations

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Normalize, Pooling, Transformer
from transformers import BertConfig, BertModel

from support.tiny import save_encoder_tokenizer


def save_bert(folder, *, size=32, seed=7, noise=0.0, normalize=True, prompts=None, window=48):
    """Saves one and returns its folder: the same size and seed is the same model, but for the noise on its weights."""
    inner = folder.with_name(f"{folder.name}-transformer")
    words = save_encoder_tokenizer(inner)
    config = BertConfig(
        vocab_size=words,
        hidden_size=size,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        pad_token_id=1,
    )
    model, draw = BertModel(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.25 * torch.randn(parameter.shape, generator=draw))
                parameter += noise * torch.randn(parameter.shape, generator=draw)
    model.save_pretrained(inner)
    modules = [Transformer(str(inner), max_seq_length=window), Pooling(size, pooling_mode="mean")]
    SentenceTransformer(modules=[*modules, *([Normalize()] if normalize else [])], prompts=prompts).save(str(folder))
    return folder
