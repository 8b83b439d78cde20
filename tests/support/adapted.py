"""A tiny model as `lusifer adapt` saves it, without the work: a random head on a tiny encoder."""

from __future__ import annotations

import json

import torch

import lusifer
from lusifer.adapt.modeling import LayerHead
from lusifer.adapt.saving import sentence_transformer
from lusifer.model.backbones import load_config, load_encoder, load_tokenizer
from lusifer.model.fingerprint import weights_hash

PROMPTS = {"query": "the ", "document": "a "}


def save_adapted(folder, encoder, teacher=None, *, dimension=32, layers=(1, 2), hidden=8, seed=0):
    """Saves one into a folder and returns its name."""
    config = load_config("encoder", encoder)
    inner, tokenizer = load_encoder(encoder, config), load_tokenizer("encoder", encoder, config=config)
    torch.manual_seed(seed)
    head = LayerHead(config.hidden_size * len(layers), dimension, hidden)
    if head.down is not None:
        torch.nn.init.normal_(head.down.weight, std=0.05)
    model = sentence_transformer(inner, tokenizer, head, list(layers), window=64, prompts=PROMPTS)
    model.save_pretrained(str(folder), create_model_card=False)
    known = weights_hash(lusifer.load(teacher)) if teacher else ""
    origin = {"teacher": teacher, "teacher_hash": known, "dimension": dimension}
    (folder / "adapted.json").write_text(json.dumps(origin))
    return str(folder)
