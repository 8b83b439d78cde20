"""The direction a decoder reads in, measured: families that do not follow ``is_causal`` by themselves."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from lusifer import LusiferError, LusiferModel
from lusifer.interop.llm_embedder import inspect_embedder
from lusifer.model.backbone_alone import mean_pooled_llm
from lusifer.model.direction.masks import masked_directions
from lusifer.model.direction.measured import check_alone, check_encoder, layers_ahead, settle_direction
from lusifer.model.packing import run_llm
from lusifer.recipes.schema import Recipe
from lusifer.training.run import check_inputs
from support.backbones import save_word_tokenizer
from support.tiny import sharpen

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
LLM = {**SHAPE, "vocab_size": 100, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
LLAMA4 = {**LLM, "intermediate_size_mlp": 48, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2}
GEMMA = {**LLM, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}
# They stayed causal without a word before: StableLM, Falcon and GPT-NeoX-Japanese always, Nemotron without padding, and
# the chunked layers of Llama 4 with it. EmbeddingGemma stayed bidirectional in stage 1.
MENDED = {
    "stablelm": lambda: tf.StableLmConfig(**LLM, num_key_value_heads=2),
    "falcon": lambda: tf.FalconConfig(**{k: v for k, v in LLM.items() if k != "intermediate_size"}),
    "nemotron": lambda: tf.NemotronConfig(**LLM, num_key_value_heads=2),
    "gpt_neox_japanese": lambda: tf.GPTNeoXJapaneseConfig(**LLM),
    "llama4": lambda: tf.Llama4TextConfig(**LLAMA4, layer_types=["chunked_attention", "full_attention"]),
    "embeddinggemma": lambda: tf.Gemma3TextConfig(
        **GEMMA, use_bidirectional_attention=True, layer_types=["sliding_attention", "full_attention"]
    ),
}
REFUSED = {
    "mamba": lambda: tf.MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, vocab_size=100),
    "bloom": lambda: tf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=100),
    "falcon-alibi": lambda: tf.FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True),
}


def saved(folder, config):
    torch.manual_seed(1)
    sharpen(tf.AutoModel.from_config(config)).save_pretrained(folder)
    save_word_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("encoder"), tf.BertConfig(**SHAPE, vocab_size=100))


def first_moves(llm, *, is_causal, padding):
    """Which first states change with the last input: real text of 6, in a row of 6 or of 8."""
    torch.manual_seed(4)
    embeds = torch.randn(1, 8 if padding else 6, 32).repeat(2, 1, 1)
    embeds[1, 5] = torch.randn(32)  # Not a constant added, which a layer norm takes away.
    mask = (torch.arange(embeds.shape[1]) < 6).expand(2, -1)
    states = run_llm(llm, embeds, mask, is_causal=is_causal)[:, 0]
    return float((states[0] - states[1]).detach().abs().max()) > 1e-4


@pytest.mark.parametrize(
    ("family", "attention"),
    [(f, a) for f in MENDED for a in ("sdpa", "eager") if (f, a) != ("gpt_neox_japanese", "sdpa")],
)
def test_a_family_that_ignores_is_causal_reads_both_ways(encoder, family, attention, tmp_path):
    llm = saved(tmp_path, MENDED[family]())
    model = LusiferModel.from_backbones(encoder, llm, attn_implementation=attention)
    for padding in (False, True):
        assert first_moves(model.llm, is_causal=False, padding=padding)
        assert not first_moves(model.llm, is_causal=True, padding=padding)
    layers = layers_ahead(model.llm, lambda e, m: run_llm(model.llm, e, m, is_causal=False), padding=True)
    assert layers == {0: True, 1: True}


def test_a_checkpoint_reads_as_it_was_trained(encoder, tmp_path):
    llm = saved(tmp_path / "llm", MENDED["stablelm"]())
    model = LusiferModel.from_backbones(encoder, llm)
    assert masked_directions(model.config.llm_config) == ["bidirectional"]
    ids = torch.randint(5, 95, (2, 7), generator=torch.Generator().manual_seed(0))
    expected = model(ids).pooler_output
    model.save_pretrained(tmp_path / "small")
    model.merge().save_pretrained(tmp_path / "whole")
    for name in ("small", "whole"):
        again = LusiferModel.from_pretrained(tmp_path / name)
        assert torch.equal(again(ids).pooler_output, expected)
    # As checkpoints of earlier versions are, which were trained with the LLM causal.
    again.llm.config.masked_directions = None
    assert not torch.allclose(again(ids).pooler_output, expected)


def test_padding_does_not_show_through_a_mask(encoder, tmp_path):
    model = LusiferModel.from_backbones(encoder, saved(tmp_path, MENDED["falcon"]()))
    ids = torch.randint(5, 95, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    alone = model(ids[1:, :4]).pooler_output
    torch.testing.assert_close(model(ids, mask).pooler_output[1:], alone, atol=1e-5, rtol=1e-5)  # Sums in float32.


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_read_both_ways_is_refused_before_anything_is_loaded(encoder, family, tmp_path):
    REFUSED[family]().save_pretrained(tmp_path)
    llm = str(tmp_path)
    stages = {"warm_start": {"enabled": False}, "align": {"enabled": False}, "contrast": {"data": [{"source": "none"}]}}
    recipe = Recipe.model_validate({"output": "o", "model": {"encoder": encoder, "llm": llm}, **stages})
    for refused in (
        lambda: LusiferModel.from_backbones(encoder, llm),
        lambda: check_inputs(recipe),
        lambda: inspect_embedder(llm),
        lambda: mean_pooled_llm(llm),
    ):
        with pytest.raises(LusiferError, match="give an LLM whose attention can be bidirectional") as caught:
            refused()
        assert "\n" not in str(caught.value)


def test_an_unknown_family_is_refused_by_what_is_measured(monkeypatch):
    llm = tf.AutoModel.from_config(
        tf.GPTNeoConfig(hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global"], 2]], vocab_size=100)
    ).eval()
    monkeypatch.setattr("lusifer.model.direction.families.REFUSED", {})
    with pytest.raises(LusiferError, match="stays causal where encoding needs it bidirectional"):
        settle_direction("mine", llm)


def test_a_baseline_says_when_its_direction_is_not_what_was_asked(tmp_path):
    llm = saved(tmp_path, MENDED["stablelm"]())
    with pytest.raises(LusiferError, match="stays causal, not bidirectional; compare with llm-causal:NAME"):
        mean_pooled_llm(llm)
    mean_pooled_llm(llm, causal=True)


def test_a_hybrid_says_what_stays_causal(caplog):
    config = tf.Lfm2Config(**LLM, num_key_value_heads=2, layer_types=["conv", "full_attention"])
    llm = tf.AutoModel.from_config(config).eval()
    settle_direction("mine", llm)
    assert "1 of 2 layers have no attention and stay causal (0)" in caplog.text
    assert layers_ahead(llm, lambda e, m: run_llm(llm, e, m, is_causal=False), padding=False) == {0: False, 1: True}


def test_measuring_leaves_random_numbers_and_the_model_alone():
    llm = tf.AutoModel.from_config(tf.LlamaConfig(**LLM, num_key_value_heads=2)).eval()
    before = torch.random.get_rng_state()
    with torch.no_grad():
        settle_direction("mine", llm)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in llm.parameters())
    assert not any(layer._forward_hooks for layer in llm.layers) and not masked_directions(llm.config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_measured_alike(dtype):
    for family in ("stablelm", "llama4"):
        llm = tf.AutoModel.from_config(MENDED[family]()).to(dtype).eval()
        settle_direction("mine", llm)
        assert masked_directions(llm.config) == ["bidirectional"]


def test_an_encoder_that_reads_causally_is_refused():
    encoder = tf.AutoModel.from_config(tf.LlamaConfig(**LLM, num_key_value_heads=2)).eval()
    with pytest.raises(LusiferError, match="does not read whole texts"):
        check_encoder("mine", encoder, 32)
    with pytest.raises(LusiferError, match="returns states of shape"):
        check_encoder("mine", encoder, 48)


def test_check_alone_follows_the_configuration():
    llm = tf.AutoModel.from_config(tf.LlamaConfig(**LLM, num_key_value_heads=2)).eval()
    for is_causal in (True, False):
        llm.config.is_causal = is_causal
        check_alone("mine", llm, is_causal=is_causal)
        with pytest.raises(LusiferError, match="compare with"):
            check_alone("mine", llm, is_causal=not is_causal)
