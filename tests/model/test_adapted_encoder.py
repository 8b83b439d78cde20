"""LUSIFER on top of a model that `lusifer adapt` saved: it starts there, and is stored and read like any other."""

from __future__ import annotations

import copy
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

import lusifer
from lusifer import LusiferError, LusiferModel
from lusifer.loading import describe
from lusifer.model.sentence_transformer import lusifer_model
from lusifer.model.text_encoder import TextEncoder
from lusifer.recipes.schema import ModelRecipe
from lusifer.training.stages import build_model
from support.adapted import PROMPTS, save_adapted
from support.texts import TEXTS
from support.tiny import sharpen

LORA = {"r": 2, "alpha": 4, "dropout": 0.0}


@pytest.fixture(scope="module")
def adapted(tiny_encoder, tmp_path_factory):
    return save_adapted(tmp_path_factory.mktemp("adapted") / "model", tiny_encoder)


@pytest.fixture
def build(adapted, tiny_llm):
    def built(**fields):
        torch.manual_seed(0)
        fields = {"encoder": adapted, "llm": tiny_llm, "max_seq_length": 64, "llm_lora": LORA, **fields}
        return build_model(ModelRecipe(**fields)).eval()

    return built


@pytest.fixture
def trained(build):
    """One whose every part adds something."""
    model = build(encoder_lora=LORA)
    inner = lusifer_model(model)
    inner.add_adapter("llm", {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0})
    sharpen(inner.connector)
    for name, parameter in inner.named_parameters():
        if "lora_" in name or name.startswith("head."):
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_it_starts_at_the_encoders_own_embedding(build, adapted):
    model, original = build(), SentenceTransformer(adapted, device="cpu")
    assert model.get_embedding_dimension() == original.get_embedding_dimension() == 32
    # The same products in float32, in batches of other lengths.
    np.testing.assert_allclose(model.encode(TEXTS), original.encode(TEXTS), atol=1e-5)
    for role in ("query", "document"):
        ours, theirs = (getattr(m, f"encode_{role}")(TEXTS[:4]) for m in (model, original))
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert {role: model.prompts[role] for role in PROMPTS} == PROMPTS


def test_the_llm_adds_to_it(trained, adapted):
    original = SentenceTransformer(adapted, device="cpu")
    assert np.abs(trained.encode(TEXTS) - original.encode(TEXTS)).max() > 0.05


def test_padding_and_batch_mates_change_nothing(trained):
    texts = [*TEXTS[:6], "the", " ".join(TEXTS)[:150], ""]
    alone = np.concatenate([TextEncoder(trained).encode([text]) for text in texts])
    np.testing.assert_allclose(TextEncoder(trained).encode(texts), alone, atol=1e-5)
    inner = lusifer_model(trained)
    left = trained.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    right = trained.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        one, other = (inner(batch["input_ids"], batch["attention_mask"]).pooler_output for batch in (left, right))
        empty = inner(torch.ones(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long)).pooler_output
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert empty.isfinite().all()


def test_a_small_checkpoint_names_the_adapted_model_and_comes_back_the_same(trained, adapted, tmp_path):
    expected = trained.encode(TEXTS)
    trained.save_pretrained(str(tmp_path / "small"), create_model_card=False)
    stored = load_file(tmp_path / "small" / "model.safetensors")
    assert all(name.startswith(("connector.", "head.")) or ".lora_" in name for name in stored)
    assert any(name.startswith("encoder.encoder.encoder.layer.1") for name in stored)
    assert not any(name.startswith("encoder.head.") for name in stored)  # No adapter on the encoder's own head.
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["encoder"] == adapted and config["encoder_fingerprint"]
    loaded = SentenceTransformer(str(tmp_path / "small"), device="cpu")
    assert (loaded.encode(TEXTS) == expected).all() and loaded.default_prompt_name == "query"
    np.testing.assert_allclose(lusifer.load(str(tmp_path / "small")).encode(TEXTS), expected, atol=1e-5)
    assert describe(str(tmp_path / "small"))["dimension"] == 32


def test_another_adapted_model_in_its_place_is_refused(build, adapted, tiny_llm, tmp_path):
    own = shutil.copytree(adapted, tmp_path / "own")
    model = build(encoder=str(own))
    model.save_pretrained(str(tmp_path / "small"), create_model_card=False)
    state = load_file(own / "model.safetensors")
    state["head.linear.weight"] = state["head.linear.weight"] + 1
    save_file(state, own / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LusiferError, match="is not the one this checkpoint was trained with"):
        lusifer.load(str(tmp_path / "small"))


def test_merged_it_holds_all(trained, adapted, tmp_path):
    expected = trained.encode(TEXTS)
    inner = lusifer_model(trained)
    inner.merge()
    trained.save_pretrained(str(tmp_path / "whole"), create_model_card=False)
    stored = load_file(tmp_path / "whole" / "model.safetensors")
    assert {"encoder.head.linear.weight", "encoder.head.mean", "head.linear.weight"} <= set(stored)
    assert adapted not in (tmp_path / "whole" / "config.json").read_text()
    again = SentenceTransformer(str(tmp_path / "whole"), device="cpu")
    # Adapters added to the weights, and not beside them: float32.
    np.testing.assert_allclose(again.encode(TEXTS), expected, atol=1e-5)


def test_an_encoder_trained_in_full_is_stored_with_its_head(build, tmp_path):
    model = build()
    inner = lusifer_model(model)
    inner.set_trainable(encoder="full", connector=True, llm=False)
    with torch.no_grad():
        inner.encoder.head.linear.weight.mul_(1.5)
    expected = model.encode(TEXTS)
    model.save_pretrained(str(tmp_path / "model"), create_model_card=False)
    assert (SentenceTransformer(str(tmp_path / "model"), device="cpu").encode(TEXTS) == expected).all()


def test_copies_for_inference_and_other_processes_are_the_same_model(trained):
    expected = trained.encode(TEXTS)  # Leaves hooks of transformers behind, which cannot be pickled.
    np.testing.assert_allclose(TextEncoder(trained).encode(TEXTS), trained.encode(TEXTS, prompt=""), atol=1e-5)
    for again in (pickle.loads(pickle.dumps(trained)), copy.deepcopy(trained)):
        np.testing.assert_array_equal(again.encode(TEXTS), expected)
    lusifer_model(trained).merge_for_inference()
    np.testing.assert_allclose(trained.encode(TEXTS), expected, atol=1e-5)


def test_a_frozen_encoder_reads_without_dropout_while_the_rest_trains(build):
    inner = lusifer_model(build(encoder_lora=LORA))
    inner.set_trainable(encoder="frozen", connector=True, llm=False)
    assert not inner.train().encoder.training and inner.connector.training
    inner.set_trainable(encoder="lora", connector=True, llm=False)
    assert inner.train().encoder.training


def test_what_cannot_stand_behind_it_is_refused(adapted, tiny_encoder, tiny_llm, tmp_path):
    with pytest.raises(LusiferError, match="head_dim does not apply to an adapted encoder"):
        LusiferModel.from_backbones(adapted, tiny_llm, head_dim=16)
    plain = save_adapted(tmp_path / "plain", tiny_encoder, layers=(2,), hidden=0)
    with pytest.raises(LusiferError, match="adapted with --plain"):
        LusiferModel.from_backbones(plain, tiny_llm)
