"""What a checkpoint holds, that it comes back bit for bit, and what a broken one says."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

import lusifer
from lusifer import LusiferError, LusiferModel
from lusifer.loading import load_checkpoint
from lusifer.model.backbones import load_tokenizer
from lusifer.model.sentence_transformer import lusifer_model, save_atomically, to_sentence_transformer
from support.tiny import CORPUS, sharpen

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
TEXTS = [*CORPUS[:3], "bread"]


def trained(encoder, llm, *, encoder_adapter=True, **config):
    """A model as training leaves it: adapters that do something, everything in evaluation mode."""
    torch.manual_seed(0)
    model = LusiferModel.from_backbones(encoder, llm, max_seq_length=64, **config)
    sharpen(model.connector)
    model.add_adapter("llm", LORA)
    if encoder_adapter:
        model.add_adapter("encoder", LORA)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return to_sentence_transformer(model.eval(), load_tokenizer("encoder", encoder))


@pytest.fixture(scope="module")
def backbones(tiny_encoder, tiny_llm, tmp_path_factory):
    """Copies that a test may delete or damage."""
    root = tmp_path_factory.mktemp("backbones")
    return [shutil.copytree(folder, root / name) for folder, name in ((tiny_encoder, "encoder"), (tiny_llm, "llm"))]


@pytest.fixture(scope="module")
def original(backbones):
    return trained(*map(str, backbones), head_dim=20)


@pytest.fixture(scope="module")
def small(original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "model"
    original.save_pretrained(str(folder), create_model_card=False)
    return folder


@pytest.fixture
def copy(small, tmp_path):
    return Path(shutil.copytree(small, tmp_path / "copy"))


def one_line(error):
    return "\n" not in str(error.value)


def test_small_checkpoint_holds_only_what_learned(small, original):
    names = set(load_file(small / "model.safetensors"))
    assert names == {
        name
        for name in lusifer_model(original).state_dict()
        if name.startswith(("connector.", "head.")) or ".lora_" in name
    }
    for prefix in ("connector.added_tokens", "connector.shortcut", "head.", "llm.layers.2", "encoder.encoder.layer.1"):
        assert any(name.startswith(prefix) for name in names), prefix
    suffixes = {file.suffix for file in small.rglob("*") if file.is_file()}
    assert suffixes <= {".json", ".safetensors", ".txt", ".md", ".model"}  # Nothing that unpickles or runs.
    assert len(list(small.rglob("*.safetensors"))) == 1
    for module in json.loads((small / "modules.json").read_text()):
        assert module["type"].startswith("sentence_transformers."), module
        __import__(module["type"].rpartition(".")[0])  # A module of the library, and not one of ours under its name.


def test_fully_trained_encoder_is_stored(tiny_encoder, tiny_llm, tmp_path):
    model = trained(tiny_encoder, tiny_llm, encoder_adapter=False)
    inner = lusifer_model(model)
    inner.set_trainable(encoder="full", connector=True, llm=True)
    with torch.no_grad():
        for parameter in inner.encoder.parameters():
            parameter.mul_(1.1)
    expected = model.encode(TEXTS)
    model.save_pretrained(str(tmp_path / "model"), create_model_card=False)
    names = set(load_file(tmp_path / "model" / "model.safetensors"))
    assert {f"encoder.{name}" for name in inner.encoder.state_dict()} <= names
    assert not any(name.startswith("llm.") and ".lora_" not in name for name in names)
    assert (SentenceTransformer(str(tmp_path / "model")).encode(TEXTS) == expected).all()


def test_round_trip_is_bit_equal(small, original):
    loaded = lusifer.load(str(small))
    assert (SentenceTransformer(str(small)).encode(TEXTS) == original.encode(TEXTS)).all()
    state = lusifer_model(loaded).state_dict()
    for name, tensor in lusifer_model(original).state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert loaded.get_embedding_dimension() == 20
    assert loaded.max_seq_length == 64


def test_saving_a_loaded_checkpoint_gives_the_same_weights(small, tmp_path):
    lusifer.load(str(small)).save_pretrained(str(tmp_path / "again"), create_model_card=False)
    first, second = (load_file(folder / "model.safetensors") for folder in (small, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_merged_is_standalone(original, small, backbones, tmp_path):
    expected = original.encode(TEXTS)
    merged = lusifer.load(str(small))
    inner = lusifer_model(merged)
    inner.merge()
    assert not any("lora_" in name for name, _ in inner.named_parameters())
    assert not any("base_layer" in name for name, _ in inner.named_parameters())
    # W + BA is one float32 matrix product now where it was two before.
    assert abs(merged.encode(TEXTS) - expected).max() < 1e-5
    save_atomically(merged, tmp_path / "standalone")
    config = json.loads((tmp_path / "standalone" / "config.json").read_text())
    assert config["standalone"] and config["llm_adapter"] is None and config["encoder_adapter"] is None
    hidden = [folder.rename(folder.with_name(f"hidden-{folder.name}")) for folder in backbones]
    try:
        with pytest.raises(LusiferError):
            load_checkpoint(str(small))  # The small one does need them, so they are really gone.
        alone = lusifer.load(str(tmp_path / "standalone"))
    finally:
        for folder, name in zip(hidden, backbones, strict=True):
            folder.rename(name)
    assert (alone.encode(TEXTS) == merged.encode(TEXTS)).all()


def test_adapters_matter(original, small):
    # Otherwise the tests above would pass without any.
    loaded = lusifer.load(str(small))
    for part in ("encoder", "llm"):
        with torch.no_grad():
            for name, parameter in getattr(lusifer_model(loaded), part).named_parameters():
                if "lora_B" in name:
                    parameter.zero_()
        assert abs(loaded.encode(TEXTS) - original.encode(TEXTS)).max() > 1e-2


FRESH = """
import json
import sys
import numpy as np
import lusifer
from sentence_transformers import SentenceTransformer
path, texts, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
np.save(out, np.stack([load(path).encode(texts) for load in (SentenceTransformer, lusifer.load)]))
"""


def test_fresh_process_needs_no_remote_code(small, original, tmp_path):
    out = tmp_path / "found.npy"
    command = [sys.executable, "-c", FRESH, str(small), json.dumps(TEXTS), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    by_class, by_us = np.load(out)
    # Ours folds the adapters and batches by tokens: float32, summed in another order.
    assert abs(by_class - by_us).max() < 1e-5
    # Another process may use another number of threads, and so another summation order.
    assert abs(by_us - original.encode(TEXTS)).max() < 1e-5


@pytest.mark.parametrize("types", [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_standalone_checkpoint_keeps_every_data_type(tiny_encoder, tiny_llm, tmp_path, types):
    model = LusiferModel.from_backbones(
        tiny_encoder, tiny_llm, max_seq_length=32, head_dim=24, encoder_dtype=types[0], llm_dtype=types[1]
    )
    model.merge().save_pretrained(tmp_path / "model")
    again = LusiferModel.from_pretrained(tmp_path / "model")
    assert {n: p.dtype for n, p in again.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}
    ids = torch.tensor([[0, 5, 6, 2]])
    vectors = [one.eval()(ids, torch.ones_like(ids)).pooler_output for one in (model, again)]
    assert torch.equal(*vectors)


def test_dtype_is_that_of_the_checkpoint_unless_asked(small):
    assert lusifer_model(lusifer.load(str(small))).llm.dtype == torch.float32
    half = lusifer_model(lusifer.load(str(small), model_kwargs={"dtype": torch.bfloat16}))
    assert half.llm.dtype == half.encoder.dtype == torch.bfloat16
    # What learned stays in float32: its updates are smaller than bfloat16 can add up.
    assert half.connector.up.weight.dtype == torch.float32
    adapters = [p.dtype for name, p in half.named_parameters() if "lora_" in name]
    assert set(adapters) == {torch.float32}


def test_a_checkpoint_keeps_the_data_types_it_was_made_with(small, tmp_path):
    """Those of the model, not those of its backbones' own files, which are in float32."""
    kwargs = {"encoder_dtype": "float32", "llm_dtype": "bfloat16", "dtype": torch.float16}
    mixed = lusifer_model(lusifer.load(str(small), model_kwargs=kwargs))
    assert (mixed.encoder.dtype, mixed.llm.dtype) == (torch.float32, torch.bfloat16)
    mixed.save_pretrained(tmp_path / "mixed")
    again = lusifer_model(lusifer.load(str(tmp_path / "mixed")))
    assert (again.encoder.dtype, again.llm.dtype) == (torch.float32, torch.bfloat16)
    assert again.connector.up.weight.dtype == torch.float32
    assert {p.dtype for name, p in again.named_parameters() if "lora_" in name} == {torch.float32}


@pytest.mark.parametrize("part", ["encoder", "llm"])
def test_missing_backbone_is_named(copy, tmp_path, part):
    config = json.loads((copy / "config.json").read_text())
    config[part] = str(tmp_path / "gone")
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(LusiferError, match="gone") as error:
        lusifer.load(str(copy))
    assert one_line(error)
    assert part in str(error.value)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_truncated_weights(copy, share):
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(LusiferError, match=r"model\.safetensors") as error:
        lusifer.load(str(copy))
    assert one_line(error)


def test_no_weights(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(LusiferError, match=r"model\.safetensors") as error:
        lusifer.load(str(copy))
    assert one_line(error)


def drop(state):
    del state["connector.up.weight"]


def add(state):
    state["llm.surprise"] = torch.zeros(2)


def reshape(state):
    state["connector.up.weight"] = torch.zeros(3, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [(drop, r"lacks 1 .*connector\.up\.weight"), (add, r"unexpected 1 .*llm\.surprise"), (reshape, r"other shapes")],
)
def test_weights_that_do_not_fit(copy, change, message):
    state = load_file(copy / "model.safetensors")
    change(state)
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LusiferError, match=message) as error:
        lusifer.load(str(copy))
    assert one_line(error)


@pytest.fixture(scope="module")
def standalone(original, small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("standalone") / "model"
    merged = lusifer.load(str(small))
    lusifer_model(merged).merge()
    merged.save_pretrained(str(folder), create_model_card=False)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, r"cannot read the weights"),
        (drop, r"lacks 1 .*connector\.up\.weight"),
        (add, r"unexpected 1 .*llm\.surprise"),
        (reshape, r"other shapes .*connector\.up\.weight"),
    ],
)
def test_damaged_standalone(standalone, tmp_path, change, message):
    folder = Path(shutil.copytree(standalone, tmp_path / "copy"))
    weights = folder / "model.safetensors"
    if change is None:
        weights.write_bytes(weights.read_bytes()[:5000])
    else:
        state = load_file(weights)
        change(state)
        save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(LusiferError, match=message) as error:
        lusifer.load(str(folder))
    assert one_line(error)


def test_not_a_checkpoint(tmp_path):
    with pytest.raises(LusiferError, match=r"no modules\.json") as error:
        lusifer.load(str(tmp_path))
    assert one_line(error)


def test_saving_replaces_whole_or_not_at_all(original, tmp_path, monkeypatch):
    target = tmp_path / "model"
    save_atomically(original, target)
    before = (target / "model.safetensors").read_bytes()

    def full_disk(*args, **kwargs):
        Path(args[0]).mkdir(exist_ok=True)
        (Path(args[0]) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(original, "save_pretrained", full_disk)
    with pytest.raises(LusiferError, match="No space left"):
        save_atomically(original, target)
    assert (target / "model.safetensors").read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
