"""The divergence of neighbourhoods, and the encoder as its own guide."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import kl_div, normalize
from transformers import AutoModel, AutoTokenizer

import lusifer.training.distillation
from lusifer.model.backbone_alone import EncoderAlone
from lusifer.starter.use_encoder import UseConfig, UseModel
from lusifer.training.distillation import neighbourhood_divergence


def naive(vectors, guide, temperature):
    """Row by row, without the text itself."""
    ours, theirs = (normalize(x, dim=-1) @ normalize(x, dim=-1).T / temperature for x in (vectors, guide))
    rows = []
    for i in range(len(vectors)):
        others = [j for j in range(len(vectors)) if j != i]
        a, b = (torch.log_softmax(scores[i, others], dim=0) for scores in (ours, theirs))
        rows.append(kl_div(a, b, reduction="sum", log_target=True))
    return torch.stack(rows).mean()


@pytest.mark.parametrize("size", [256, 4, 1])
def test_divergence_and_gradient_equal_the_naive_form(monkeypatch, size):
    monkeypatch.setattr(lusifer.training.distillation, "_SLICE", size)
    draw = torch.Generator().manual_seed(0)
    vectors = torch.randn(9, 5, generator=draw, requires_grad=True)
    guide = torch.randn(9, 7, generator=draw)
    expected = naive(vectors, guide, 0.1)
    (wanted,) = torch.autograd.grad(expected, vectors)
    found = neighbourhood_divergence(vectors, guide, temperature=0.1)
    (gradient,) = torch.autograd.grad(2 * found, vectors)
    # float32 sums in another order.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, 2 * wanted, rtol=1e-4, atol=1e-6)


def test_no_divergence_from_oneself_and_no_gradient_for_the_guide():
    vectors = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    turned = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(2))).Q
    found = neighbourhood_divergence(vectors, vectors @ turned, temperature=0.05)
    assert float(found.detach()) == pytest.approx(0, abs=1e-5)
    with torch.no_grad():
        assert float(neighbourhood_divergence(vectors, torch.randn(6, 4), temperature=0.05)) > 0.1


def test_the_guide_is_the_mean_of_real_token_states(tiny_encoder):
    guide = EncoderAlone.from_name(tiny_encoder, max_seq_length=16)
    texts = ["one", "some longer text than one", "word " * 40]
    features = guide.preprocess(texts)
    assert features["input_ids"].shape[1] == 16
    with torch.no_grad():
        found = guide(features)["sentence_embedding"]
    encoder, tokenizer = AutoModel.from_pretrained(tiny_encoder).eval(), AutoTokenizer.from_pretrained(tiny_encoder)
    for row, text in zip(found, texts, strict=True):
        alone = tokenizer(text, truncation=True, max_length=16, return_tensors="pt")
        with torch.no_grad():
            states = encoder(**alone).last_hidden_state[0]
        torch.testing.assert_close(row, normalize(states.mean(dim=0), dim=0), rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in guide.parameters())


def test_an_encoder_of_sentences_adds_its_own_embedding():
    torch.manual_seed(0)
    encoder = UseModel(UseConfig(vocab_size=50)).eval()
    features = {"input_ids": torch.tensor([[3, 4, 5]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with torch.no_grad():
        found = EncoderAlone(encoder, None, 8)(features)["sentence_embedding"]
        output = encoder(**features)
    own = output.pooler_output
    torch.testing.assert_close(found[:, -own.shape[1] :], own)
    assert found.shape[1] == own.shape[1] + output.last_hidden_state.shape[2]


def test_as_a_model_an_encoder_of_sentences_is_its_own_embedding_alone():
    torch.manual_seed(0)
    encoder = UseModel(UseConfig(vocab_size=50)).eval()
    alone = EncoderAlone(encoder, None, 8)
    features = {"input_ids": torch.tensor([[3, 4, 5]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    alone.preprocess = lambda texts: features
    torch.testing.assert_close(alone.embed(["a"]), encoder(**features).pooler_output)
