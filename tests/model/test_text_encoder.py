"""Fast encoding: the vectors of the plain path, in order, whatever the batch."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AttentionInterface

from lusifer import LusiferError, LusiferModel, load
from lusifer.model.backbones import load_tokenizer
from lusifer.model.sentence_transformer import lusifer_model, save_atomically, to_sentence_transformer
from lusifer.model.text_encoder import (
    FastSentenceTransformer,
    TextEncoder,
    choose_dtype,
    choose_precision,
    set_precision,
)
from lusifer.model.token_batches import exact_batches
from support.tiny import give_adapters, sharpen
from support.varlen import flash_reference

TEXTS = ["cat", "the cat sat on the mat", "a dog", "rain fell on the roof " * 6, "rain fell", "she reads", "milk"]


@pytest.mark.parametrize("budget", [1, 16, 50, 10_000])
@pytest.mark.parametrize("window", [1, 3, 100])
def test_order_is_restored_and_vectors_are_those_of_encode(tiny_st, budget, window):
    expected = np.stack([tiny_st.encode(text) for text in TEXTS])
    encoder = TextEncoder(tiny_st, token_budget=budget, window=window)
    found = encoder.encode(TEXTS)
    # Unit vectors in float32, summed in another order.
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(encoder.encode_ids(encoder.tokenize(TEXTS)), expected, atol=1e-5)
    assert found.dtype == np.float32 and np.abs(found[0] - found[1]).max() > 1e-2


def test_long_texts_are_truncated_by_the_tokenizer_and_counted(tiny_st):
    long = "the cat sat on the mat " * 50
    encoder = TextEncoder(tiny_st)
    ids = encoder.tokenize(["cat", long, long + "and more"])
    assert len(ids[1]) == tiny_st.max_seq_length and ids[1][-1] == tiny_st.tokenizer.eos_token_id
    assert ids[1] == ids[2] and encoder.cut == 2


def test_a_window_ends_early_where_texts_are_long(tiny_st, monkeypatch):
    expected = TextEncoder(tiny_st).encode(TEXTS)
    monkeypatch.setattr("lusifer.model.text_encoder._CHARACTERS", 30)
    told = []
    found = list(TextEncoder(tiny_st, window=4).stream(iter(TEXTS), told.append))
    # 3 + 22 + 5, the long one, and the rest.
    assert [len(vectors) for vectors in found] == [3, 1, 3] and sum(told) == len(TEXTS)
    np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-5)


def test_nothing_gives_nothing(tiny_st):
    assert TextEncoder(tiny_st).encode([]).shape == (0, tiny_st.get_embedding_dimension())


def test_batches_are_of_one_length_where_there_are_enough():
    lengths = torch.tensor([5, 9, 5, 9, 9, 7, 5, 300])
    for enough, expected in ((1, [[300], [9, 9, 9], [7], [5, 5, 5]]), (10**9, [[300], [9, 9, 9, 7, 5, 5, 5]])):
        groups = exact_batches(lengths, 100, enough=enough)
        assert [lengths[rows].tolist() for rows in groups] == expected
        assert sorted(torch.cat(groups).tolist()) == list(range(8))
    lengths = torch.randint(1, 60, (200,), generator=torch.Generator().manual_seed(0))
    for rows in exact_batches(lengths, 128, enough=64):
        assert len(rows) * int(lengths[rows].max()) <= 128


@pytest.fixture
def adapted(tiny_st, tmp_path):
    """A checkpoint with adapters that do something, on disk."""
    give_adapters(lusifer_model(tiny_st))
    save_atomically(tiny_st.eval(), tmp_path / "model")
    return tmp_path / "model"


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*.safetensors"))}


def test_merged_adapters_change_speed_alone(adapted, tmp_path):
    plain, fast = SentenceTransformer(str(adapted)), load(str(adapted))
    assert type(plain) is SentenceTransformer and type(fast) is FastSentenceTransformer
    encoder = TextEncoder(fast)
    assert np.abs(encoder.encode(TEXTS) - plain.encode(TEXTS)).max() < 1e-5
    assert not any("lora_" in name for name in encoder.inner.state_dict()), "the adapters are not merged"
    save_atomically(fast, tmp_path / "again")
    assert digests(tmp_path / "again") == digests(adapted)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prompt": "query: "},
        {"truncate_dim": 8, "normalize_embeddings": True},
        {"convert_to_tensor": True},
        {"convert_to_numpy": False},
        {"precision": "ubinary"},
        {"batch_size": 1},
    ],
    ids=str,
)
def test_encode_gives_what_sentence_transformers_gives(adapted, options, monkeypatch):
    plain, fast = SentenceTransformer(str(adapted)), load(str(adapted))
    # The plain path tokenises with preprocess; ours must not come by there.
    monkeypatch.setattr(fast, "preprocess", lambda *args, **kwargs: pytest.fail("took the slow path"))
    for inputs in (TEXTS, TEXTS[1]):
        expected, found = plain.encode(inputs, **options), fast.encode(inputs, **options)
        assert type(found) is type(expected)
        for one, other in zip(expected, found, strict=True):
            np.testing.assert_allclose(np.asarray(other), np.asarray(one), atol=1e-5)


def test_what_is_not_plain_text_to_embedding_goes_the_usual_way(adapted):
    fast = load(str(adapted))
    assert isinstance(fast.encode(TEXTS[:2], output_value=None), list)
    assert fast.encode([]).shape[0] == 0
    assert fast.encode_query("cat").shape == fast.encode_document(["cat"])[0].shape


def test_a_padded_batch_is_split_into_groups_with_the_same_result(tiny_model, monkeypatch):
    passes = []
    sharpen(tiny_model.encoder)
    tiny_model.encoder.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    lengths = torch.tensor([60, 3, 4, 30, 3, 5])
    ids = torch.randint(4, 100, (6, 60), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(60) < lengths.unsqueeze(1)).long()
    monkeypatch.setattr("lusifer.model.token_batches.PASS_TOKENS", 64)
    whole = tiny_model(input_ids=ids, attention_mask=mask)
    assert len(passes) == 1, "while gradients flow, a batch stays whole"
    with torch.no_grad():
        cut = tiny_model(input_ids=ids, attention_mask=mask)
    assert len(passes) > 2 and sum(rows * width for rows, width in passes[1:]) < 0.5 * mask.numel()
    torch.testing.assert_close(cut.pooler_output, whole.pooler_output.detach(), atol=1e-5, rtol=0)
    for row, length in enumerate(lengths):  # BOS and the added token beside the text's own.
        own = slice(0, int(length) + 2)
        torch.testing.assert_close(
            cut.last_hidden_state[row, own], whole.last_hidden_state[row, own].detach(), atol=1e-4, rtol=0
        )


def test_bfloat16_is_near_and_auto_measures(adapted):
    exact = load(str(adapted)).encode(TEXTS)
    model = load(str(adapted))
    assert choose_precision(model) in ("float32", "bfloat16", "float16")
    assert set_precision(model, "bfloat16") == "bfloat16"
    assert next(lusifer_model(model).llm.parameters()).dtype == torch.bfloat16
    found = model.encode(TEXTS)
    assert found.dtype == np.float32
    # Unit vectors; eight bits of mantissa.
    assert (found * exact).sum(axis=1).min() > 0.99
    with pytest.raises(LusiferError, match="no precision 'int4'; there are auto, float32"):
        set_precision(model, "int4")


@pytest.mark.parametrize("slow", [torch.float32, torch.bfloat16, None])
def test_bfloat16_is_chosen_only_where_it_is_faster(monkeypatch, slow):
    real, clock = torch.nn.functional.linear, [0.0]

    def linear(rows, weight):
        clock[0] += 2.0 if rows.dtype == slow else 1.0
        return real(rows, weight)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    monkeypatch.setattr("lusifer.model.text_encoder.time.perf_counter", lambda: clock[0])
    name, reason = choose_dtype(torch.device("cpu"), (8, 4), training=True)
    assert name == ("bfloat16" if slow == torch.float32 else "float32")
    times = {kind: 2000.0 if kind == slow else 1000.0 for kind in (torch.bfloat16, torch.float32)}
    assert reason == (
        f"a product of 1024 x 4 x 8 takes {times[torch.bfloat16]} ms in bfloat16, {times[torch.float32]} ms in float32"
    )


@pytest.mark.parametrize(("native", "chosen"), [(True, "bfloat16"), (False, "float32")])
def test_a_gpu_trains_in_bfloat16_if_it_has_it(monkeypatch, native, chosen):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native and not including_emulation)
    assert choose_dtype(torch.device("cuda"), (8, 4), training=True).name == chosen


@pytest.mark.skipif(platform.machine() != "x86_64", reason="oneDNN is told about instructions of x86")
def test_without_instructions_for_bfloat16_a_cpu_computes_in_float32():
    code = "import torch; from lusifer.model.text_encoder import choose_dtype as c; "
    code += "print(c(torch.device('cpu'), (1536, 576), training=True).name)"
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=200)
    assert done.stdout.strip() == "float32"


@pytest.mark.parametrize("pooling", ["mean", "weighted_mean", "last_token"])
@pytest.mark.parametrize(("added", "use_bos"), [(1, True), (0, True), (3, False)])
def test_one_packed_row_equals_padded_batches(tiny_encoder, tiny_llm, pooling, added, use_bos):
    """Through a reference of varlen attention on the CPU; every part of the row is moved by hand."""
    AttentionInterface.register("flash_reference", flash_reference)
    torch.manual_seed(0)
    model = LusiferModel.from_backbones(
        tiny_encoder, tiny_llm, max_seq_length=64, pooling=pooling, num_added_tokens=added, use_bos=use_bos, head_dim=8
    )
    sharpen(model.connector)
    encoder = TextEncoder(to_sentence_transformer(model.eval(), load_tokenizer("encoder", tiny_encoder)))
    expected = encoder.encode(TEXTS)
    for part in (model.encoder, model.llm):
        part.config._attn_implementation = "flash_reference"
    packed = TextEncoder(encoder.model)
    assert packed.packs and not encoder.packs
    flash_reference.texts = 0
    # Float32 sums in another order.
    np.testing.assert_allclose(packed.encode(TEXTS), expected, atol=1e-5)
    assert flash_reference.texts == len(TEXTS), "not one row of all texts"


def test_two_processes_equal_one(adapted):
    fast = load(str(adapted), device="cpu")
    one = fast.encode(TEXTS)
    # Other batches, so other sums of float32.
    np.testing.assert_allclose(fast.encode(TEXTS, device=["cpu", "cpu"], chunk_size=3), one, atol=1e-5)
