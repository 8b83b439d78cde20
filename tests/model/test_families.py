"""Every family the README names, from a local folder: directions of attention, padding, batch mates."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from lusifer import LusiferError, LusiferModel
from lusifer.model.packing import run_llm
from lusifer.training.alignment import load_lm_head
from support.backbones import save_word_tokenizer
from support.tiny import sharpen

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
LLM = {**SHAPE, "vocab_size": 100, "num_key_value_heads": 2, "max_position_embeddings": 128}
LLM |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SLIDING = {"sliding_window": 3}

ENCODERS = {
    "xlm-roberta": lambda: tf.XLMRobertaModel(tf.XLMRobertaConfig(**SHAPE, vocab_size=100, max_position_embeddings=70)),
    "bert": lambda: tf.BertModel(tf.BertConfig(**SHAPE, vocab_size=100)),
    "modernbert": lambda: tf.ModernBertModel(tf.ModernBertConfig(**SHAPE, vocab_size=100, pad_token_id=0)),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    ),
    "mt5": lambda: tf.MT5ForConditionalGeneration(
        tf.MT5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    ),
}
LLMS = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLM)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**LLM, **SLIDING)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**{**LLM, "bos_token_id": None})),
    "qwen2-windows": lambda: tf.Qwen2ForCausalLM(
        tf.Qwen2Config(**LLM, sliding_window=3, use_sliding_window=True, max_window_layers=1)
    ),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**LLM, head_dim=8)),
    "gemma3_text": lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(**LLM, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"])
    ),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**LLM, **SLIDING)),
    "olmo2": lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**LLM)),
    "smollm3": lambda: tf.SmolLM3ForCausalLM(tf.SmolLM3Config(**LLM)),
}
# Float32 sums in another order: a few units in the last place of values near 1.
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(kind, name):
        if (kind, name) not in made:
            path = tmp_path_factory.mktemp(f"{kind}-{name}")
            torch.manual_seed(1)
            sharpen((ENCODERS if kind == "encoder" else LLMS)[name]()).save_pretrained(path)
            save_word_tokenizer(path)
            made[kind, name] = str(path)
        return made[kind, name]

    return folder


def build(folders, encoder, llm, **kwargs):
    torch.manual_seed(2)
    model = LusiferModel.from_backbones(folders("encoder", encoder), folders("llm", llm), **kwargs)
    sharpen(model.connector)
    return model


def batch(lengths, side="right", width=None):
    width = width or max(lengths)
    generator = torch.Generator().manual_seed(3)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(width - length, width)
        ids[row, place] = torch.randint(5, 95, (length,), generator=generator)
        mask[row, place] = 1
    return ids, mask


@torch.no_grad()
@pytest.mark.parametrize("llm", LLMS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_encoding_is_bidirectional_and_alignment_causal(folders, llm, attention):
    model = build(folders, "xlm-roberta", llm, attn_implementation=attention)
    width = model.config.llm_config.hidden_size
    torch.manual_seed(4)
    embeds = torch.randn(2, 9, width)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False  # Padding: setting only self_attn.is_causal is silently causal then.
    changed = embeds.clone()
    changed[0, 8] += 1.0
    changed[1, 5] += 1.0
    both = [run_llm(model.llm, e, mask, is_causal=False) for e in (embeds, changed)]
    assert (both[0][:, 0] - both[1][:, 0]).abs().amax(dim=1).min() > 1e-3
    causal = [run_llm(model.llm, e, mask, is_causal=True) for e in (embeds, changed)]
    assert torch.equal(causal[0][0, :8], causal[1][0, :8]) or torch.allclose(
        causal[0][0, :8], causal[1][0, :8], **TOLERANCE
    )
    torch.testing.assert_close(causal[0][1, :5], causal[1][1, :5], **TOLERANCE)
    assert (causal[0][0, 8] - causal[1][0, 8]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("llm", LLMS)
def test_no_target_token_sees_itself_or_the_future(folders, llm):
    model = build(folders, "xlm-roberta", llm)
    ids, mask = batch([7, 4])
    torch.manual_seed(5)
    target, target_mask = torch.randint(5, 60, (2, 6)), torch.ones(2, 6, dtype=torch.bool)
    target_mask[1, 4:] = False

    def align(target):
        return model(ids, mask, target_ids=target, target_mask=target_mask).last_hidden_state

    states = align(target)
    assert states.shape == (10, 32)
    for position in range(6):
        changed = target.clone()
        changed[0, position] += 1
        moved = (align(changed) - states).abs().amax(dim=1)
        assert moved[: position + 1].max() < 1e-5  # These predict tokens up to and including this one.
        assert moved[6:].max() < 1e-5  # The other row.
        if position < 5:
            assert moved[position + 1] > 1e-4  # The next one does see it.


@torch.no_grad()
@pytest.mark.parametrize(("encoder", "llm"), [*((e, "llama") for e in ENCODERS), *(("xlm-roberta", m) for m in LLMS)])
def test_embedding_is_its_own_whatever_the_batch(folders, encoder, llm):
    model = build(folders, encoder, llm)
    ids, mask = batch([9, 3, 6])
    together = model(ids, mask).pooler_output
    for row, length in enumerate([9, 3, 6]):
        alone = model(ids[row : row + 1, :length]).pooler_output
        torch.testing.assert_close(together[row : row + 1], alone, **TOLERANCE)
    padded = model(*batch([9, 3, 6], width=15)).pooler_output
    torch.testing.assert_close(together, padded, **TOLERANCE)
    assert (together[0] - together[1]).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("encoder", "llm"), [*((e, "llama") for e in ENCODERS), *(("xlm-roberta", m) for m in LLMS)])
def test_left_padding_equals_right_padding(folders, encoder, llm, attention):
    model = build(folders, encoder, llm, attn_implementation=attention)
    right = model(*batch([9, 3, 6])).pooler_output
    left = model(*batch([9, 3, 6], side="left")).pooler_output
    torch.testing.assert_close(right, left, **TOLERANCE)


@pytest.mark.parametrize("llm", LLMS)
def test_only_the_first_layers(folders, llm):
    model = build(folders, "bert", llm, llm_layers=1)
    assert len(model.llm.layers) == 1
    with pytest.raises(LusiferError, match="between 1 and 2"):
        build(folders, "bert", llm, llm_layers=3)


def test_roles_are_checked(folders):
    with pytest.raises(LusiferError, match="is a decoder LLM"):
        LusiferModel.from_backbones(folders("llm", "llama"), folders("llm", "llama"))
    with pytest.raises(LusiferError, match="is not a decoder LLM"):
        LusiferModel.from_backbones(folders("encoder", "bert"), folders("encoder", "bert"))
    with pytest.raises(LusiferError, match="cannot load the encoder '/no/such'"):
        LusiferModel.from_backbones("/no/such", folders("llm", "llama"))


@torch.no_grad()
@pytest.mark.parametrize("llm", LLMS)
def test_encoding_feeds_the_whole_row_to_the_llm(folders, llm):
    # A last soft token that changes alone, as with an encoder that looks at one token only.
    model = build(folders, "xlm-roberta", llm, num_added_tokens=0)
    states = torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(6))
    model.encoder.forward = lambda **_: tf.modeling_outputs.BaseModelOutput(last_hidden_state=states)
    ids, mask = batch([8, 4, 8])
    before = model(ids, mask).last_hidden_state
    states[0, 7] += 1.0
    states[1, 3] += 1.0
    moved = (model(ids, mask).last_hidden_state - before).abs()
    assert moved[:2, 0].amax(dim=1).min() > 1e-3
    assert moved[2].max() < 1e-5  # Another row, the same sums.


@torch.no_grad()
@pytest.mark.parametrize("llm", LLMS)
def test_both_attention_implementations_agree(folders, llm):
    found = [build(folders, "xlm-roberta", llm, attn_implementation=a)(*batch([9, 3])) for a in ("sdpa", "eager")]
    # Two kernels, each with its own order of sums.
    torch.testing.assert_close(found[0].pooler_output, found[1].pooler_output, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("llm", LLMS)
def test_head_and_embeddings_are_the_llms_own(llm, tied, tmp_path):
    causal = LLMS[llm]()
    fields = causal.config.to_dict() | {"tie_word_embeddings": tied}
    if llm == "gemma3_text":
        fields["final_logit_softcapping"] = 2.0  # Small enough to bend the logits.
    config = type(causal.config)(**fields)
    causal = sharpen(type(causal)(config)).eval()
    causal.save_pretrained(tmp_path)
    bert = sharpen(ENCODERS["bert"]())
    bert.save_pretrained(tmp_path / "bert")
    for folder in (tmp_path, tmp_path / "bert"):
        save_word_tokenizer(folder)
    model = LusiferModel.from_backbones(str(tmp_path / "bert"), str(tmp_path))
    ids, mask = batch([8, 8])
    torch.testing.assert_close(model.llm_embeddings()[ids], model.llm.get_input_embeddings()(ids), **TOLERANCE)
    # A window of 3 is the LLM's own in causal attention and not ours: look at no further back than it does.
    ids, mask = (ids[:, :3], mask[:, :3])
    hidden = run_llm(model.llm, model.llm_embeddings()[ids], mask.bool(), is_causal=True)
    head = load_lm_head(str(tmp_path), model.llm)
    torch.testing.assert_close(head(hidden), causal(input_ids=ids).logits, atol=1e-4, rtol=1e-4)  # Values up to 10.


@torch.no_grad()
@pytest.mark.parametrize("learned", ["adapters", "encoder", "merged"])
@pytest.mark.parametrize(("encoder", "llm"), [*((e, "llama") for e in ENCODERS), *(("bert", m) for m in LLMS)])
def test_checkpoints_come_back(folders, encoder, llm, learned, tmp_path):
    model = build(folders, encoder, llm)
    model.add_adapter("llm", {"r": 2})
    if learned == "encoder":
        model.set_trainable(encoder="full", connector=True, llm=True)
        for parameter in model.encoder.parameters():
            parameter.mul_(1.1)
    else:
        model.add_adapter("encoder", {"r": 2})
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    expected = model.eval()(*batch([9, 3])).pooler_output
    if learned == "merged":
        expected = model.merge()(*batch([9, 3])).pooler_output
    model.save_pretrained(tmp_path)
    assert torch.equal(LusiferModel.from_pretrained(tmp_path)(*batch([9, 3])).pooler_output, expected)
