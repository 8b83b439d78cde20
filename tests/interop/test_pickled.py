"""Backbones whose weights are pickles alone: converted, and nothing in the pickle runs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lusifer import LusiferError, LusiferModel
from lusifer.interop.pickled import convert_pickled
from support.command import mistake


def pickled(source, folder, *, parts=1):
    """A model's folder as it was before safetensors."""
    shutil.copytree(source, folder)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if parts == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    names = sorted(state)
    weight_map = {name: f"pytorch_model-{place % parts + 1:05}.bin" for place, name in enumerate(names)}
    for file in set(weight_map.values()):
        torch.save({name: state[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("parts", [1, 3])
def test_a_converted_model_is_the_one_of_the_pickle(tiny_encoder, tiny_llm, tmp_path, parts):
    for name, source in (("encoder", tiny_encoder), ("llm", tiny_llm)):
        convert_pickled(str(pickled(source, tmp_path / f"{name}-before", parts=parts)), tmp_path / name)
    one, other = (
        LusiferModel.from_backbones(*folders, max_seq_length=32)
        for folders in ((tiny_encoder, tiny_llm), (str(tmp_path / "encoder"), str(tmp_path / "llm")))
    )
    for name, value in one.encoder.state_dict().items():
        assert torch.equal(other.encoder.state_dict()[name], value)
    # Its LM head too, which stage 1 needs.
    head = AutoModelForCausalLM.from_pretrained(tmp_path / "llm").lm_head.weight
    assert torch.equal(head, AutoModelForCausalLM.from_pretrained(tiny_llm).lm_head.weight)


class Code:
    def __reduce__(self):
        return (os.mkdir, (os.environ["LUSIFER_TEST_TRAP"],))


def test_no_code_of_a_pickle_runs(tiny_encoder, tmp_path, monkeypatch):
    monkeypatch.setenv("LUSIFER_TEST_TRAP", str(tmp_path / "ran"))
    folder = pickled(tiny_encoder, tmp_path / "encoder")
    torch.save({"weight": Code()}, folder / "pytorch_model.bin")
    with pytest.raises(LusiferError, match="is not opened"):
        convert_pickled(str(folder), tmp_path / "new")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "new").exists()


def test_what_cannot_be_converted_is_refused_in_one_line(tiny_encoder, tmp_path, call):
    def said(folder):
        return mistake(*call("convert", "pickled", folder, out))

    out = tmp_path / "new"
    assert "no pytorch_model.bin" in said(tiny_encoder)
    folder = pickled(tiny_encoder, tmp_path / "encoder")
    (folder / "pytorch_model.bin").write_bytes(b"no pickle")
    assert "is damaged" in said(folder)
    torch.save([1, 2], folder / "pytorch_model.bin")
    assert "does not contain the weights of one model" in said(folder)
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "../b.bin"}}')
    assert "no ../b.bin" in said(folder)
    out.mkdir()
    assert "already exists" in said(folder)
    assert [path.name for path in Path(tmp_path).iterdir() if path.name.startswith(".")] == []
