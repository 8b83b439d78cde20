"""Stage 1 against full logits, in values and gradients, on one process and on two."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM

from lusifer import LusiferError
from lusifer.model.packing import run_llm
from lusifer.training.alignment import AlignmentLoss, LMHead, held_out_metrics, load_lm_head, token_cross_entropy
from support.batches import (
    align_batch,
    assert_same,
    graph_gradients,
    learning,
    on_two_ranks,
    part,
    sharded,
    step_gradients,
    tokens,
)

STEPS = 70  # Of the leak test.


def alignment(model, **options):
    embeddings = model.llm_embeddings()
    head = LMHead(embeddings.clone(), None, model.llm.config)
    return AlignmentLoss(head, embeddings.mean(dim=0), **{"mask_probability": 0.4, "chunk": 5, **options})


def naive_loss(model, loss, batch, progress=0.0):
    """One text at a time, logits of all positions, and labels as long as the input."""
    source, target = batch["source"], batch["target"]
    hidden = loss.choose_masked(target["attention_mask"], batch["positions"], progress)
    total, count = 0.0, 0
    for row in range(len(hidden)):
        length, own = (int(part["attention_mask"][row].sum()) for part in (source, target))
        prefix, _, _ = model.soft_tokens(
            source["input_ids"][row : row + 1, :length], source["attention_mask"][row : row + 1, :length]
        )
        ids = target["input_ids"][row, :own]
        inputs = torch.where(hidden[row, :own, None], loss.mask_embedding, model.llm.get_input_embeddings()(ids))
        # Causal is the LLM's own default.
        states = model.llm(inputs_embeds=torch.cat([prefix, inputs[None]], dim=1)).last_hidden_state[0]
        labels = torch.cat([torch.full((prefix.shape[1],), -100), ids])
        total = total + cross_entropy(loss.lm_head(states)[:-1], labels[1:], reduction="sum")
        count += own
    return total / count


@pytest.mark.parametrize("max_tokens", [1, 60, 10_000])
def test_step_equals_the_naive_form(tiny_model, max_tokens):
    model, batch = learning(tiny_model), align_batch()
    loss = alignment(model, max_tokens=max_tokens)
    expected = naive_loss(model, loss, batch)
    expected.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    metrics, found = step_gradients(loss, model, batch)
    assert metrics["loss"] == pytest.approx(float(expected.detach()), rel=1e-5)  # float32
    assert_same(found, gradients)
    value, found = graph_gradients(loss, model, batch)
    assert value == pytest.approx(float(expected.detach()), rel=1e-5)
    assert_same(found, gradients)


@pytest.mark.parametrize("scaling", [{}, {"final_logit_softcapping": 3.0}, {"logits_scaling": 4.0}, {"bias": True}])
def test_sliced_cross_entropy_equals_full_logits(scaling):
    torch.manual_seed(0)
    bias = torch.randn(50) if scaling.pop("bias", False) else None
    head = LMHead(torch.randn(50, 12), bias, types.SimpleNamespace(**scaling))
    states, wanted = torch.randn(23, 12, requires_grad=True), torch.randint(50, (23,))
    expected = cross_entropy(head(states), wanted, reduction="sum")
    for chunk in (1, 5, 100):
        found = token_cross_entropy(states, wanted, head, chunk)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)  # A float32 sum of 23.
        mine, theirs = (torch.autograd.grad(v * 0.3, states, retain_graph=True)[0] for v in (found, expected))
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    assert float(token_cross_entropy(states[:0], wanted[:0], head).detach()) == 0


def test_the_head_computes_in_its_own_precision():
    head = LMHead(torch.randn(50, 12), None, types.SimpleNamespace())
    states, wanted = torch.randn(23, 12), torch.randint(50, (23,))
    expected = token_cross_entropy(states, wanted, head)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(token_cross_entropy(states, wanted, head), expected)


def test_the_fused_kernel_gets_what_it_needs(monkeypatch):
    """On a GPU, liger-kernel's module is called; a stand-in checks its arguments here."""
    from lusifer.training import alignment as module

    class Kernel:
        def __init__(self, reduction, softcap):
            assert reduction == "sum"
            self.softcap = softcap

        def __call__(self, weight, states, wanted, bias):
            logits = torch.nn.functional.linear(states, weight, bias)
            logits = logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
            return cross_entropy(logits, wanted, reduction="sum")

    stand_in = types.SimpleNamespace(LigerFusedLinearCrossEntropyLoss=Kernel)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", stand_in)
    states, wanted = torch.randn(23, 12), torch.randint(50, (23,))
    for softcap in (None, 3.0):
        head = LMHead(torch.randn(50, 12), torch.randn(50), types.SimpleNamespace(final_logit_softcapping=softcap))
        expected = token_cross_entropy(states, wanted, head)
        torch.testing.assert_close(module._fused(states, wanted, head), expected, atol=1e-4, rtol=1e-5)


def test_no_more_logits_than_a_slice_are_made(tiny_model):
    model, batch = learning(tiny_model), align_batch()
    seen = []
    loss = alignment(model)
    loss.lm_head.register_forward_hook(lambda _, inputs, logits: seen.append(logits.shape[0]))
    step_gradients(loss, model, batch)
    assert max(seen) <= 5
    assert sum(seen) == int(batch["target"]["attention_mask"].sum())  # Supervised positions only.


def test_one_group_at_a_time(tiny_model):
    model, batch = learning(tiny_model), align_batch()
    order = []
    model.register_forward_hook(lambda *_: order.append("forward"))

    def backward(value):
        order.append("backward")
        value.backward()

    step_gradients(alignment(model, max_tokens=60), model, batch, backward=backward)
    assert len(order) > 2 and order == ["forward", "backward"] * (len(order) // 2)


def test_masks_depend_on_seed_and_position_only(tiny_model):
    loss = alignment(tiny_model, mask_probability=0.3)
    mask = torch.ones(400, 50, dtype=torch.long)
    mask[::2, 20:] = 0
    positions = torch.arange(1000, 1400)
    hidden = loss.choose_masked(mask, positions, 0.0)
    assert not hidden[mask == 0].any()
    share = float(hidden[mask == 1].float().mean())
    assert share == pytest.approx(0.3, abs=0.012)  # 14,000 draws: three standard deviations.
    order = torch.randperm(400)[:7]
    assert torch.equal(loss.choose_masked(mask[order], positions[order], 0.0), hidden[order])
    wide = torch.nn.functional.pad(mask, (0, 9))
    assert torch.equal(loss.choose_masked(wide, positions, 0.0)[:, :50], hidden)
    assert not torch.equal(hidden[1], hidden[3])
    loss.seed = 1
    assert not torch.equal(loss.choose_masked(mask, positions, 0.0), hidden)


def test_mask_probability_follows_its_schedule(tiny_model):
    loss = alignment(tiny_model, mask_probability=(0.2, 1.0))
    mask, positions = torch.ones(200, 50, dtype=torch.long), torch.arange(200)
    for progress, expected in ((0.0, 0.2), (0.5, 0.6), (1.0, 1.0)):
        assert loss.probability(progress) == pytest.approx(expected)
        share = float(loss.choose_masked(mask, positions, progress).float().mean())
        assert share == pytest.approx(expected, abs=0.015)  # 10,000 draws: three standard deviations.


def test_default_masks_half_and_evaluation_nothing(tiny_model):
    """The published masking leaves a token visible with (1 - p)^2, and its configurations leave p at 0."""
    model, batch = tiny_model, align_batch()
    embeddings = model.llm_embeddings()
    loss = AlignmentLoss(LMHead(embeddings, None, model.llm.config), embeddings.mean(dim=0))
    assert loss.probability(0.3) == 0.5
    with torch.no_grad():
        loss.eval()
        visible = float(loss(model, batch))
        loss.mask_probability = 0.0
        assert float(loss.train()(model, batch)) == visible
        loss.mask_probability = 1.0
        assert abs(float(loss(model, batch)) - visible) > 0.01


def test_hidden_inputs_are_the_mask_embedding(tiny_model):
    """With everything hidden, no target token but the last position's own can change a state."""
    model, batch = tiny_model, align_batch()
    loss = alignment(model)
    everything = batch["target"]["attention_mask"].bool()
    with torch.no_grad():
        states = loss.states(model, batch["source"], batch["target"], everything)
        other = {**batch["target"], "input_ids": (batch["target"]["input_ids"] + 7) % 200}
        assert torch.equal(loss.states(model, batch["source"], other, everything), states)
        assert not torch.equal(loss.states(model, batch["source"], other, None), states)


def test_untied_head_is_loaded(tiny_model, tmp_path):
    config = tiny_model.llm.config.to_dict() | {"tie_word_embeddings": False}
    causal = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    causal.save_pretrained(tmp_path)
    head = load_lm_head(str(tmp_path), causal.model)
    assert torch.equal(head.weight, causal.lm_head.weight)
    hidden = torch.randn(3, 48)
    torch.testing.assert_close(head(hidden), causal.lm_head(hidden))


def test_soft_tokens_learn_to_carry_the_text(tiny_model):
    model, batch = tiny_model, align_batch()
    loss = alignment(model, mask_probability=1.0)
    model.set_trainable(encoder="full", connector=True, llm=False)
    frozen = {name: p.clone() for name, p in model.llm.named_parameters()}
    before = held_out_metrics(loss, model, batch)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(60):
        step = {"backward": torch.Tensor.backward, "no_sync": torch.enable_grad}
        loss.step(model, batch, **step)
        optimizer.step()
        optimizer.zero_grad()
    after = held_out_metrics(loss, model, batch)
    assert after["hidden_own_accuracy"] > before["hidden_own_accuracy"] + 0.2
    assert after["hidden_other_cross_entropy"] > after["hidden_own_cross_entropy"] + 0.5
    assert after["hidden_none_cross_entropy"] > after["hidden_own_cross_entropy"] + 0.5
    for name, parameter in model.llm.named_parameters():
        assert torch.equal(parameter, frozen[name]), name


@torch.no_grad()
def test_held_out_metrics_by_hand(tiny_model):
    model, batch = tiny_model, align_batch()
    loss = alignment(model, max_tokens=60).train()
    model.train()
    found = held_out_metrics(loss, model, batch)
    assert model.training
    model.eval()
    source, target = batch["source"], batch["target"]
    ids, mask = source["input_ids"], source["attention_mask"]
    sources = {"own": (ids, mask), "other": (ids.roll(1, 0), mask.roll(1, 0)), "none": (ids, mask * 0)}
    wanted = target["input_ids"][target["attention_mask"].bool()]
    assert len(found) == 12
    for inputs, hidden in (("visible", None), ("hidden", target["attention_mask"].bool())):
        for name, (ids, mask) in sources.items():
            states = loss.states(model, {"input_ids": ids, "attention_mask": mask}, target, hidden)
            logits = loss.lm_head(states)
            entropy = float(cross_entropy(logits, wanted))
            assert found[f"{inputs}_{name}_cross_entropy"] == pytest.approx(entropy, rel=1e-4)  # float32
            accuracy = float((logits.argmax(dim=1) == wanted).float().mean())
            assert found[f"{inputs}_{name}_accuracy"] == pytest.approx(accuracy)
    prefix, real, _ = model.soft_tokens(source["input_ids"][:1], source["attention_mask"][:1] * 0)
    assert real.tolist() == [[True, True]]  # BOS and the added token.
    with pytest.raises(LusiferError, match="two rows"):
        held_out_metrics(loss, model, part(batch, 0, 6))


@pytest.mark.parametrize("leak", [False, True])
def test_random_tokens_cannot_be_learned(tiny_model, monkeypatch, leak):
    """The published code aligns with full attention and so reads its answers; fresh random tokens show it."""
    model = tiny_model.requires_grad_(True)
    loss = alignment(model, mask_probability=0.0, chunk=256)
    if leak:
        both_ways = lambda llm, embeds, mask, is_causal: run_llm(llm, embeds, mask, is_causal=False)  # noqa: E731
        monkeypatch.setattr("lusifer.model.modeling.run_llm", both_ways)
    torch.manual_seed(0)
    # Gentle weights learn faster, and start near the entropy.
    for parameter in model.llm.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    loss.lm_head.weight.data = model.llm.get_input_embeddings().weight.data
    kinds, source = 8, tokens([3] * 32)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    history = []
    for _ in range(STEPS):
        ids = torch.randint(10, 10 + kinds, (32, 8))
        batch = {"source": source, "target": {"input_ids": ids, "attention_mask": torch.ones_like(ids)}}
        optimizer.zero_grad()
        value = loss(model, {**batch, "positions": torch.arange(32)})
        value.backward()
        optimizer.step()
        history.append(float(value.detach()))
    reached = sum(history[-10:]) / 10
    if leak:
        assert reached < 0.5 * math.log(kinds)  # The control: these steps suffice to exploit a leak.
    else:
        # 10 x 256 tokens: their mean loss scatters by less than a hundredth around at least the entropy.
        assert reached > 0.97 * math.log(kinds)


def on_a_rank(rank, size, model):
    wrapped, batch = DistributedDataParallel(model), align_batch()
    shards, no_sync = sharded(model)
    found = []
    for max_tokens in (40, 10_000):
        loss, mine = alignment(model, max_tokens=max_tokens, seed=3), part(batch, rank, size)
        found += [step_gradients(loss, wrapped, mine), step_gradients(loss, shards, mine, no_sync=no_sync)]
    message = ""
    try:
        step_gradients(alignment(model), wrapped, part(batch, 0, 2 + rank))
    except LusiferError as error:
        message = str(error)
    return found, message


def test_two_processes_equal_one(tiny_model):
    """Under DDP and under FSDP2; ranks hold different numbers of target tokens and of length-sorted groups."""
    model = learning(tiny_model)
    metrics, gradients = step_gradients(alignment(model, seed=3), model, align_batch())
    for steps, message in on_two_ranks(on_a_rank, model):
        for measured, found in steps:
            assert measured["loss"] == pytest.approx(metrics["loss"], rel=1e-5)  # float32
            assert_same(found, gradients)
        assert "different numbers of rows" in message
