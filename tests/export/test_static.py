"""A table of token vectors: a text's embedding is the weighted mean of its tokens' vectors, without the model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from lusifer.export.static import frequency_weights, whitened
from support.adapted import save_adapted
from support.command import mistake
from support.tiny import CORPUS


@pytest.fixture
def name(tiny_encoder, tmp_path):
    return save_adapted(tmp_path / "model", tiny_encoder)


def test_a_text_is_the_mean_of_its_tokens(name, tmp_path, call):
    code, out, err = call("export", "static", name, tmp_path / "static", "--dimensions", 8, "--json", "--quiet")
    assert code == 0, err
    facts = json.loads(out)
    static, model = SentenceTransformer(str(tmp_path / "static")), SentenceTransformer(name, device="cpu")
    tokenizer = model.tokenizer
    assert (facts["tokens"], facts["dimension"]) == (len(tokenizer), 8)
    # Every token alone, between the special tokens of any text.
    ids = torch.tensor([[0, token, 2] for token in range(len(tokenizer))])
    with torch.inference_mode():
        vectors = model({"input_ids": ids, "attention_mask": torch.ones_like(ids)})["sentence_embedding"].numpy()
    table = whitened(vectors, 8) * frequency_weights(len(vectors))[:, None]
    table[tokenizer.all_special_ids] = 0
    means = np.stack([table[tokenizer(text, add_special_tokens=False)["input_ids"]].mean(axis=0) for text in CORPUS])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    found = static.encode(CORPUS)
    # Of an axis of PCA both directions are one: cosines count.
    np.testing.assert_allclose(found @ found.T, means @ means.T, atol=1e-3)
    # No longest text: what stands at its end counts.
    assert static.encode("the cat " * 200 + "river " * 200) @ static.encode("river") > 0.1


def test_whitened_vectors_have_unit_variance():
    generator = np.random.default_rng(0)
    vectors = (generator.normal(size=(500, 6)) @ generator.normal(size=(6, 6)) + 3).astype(np.float32)
    white = whitened(vectors, 4)
    np.testing.assert_allclose(white.T @ white / len(white), np.eye(4), atol=1e-3)
    assert white.dtype == np.float32
    # The first axis is that of most variance.
    centred = vectors - vectors.mean(axis=0)
    assert np.abs(np.corrcoef(white[:, 0], centred @ np.linalg.svd(centred)[2][0])[0, 1]) > 0.999


def test_axes_without_variance_stay_small():
    vectors = np.random.default_rng(0).normal(size=(500, 6)).astype(np.float32)
    white = whitened(np.concatenate([vectors, vectors[:, :1]], axis=1), 7)
    assert np.abs(white[:, -1]).max() < 1e-2 < np.abs(white[:, -2]).max()


def test_mistakes_take_one_line(name, tmp_path, call):
    assert "already exists" in mistake(*call("export", "static", name, tmp_path))
    assert "no checkpoint at" in mistake(*call("export", "static", tmp_path, tmp_path / "new"))
