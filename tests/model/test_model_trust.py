"""A stranger's model: its folder reaches nothing outside of itself, no pickle is opened, and nothing waits for ever."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer

import lusifer
from lusifer import LusiferError, LusiferModel
from lusifer.interop.hub import check_shareable
from lusifer.interop.pickled import convert_pickled
from lusifer.model.adapters import add_lora
from lusifer.model.backbone_alone import encoder_alone
from lusifer.model.backbones import load_config, load_encoder, load_llm, load_tokenizer
from support.adapters import make_adapter


@pytest.fixture(autouse=True)
def in_time():
    """A load that hangs is a failure, not a wait."""

    def late(*_):
        raise TimeoutError("loading hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def whole(tiny_encoder, tmp_path_factory):
    """A Sentence Transformers model of three modules."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    modules = [Transformer(tiny_encoder), Pooling(32), Dense(32, 16)]
    SentenceTransformer(modules=modules).save_pretrained(str(folder))
    return folder


@pytest.fixture
def stranger(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "stranger")


def change(file, **fields):
    found = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**found, **fields}))


def refused(folder, match):
    with pytest.raises(LusiferError, match=match) as caught:
        lusifer.load(str(folder), device="cpu")
    assert "\n" not in str(caught.value)


def test_a_whole_model_loads(stranger):
    assert lusifer.load(str(stranger), device="cpu").encode(["a"]).shape == (1, 16)


def test_a_modules_pickle_is_not_opened(stranger):
    dense = next(stranger.glob("*_Dense"))
    weights = load_file(dense / "model.safetensors")
    (dense / "model.safetensors").unlink()
    torch.save(weights, dense / "pytorch_model.bin")
    refused(stranger, f"{dense.name}/pytorch_model.bin of .* is a pickle and is not opened")
    with pytest.raises(LusiferError, match="pytorch_model.bin .* is a pickle"):
        encoder_alone(str(stranger))
    insisted = lusifer.load(str(stranger), device="cpu", model_kwargs={"use_safetensors": None})
    assert insisted.encode(["a"]).shape == (1, 16)


@pytest.mark.parametrize("field", ["gguf_file", "subfolder", "vocab_file", "variant"])
@pytest.mark.parametrize("options", ["model_kwargs", "config_kwargs", "processor_kwargs", "model_args"])
def test_options_of_a_module_name_no_files(stranger, options, field):
    change(stranger / "sentence_bert_config.json", **{options: {field: "../other"}})
    refused(stranger, f"the {options} of .* names files or code; remove {field}")


def test_a_configuration_names_no_gguf(stranger, tiny_llm, tmp_path):
    llm = shutil.copytree(tiny_llm, tmp_path / "llm")
    change(llm / "config.json", gguf_file="../other.gguf")
    with pytest.raises(LusiferError, match="the llm .* names files or code; remove gguf_file"):
        load_config("llm", str(llm))


@pytest.mark.parametrize("complete", [True, False], ids=["beside its model", "alone"])
def test_an_adapters_base_lies_nowhere_on_this_machine(stranger, tiny_encoder, complete, tmp_path):
    change(stranger / "adapter_config.json", peft_type="LORA", r=2, base_model_name_or_path=tiny_encoder)
    if not complete:
        (stranger / "config.json").unlink()
    refused(stranger, "is an adapter of .*, which lies outside of it")


@pytest.mark.parametrize("base", ["../encoder", "~/encoder", "/encoder", "..\\encoder", "a/../../b"])
def test_an_adapters_base_is_no_path(tiny_encoder, base, tmp_path):
    folder = shutil.copytree(tiny_encoder, tmp_path / "model")
    change(folder / "adapter_config.json", peft_type="LORA", base_model_name_or_path=base)
    with pytest.raises(LusiferError, match="which lies outside of it"):
        load_encoder(str(folder), load_config("encoder", tiny_encoder))


def test_an_adapter_in_a_pickle_is_not_opened(stranger):
    change(stranger / "adapter_config.json", peft_type="LORA", r=2, target_modules=["query"])
    torch.save({}, stranger / "adapter_model.bin")
    refused(stranger, "adapter_model.bin of .* is a pickle")


ENDLESS = "(.*.*)*(.*.*)*(.*.*)*x"


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ENDLESS},
        {"target_modules": ["query"], "exclude_modules": ENDLESS},
        {"target_modules": ["query"], "rank_pattern": {ENDLESS: 4}},
        {"target_modules": ["query"], "alpha_pattern": {ENDLESS: 4}},
        {"target_modules": ["query"], "layers_to_transform": [0], "layers_pattern": ENDLESS},
    ],
    ids=lambda fields: list(fields)[-1],
)
def test_an_adapters_patterns_are_names(stranger, tiny_model, fields):
    with pytest.raises(LusiferError, match=f"{list(fields)[-1]} .*(list of layers|layers' names)"):
        tiny_model.add_adapter("encoder", fields)
    change(stranger / "adapter_config.json", peft_type="LORA", r=2, **fields)
    refused(stranger, f"cannot add the adapter of .*: {list(fields)[-1]}")


def test_all_linear_layers_may_be_asked_for(tiny_encoder):
    encoder = load_encoder(tiny_encoder, load_config("encoder", tiny_encoder))
    assert add_lora(encoder, {"target_modules": "all-linear", "r": 2})["target_modules"] == "all-linear"


def test_the_pattern_of_a_published_adapter_is_refused(tiny_llm, tmp_path):
    adapter = make_adapter(tiny_llm, tmp_path / "adapter")
    change(tmp_path / "adapter" / "adapter_config.json", alpha_pattern={ENDLESS: 2})
    with pytest.raises(LusiferError, match="alpha_pattern has a pattern"):
        load_llm(tiny_llm, load_config("llm", tiny_llm), adapters=[adapter])


def test_a_pipe_in_place_of_a_file_is_refused(stranger):
    # Whichever file: those that are read last too.
    for file in sorted(path for path in stranger.rglob("*") if path.is_file()):
        kept = file.read_bytes()
        file.unlink()
        os.mkfifo(file)
        refused(stranger, f"{file.name}' of .* is a pipe, a socket or a device")
        file.unlink()
        file.write_bytes(kept)
    (stranger / "modules.json").rename(stranger / "kept")
    os.symlink("/dev/zero", stranger / "README.html")
    (stranger / "kept").rename(stranger / "modules.json")
    refused(stranger, "README.html' of .* is a link to '/dev/zero'")


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json", "tokenizer_config.json"])
def test_a_pipe_in_a_backbone_is_refused(tiny_encoder, tiny_llm, file, tmp_path):
    llm = shutil.copytree(tiny_llm, tmp_path / "llm")
    (llm / file).unlink()
    os.mkfifo(llm / file)
    with pytest.raises(LusiferError, match="is a pipe, a socket or a device"):
        LusiferModel.from_backbones(tiny_encoder, str(llm))


def test_a_pipe_among_pickles_is_refused(tiny_llm, tmp_path):
    llm = shutil.copytree(tiny_llm, tmp_path / "llm")
    torch.save(load_file(llm / "model.safetensors"), llm / "pytorch_model.bin")
    (llm / "tokenizer.json").unlink()
    os.mkfifo(llm / "tokenizer.json")
    with pytest.raises(LusiferError, match="tokenizer.json' of .* is a pipe, a socket or a device"):
        convert_pickled(str(llm), tmp_path / "out")


def test_a_pipe_in_an_adapter_is_refused(tiny_llm, tmp_path):
    adapter = make_adapter(tiny_llm, tmp_path / "adapter")
    os.remove(tmp_path / "adapter" / "adapter_model.safetensors")
    os.mkfifo(tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(LusiferError, match="is a pipe, a socket or a device"):
        load_llm(tiny_llm, load_config("llm", tiny_llm), adapters=[adapter])


def test_a_folder_linked_into_itself_is_walked_once(stranger):
    os.symlink(stranger, stranger / "again")
    assert lusifer.load(str(stranger), device="cpu").encode(["a"]).shape == (1, 16)


def link(place, target):
    """Moves a file and leaves a link in its place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(place, target)
    place.symlink_to(os.path.relpath(target, place.parent))


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json", "README.md", "2_Dense"])
@pytest.mark.parametrize("dangling", [False, True], ids=["to something", "to nothing"])
def test_a_link_out_of_the_folder_is_refused(stranger, tmp_path, file, dangling):
    link(stranger / file, tmp_path / "elsewhere" / "private")
    if dangling:
        (tmp_path / "elsewhere").rename(tmp_path / "gone")
    refused(stranger, f"{file}' of .* is a link to '.*/elsewhere/private', outside of its folder; copy the model")


def test_a_link_of_a_link_is_followed_to_its_end(stranger, tmp_path):
    link(stranger / "README.md", tmp_path / "elsewhere" / "private")
    link(stranger / "README.md", stranger / "inner" / "README.md")
    (stranger / "inner" / "README.md").unlink()
    (stranger / "inner" / "README.md").symlink_to(tmp_path / "elsewhere" / "private")
    refused(stranger, "README.md' of .* is a link to '.*/elsewhere/private'")


def test_a_private_file_is_no_vocabulary(tiny_encoder, tmp_path):
    """It would be part of every model that is trained on this one."""
    (tmp_path / "private").write_text("[UNK]\n[CLS]\n[SEP]\n[PAD]\n[MASK]\nthe-passphrase\n")
    folder = shutil.copytree(tiny_encoder, tmp_path / "encoder")
    for file in folder.glob("*token*"):
        file.unlink()
    change(folder / "tokenizer_config.json", tokenizer_class="BertTokenizer")
    (folder / "vocab.txt").symlink_to(tmp_path / "private")
    with pytest.raises(LusiferError, match=r"vocab.txt' of .* is a link to '.*/private'"):
        load_tokenizer("encoder", str(folder))


STORES = {
    "a hub's cache": ("hub/models--a--b/snapshots/c0ffee/", "hub/models--a--b/blobs/"),
    "shared by a hub's repositories": ("hub/models--a--b/snapshots/c0ffee/", "hub/blobs/ab/"),
    "git-annex": ("repository/models/", "repository/.git/annex/objects/Xk/2m/"),
    "DVC": ("repository/models/", "repository/.dvc/cache/files/md5/ab/"),
    "the folder itself": ("", "..2026_11_26/"),
}


@pytest.mark.parametrize("where", STORES)
def test_links_into_the_store_around_a_folder_are_followed(stranger, tmp_path, where):
    within, store = STORES[where]
    folder = tmp_path / within / "model" if within else stranger
    folder.parent.mkdir(parents=True, exist_ok=True)
    stranger.rename(folder)
    store = tmp_path / store if within else stranger / store
    for number, file in enumerate([path for path in folder.rglob("*") if path.is_file()]):
        link(file, store / str(number))
    (tmp_path / "linked").symlink_to(folder)
    assert lusifer.load(str(tmp_path / "linked"), device="cpu").encode(["a"]).shape == (1, 16)
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(tmp_path / "other")
    refused(folder, "README.md' of .* is a link to")


def test_links_into_a_folder_that_the_user_names_are_followed(stranger, tmp_path, monkeypatch):
    link(stranger / "model.safetensors", tmp_path / "store" / "weights")
    refused(stranger, "or name the folder in LUSIFER_LINKED_FOLDERS if you trust the link")
    monkeypatch.setenv("LUSIFER_LINKED_FOLDERS", os.pathsep.join([str(tmp_path / "other"), str(tmp_path / "store")]))
    assert lusifer.load(str(stranger), device="cpu").encode(["a"]).shape == (1, 16)
    (tmp_path / "store" / "pipe").unlink(missing_ok=True)
    os.mkfifo(tmp_path / "store" / "pipe")
    (stranger / "README.html").symlink_to(tmp_path / "store" / "pipe")
    refused(stranger, "README.html' of .* is a pipe, a socket or a device")


def test_a_checkpoint_with_a_link_is_not_pushed(stranger, tmp_path):
    link(stranger / "README.md", tmp_path / "elsewhere" / "private")
    with pytest.raises(LusiferError, match=r"README.md' of .* is a link to"):
        check_shareable(stranger)


def break_tokenizer(folder, **parts):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, **parts}))


BROKEN = {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}


def test_a_tokenizer_that_panics_while_it_loads_is_one_line(stranger, tiny_encoder, tmp_path):
    break_tokenizer(stranger, **BROKEN)
    refused(stranger, "the tokenizer of .* fails")
    folder = shutil.copytree(tiny_encoder, tmp_path / "encoder")
    break_tokenizer(folder, **BROKEN)
    with pytest.raises(LusiferError, match="the tokenizer of the encoder tokenizer .* fails"):
        load_tokenizer("encoder", str(folder))


def test_a_tokenizer_that_panics_at_a_text_is_one_line(tiny_model, tiny_encoder, tmp_path):
    from lusifer.model.sentence_transformer import save_atomically, to_sentence_transformer

    tokenizer = load_tokenizer("encoder", tiny_encoder)
    save_atomically(to_sentence_transformer(tiny_model, tokenizer), tmp_path / "model")
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    break_tokenizer(tmp_path / "model", normalizer=None, pre_tokenizer=pattern)
    model = lusifer.load(str(tmp_path / "model"), device="cpu")
    with pytest.raises(LusiferError, match=r"fails .*retry-limit.*tokenizer.json") as caught:
        model.encode([("a" * 40 + "b") * 30])
    assert "\n" not in str(caught.value)


def test_the_base_of_an_adapter_names_no_file_of_weights(stranger, whole, tmp_path, monkeypatch):
    from lusifer import trust

    found = trust.cached_or_none
    base = shutil.copytree(whole, tmp_path / "base")
    change(base / "config.json", transformers_weights="../other.bin")

    def on_hub(name, *args, **hub):
        return found(str(base) if name == "a/base" else name, *args, **hub)

    monkeypatch.setattr(trust, "cached_or_none", on_hub)
    change(stranger / "adapter_config.json", peft_type="LORA", r=2, base_model_name_or_path="a/base")
    refused(stranger, "the configuration of 'a/base', which .* is an adapter of, names a file of weights")


def test_an_attention_of_the_hub_is_not_fetched(stranger):
    change(stranger / "sentence_bert_config.json", model_kwargs={"attn_implementation": "somebody/kernel"})
    refused(stranger, "names code to fetch")
