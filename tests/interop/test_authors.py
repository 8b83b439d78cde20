"""The authors' checkpoints become ours: same embeddings, clear refusals, nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lusifer import LusiferError, load
from lusifer.interop import authors
from lusifer.interop.authors import convert_authors
from lusifer.interop.authors_format import is_authors_checkpoint
from lusifer.model.sentence_transformer import lusifer_model
from support.authors_checkpoint import embeddings

REFERENCE = Path(__file__).parents[3] / "shared" / "reference" / "authors_tiny"


@pytest.fixture
def copy(made, tmp_path):
    """The same checkpoint, to be changed: ``copy(tensors=..., config=...)`` edits in place and returns the folder."""

    def edit(tensors=lambda state: None, config=lambda fields: None):
        state = load_file(made[0] / "model.safetensors")
        tensors(state)
        fields = json.loads((made[0] / "config.json").read_text())
        config(fields)
        folder = tmp_path / "theirs"
        folder.mkdir(exist_ok=True)
        save_file(state, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(fields))
        return folder

    return edit


@pytest.mark.parametrize("merge", [False, True], ids=["kept", "merged"])
def test_the_embeddings_are_theirs(made, tmp_path, merge):
    folder, expected = made
    facts = convert_authors(str(folder), tmp_path / "ours", merge=merge)
    assert facts["unused"] == 3
    loaded = load(str(tmp_path / "ours"), device="cpu")
    inner = lusifer_model(loaded)
    # float32; merged adapters are summed in another order.
    np.testing.assert_allclose(embeddings(inner), expected, atol=1e-5 * np.abs(expected).max())
    assert inner.config.standalone is merge and bool(inner.config.llm_adapter) is not merge
    assert loaded.prompts["query"] == ".\n" and loaded.default_prompt_name == "query"
    assert loaded.encode(["the cat"]).shape == (1, 24)


def test_adapters_make_the_difference(made, copy, tmp_path):
    def silence(state):
        for name in state:
            if "lora_B" in name:
                state[name].zero_()

    convert_authors(str(copy(silence)), tmp_path / "ours")
    assert np.abs(embeddings(lusifer_model(load(str(tmp_path / "ours")))) - made[1]).max() > 0.1


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="needs the reference checkpoint")
@pytest.mark.parametrize("merge", [False, True], ids=["kept", "merged"])
def test_the_reference_of_the_authors_own_code(tmp_path, merge):
    convert_authors(str(REFERENCE), tmp_path / "ours", merge=merge)
    loaded = load(str(tmp_path / "ours"), device="cpu")
    expected = np.load(REFERENCE / "expected.npz")["reps"]
    texts = json.loads((REFERENCE / "texts.json").read_text(encoding="utf-8"))["texts"]
    for text, vector in zip(texts, expected, strict=True):
        with torch.inference_mode():
            found = lusifer_model(loaded)(torch.tensor([text["input_ids"]])).pooler_output[0].numpy()
        assert np.abs(found - vector).max() < 1e-5
        end = ".\n" if text["is_query"] else ". Candidate:\n"
        assert loaded.tokenizer(f"{text['instruction']}{end}{text['text']}")["input_ids"] == text["input_ids"]


def test_many_files_are_one_checkpoint(made, tmp_path, monkeypatch):
    monkeypatch.setattr(authors, "_FILE_BYTES", 30_000)
    convert_authors(str(made[0]), tmp_path / "ours", merge=True)
    assert len(list((tmp_path / "ours").glob("model-*-of-*.safetensors"))) > 3
    found = embeddings(lusifer_model(load(str(tmp_path / "ours"))))
    np.testing.assert_allclose(found, made[1], atol=1e-5 * np.abs(made[1]).max())


def drop(name):
    return lambda state: state.pop(name)


def replace(name, change):
    return lambda state: state.__setitem__(name, change(state[name]))


QUERY = "universal_learner.base_model.model.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize("merge", [False, True], ids=["kept", "merged"])
@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (drop("connection_module.ff.2.bias"), "lacks 1 tensors, connector.down.bias"),
        (drop(f"{QUERY}.base_layer.weight"), "lacks 1 tensors, encoder.encoder.layer.0.attention.self.query.weight"),
        (drop("connection_module.added_tokens"), "has no connector.added_tokens"),
        (replace("connection_module.ff.2.bias", lambda t: t[:-1].clone()), "other shapes for 1 tensors"),
        (replace("output_projection.2.bias", lambda t: t * float("nan")), "contains NaN"),
        (replace(f"{QUERY}.lora_A.universal_lora.weight", lambda t: t[:, :-1].clone()), "QUERY|other shapes"),
        (lambda state: state.__setitem__("something.else", torch.ones(2)), "unknown tensor something.else"),
    ],
    ids=["connector", "backbone", "added token", "shape", "nan", "adapter", "unknown"],
)
def test_what_does_not_fit_is_refused(copy, tmp_path, tensors, words, merge):
    import re

    folder = copy(tensors)
    with pytest.raises(LusiferError, match=words.replace("QUERY", re.escape("attention.self.query"))) as caught:
        convert_authors(str(folder), tmp_path / "ours", merge=merge)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"], "something half-written stayed"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lambda fields: fields.pop("lora_alpha"), "no lora_alpha"),
        (lambda fields: fields.update(loar_r=8), "has rank 4, but config.json says 8"),
        (lambda fields: fields.update(pooling_method="cls"), "pooling_method 'cls' cannot be converted"),
        (lambda fields: fields.update(universal_learner_backbone_type="mt5"), "'mt5' cannot be converted"),
        (lambda fields: fields.update(encoder_name_or_path="no/such"), "cannot load the llm"),
        (lambda fields: fields.pop("universal_learner_name_or_path"), "not a checkpoint of the authors"),
    ],
)
def test_what_we_cannot_read_is_refused(copy, tmp_path, config, words):
    with pytest.raises(LusiferError, match=words):
        convert_authors(str(copy(config=config)), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_adapters_are_not_kept_beside_another_backbone(copy, made, tmp_path):
    folder = copy(replace(f"{QUERY}.base_layer.weight", lambda t: t + 1e-3))
    with pytest.raises(LusiferError, match="query.weight differs.*--merge"):
        convert_authors(str(folder), tmp_path / "ours")
    convert_authors(str(folder), tmp_path / "ours", merge=True)
    assert np.abs(embeddings(lusifer_model(load(str(tmp_path / "ours")))) - made[1]).max() > 0


def test_pickles_are_not_touched(copy, tmp_path):
    folder = copy()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(LusiferError, match="no .safetensors file"):
        convert_authors(str(folder), tmp_path / "ours")


def test_theirs_is_told_from_ours(made, tmp_path, tiny_st):
    tiny_st.save_pretrained(str(tmp_path / "mine"))
    assert is_authors_checkpoint(made[0]) and not is_authors_checkpoint(tmp_path / "mine")
    assert not is_authors_checkpoint(tmp_path / "nowhere")
    with pytest.raises(LusiferError, match="no such folder"):
        convert_authors(str(tmp_path / "nowhere"), tmp_path / "ours")


def test_theirs_is_converted_when_it_is_first_loaded(made, copy, tmp_path, monkeypatch):
    monkeypatch.setenv("LUSIFER_CACHE", str(tmp_path / "cache"))
    # Weights of their own, so that the backbones cannot be named.
    folder = copy(replace(f"{QUERY}.base_layer.weight", lambda t: t + 1e-6))
    vectors = load(str(folder)).encode(["the cat"])
    kept = [path for path in (tmp_path / "cache" / "models").iterdir()]
    assert len(kept) == 1 and vectors.shape == (1, 24)
    monkeypatch.setattr(authors, "convert_authors", lambda *a, **k: pytest.fail("converted twice"))
    np.testing.assert_array_equal(load(str(folder)).encode(["the cat"]), vectors)
