"""Measures against values known by hand, and a verdict for every weak part."""

from __future__ import annotations

import pytest
import torch

from lusifer import LusiferError
from lusifer.evaluation.diagnosis import Point, anisotropy, csls_accuracy, diagnose, linear_cka, mean_states, verdict
from lusifer.model.modeling import LusiferModel
from lusifer.model.sentence_transformer import to_sentence_transformer


def test_csls_sees_through_a_hub():
    draw = torch.Generator().manual_seed(0)
    english = torch.nn.functional.normalize(torch.randn(20, 16, generator=draw), dim=1)
    assert csls_accuracy(english, english) == 1.0
    # Row 0 is near everything: plain cosine chooses it, CSLS does not.
    theirs = english + 0.35 * english.sum(dim=0)
    theirs[0] = english.mean(dim=0) * 4 + 0.2 * english[0]
    cosine = torch.nn.functional.normalize(english, dim=1) @ torch.nn.functional.normalize(theirs, dim=1).T
    plain = (cosine.argmax(dim=1) == torch.arange(20)).float().mean()
    assert csls_accuracy(english, theirs) > float(plain)
    shuffled = csls_accuracy(english, english.roll(1, dims=0))
    assert shuffled == 0.0


def test_cka_is_one_for_a_turned_and_scaled_copy_and_low_for_noise():
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(500, 6, generator=draw)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=draw)).Q
    assert linear_cka(x, 3 * x @ turn + 7) == pytest.approx(1.0, abs=1e-6)
    assert linear_cka(x, torch.randn(500, 6, generator=draw)) < 0.1


def test_anisotropy_of_one_direction_and_of_opposite_pairs():
    assert anisotropy(torch.ones(5, 3)) == pytest.approx(1.0)
    assert anisotropy(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == pytest.approx(-1.0)


def points(*accuracies):
    names = ["encoder", "connector", *[f"LLM layer {n}" for n in range(1, len(accuracies) - 2)], "embedding"]
    return [Point(name, value, 0.5, 0.1) for name, value in zip(names, accuracies, strict=True)]


@pytest.mark.parametrize(
    ("accuracies", "unknown", "weak", "words"),
    [
        ((0.1, 0.1, 0.1, 0.1), 0.4, "encoder", "40 % of its tokens are unknown"),
        ((0.9, 0.6, 0.6, 0.6), 0.0, "connector", "loses 30 points"),
        ((0.9, 0.85, 0.8, 0.4, 0.5), 0.0, "llm", "most at LLM layer 2"),
        ((0.9, 0.88, 0.88, 0.86), 0.0, "none", "no part loses much"),
    ],
)
def test_the_verdict_names_the_weak_part(accuracies, unknown, weak, words):
    found, why = verdict(points(*accuracies), unknown)
    assert found == weak and words in why


@pytest.fixture(scope="module")
def model(tiny_encoder, tiny_llm):
    from transformers import AutoTokenizer

    inner = LusiferModel.from_backbones(tiny_encoder, tiny_llm).eval()
    return to_sentence_transformer(inner, AutoTokenizer.from_pretrained(tiny_encoder))


def test_states_are_taken_at_every_point_and_hooks_are_removed(model):
    found = mean_states(model, ["one text", "another longer text"])
    layers = len(model[0].auto_model.llm.layers)
    assert set(found) == {"encoder", "connector", "embedding", *[f"LLM layer {n}" for n in range(1, layers + 1)]}
    assert all(len(vectors) == 2 for vectors in found.values())
    alone = model.encode(["another longer text"], convert_to_tensor=True)
    torch.testing.assert_close(found["embedding"][1:], alone.cpu())
    assert not model[0].auto_model.encoder._forward_hooks and not model[0].auto_model.connector._forward_hooks


def test_a_model_that_never_learned_a_language_has_a_weak_encoder(model):
    facts = diagnose(model, "te")
    assert facts["weak"] == "encoder"
    names = [row["point"] for row in facts["points"]]
    assert names[:3] == ["encoder", "connector", "LLM layer 1"] and names[-1] == "embedding"
    assert facts["tokens"]["encoder"]["per sentence"] > 0
    with pytest.raises(LusiferError, match="no sentences in 'xx'; there are"):
        diagnose(model, "xx")
