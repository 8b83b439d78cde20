"""Losses against naive forms, in values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy

from lusifer.backbones import load_lm_head, load_tokenizer
from lusifer.data import llm_preprocess
from lusifer.encoding import lusifer_model
from lusifer.losses import AlignmentLoss, ContrastiveLoss, embed_columns, info_nce, micro_batches, text_keys

STEPS = 70  # Of the leak test.
TEXTS = [
    "the cat sat on the mat",
    "rain fell on the roof all night while we slept",
    "bread",
    "she reads a long book about the sea",
    "he wrote a letter to his mother",
    "the train arrives at nine",
]


def features(model, texts):
    return model.preprocess(texts)


def naive_info_nce(queries, candidates, temperature, excluded=None):
    total = 0.0
    for i, query in enumerate(queries):
        scores = [
            float(cosine_similarity(query, c, dim=0)) / temperature
            for j, c in enumerate(candidates)
            if j == i or excluded is None or not excluded[i][j]
        ]
        positive = float(cosine_similarity(query, candidates[i], dim=0)) / temperature
        total += math.log(sum(math.exp(s) for s in scores)) - positive
    return total / len(queries)


def test_info_nce_equals_a_loop():
    torch.manual_seed(0)
    queries, candidates = torch.randn(4, 8), torch.randn(12, 8)
    excluded = torch.rand(4, 12) < 0.3
    for mask in (None, excluded):
        loss = info_nce(queries, candidates, temperature=0.05, excluded=mask)
        assert float(loss) == pytest.approx(naive_info_nce(queries, candidates, 0.05, mask), rel=1e-4)  # float32
    assert info_nce(queries.bfloat16(), candidates.bfloat16(), temperature=0.05).dtype == torch.float32


def test_micro_batches_cover_every_row_once_within_the_budget():
    lengths = torch.tensor([3, 50, 7, 7, 1, 20, 90])
    groups = list(micro_batches(lengths, 40))
    assert sorted(torch.cat(groups).tolist()) == list(range(7))
    for rows in groups:
        assert len(rows) == 1 or len(rows) * int(lengths[rows].max()) <= 40


def test_text_keys_ignore_padding_only(tiny_st):
    alone, padded = features(tiny_st, ["bread"]), features(tiny_st, ["bread", TEXTS[1], "bread"])
    keys = text_keys(padded)
    assert keys[0] == keys[2] == text_keys(alone)[0]
    assert keys[0] != keys[1]


@pytest.mark.parametrize("max_tokens", [1, 30, 10_000])
def test_sorted_pass_equals_one_by_one(tiny_st, max_tokens):
    lusifer_model(tiny_st).set_trainable(encoder="frozen", connector=True, llm=False)
    weight = lusifer_model(tiny_st).connector.up.weight
    columns = [features(tiny_st, TEXTS[:3]), features(tiny_st, TEXTS[3:])]
    fast = torch.cat(embed_columns(tiny_st, columns, max_tokens))
    slow = torch.cat([tiny_st(features(tiny_st, [text]))["sentence_embedding"] for text in TEXTS])
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)  # Float32, sums in another order.
    target = torch.randn(fast.shape, generator=torch.Generator().manual_seed(0))
    gradients = [torch.autograd.grad((v * target).sum(), weight)[0] for v in (fast, slow)]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)  # Sums over all tokens of all texts.


def test_contrastive_loss_masks_duplicates(tiny_st):
    queries, positives = TEXTS[:4], [TEXTS[4], TEXTS[5], TEXTS[4], TEXTS[0]]
    loss = ContrastiveLoss(tiny_st, temperature=0.1)
    with torch.no_grad():
        found = float(loss([features(tiny_st, queries), features(tiny_st, positives)]))
        q, p = (embed_columns(tiny_st, [features(tiny_st, t)], 10_000)[0] for t in (queries, positives))
    # Rows 0 and 2 share a positive; the positive of row 3 is the query of row 0.
    excluded = torch.zeros(4, 4, dtype=torch.bool)
    excluded[0, 2] = excluded[2, 0] = excluded[0, 3] = True
    assert found == pytest.approx(naive_info_nce(q, p, 0.1, excluded), rel=1e-4)
    assert found != pytest.approx(naive_info_nce(q, p, 0.1), rel=1e-3)


def test_every_kind_of_copy_is_no_negative(tiny_st):
    a, b, c, d, e, f = TEXTS
    columns = [[a, b, a, e], [b, c, d, c], [f, d, c, e]]  # Queries, positives, hard negatives.
    batch = [features(tiny_st, texts) for texts in columns]
    excluded = torch.zeros(4, 8, dtype=torch.bool)
    # Rows 0 and 2 ask the same; column 4 + i is the hard negative of row i.
    for row, copies in ((0, [2]), (1, [0, 3, 6]), (2, [0, 5]), (3, [1, 6, 7])):
        excluded[row, copies] = True
    with torch.no_grad():
        q, p, n = embed_columns(tiny_st, batch, 10_000)
        found = float(ContrastiveLoss(tiny_st, temperature=0.1)(batch))
        both = float(ContrastiveLoss(tiny_st, temperature=0.1, symmetric=True)(batch))
    forward = naive_info_nce(q, torch.cat([p, n]), 0.1, excluded)
    backward = naive_info_nce(p, q, 0.1, excluded[:, :4].T)
    assert found == pytest.approx(forward, rel=1e-4)  # float32
    assert both == pytest.approx((forward + backward) / 2, rel=1e-4)


def test_without_in_batch_negatives_only_own_hard_negatives_count(tiny_st):
    columns = [TEXTS[:2], TEXTS[2:4], TEXTS[4:]]
    batch = [features(tiny_st, texts) for texts in columns]
    loss = ContrastiveLoss(tiny_st, temperature=0.1, in_batch_negatives=False)
    with torch.no_grad():
        found = float(loss(batch))
        q, p, n = embed_columns(tiny_st, batch, 10_000)
    excluded = torch.tensor([[False, True, False, True], [True, False, True, False]])
    assert found == pytest.approx(naive_info_nce(q, torch.cat([p, n]), 0.1, excluded), rel=1e-4)


def test_symmetric_is_the_mean_of_both_directions(tiny_st):
    batch = [features(tiny_st, TEXTS[:3]), features(tiny_st, TEXTS[3:])]
    with torch.no_grad():
        found = float(ContrastiveLoss(tiny_st, temperature=0.1, symmetric=True)(batch))
        q, p = embed_columns(tiny_st, batch, 10_000)
    expected = (naive_info_nce(q, p, 0.1) + naive_info_nce(p, q, 0.1)) / 2
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.fixture
def alignment(tiny_st, tiny_llm):
    head = load_lm_head(tiny_llm, lusifer_model(tiny_st).llm)
    loss = AlignmentLoss(tiny_st, head, mask_probability=0.0, chunk=5)
    target = llm_preprocess(load_tokenizer("llm", tiny_llm), 64)
    return loss, target


def test_alignment_loss_equals_full_logits(alignment, tiny_st):
    loss, tokenize = alignment
    model = lusifer_model(tiny_st)
    total, count = 0.0, 0
    for text in TEXTS[:3]:
        source, target = features(tiny_st, [text]), tokenize([text])
        with torch.no_grad():
            prefix, _, _ = model.soft_tokens(source["input_ids"], source["attention_mask"])
            embeds = torch.cat([prefix, model.llm.get_input_embeddings()(target["input_ids"])], dim=1)
            hidden = model.llm(inputs_embeds=embeds).last_hidden_state  # Causal is the LLM's own default.
            logits = hidden @ model.llm.get_input_embeddings().weight.T
        # The state of the added token, last of the prefix, predicts the first target token.
        predicting = logits[0, prefix.shape[1] - 1 : -1]
        total += float(cross_entropy(predicting, target["input_ids"][0], reduction="sum"))
        count += target["input_ids"].numel()
    for max_tokens in (20, 10_000):
        loss.max_tokens = max_tokens
        with torch.no_grad():
            found = float(loss([features(tiny_st, TEXTS[:3]), tokenize(TEXTS[:3])]))
        assert found == pytest.approx(total / count, rel=1e-4)  # float32


def test_target_inputs_are_masked_with_p_in_training_only(alignment):
    loss, tokenize = alignment
    loss.mask_probability = 0.3
    ids = torch.randint(3, 200, (40, 50), generator=torch.Generator().manual_seed(0))
    plain = loss.eval().masked_target(ids)
    torch.manual_seed(0)
    masked = loss.train().masked_target(ids)
    changed = (masked != plain).any(dim=-1)
    assert changed.float().mean() == pytest.approx(0.3, abs=0.03)  # 2,000 draws: three standard deviations.
    torch.testing.assert_close(masked[changed], loss.mask_embedding.expand(int(changed.sum()), -1))


def test_untied_head_is_loaded(tiny_st, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = lusifer_model(tiny_st).llm.config.to_dict() | {"tie_word_embeddings": False}
    causal = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    causal.save_pretrained(tmp_path)
    head = load_lm_head(str(tmp_path), causal.model)
    assert torch.equal(head.weight, causal.lm_head.weight)
    hidden = torch.randn(3, 48)
    torch.testing.assert_close(head(hidden), causal.lm_head(hidden))


def test_soft_tokens_learn_to_carry_the_text(alignment, tiny_st):
    loss, tokenize = alignment
    model = lusifer_model(tiny_st)
    model.set_trainable(encoder="full", connector=True, llm=False)
    frozen = {name: p.clone() for name, p in model.llm.named_parameters()}
    loss.mask_probability = 1.0
    source, target = features(tiny_st, TEXTS), tokenize(TEXTS)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    loss.train()
    for _ in range(60):
        optimizer.zero_grad()
        loss([source, target]).backward()
        optimizer.step()
    with torch.no_grad():
        right = float(loss([source, target]))
        other = {name: value.roll(1, dims=0) if torch.is_tensor(value) else value for name, value in source.items()}
        shuffled = float(loss([other, target]))
    assert shuffled > right + 0.5
    for name, parameter in model.llm.named_parameters():
        assert torch.equal(parameter, frozen[name]), name


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in lusifer_model(model).named_parameters() if p.grad is not None}


def assert_same_gradients(first, second):
    assert first.keys() == second.keys() and first
    for name, gradient in first.items():
        assert gradient.abs().max() > 0 or "key" in name or "embeddings" in name, name
        # Float32 sums over all tokens in another order: relative to the largest entry of each gradient.
        torch.testing.assert_close(gradient, second[name], atol=1e-4 * float(gradient.abs().max() + 1), rtol=1e-3)


def test_gradients_do_not_depend_on_micro_batches(alignment, tiny_st):
    align, tokenize = alignment
    lusifer_model(tiny_st).set_trainable(encoder="full", connector=True, llm=False)
    pairs = [features(tiny_st, TEXTS[:3]), features(tiny_st, TEXTS[3:])]
    contrast = ContrastiveLoss(tiny_st, temperature=0.2, symmetric=True)
    for loss, batch in ((contrast, pairs), (align, [features(tiny_st, TEXTS), tokenize(TEXTS)])):
        found = []
        for budget in (1, 60, 10_000):
            loss.max_tokens = budget
            found.append(gradients(tiny_st, loss(batch)))
        assert_same_gradients(found[2], found[0])
        assert_same_gradients(found[2], found[1])


def test_alignment_gradients_equal_full_logits(alignment, tiny_st):
    loss, tokenize = alignment
    model = lusifer_model(tiny_st)
    model.set_trainable(encoder="full", connector=True, llm=False)
    losses = []
    for text in TEXTS[:3]:
        source, target = features(tiny_st, [text]), tokenize([text])
        prefix, _, _ = model.soft_tokens(source["input_ids"], source["attention_mask"])
        embeds = torch.cat([prefix, model.llm.get_input_embeddings()(target["input_ids"])], dim=1)
        logits = model.llm(inputs_embeds=embeds).last_hidden_state @ model.llm.get_input_embeddings().weight.T
        losses.append(cross_entropy(logits[0, prefix.shape[1] - 1 : -1], target["input_ids"][0], reduction="none"))
    naive = gradients(tiny_st, torch.cat(losses).mean())
    found = gradients(tiny_st, loss([features(tiny_st, TEXTS[:3]), tokenize(TEXTS[:3])]))
    assert_same_gradients(naive, found)


@pytest.mark.parametrize("leak", [False, True])
def test_random_tokens_cannot_be_learned(alignment, tiny_st, monkeypatch, leak):
    """The published code aligns with full attention and so reads its answers; fresh random tokens show it."""
    loss, _ = alignment
    model = lusifer_model(tiny_st).requires_grad_(True)
    run = model._run_llm
    if leak:
        monkeypatch.setattr(model, "_run_llm", lambda embeds, mask, is_causal: run(embeds, mask, is_causal=False))
    torch.manual_seed(0)
    # Gentle weights learn faster, and start near the entropy.
    for parameter in model.llm.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    kinds, source = 8, features(tiny_st, ["bread"] * 32)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    history = []
    for _ in range(STEPS):
        ids = torch.randint(10, 10 + kinds, (32, 8))
        optimizer.zero_grad()
        value = loss([source, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
        value.backward()
        optimizer.step()
        history.append(float(value.detach()))
    reached = sum(history[-10:]) / 10
    if leak:
        assert reached < 0.5 * math.log(kinds)  # The control: these steps suffice to exploit a leak.
    else:
        # 10 x 256 tokens: their mean loss scatters by less than a hundredth around at least the entropy.
        assert reached > 0.97 * math.log(kinds)
