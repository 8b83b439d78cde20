"""Canaries: which private part of Sentence Transformers an upgrade has moved."""

from __future__ import annotations

import inspect

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding, Transformer
from tokenizers import Tokenizer

from lusifer.hooks.sentence_transformers import InferenceHook, static_features, static_tokenizer, transformer_module
from support.tiny import CORPUS, save_encoder_tokenizer


def test_transformer_still_loads_through_load_model(tiny_model, tiny_encoder, tmp_path):
    from lusifer.model.backbones import load_tokenizer

    tiny_model.config.save_pretrained(tmp_path)
    load_tokenizer("encoder", tiny_encoder).save_pretrained(tmp_path)
    module = transformer_module(str(tmp_path), tiny_model)
    assert type(module) is Transformer and module.auto_model is tiny_model


def test_encode_still_comes_to_inference_with_known_arguments(tiny_st):
    class Fixed(InferenceHook):
        def embed_texts(self, texts, *, batch_size, progress):
            seen.append((texts, batch_size))
            return torch.full((len(texts), 48), 2.0)

    seen = []
    model = Fixed(modules=[tiny_st[0], Normalize()], device="cpu")
    found = model.encode(["a", "b"], batch_size=7, prompt="query: ", normalize_embeddings=True, truncate_dim=4)
    assert seen == [(["query: a", "query: b"], 7)]
    assert found.shape == (2, 4) and abs(found - 0.5).max() < 1e-6
    expected = {"inputs", "prompt", "batch_size", "show_progress_bar", "output_value", "save_to_cpu"}
    expected |= {"normalize_embeddings", "truncate_dim", "device", "kwargs", "self"}
    assert set(inspect.signature(SentenceTransformer._inference).parameters) == expected


def test_the_inference_device_is_still_resolved_by_a_method_of_its_own(tiny_st):
    assert tiny_st._resolve_inference_device("cpu").type == "cpu"


def test_the_configuration_is_still_the_first_file_saved(tiny_st, tmp_path):
    """LusiferModel.save_pretrained takes it as the sign that Sentence Transformers writes the rest."""
    from lusifer.model.sentence_transformer import CONFIG

    seen = []
    inner = tiny_st[0].auto_model
    save = inner.save_pretrained
    inner.save_pretrained = lambda folder, **kwargs: (
        seen.append((tmp_path / CONFIG).is_file()) or save(folder, **kwargs)
    )
    tiny_st.save(str(tmp_path))
    assert seen == [True]


def test_a_static_embedding_is_still_a_bag_of_tokens_without_special_ones(tmp_path):
    save_encoder_tokenizer(tmp_path)
    tokens = StaticEmbedding(Tokenizer.from_file(str(tmp_path / "tokenizer.json")), embedding_dim=4)
    model = SentenceTransformer(modules=[tokens], device="cpu")
    ids = static_tokenizer(model)(CORPUS[:3])["input_ids"]
    expected = tokens.preprocess(CORPUS[:3])
    found = static_features(ids)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
