"""Groups of a batch, and the gradient cache's replayed randomness."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from lusifer.model.token_batches import micro_batches, padded_tokens, trim
from lusifer.training.alignment import AlignmentLoss, LMHead
from lusifer.training.contrastive import ContrastiveLoss
from lusifer.training.gradient_cache import RandomState, groups_within
from support.batches import align_batch, assert_same, contrast_batch, learning, step_gradients, tokens

LENGTHS = torch.tensor([3, 50, 7, 7, 1, 20, 90])


def test_micro_batches_cover_every_row_once_within_the_budget():
    groups = micro_batches(LENGTHS, 40)
    assert sorted(torch.cat(groups).tolist()) == list(range(7))
    assert max(len(rows) for rows in groups) > 1
    for rows, padded in zip(groups, padded_tokens(LENGTHS, groups), strict=True):
        assert len(rows) == 1 or padded <= 40


def test_groups_are_halved_until_there_are_enough():
    for least in range(1, 8):
        groups = micro_batches(LENGTHS, 10_000, at_least=least)
        assert len(groups) == least
        assert sorted(torch.cat(groups).tolist()) == list(range(7))


def test_graphs_are_kept_up_to_the_budget():
    groups, kept = groups_within(LENGTHS, 60, 150)
    padded = padded_tokens(LENGTHS, groups)
    assert 0 < kept < len(groups)
    assert sum(padded[:kept]) <= 150 < sum(padded[: kept + 1])
    assert groups_within(LENGTHS, 60, 0)[1] == 0
    assert groups_within(LENGTHS, 60, sum(padded))[1] == len(groups)


def test_trim_drops_common_padding_only():
    features = tokens([3, 9, 5])
    few = trim(features, torch.tensor([2, 0]))
    assert few["input_ids"].shape == (2, 5)
    assert few["input_ids"].tolist() == features["input_ids"][[2, 0], :5].tolist()
    assert trim({"attention_mask": torch.zeros(1, 4)}, torch.tensor([0]))["attention_mask"].shape == (1, 1)


def test_randomness_is_replayed_and_then_goes_on():
    torch.manual_seed(0)
    state = RandomState(torch.device("cpu"))
    first, second = torch.rand(3), torch.rand(3)
    with state.replayed():
        assert torch.equal(torch.rand(3), first)
        torch.rand(100)
    third = torch.rand(3)
    state.restore()
    assert torch.equal(torch.rand(9), torch.cat([first, second, third]))


@pytest.mark.parametrize("graph_tokens", [0, 120])
def test_cached_gradient_is_the_single_pass_one_under_dropout(tiny_model, graph_tokens):
    model, batch = learning(tiny_model, dropout=0.3), contrast_batch()
    found = []
    for kept in (graph_tokens, 10_000):
        torch.manual_seed(0)
        loss = ContrastiveLoss(temperature=0.2, max_tokens=40, graph_tokens=kept)
        found.append(step_gradients(loss, model, batch))
        after = torch.rand(3)
        found[-1] += (after,)
    (cached, gradients, after), (single, expected, expected_after) = found
    assert cached["recomputed"] > 0.2 and single["recomputed"] == 0
    assert cached["loss"] == single["loss"]
    # The same passes in another order: only the order in which the groups' gradients are added differs.
    assert_same(gradients, expected, tolerance=1e-6)
    assert torch.equal(after, expected_after)
    torch.manual_seed(1)
    other = step_gradients(ContrastiveLoss(temperature=0.2, max_tokens=40, graph_tokens=0), model, batch)[1]
    with pytest.raises(AssertionError):  # The control: dropout does matter.
        assert_same(other, expected, tolerance=1e-2)


@pytest.mark.parametrize("outside", [True, False])
def test_autocast_around_a_cached_step_loses_no_gradient(tiny_model, outside):
    """Older autocasts keep weights cast without a graph; used in the second pass they would get no gradient."""
    model, batch = learning(tiny_model), contrast_batch()
    single, cached = (ContrastiveLoss(max_tokens=40, graph_tokens=tokens) for tokens in (10_000, 0))
    forward = model.forward
    with torch.autocast("cpu", torch.bfloat16, enabled=outside):
        if not outside:
            model.forward = torch.autocast("cpu", torch.bfloat16)(forward)
        expected = step_gradients(single, model, batch)
        found = step_gradients(cached, model, batch)
    assert found[0]["loss"] == expected[0]["loss"]
    assert_same(found[1], expected[1], tolerance=1e-2)  # The groups' gradients are rounded to bfloat16 one by one.


@pytest.mark.parametrize("stage", ["align", "contrast"])
def test_activation_checkpointing_changes_no_gradient(tiny_model, stage):
    model = learning(tiny_model, dropout=0.2)
    if stage == "align":
        embeddings = model.llm_embeddings()
        head = LMHead(embeddings, None, model.llm.config)
        loss, batch = AlignmentLoss(head, embeddings.mean(dim=0), max_tokens=60), align_batch()
    else:
        loss, batch = ContrastiveLoss(max_tokens=60, graph_tokens=120), contrast_batch()
    calls, found = [], []
    model.llm.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        calls.clear()
        torch.manual_seed(0)
        found.append((len(calls), step_gradients(loss, model, batch)[1], len(calls)))
    assert found[1][2] > found[0][2]  # Layers did run again.
    assert_same(found[1][1], found[0][1], tolerance=1e-6)


@pytest.mark.parametrize("graph_tokens", [0, 120, 10_000])
def test_gradients_are_reduced_once(tiny_model, graph_tokens):
    """Outside of ``no_sync`` there are one backward pass and, right before it, one forward pass with a graph."""
    model, log, depth = learning(tiny_model), [], [0]

    @contextmanager
    def no_sync():
        depth[0] += 1
        yield
        depth[0] -= 1

    def backward(value):
        log.append(("backward", depth[0]))
        value.backward()

    model.register_forward_hook(lambda *_: log.append(("forward", depth[0])))
    embeddings = model.llm_embeddings()
    align = AlignmentLoss(LMHead(embeddings, None, model.llm.config), embeddings.mean(dim=0), max_tokens=60)
    contrast = ContrastiveLoss(max_tokens=40, graph_tokens=graph_tokens)
    for loss, batch in ((align, align_batch()), (contrast, contrast_batch())):
        log.clear()
        loss.step(model, batch, backward=backward, no_sync=no_sync)
        assert len(log) > 3 and depth == [0]
        assert log[-2:] == [("forward", 0), ("backward", 0)]
        assert all(inside == 1 for _, inside in log[:-2])
