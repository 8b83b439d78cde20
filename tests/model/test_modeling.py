"""Packing, pooling, what learns, and that what is frozen stays bit-identical."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from transformers import AttentionInterface, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.utils.generic import is_flash_attention_requested

from lusifer import LusiferError, LusiferModel
from lusifer.model.backbones import build_llm
from lusifer.model.packing import pack_left
from lusifer.model.pooling import pool
from lusifer.training.alignment import AlignmentLoss, LMHead
from lusifer.training.contrastive import ContrastiveLoss
from support.batches import align_batch, contrast_batch
from support.tiny import sharpen
from support.varlen import flash_reference

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}


def tokens(*lengths):
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()
    ids = torch.randint(4, 200, mask.shape, generator=generator)
    return torch.where(mask.bool(), ids, 1), mask


def test_pack_left_by_hand():
    states = torch.arange(10.0).reshape(2, 5, 1)
    mask = torch.tensor([[0, 1, 0, 1, 0], [1, 0, 0, 0, 1]]).bool()
    packed, packed_mask = pack_left(states, mask)
    assert packed.squeeze(-1).tolist() == [[1.0, 3.0], [5.0, 9.0]]
    assert packed_mask.all()
    uneven = torch.tensor([[0, 1, 0, 0, 0], [1, 1, 0, 0, 1]]).bool()
    packed, packed_mask = pack_left(states, uneven)
    assert packed.squeeze(-1).tolist() == [[1.0, 0.0, 0.0], [5.0, 6.0, 9.0]]
    assert packed_mask.tolist() == [[True, False, False], [True, True, True]]


def test_pooling_by_hand():
    states = torch.tensor([[[100.0], [1.0], [2.0], [6.0], [50.0]]])
    mask = torch.tensor([[False, True, True, True, False]])  # BOS and padding are not pooled.
    assert pool(states, mask, "mean").item() == pytest.approx(3.0)
    assert pool(states, mask, "last_token").item() == 6.0
    assert pool(states, mask, "weighted_mean").item() == pytest.approx((1 + 2 * 2 + 3 * 6) / 6)


@torch.no_grad()
def test_row_is_bos_soft_tokens_added_token(tiny_model):
    ids, mask = tokens(6, 3)
    embeds, real, pooled = tiny_model.soft_tokens(ids, mask)
    states = tiny_model.encoder(input_ids=ids[1:, :3], attention_mask=mask[1:, :3]).last_hidden_state
    bos = tiny_model.llm_embeddings()[tiny_model.config.llm_config.bos_token_id]
    by_hand = torch.cat([bos[None], tiny_model.connector(states)[0], tiny_model.connector.added_tokens])
    # The same float32 sums, in a batch of another size.
    torch.testing.assert_close(embeds[1, :5], by_hand, atol=1e-5, rtol=1e-5)
    assert embeds[1, 5:].abs().max() == 0
    assert real.sum(dim=1).tolist() == [8, 5]
    assert pooled[1].tolist() == [False, True, True, True, True, False, False, False]


@pytest.mark.parametrize("added", [0, 1, 2])
@pytest.mark.parametrize("use_bos", [True, False])
@torch.no_grad()
def test_layout_options(tiny_encoder, tiny_llm, added, use_bos):
    model = LusiferModel.from_backbones(tiny_encoder, tiny_llm, num_added_tokens=added, use_bos=use_bos)
    output = model(*tokens(6, 3))
    assert output.last_hidden_state.shape == (2, 6 + added + use_bos, 48)
    assert output.pooler_output.shape == (2, 48)
    empty = model(torch.tensor([[1, 1]]), torch.zeros(1, 2))
    assert empty.pooler_output.isfinite().all()


@torch.no_grad()
def test_head_and_pooling_change_the_output(tiny_encoder, tiny_llm):
    found = []
    for options in ({}, {"pooling": "last_token"}, {"pooling": "weighted_mean"}, {"head_dim": 20}):
        torch.manual_seed(0)
        model = LusiferModel.from_backbones(tiny_encoder, tiny_llm, **options)
        found.append(model(*tokens(6, 3)).pooler_output)
        assert found[-1].shape[1] == model.config.hidden_size
    assert found[3].shape == (2, 20)
    assert len({tuple(vectors[0, :3].tolist()) for vectors in found}) == 4


@torch.no_grad()
def test_order_of_the_batch_does_not_matter(tiny_model):
    ids, mask = tokens(6, 3, 5)
    forward, backward = tiny_model(ids, mask).pooler_output, tiny_model(ids.flip(0), mask.flip(0)).pooler_output
    torch.testing.assert_close(forward, backward.flip(0), atol=1e-5, rtol=1e-5)  # Float32, another summation order.


def test_backbones_keep_their_weights(tiny_model, tiny_encoder, tiny_llm):
    from transformers import AutoModel

    for part, folder in (("encoder", tiny_encoder), ("llm", tiny_llm)):
        state = getattr(tiny_model, part).state_dict()
        for name, tensor in AutoModel.from_pretrained(folder).state_dict().items():
            if name in state:
                assert torch.equal(state[name], tensor), name


def test_random_start_matches_the_embeddings_in_size(tiny_encoder, tiny_llm):
    torch.manual_seed(0)
    model = LusiferModel.from_backbones(tiny_encoder, tiny_llm, connector_dim=256)
    with torch.no_grad():
        soft = model.connector(torch.randn(4000, 32))
    spread = model.llm_embeddings().std(dim=0).mean()
    # A random draw of the weights moves the spread by a few per cent; a default initialisation misses by 5 times.
    assert soft.std(dim=0).mean() == pytest.approx(float(spread), rel=0.2)


CHOICES = {
    "connector": ({"encoder": "frozen", "connector": True, "llm": False}, ("connector.",)),
    "both adapters": ({"encoder": "lora", "connector": True, "llm": True}, ("connector.", "lora_")),
    "llm adapter": ({"encoder": "frozen", "connector": False, "llm": True}, ("llm.lora_",)),
    "full encoder": ({"encoder": "full", "connector": True, "llm": False}, ("connector.", "encoder.")),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_gradients_reach_what_learns_and_nothing_else(tiny_model, choice):
    settings, learning = CHOICES[choice]
    tiny_model.add_adapter("encoder", LORA)
    tiny_model.add_adapter("llm", LORA)
    tiny_model.set_trainable(**settings)
    torch.manual_seed(0)
    for name, parameter in tiny_model.named_parameters():
        if "lora_B" in name:  # Zero at the start, which hides the gradient of lora_A.
            torch.nn.init.normal_(parameter, std=0.1)
    (tiny_model(*tokens(6, 3, 5)).pooler_output ** 2).mean().backward()
    for name, parameter in tiny_model.named_parameters():
        expected = any(
            name.startswith(key.split("lora_")[0]) and ("lora_" in name or "lora_" not in key) for key in learning
        )
        if choice == "connector" or choice == "both adapters":
            expected = name.startswith("connector.") or ("lora_" in name and choice == "both adapters")
        assert parameter.requires_grad == expected, name
        if not expected:
            assert parameter.grad is None, name
        elif "embeddings" not in name and ".key." not in name:  # Unused rows; key biases cancel in the softmax.
            assert parameter.grad.abs().max() > 0, name


def test_an_adapter_starts_as_nothing(tiny_model):
    with torch.no_grad():
        before = tiny_model(*tokens(6, 3)).pooler_output
        tiny_model.add_adapter("llm", LORA)
        tiny_model.add_adapter("encoder", LORA)
        assert torch.equal(before, tiny_model(*tokens(6, 3)).pooler_output)
    assert any("lora_" in name for name, _ in tiny_model.encoder.named_parameters())


def test_mistakes(tiny_model, tiny_encoder, tiny_llm):
    for settings, message in (
        ({"encoder": "lora", "connector": True, "llm": False}, "encoder has no adapter"),
        ({"encoder": "frozen", "connector": True, "llm": True}, "LLM has no adapter"),
    ):
        with pytest.raises(LusiferError, match=message):
            tiny_model.set_trainable(**settings)
    with pytest.raises(LusiferError, match="cannot add this adapter"):
        tiny_model.add_adapter("llm", {"target_modules": ["no_such_layer"]})
    tiny_model.add_adapter("encoder", LORA)
    with pytest.raises(LusiferError, match="already"):
        tiny_model.add_adapter("encoder", LORA)
    for options, message in (({"pooling": "max"}, "pooling"), ({"max_seq_length": 1}, "max_seq_length")):
        with pytest.raises(LusiferError, match=message):
            LusiferModel.from_backbones(tiny_encoder, tiny_llm, **options)


@torch.no_grad()
def test_padding_is_never_read(tiny_model):
    ids, mask = tokens(6, 3, 5)
    expected = tiny_model(ids, mask).pooler_output
    for side in ("left", "right"):
        for width in (7, 20):
            wide_ids, wide_mask = torch.full((3, width), 77), torch.zeros(3, width, dtype=torch.long)
            for row, length in enumerate((6, 3, 5)):
                place = slice(0, length) if side == "right" else slice(width - length, width)
                wide_ids[row, place], wide_mask[row, place] = ids[row, :length], 1
            found = tiny_model(wide_ids, wide_mask).pooler_output
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)  # Float32, another summation order.


@torch.no_grad()
@pytest.mark.parametrize("options", [{"pooling": p} for p in ("mean", "last_token", "weighted_mean")])
def test_pooled_vector_is_pooled_states_without_bos(tiny_encoder, tiny_llm, options):
    model = LusiferModel.from_backbones(tiny_encoder, tiny_llm, num_added_tokens=2, head_dim=20, **options)
    output = model(*tokens(6, 3))
    states = output.last_hidden_state[1, 1 : 1 + 3 + 2].double()  # After BOS: three soft tokens, two added.
    weights = {"mean": [1, 1, 1, 1, 1], "last_token": [0, 0, 0, 0, 1], "weighted_mean": [1, 2, 3, 4, 5]}
    weight = torch.tensor(weights[options["pooling"]], dtype=torch.float64)
    pooled = (weight / weight.sum()) @ states
    first, _, last = model.head.double()
    expected = (pooled @ first.weight.T + first.bias).clamp(min=0) @ last.weight.T + last.bias
    torch.testing.assert_close(output.pooler_output[1].double(), expected, atol=1e-5, rtol=1e-5)  # float32


@torch.no_grad()
def test_an_empty_text_leaves_its_batch_mates_alone(tiny_model):
    ids, mask = tokens(6, 3)
    expected = tiny_model(ids, mask).pooler_output
    mask = torch.cat([mask, torch.zeros(1, 6, dtype=torch.long)])
    found = tiny_model(torch.cat([ids, ids[:1]]), mask).pooler_output
    assert found[2].isfinite().all()
    torch.testing.assert_close(found[:2], expected, atol=1e-5, rtol=1e-5)  # Float32, another batch size.


def test_lora_a_learns_after_the_first_step(tiny_model):
    tiny_model.add_adapter("encoder", LORA)
    tiny_model.add_adapter("llm", LORA)
    tiny_model.set_trainable(encoder="lora", connector=False, llm=True)
    learning = {name: p for name, p in tiny_model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(learning.values(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        tiny_model(*tokens(6, 3, 5)).pooler_output.square().mean().backward()
        for name, parameter in learning.items():
            if ".key." not in name:  # Some key directions cancel in the softmax.
                assert (parameter.grad.abs().max() > 0) == ("lora_B" in name or step > 0), name
        optimizer.step()


@pytest.mark.parametrize("encoder", ["frozen", "lora", "full"])
def test_both_losses_leave_frozen_weights_bit_identical(tiny_model, encoder):
    model = tiny_model
    model.add_adapter("llm", LORA)
    if encoder == "lora":
        model.add_adapter("encoder", LORA)
    embeddings = model.llm_embeddings()
    align = AlignmentLoss(LMHead(embeddings, None, model.llm.config), embeddings.mean(dim=0))
    for loss, batch, llm in ((align, align_batch(), False), (ContrastiveLoss(), contrast_batch(), True)):
        model.set_trainable(encoder=encoder, connector=True, llm=llm)
        everything = torch.nn.ModuleList([model, loss])
        before = {name: p.detach().clone() for name, p in everything.named_parameters()}
        learning = {name for name, p in everything.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(everything.parameters(), lr=1e-2, weight_decay=0.1)
        everything.train()
        for _ in range(3):
            optimizer.zero_grad()
            loss.step(model, batch, backward=torch.Tensor.backward, no_sync=nullcontext)
            optimizer.step()
        for name, parameter in everything.named_parameters():
            assert torch.equal(parameter, before[name]) != (name in learning), name
        assert any("llm.layers" in name for name in learning) == llm
        assert any("encoder." in name for name in learning) == (encoder != "frozen")


@torch.no_grad()
def test_targets_follow_the_prefix_and_may_be_hidden(tiny_model):
    ids, mask = tokens(6, 3)
    target, target_mask = tokens(2, 5)
    hidden = torch.zeros_like(target_mask, dtype=torch.bool)
    hidden[1, 3] = True
    replacement = torch.randn(48)
    targets = {"target_ids": target, "target_mask": target_mask}
    output = tiny_model(ids, mask, **targets, target_masked=hidden, mask_embedding=replacement)
    assert output.pooler_output is None
    expected = []
    for row, (length, own) in enumerate(((6, 2), (3, 5))):
        prefix, _, _ = tiny_model.soft_tokens(ids[row : row + 1, :length], mask[row : row + 1, :length])
        inputs = tiny_model.llm_embeddings()[target[row : row + 1, :own]]
        if row == 1:
            inputs[0, 3] = replacement
        states = tiny_model.llm(inputs_embeds=torch.cat([prefix, inputs], dim=1)).last_hidden_state
        expected.append(states[0, prefix.shape[1] - 1 : -1])  # The added token's state predicts the first one.
    torch.testing.assert_close(output.last_hidden_state, torch.cat(expected), atol=1e-5, rtol=1e-5)  # float32
    plain = tiny_model(ids, mask, **targets).last_hidden_state
    assert torch.equal(plain[:6], output.last_hidden_state[:6])  # Up to the hidden token nothing changes.
    assert not torch.equal(plain[6:], output.last_hidden_state[6:])


FAMILIES = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_attention_equals_padded(tiny_model, family):
    """The LLM runs one row of all texts, in both directions, with the same states and gradients."""
    AttentionInterface.register("flash_reference", flash_reference)
    torch.manual_seed(2)
    config = FAMILIES[family](
        vocab_size=300,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        intermediate_size=64,
    )
    tiny_model.llm = sharpen(build_llm(config))
    ids, mask = tokens(6, 3, 5)
    target, target_mask = tokens(2, 5, 4)
    found = []
    for attention in ("sdpa", "flash_reference"):
        tiny_model.llm.config._attn_implementation = attention
        assert is_flash_attention_requested(tiny_model.llm.config) == (attention != "sdpa")
        flash_reference.texts = 0
        both = tiny_model(ids, mask)
        causal = tiny_model(ids, mask, target_ids=target, target_mask=target_mask).last_hidden_state
        assert flash_reference.texts == (0 if attention == "sdpa" else 3)
        real = torch.arange(8) < torch.tensor([[8], [5], [7]])
        vectors = (both.pooler_output, both.last_hidden_state[real], causal)
        weight = tiny_model.connector.up.weight
        gradients = torch.autograd.grad(both.pooler_output.square().sum() + causal.square().sum(), weight)[0]
        found.append((*vectors, gradients / gradients.abs().max()))
    for padded, packed in zip(*found, strict=True):
        torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-5)  # Float32, another summation order.
    alone = tiny_model(ids[1:2, :3]).pooler_output
    torch.testing.assert_close(alone[0], found[1][0][1], atol=1e-5, rtol=1e-5)
