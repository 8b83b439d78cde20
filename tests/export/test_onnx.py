"""A model as an ONNX graph gives torch's vectors, whatever the batch, and needs neither torch nor this package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lusifer
from lusifer import LusiferError
from lusifer.export import onnx as export
from lusifer.model.sentence_transformer import lusifer_model, save_atomically
from support.adapted import PROMPTS, save_adapted
from support.command import mistake
from support.tiny import CORPUS, give_adapters

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

EXAMPLE = Path(__file__).parents[2] / "examples" / "onnx_embed.py"
BATCHES = [CORPUS[:1], CORPUS[:3], [*CORPUS, "", "a"], ["the cat sat " * 60, "cat"]]


@pytest.fixture
def checkpoint(tiny_st, tmp_path):
    """A checkpoint whose adapters do something."""
    give_adapters(lusifer_model(tiny_st))
    tiny_st.prompts["query"] = "the "
    save_atomically(tiny_st.eval(), tmp_path / "model")
    return str(tmp_path / "model")


def same_vectors(name, folder):
    model, exported = lusifer.load(name, device="cpu"), export.OnnxEmbedder(folder, threads=1)
    for batch in BATCHES:
        expected = model.encode(batch, prompt="")
        np.testing.assert_allclose(exported.encode(batch), expected, atol=export.TOLERANCE)
    # Which row is beside it, and how much padding that makes, is nothing to a vector.
    np.testing.assert_allclose(exported.encode(BATCHES[3])[1], exported.encode(["cat"])[0], atol=1e-5)


def test_a_whole_model_is_one_graph(checkpoint, tmp_path, call):
    folder = tmp_path / "onnx"
    code, out, err = call("export", "onnx", checkpoint, folder, "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert facts["difference"] < 1e-5 and facts["dimension"] == 48
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.onnx", "tokenizer.json"]
    same_vectors(checkpoint, folder)
    assert json.loads((folder / "config.json").read_text())["prompts"]["query"] == "the "
    # Nothing of the machine it was made on.
    assert b"site-packages" not in (folder / "model.onnx").read_bytes()

    code = "import runpy, sys; sys.argv[1:] = {!r}; runpy.run_path({!r}, run_name='__main__')\n"
    code += "print([name for name in ('torch', 'transformers', 'lusifer') if name in sys.modules])"
    code = code.format([str(folder), *CORPUS[:2]], str(EXAMPLE))
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[-1] == "[]"
    one, other = lusifer.load(checkpoint, device="cpu").encode(CORPUS[:2])
    assert float(lines[0].split()[0]) == pytest.approx(float(one @ other), abs=2e-3)


@pytest.mark.parametrize("shape", [{"layers": (1, 2), "hidden": 8}, {"layers": (2,), "hidden": 0}])
def test_an_adapted_model_is_one_graph(tiny_encoder, tmp_path, monkeypatch, shape):
    monkeypatch.setattr(export, "_ONE_FILE", 1000)  # As for models of gigabytes.
    name = save_adapted(tmp_path / "model", tiny_encoder, **shape)
    export.export_onnx(name, tmp_path / "onnx")
    assert (tmp_path / "onnx" / "model.onnx.data").stat().st_size > 10_000
    same_vectors(name, tmp_path / "onnx")
    assert json.loads((tmp_path / "onnx" / "config.json").read_text())["prompts"] == PROMPTS


def test_a_graph_that_differs_is_not_kept(tiny_encoder, tmp_path, monkeypatch):
    name = save_adapted(tmp_path / "model", tiny_encoder)
    monkeypatch.setattr(export, "_write_graph", lambda *_: None)
    for difference in (2e-4, float("nan")):
        monkeypatch.setattr(export, "largest_difference", lambda *_, wrong=difference: wrong)
        with pytest.raises(LusiferError, match="vectors differ from the model's"):
            export.export_onnx(name, tmp_path / "onnx")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_mistakes_take_one_line(tiny_encoder, tmp_path, call, monkeypatch):
    name = save_adapted(tmp_path / "model", tiny_encoder)
    assert "already exists" in mistake(*call("export", "onnx", name, tmp_path))
    assert "no checkpoint at" in mistake(*call("export", "onnx", tmp_path, tmp_path / "new"))
    monkeypatch.setattr(export, "_NEEDS", ("onnx", "no_such_module"))
    said = mistake(*call("export", "onnx", name, tmp_path / "new"))
    assert "no_such_module" in said and "pip install 'lusifer[onnx]'" in said
