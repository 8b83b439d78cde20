"""Backbones that do not fit are refused before anything is loaded, and a checkpoint knows its own again."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

import lusifer
from lusifer import LusiferConfig, LusiferError, LusiferModel
from lusifer.model.backbone_alone import EncoderAlone, mean_pooled_llm
from lusifer.model.backbone_pair import encoder_window
from lusifer.model.backbones import load_tokenizer
from lusifer.model.fingerprint import files_fingerprint
from lusifer.model.sentence_transformer import lusifer_model, save_atomically
from lusifer.model.text_encoder import TextEncoder
from support.backbones import save_word_tokenizer
from support.tiny import CORPUS, sharpen

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 100}
LONG = {**SMALL, "max_position_embeddings": 40}
WINDOWS = {
    "roberta": (lambda: tf.RobertaConfig(**LONG), 38),
    "xlm-roberta": (lambda: tf.XLMRobertaConfig(**LONG), 38),
    "mpnet": (lambda: tf.MPNetConfig(**LONG), 38),
    "bert": (lambda: tf.BertConfig(**LONG), 40),
    "electra": (lambda: tf.ElectraConfig(**LONG, embedding_size=8), 40),
    "distilbert": (
        lambda: tf.DistilBertConfig(dim=8, n_layers=1, n_heads=2, vocab_size=100, max_position_embeddings=40),
        40,
    ),
    "modernbert": (lambda: tf.ModernBertConfig(**LONG, pad_token_id=0), None),
    "t5": (lambda: tf.T5Config(vocab_size=100, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2), None),
}


@torch.no_grad()
@pytest.mark.parametrize("family", WINDOWS)
def test_the_window_is_what_the_encoder_reads(family):
    from lusifer.model.backbones import build_encoder

    make, window = WINDOWS[family]
    assert encoder_window(make()) == window
    encoder = build_encoder(make()).eval()
    encoder(input_ids=torch.full((1, window or 60), 5))
    if window is not None:
        with pytest.raises((IndexError, RuntimeError)):
            encoder(input_ids=torch.full((1, window + 1), 5))


def test_a_window_beyond_the_encoder_is_refused(tiny_encoder, tiny_llm):
    with pytest.raises(LusiferError, match="max_seq_length is 129, but the encoder .* reads at most 128 tokens"):
        LusiferModel.from_backbones(tiny_encoder, tiny_llm, max_seq_length=129)
    assert LusiferModel.from_backbones(tiny_encoder, tiny_llm, max_seq_length=128).config.max_seq_length == 128
    assert LusiferModel.from_backbones(tiny_encoder, tiny_llm).config.max_seq_length == 128


def test_an_older_checkpoint_is_truncated_to_the_encoders_window(tiny_st, tmp_path):
    tiny_st.save_pretrained(str(tmp_path), create_model_card=False)
    for file, key in (("config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length")):
        content = json.loads((tmp_path / file).read_text())
        (tmp_path / file).write_text(json.dumps(content | {key: 512}))
    model = lusifer.load(str(tmp_path), device="cpu")
    assert model.max_seq_length == 128
    assert model.encode(["the cat sat " * 200]).shape == (1, 48)
    assert TextEncoder(SentenceTransformer(str(tmp_path), device="cpu")).encode(["a " * 200]).shape == (1, 48)


def without_tokenizer(folder):
    for path in folder.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()


def with_one_token_more(folder):
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["the cat"])
    tokenizer.save_pretrained(folder)


def with_pad_token_outside(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)


DAMAGES = [
    (without_tokenizer, "has no tokenizer|cannot load the llm tokenizer"),
    (with_one_token_more, r"no embedding for the token 'the cat' .* knows \d+ tokens, .* has \d+ rows"),
    (with_pad_token_outside, r"no embedding for the token '\[PAD\]'"),
]


@pytest.mark.parametrize("part", ["encoder", "llm"])
@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_a_tokenizer_that_does_not_fit_is_refused_everywhere(tiny_encoder, tiny_llm, part, damage, message, tmp_path):
    folders = {"encoder": tiny_encoder, "llm": tiny_llm}
    damage(shutil.copytree(folders[part], tmp_path / part))
    folders[part] = str(tmp_path / part)
    alone = {"encoder": EncoderAlone.from_name, "llm": mean_pooled_llm}[part]
    for load in (
        lambda: load_tokenizer(part, folders[part]),
        lambda: LusiferModel.from_backbones(**folders),
        lambda: alone(folders[part]),
    ):
        with pytest.raises(LusiferError, match=message) as error:
            load()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "roberta", "mpnet", "electra", "t5"])
def test_every_kind_of_empty_tokenizer_is_found(family, tmp_path):
    WINDOWS[family][0]().save_pretrained(tmp_path)
    with pytest.raises(LusiferError, match="has no tokenizer|cannot load the encoder tokenizer"):
        load_tokenizer("encoder", str(tmp_path))


def test_a_checkpoint_whose_tokenizer_outgrew_its_encoder_is_refused(tiny_st, tmp_path):
    tiny_st.save_pretrained(str(tmp_path), create_model_card=False)
    with_one_token_more(tmp_path)
    with pytest.raises(LusiferError, match="no embedding for the token 'the cat'"):
        lusifer.load(str(tmp_path))


def test_a_missing_pad_token_is_replaced(tmp_path):
    sharpen(tf.BertModel(tf.BertConfig(**SMALL))).save_pretrained(tmp_path)
    save_word_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.pop("pad_token")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer("encoder", str(tmp_path)).pad_token == "<pad>"  # The id that the configuration names.


@pytest.fixture
def moved(tiny_encoder, tiny_llm, tmp_path, monkeypatch):
    """A checkpoint made with relative names, in the folder of its backbones."""
    for name, folder in (("enc", tiny_encoder), ("llm", tiny_llm)):
        shutil.copytree(folder, tmp_path / "a" / name)
    monkeypatch.chdir(tmp_path / "a")
    LusiferModel.from_backbones("enc", "llm", max_seq_length=64).save_pretrained("model")
    return tmp_path / "a" / "model"


def other_weights(folder):
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor + 0.1 for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})


def test_a_checkpoint_loads_from_any_folder(moved, monkeypatch, tmp_path):
    expected = lusifer.load("./model", device="cpu").encode(CORPUS)
    config = json.loads((moved / "config.json").read_text())
    assert config["encoder"] == str(moved.parent / "enc") and config["llm"] == str(moved.parent / "llm")
    # Another model of the same name, where the checkpoint is loaded.
    shutil.copytree(moved.parent / "llm", tmp_path / "b" / "llm")
    other_weights(tmp_path / "b" / "llm")
    monkeypatch.chdir(tmp_path / "b")
    assert (lusifer.load(str(moved), device="cpu").encode(CORPUS) == expected).all()


@pytest.mark.parametrize("part", ["enc", "llm"])
def test_another_model_under_the_recorded_name_is_refused(moved, part):
    other_weights(moved.parent / part)
    with pytest.raises(LusiferError, match="is not the one this checkpoint was trained with") as error:
        lusifer.load(str(moved))
    assert "\n" not in str(error.value)


def test_a_checkpoint_without_fingerprints_loads(moved):
    config = json.loads((moved / "config.json").read_text())
    del config["encoder_fingerprint"], config["llm_fingerprint"]
    config["connector_shortcut"] = config.pop("connector_residual")  # As it was called then.
    (moved / "config.json").write_text(json.dumps(config))
    other_weights(moved.parent / "llm")
    assert lusifer.load(str(moved), device="cpu").encode(CORPUS).shape == (8, 48)


def test_the_older_name_of_the_residual_is_read(tiny_encoder):
    assert LusiferConfig(connector_shortcut=False).connector_residual is False
    assert "connector_shortcut" not in LusiferConfig(connector_shortcut=False).to_dict()


def test_a_fingerprint_is_of_the_weights_alone(tiny_llm, tmp_path):
    first = files_fingerprint(tiny_llm)
    folder = shutil.copytree(tiny_llm, tmp_path / "llm")
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert files_fingerprint(str(folder)) == first
    tf.AutoModelForCausalLM.from_pretrained(tiny_llm).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert files_fingerprint(str(tmp_path / "shards")) == first
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        changed = {**weights, name: weights[name] * 1.1}
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        assert files_fingerprint(str(folder)) != first, name
    assert files_fingerprint(str(tmp_path)) is None


def test_what_from_backbones_saves_is_whole(tiny_encoder, tiny_llm, tmp_path):
    torch.manual_seed(0)
    model = LusiferModel.from_backbones(tiny_encoder, tiny_llm, max_seq_length=64)
    sharpen(model.connector)
    model.save_pretrained(tmp_path / "direct")
    fast = lusifer.load(str(tmp_path / "direct"), device="cpu")
    expected = fast.encode(CORPUS)
    plain = SentenceTransformer(str(tmp_path / "direct"), device="cpu")
    assert abs(plain.encode(CORPUS) - expected).max() < 1e-5 and fast.max_seq_length == 64
    save_atomically(fast, tmp_path / "wrapped")
    folders = [tmp_path / "direct", tmp_path / "wrapped"]
    assert len({frozenset(str(p.relative_to(folder)) for p in folder.rglob("*")) for folder in folders}) == 1
    assert len({(folder / "model.safetensors").read_bytes() for folder in folders}) == 1
    # Loaded by itself and saved again, merged or not, it stays whole.
    again = LusiferModel.from_pretrained(tmp_path / "direct")
    again.add_adapter("llm", {"r": 2})
    again.merge().save_pretrained(tmp_path / "again")
    assert abs(lusifer.load(str(tmp_path / "again"), device="cpu").encode(CORPUS) - expected).max() < 1e-5


def test_files_have_the_rights_that_the_umask_leaves(tiny_st, tmp_path):
    before = os.umask(0o027)
    try:
        save_atomically(tiny_st, tmp_path / "atomic")
        tiny_st.save(str(tmp_path / "plain"))
        lusifer_model(tiny_st).save_pretrained(tmp_path / "inner")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in files} == {path.name: 0o640 for path in files}


PROGRAM = """
import sys
import lusifer
assert "transformers" not in sys.modules, "importing lusifer imports transformers"
from sentence_transformers import SentenceTransformer
print(SentenceTransformer(sys.argv[1], device="cpu").encode(["the cat"]).shape)
"""


@pytest.mark.parametrize(("name", "order"), [("lusifer", "after"), ("lusifer.py", "before"), ("app.py", "after")])
def test_registration_does_not_depend_on_the_programs_name(tiny_st, tmp_path, name, order):
    tiny_st.save_pretrained(str(tmp_path / "model"), create_model_card=False)
    (tmp_path / "app").mkdir()
    # A folder of its own, since a script's folder is searched for modules: lusifer.py would be `lusifer`.
    program = tmp_path / "app" / name
    lines = PROGRAM.splitlines()
    if order == "after":
        lines = [line for line in lines if not line.startswith(("import lusifer", "assert"))]
        lines.insert(-1, "import lusifer")
    if name == "lusifer.py":
        lines = ["import sys", "sys.path.pop(0)", *lines]
    program.write_text("\n".join(lines))
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path / "model")],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": str(Path(lusifer.__file__).parents[1])},
    )
    assert done.stdout.strip() == "(1, 48)", done.stderr
