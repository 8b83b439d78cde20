"""The released starter: assembled from the package and the cache, whole or not at all."""

import json
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lusifer
from lusifer.data.everyday_set import load_everyday
from lusifer.errors import LusiferError
from lusifer.loading import resolve
from lusifer.starter import fetch
from lusifer.starter.fetch import starter_path
from lusifer.starter.packed import pack, unpack
from lusifer.starter.released import BASE, CHANGES, assemble, changes_of

RELEASE = Path(str(files("lusifer") / "resources" / "starter"))


def fetched():
    try:
        return starter_path(BASE)
    except LusiferError:
        return None


needs_backbones = pytest.mark.skipif(fetched() is None, reason="the starter backbones are not fetched")


def base_weights():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(7, 64, generator=generator).half()
    return {"table.weight": table, "layer.weight": torch.randn(4, 64, generator=generator), "layer.bias": torch.ones(4)}


def trained_weights():
    """The base under the model's names, its layer moved a little, and a head."""
    generator = torch.Generator().manual_seed(1)
    state = {f"encoder.{name}": value.clone() for name, value in base_weights().items()}
    state["encoder.layer.weight"] += 0.01 * torch.randn(4, 64, generator=generator)
    return state | {"head.linear.weight": torch.randn(3, 64, generator=generator), "head.mean": torch.ones(64)}


@pytest.fixture
def fake_cache(tmp_path, monkeypatch):
    """A cache whose encoder looks fetched."""
    monkeypatch.setenv("LUSIFER_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "starter" / BASE
    folder.mkdir(parents=True)
    save_file(base_weights(), folder / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text(json.dumps({"of": BASE}))
    files = {path.name: [path.stat().st_size, "unchecked"] for path in folder.iterdir()}
    (folder / "complete.json").write_text(json.dumps({"format": fetch._FORMAT, "files": files}))
    return tmp_path / "cache"


@pytest.fixture
def release(tmp_path):
    folder = tmp_path / "release"
    (folder / "1_Normalize").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "1_Normalize" / "config.json").write_text("{}")
    changes = pack(changes_of(base_weights(), trained_weights()), whole="head.linear.weight")
    save_file(changes, folder / CHANGES)
    return folder


def test_base_and_changes_give_the_trained_weights(fake_cache, release):
    changes = changes_of(base_weights(), trained_weights())
    assert set(changes) == {"encoder.layer.weight", "head.linear.weight", "head.mean"}  # What did not move is not kept.
    folder = assemble(release)
    assert not (folder / CHANGES).exists()
    state, wanted = load_file(folder / "model.safetensors"), trained_weights()
    assert state.keys() == wanted.keys()
    for name in ("encoder.table.weight", "encoder.layer.bias", "head.mean"):
        assert torch.equal(state[name], wanted[name])
    assert torch.equal(state["head.linear.weight"], wanted["head.linear.weight"].half().float())
    # Four bits of the change, not of the weight: an eighth of the largest change of a block is the step.
    moved = (wanted["encoder.layer.weight"] - base_weights()["layer.weight"]).abs().max()
    assert (state["encoder.layer.weight"] - wanted["encoder.layer.weight"]).abs().max() <= moved / 8 + 1e-6


@pytest.mark.parametrize("shape", [(3, 64), (5, 33), (40,), (2, 3, 32)])
def test_four_bits_keep_shape_and_size(shape):
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    again = unpack(pack({"x": value}))["x"]
    assert again.shape == value.shape
    packed = len(shape) == 2 and shape[1] % 32 == 0
    assert (again - value).abs().max() <= (value.abs().max() / 8 if packed else 2e-3)
    if packed:
        assert sum(t.numel() * t.element_size() for t in pack({"x": value}).values()) == value.numel() * 18 // 32


def test_zeros_stay_zeros():
    assert not unpack(pack({"x": torch.zeros(2, 64)}))["x"].any()


def test_release_and_tokenizer_come_together_once(fake_cache, release):
    folder = assemble(release)
    assert folder.parent == fake_cache / "models"
    assert json.loads((folder / "tokenizer.json").read_text()) == {"of": BASE}
    assert (folder / "1_Normalize" / "config.json").is_file()
    before = (folder / "config.json").stat().st_mtime_ns
    assert assemble(release) == folder
    assert (folder / "config.json").stat().st_mtime_ns == before


def test_another_release_gets_another_folder(fake_cache, release):
    first = assemble(release)
    (release / "config.json").write_text('{"seed": 1}')
    assert assemble(release) != first


def test_a_failed_copy_leaves_nothing(fake_cache, release, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(LusiferError, match="No space left"):
        assemble(release)
    assert list((fake_cache / "models").iterdir()) == []


def test_without_backbones_it_says_how_to_get_them(tmp_path, release, monkeypatch):
    monkeypatch.setenv("LUSIFER_CACHE", str(tmp_path / "empty"))
    with pytest.raises(LusiferError, match="lusifer fetch"):
        assemble(release)


def test_a_folder_called_starter_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "starter").mkdir()
    assert resolve("starter") == "starter"
    assert resolve("someone/model") == "someone/model"


def test_release_is_small_and_names_no_machine():
    size = sum(path.stat().st_size for path in RELEASE.rglob("*") if path.is_file())
    assert 1_000_000 < size <= 16_000_000
    config = (RELEASE / "config.json").read_text()
    assert '"/' not in config
    card = (RELEASE / "README.md").read_text()
    for part in ("Data", "Licence", "Hardware", "Scores"):
        assert part in card


@needs_backbones
def test_released_model_finds_the_teachers_vectors():
    sentences = load_everyday().sentences
    index = lusifer.load(fetch.PREFIX + "all-minilm-l6-v2").encode_document(sentences["en"])
    model = lusifer.load("starter")
    for language in ("fr", "ru", "ko", "te", "sw"):
        nearest = (model.encode_query(sentences[language]) @ index.T).argmax(1)
        assert (nearest == range(len(nearest))).mean() > 0.6, language


@needs_backbones
def test_released_model_loads_offline_in_sentence_transformers():
    code = (
        "import lusifer, sys; from lusifer.starter.released import assemble; "
        "from sentence_transformers import SentenceTransformer; "
        "print(SentenceTransformer(str(assemble())).encode(['ein Satz']).shape)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.strip().startswith("(1, ")
