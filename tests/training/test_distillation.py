"""The divergence of neighbourhoods, and the encoder as its own guide."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.functional import kl_div, normalize
from transformers import AutoModel, AutoTokenizer

import lusifer.training.distillation
from lusifer.model.backbone_alone import EncoderAlone, SentenceEncoder, encoder_alone
from lusifer.model.backbones import load_tokenizer
from lusifer.recipes.schema import Recipe
from lusifer.training import stages
from lusifer.training.distillation import neighbourhood_divergence
from support.backbones import save_sentence_encoder
from support.texts import TEXTS


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


@pytest.fixture
def sentence_encoder(tiny_encoder, tmp_path):
    return save_sentence_encoder(tiny_encoder, tmp_path)


def test_an_encoder_that_is_a_model_of_sentences_has_its_own_pooling_and_prompt(sentence_encoder, tiny_encoder):
    texts = ["one", "some longer text than one"]
    alone = encoder_alone(sentence_encoder)
    assert isinstance(alone, SentenceEncoder) and isinstance(encoder_alone(tiny_encoder), EncoderAlone)
    encoder, tokenizer = AutoModel.from_pretrained(tiny_encoder).eval(), AutoTokenizer.from_pretrained(tiny_encoder)
    expected = []
    for text in texts:
        with torch.no_grad():
            state = encoder(**tokenizer("the query: " + text, return_tensors="pt")).last_hidden_state[0, 0]
        expected.append(normalize(state, dim=0))
    torch.testing.assert_close(alone.embed(texts).clone(), torch.stack(expected), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        guide = alone(alone.preprocess(texts))["sentence_embedding"]
    torch.testing.assert_close(guide, torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in alone.parameters())


def test_it_reads_no_more_than_it_is_told_to(sentence_encoder):
    short = encoder_alone(sentence_encoder, max_seq_length=6)
    assert short.max_seq_length == 6 and short.preprocess(["word " * 40])["input_ids"].shape == (1, 6)
    assert encoder_alone(sentence_encoder, max_seq_length=100_000).max_seq_length < 1000


@pytest.mark.parametrize("guide", ["encoder", "another"])
def test_a_guide_reads_the_texts_alone_behind_its_own_prompts(tiny_encoder, tiny_llm, tmp_path, monkeypatch, guide):
    """No instruction, which is for the model that learns."""
    monkeypatch.setenv("LUSIFER_CACHE", str(tmp_path / "cache"))
    name = save_sentence_encoder(tiny_encoder, tmp_path / "sentences")
    rows = [{"query": text, "positive": text.upper()} for text in TEXTS]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [{"source": str(tmp_path / "pairs.jsonl"), "instruction": "Find it"}]
    recipe = Recipe.model_validate(
        {
            "output": str(tmp_path),
            "model": {"encoder": name, "llm": tiny_llm, "max_seq_length": 64},
            "warm_start": {"enabled": False},
            "contrast": {
                "data": data,
                "batch_size": 4,
                "distill": 1.0,
                "guide": guide if guide == "encoder" else str(tmp_path / "sentences"),
            },
        }
    )
    seen = []
    monkeypatch.setattr(stages, "_train", lambda *arguments: seen.extend(arguments) or {})
    tokenizer = load_tokenizer("encoder", tiny_encoder)
    # Rows are held out for figures before the stage, which such a model cannot give.
    monkeypatch.setattr(stages, "_HELD_OUT", 0)
    stages.contrast(recipe, torch.nn.Linear(1, 1), tokenizer, tmp_path, False)
    mixture, collator = seen[4:6]
    examples = [mixture[place] for place in range(4)]
    ids = collator(examples)["guide"]["input_ids"]
    expected = ["the query: " + example["plain_query"] for example in examples]
    expected += ["a passage: " + example["positive"] for example in examples]
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == tokenizer.batch_decode(
        tokenizer(expected)["input_ids"], skip_special_tokens=True
    )
