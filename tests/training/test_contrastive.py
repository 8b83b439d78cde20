"""InfoNCE against a loop, in values and gradients, on one process and on two."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributed
from torch.nn.functional import cosine_similarity, cross_entropy, normalize
from torch.nn.parallel import DistributedDataParallel

from lusifer import LusiferError
from lusifer.data.collate import ContrastCollator
from lusifer.model.backbones import load_tokenizer
from lusifer.training.contrastive import ContrastiveLoss, info_nce
from lusifer.training.distillation import neighbourhood_divergence
from support.batches import (
    assert_same,
    contrast_batch,
    graph_gradients,
    learning,
    on_two_ranks,
    part,
    sharded,
    step_gradients,
    tokens,
)


def naive(queries, candidates, tau, out=lambda i, j: False):
    """Mean over queries of -log softmax, one cosine at a time."""
    losses = []
    for i, query in enumerate(queries):
        cosines = [
            cosine_similarity(query, candidate, dim=0) / tau
            for j, candidate in enumerate(candidates)
            if j == i or not out(i, j)
        ]
        losses.append(torch.stack(cosines).logsumexp(dim=0) - cosine_similarity(query, candidates[i], dim=0) / tau)
    return torch.stack(losses).mean()


def embeddings(columns=3, rows=5, dim=8, seed=0):
    return torch.randn(columns, rows, dim, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def distinct(vectors):
    return torch.arange(vectors.shape[0] * vectors.shape[1]).reshape(vectors.shape[:2])


def compare(found, expected, *inputs):
    """Values and gradients: float32, a few dozen summands of size 1/tau."""
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(value, inputs, retain_graph=True) for value in (found, expected)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rows", [3, 300])  # 300 do not fit one slice of the score matrix.
def test_info_nce_equals_autograd(rows):
    queries, candidates = torch.randn(rows, 8, requires_grad=True), torch.randn(2 * rows, 8, requires_grad=True)
    out = torch.rand(rows, 2 * rows) < 0.3
    out[range(rows), range(rows)] = True  # The own positive counts all the same.
    found = info_nce(queries, candidates, temperature=0.05, excluded=lambda few: out[few].clone())
    scores = normalize(queries, dim=-1) @ normalize(candidates, dim=-1).T / 0.05
    free = out & ~torch.eye(rows, 2 * rows, dtype=torch.bool)
    expected = cross_entropy(scores.masked_fill(free, float("-inf")), torch.arange(rows))
    compare(found, expected, queries, candidates)


def test_in_batch_negatives_equal_a_loop():
    vectors = embeddings()
    queries, candidates = vectors[0], vectors[1:].flatten(0, 1)
    keys = distinct(vectors)
    compare(ContrastiveLoss(temperature=0.1).of_embeddings(vectors, keys), naive(queries, candidates, 0.1), vectors)
    both = (naive(queries, candidates, 0.1) + naive(vectors[1], queries, 0.1)) / 2
    compare(ContrastiveLoss(temperature=0.1, symmetric=True).of_embeddings(vectors, keys), both, vectors)


def test_scores_are_cosines_in_float32_whatever_autocast_says():
    """The published loss is -sqrt(2 - 2 cos) / tau, in bfloat16."""
    vectors = embeddings()
    expected = ContrastiveLoss().of_embeddings(vectors, distinct(vectors)).detach()
    vectors.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        found = ContrastiveLoss().of_embeddings(vectors, distinct(vectors))
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    distances = -torch.cdist(normalize(vectors[0], dim=-1), normalize(vectors[1:].flatten(0, 1), dim=-1)) / 0.05
    assert abs(float(cross_entropy(distances, torch.arange(5)) - expected)) > 0.1  # The control.


@pytest.mark.parametrize("symmetric", [False, True])
def test_without_in_batch_negatives_only_own_hard_negatives_count(symmetric):
    vectors = embeddings()
    loss = ContrastiveLoss(temperature=0.1, symmetric=symmetric)
    expected = naive(vectors[0], vectors[1:].flatten(0, 1), 0.1, lambda i, j: j % 5 != i)
    compare(loss.of_embeddings(vectors, distinct(vectors), in_batch=False), expected, vectors)
    # A row whose negative is its own positive has nothing left to learn from; that is no error.
    keys = distinct(vectors)
    keys[2] = keys[1]
    assert float(loss.of_embeddings(vectors, keys, in_batch=False).detach()) == 0


def test_every_kind_of_copy_is_no_negative():
    a, b, c, d, e, f = range(6)
    keys = torch.tensor([[a, b, a, e], [b, c, d, c], [f, d, c, e]])  # Queries, positives, hard negatives.
    vectors = embeddings(3, 4)
    # Rows 0 and 2 ask the same; column 4 + i is the hard negative of row i.
    copies = {0: [2], 1: [0, 3, 6], 2: [0, 5], 3: [1, 6, 7]}
    expected = naive(vectors[0], vectors[1:].flatten(0, 1), 0.1, lambda i, j: j in copies[i])
    compare(ContrastiveLoss(temperature=0.1).of_embeddings(vectors, keys), expected, vectors)
    mirrored = naive(vectors[1], vectors[0], 0.1, lambda i, j: i in copies[j])
    both = ContrastiveLoss(temperature=0.1, symmetric=True).of_embeddings(vectors, keys)
    compare(both, (expected + mirrored) / 2, vectors)
    own = ContrastiveLoss(temperature=0.1).of_embeddings(vectors, keys, in_batch=False)
    expected = naive(vectors[0], vectors[1:].flatten(0, 1), 0.1, lambda i, j: j % 4 != i or j in copies[i])
    compare(own, expected, vectors)


@pytest.mark.parametrize("in_batch", [True, False])
def test_matryoshka_is_the_mean_over_truncated_embeddings(in_batch):
    vectors = embeddings()
    found = ContrastiveLoss(temperature=0.1, matryoshka_dims=[8, 4, 2])
    found = found.of_embeddings(vectors, distinct(vectors), in_batch=in_batch)
    parts = [
        naive(v[0], v[1:].flatten(0, 1), 0.1, lambda i, j: not in_batch and j % 5 != i)
        for v in (vectors, vectors[..., :4], vectors[..., :2])
    ]
    compare(found, torch.stack(parts).mean(), vectors)
    with pytest.raises(LusiferError, match="matryoshka_dims asks for 9"):
        ContrastiveLoss(matryoshka_dims=[9]).of_embeddings(vectors, distinct(vectors))


@pytest.mark.parametrize("margin", [0.0, 0.3])
@pytest.mark.parametrize("in_batch", [True, False])
def test_a_guide_leaves_out_what_it_finds_closer_than_the_positive(margin, in_batch):
    vectors, guide = embeddings(), normalize(embeddings(seed=1).detach(), dim=-1)
    queries, candidates = guide[0], guide[1:].flatten(0, 1)

    def out(i, j):
        near = queries[i] @ candidates[j] > queries[i] @ candidates[i] - margin
        return near or (not in_batch and j % 5 != i)

    assert any(out(i, 5 + i) for i in range(5)) and not all(out(i, 5 + i) for i in range(5))
    loss = ContrastiveLoss(temperature=0.1, guide=torch.nn.Linear(1, 1), guide_margin=margin)
    found = loss.of_embeddings(vectors, distinct(vectors), guide, in_batch=in_batch)
    compare(found, naive(vectors[0], vectors[1:].flatten(0, 1), 0.1, out), vectors)


def test_symmetric_guide_is_the_mirror_image():
    vectors, guide = embeddings(2), normalize(embeddings(2, seed=1).detach(), dim=-1)
    loss = ContrastiveLoss(temperature=0.1, symmetric=True, guide_margin=0.0)
    forward = naive(*vectors, 0.1, lambda i, j: guide[0, i] @ guide[1, j] > guide[0, i] @ guide[1, i])
    mirror = naive(vectors[1], vectors[0], 0.1, lambda i, j: guide[1, i] @ guide[0, j] > guide[1, i] @ guide[0, i])
    compare(loss.of_embeddings(vectors, distinct(vectors), guide), (forward + mirror) / 2, vectors)


def test_a_guide_without_margin_leaves_out_nothing_and_distill_adds_its_divergence():
    vectors, guide = embeddings(), normalize(embeddings(seed=1).detach(), dim=-1)
    plain = ContrastiveLoss(temperature=0.1).of_embeddings(vectors, distinct(vectors))
    idle = ContrastiveLoss(temperature=0.1, guide=torch.nn.Linear(1, 1))
    compare(idle.of_embeddings(vectors, distinct(vectors), guide), plain, vectors)
    taught = ContrastiveLoss(temperature=0.1, guide=torch.nn.Linear(1, 1), distill=3.0, distill_temperature=0.2)
    texts, theirs = vectors.flatten(0, 1), guide.flatten(0, 1)
    expected = plain + 3 * neighbourhood_divergence(texts, theirs, temperature=0.2)
    compare(taught.of_embeddings(vectors, distinct(vectors), guide), expected, vectors)


class Guide(torch.nn.Module):
    """Texts of a like first token are alike."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(100, 6)
        torch.nn.init.normal_(self.table.weight, generator=torch.Generator().manual_seed(5))

    def forward(self, features):
        assert not self.training and not torch.is_grad_enabled()
        mask = features["attention_mask"].unsqueeze(-1)
        return {"sentence_embedding": (self.table(features["input_ids"]) * mask).sum(dim=1)}


def test_the_guide_reads_its_own_features_and_learns_nothing(tiny_model):
    model, batch = learning(tiny_model), contrast_batch()
    plain = ContrastiveLoss(temperature=0.1)
    guided = ContrastiveLoss(
        temperature=0.1, guide=Guide(), guide_margin=0.0, distill=0.5, max_tokens=40, graph_tokens=80
    ).train()
    with pytest.raises(LusiferError, match="guide"):
        guided.step(model, batch, backward=torch.Tensor.backward, no_sync=torch.no_grad)
    model.zero_grad()
    features = tokens(torch.arange(5, 17).tolist(), high=100, seed=9)
    batch["guide"] = features
    value, gradients = graph_gradients(guided, model, batch)
    with torch.no_grad():
        guide = normalize(guided.guide(features)["sentence_embedding"], dim=-1).unflatten(0, (3, -1))
        vectors = model(batch["input_ids"], batch["attention_mask"]).pooler_output.unflatten(0, (3, -1))
        keys = batch["keys"].unflatten(0, (3, -1))
        assert value == pytest.approx(float(guided.of_embeddings(vectors, keys, guide)), rel=1e-5)  # float32
        assert abs(value - float(plain(model, batch))) > 0.01
    assert_same(step_gradients(guided, model, batch)[1], gradients)
    assert not any(parameter.requires_grad for parameter in guided.parameters())


def naive_batch_loss(model, batch, loss):
    """One padded pass over all texts, a loop over all pairs."""
    vectors = model(batch["input_ids"], batch["attention_mask"]).pooler_output.unflatten(0, (batch["columns"], -1))
    rows, tau = vectors.shape[1], loss.temperature
    candidates = vectors[1:].flatten(0, 1)
    if not batch["in_batch_negatives"]:
        return naive(vectors[0], candidates, tau, lambda i, j: j % rows != i)
    value = naive(vectors[0], candidates, tau)
    return (value + naive(vectors[1], vectors[0], tau)) / 2 if loss.symmetric else value


@pytest.mark.parametrize(("in_batch", "symmetric"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("budgets", [(10_000, 10_000), (40, 10_000), (40, 120), (40, 0), (1, 0)])
def test_step_equals_the_naive_form(tiny_model, in_batch, symmetric, budgets):
    """Single pass, length-sorted passes, a partly and a wholly cached one, and one text at a time."""
    model, batch = learning(tiny_model), contrast_batch(in_batch=in_batch)
    loss = ContrastiveLoss(temperature=0.1, symmetric=symmetric, max_tokens=budgets[0], graph_tokens=budgets[1])
    expected = naive_batch_loss(model, batch, loss)
    expected.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    metrics, found = step_gradients(loss, model, batch)
    assert metrics["loss"] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert metrics["tokens"] == int(batch["attention_mask"].sum())
    assert_same(found, gradients)
    value, found = graph_gradients(loss, model, batch)
    assert value == pytest.approx(float(expected.detach()), rel=1e-5)
    assert_same(found, gradients)


@pytest.mark.parametrize(
    ("instruction", "prompts"),
    [("", {}), ("Find it: ", {}), ("", {"query": "query: ", "document": "passage: "})],
)
def test_copies_are_found_behind_instructions_and_prompts(tiny_model, tiny_encoder, instruction, prompts):
    """Row 0's query is row 1's positive; row 2 asks what row 1 asks."""
    texts = [("the cat", "the dog"), ("rain", "the cat"), ("rain", "milk"), ("a small house", "the sea")]
    rows = [
        {
            "query": instruction + query,
            "plain_query": query,
            "document_instruction": None,
            "positive": positive,
            "negatives": [],
            "position": place,
            "dataset": "d",
            "in_batch_negatives": True,
        }
        for place, (query, positive) in enumerate(texts)
    ]
    batch = ContrastCollator(load_tokenizer("encoder", tiny_encoder), 32, prompts=prompts)(rows)
    vectors = tiny_model(batch["input_ids"], batch["attention_mask"]).pooler_output.unflatten(0, (2, -1)).detach()
    copies = {0: [1], 1: [2], 2: [1], 3: []}
    expected = naive(*vectors, 0.1, lambda i, j: j in copies[i])
    found = ContrastiveLoss(temperature=0.1)(tiny_model, batch)
    torch.testing.assert_close(found.detach(), expected, atol=1e-5, rtol=1e-5)


def test_a_single_process_uses_in_batch_negatives():
    """The published code does so on several processes only."""
    vectors = embeddings(2)
    with_others = ContrastiveLoss().of_embeddings(vectors, distinct(vectors))
    assert float(with_others.detach()) > 0.5
    assert float(ContrastiveLoss().of_embeddings(vectors, distinct(vectors), in_batch=False).detach()) == 0


CASES = [
    ({"symmetric": True, "max_tokens": 30, "graph_tokens": 10_000}, {}),
    ({"max_tokens": 30, "graph_tokens": 60}, {}),
    ({"max_tokens": 30, "graph_tokens": 0, "matryoshka_dims": [48, 16], "guide": Guide(), "distill": 2.0}, {}),
    ({"max_tokens": 30, "graph_tokens": 60, "guide": Guide(), "guide_margin": 0.1, "distill": 0.5}, {}),
    ({"max_tokens": 30, "graph_tokens": 60}, {"in_batch": False}),
]


def case_batch(settings):
    batch = contrast_batch(rows=6, seed=4, **settings)
    # A copy of a text of the other rank must be found there.
    for name in ("input_ids", "attention_mask", "keys"):
        batch[name][11] = batch[name][6]
    batch["guide"] = tokens([3 + i % 7 for i in range(18)], high=100, seed=9)
    return batch


def disagreements(model):
    """What ranks are told that drew different sets, flags or numbers of negatives."""
    rank, messages = distributed.get_rank(), []
    for change in ({"dataset": f"set {rank}"}, {"in_batch_negatives": rank == 0}, {"columns": 3 - rank}):
        batch = {**contrast_batch(rows=2, columns=6), **change}
        try:
            step_gradients(ContrastiveLoss(), model, batch)
        except LusiferError as error:
            messages.append(str(error))
    return messages


def on_a_rank(rank, size, model):
    whole, (shards, no_sync) = DistributedDataParallel(model), sharded(model)
    found = []
    for options, settings in CASES:
        loss, mine = ContrastiveLoss(temperature=0.1, **options), part(case_batch(settings), rank, size)
        found.append([step_gradients(loss, whole, mine), step_gradients(loss, shards, mine, no_sync=no_sync)])
    return found, disagreements(whole)


def test_two_processes_equal_one_and_stop_where_they_disagree(tiny_model):
    """Under DDP and under FSDP2."""
    model = learning(tiny_model)
    ranks = on_two_ranks(on_a_rank, model)
    for index, (options, settings) in enumerate(CASES):
        expected, gradients = step_gradients(ContrastiveLoss(temperature=0.1, **options), model, case_batch(settings))
        for metrics, found in [step for steps, _ in ranks for step in steps[index]]:
            assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-5)  # float32
            assert_same(found, gradients)
    for rank, (_, messages) in enumerate(ranks):
        assert len(messages) == 3
        assert f"rank {rank} drew" in messages[0] and f"set {rank}" in messages[0] and "same recipe" in messages[0]


def test_the_loss_of_a_large_batch_stays_small():
    """A loss that grows with the cube of the batch, as the published one, would need gigabytes."""
    vectors = torch.randn(9, 512, 64, requires_grad=True)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if torch.is_tensor(tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes())
            return result

    with Watch():
        ContrastiveLoss().of_embeddings(vectors, distinct(vectors)).backward()
    assert largest <= 512 * 8 * 512 * 4 / 2 + 1  # A slice of the scores is half of them here.
    assert math.isfinite(float(vectors.grad.sum()))
