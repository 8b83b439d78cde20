"""Checkpoints: saved whole or not at all, described, and refused where they are none."""

from __future__ import annotations

import errno
import json
import os

import numpy as np
import pytest
import torch

import lusifer
from lusifer import LusiferError
from lusifer.loading import describe, load_checkpoint
from lusifer.model.sentence_transformer import lusifer_model, save_atomically


def refused(function, *args, **kwargs):
    with pytest.raises(LusiferError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_saved_model_loads_to_the_same_vectors(tiny_st, tmp_path):
    save_atomically(tiny_st, tmp_path / "model")
    loaded = lusifer.load(str(tmp_path / "model"))
    texts = ["the cat sat", "rain"]
    assert np.array_equal(loaded.encode(texts), tiny_st.encode(texts))
    modules = json.loads((tmp_path / "model" / "modules.json").read_text())
    assert all(module["type"].startswith("sentence_transformers.") for module in modules)
    assert lusifer_model(loaded).connector is not None
    facts = describe(str(tmp_path / "model"))
    assert facts["dimension"] == 48 and facts["max_seq_length"] == 64 and not facts["standalone"]
    assert facts["parameters"]["connector"]["trainable"] == facts["parameters"]["connector"]["total"] > 0
    assert facts["parameters"]["llm"]["trainable"] == 0


@pytest.mark.parametrize("when", ["saving", "renaming"])
def test_a_failed_save_leaves_the_older_checkpoint(tiny_st, tmp_path, monkeypatch, when):
    save_atomically(tiny_st, tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir() if path.is_file()}
    if when == "saving":
        monkeypatch.setattr(tiny_st, "save_pretrained", full_disk)
    else:
        real, calls = os.rename, []

        def rename(source, target):
            calls.append(target)  # The older folder goes aside, then the new one takes its place.
            return full_disk() if len(calls) == 2 else real(source, target)

        monkeypatch.setattr(os, "rename", rename)
    assert "No space left" in refused(save_atomically, tiny_st, tmp_path / "model")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["model"]
    after = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir() if path.is_file()}
    assert after == before


def test_a_disk_that_fills_while_weights_are_written(tiny_st, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(tiny_st, "save_pretrained", full)
    assert "No space left" in refused(save_atomically, tiny_st, tmp_path / "model")
    assert os.listdir(tmp_path) == []


def test_paths_that_hold_no_checkpoint(tiny_encoder, tiny_st, tmp_path):
    assert "no checkpoint at" in refused(load_checkpoint, str(tmp_path / "none"))
    assert "no checkpoint at" in refused(load_checkpoint, tiny_encoder)
    save_atomically(tiny_st, tmp_path / "model")
    weights = next((tmp_path / "model").rglob("model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    assert "cannot read" in refused(load_checkpoint, str(tmp_path / "model"))
    weights.unlink()
    assert str(tmp_path / "model") in refused(load_checkpoint, str(tmp_path / "model"))


def test_other_models_are_told_apart(tiny_encoder):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    module = Transformer(tiny_encoder)
    other = SentenceTransformer(modules=[module, Pooling(module.get_embedding_dimension())], device="cpu")
    assert "not a LUSIFER checkpoint" in refused(lusifer_model, other)
    assert torch.is_tensor(other.encode(["a"], convert_to_tensor=True))
