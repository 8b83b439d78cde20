"""Sharing and loading through a hub: real HTTP against a stand-in of the hub's interface, in processes of their own."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
from huggingface_hub import ModelCard

import lusifer
from lusifer import LusiferError, LusiferModel
from lusifer.interop.hub import check_shareable
from lusifer.model.backbones import load_tokenizer
from lusifer.model.sentence_transformer import lusifer_model, save_atomically, to_sentence_transformer
from support import forked
from support.authors_checkpoint import IDS
from support.hub_server import READER, TOKEN, Hub
from support.tiny import CORPUS, sharpen

CLOSE = 1e-5  # Another process, with other batches and as many threads as there are: sums round otherwise.


@pytest.fixture(scope="module")
def hub():
    server = Hub()
    yield server
    server.close()


@pytest.fixture(scope="module")
def call(hub, tmp_path_factory):
    """Runs a command or a piece of Python as somebody with an empty cache would."""
    home = tmp_path_factory.mktemp("home")

    def run(*command, token=TOKEN, home=home, **more):
        left_out = ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_HOME", "HF_HUB_CACHE", "TRANSFORMERS_OFFLINE")
        environment = {key: value for key, value in os.environ.items() if key not in left_out}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        environment |= {"LUSIFER_CACHE": str(home / "lusifer"), "HF_HUB_DISABLE_TELEMETRY": "1", **more}
        if token:
            environment["HF_TOKEN"] = token
        arguments = ["-c", command[0]] if len(command) == 1 else ["-m", "lusifer", *map(str, command)]
        return forked.run(arguments, environment=environment)

    return run


@pytest.fixture(scope="module")
def small(hub, call, tiny_encoder, tiny_llm, tmp_path_factory):
    """A checkpoint whose backbones are on the hub."""
    hub.commits = {name: hub.put(name, folder) for name, folder in _folders(tiny_encoder, tiny_llm)}
    model = LusiferModel.from_backbones(tiny_encoder, tiny_llm, max_seq_length=64)
    sharpen(model.connector)
    model.config.encoder, model.config.llm = "acme/encoder", "acme/llm"
    model.config.encoder_config._name_or_path, model.config.llm_config._name_or_path = "acme/encoder", "acme/llm"
    model.config.encoder_revision = hub.commits["acme/encoder"]
    folder = tmp_path_factory.mktemp("push") / "model"
    save_atomically(to_sentence_transformer(model.eval(), load_tokenizer("encoder", tiny_encoder)), folder)
    expected = to_sentence_transformer(model, load_tokenizer("encoder", tiny_encoder)).encode(CORPUS)
    return folder, expected


def _folders(encoder, llm):
    from pathlib import Path

    return (("acme/encoder", Path(encoder)), ("acme/llm", Path(llm)))


@pytest.fixture(scope="module")
def pushed(call, small):
    return call("push", small[0], "acme/small", "--private", "--json")


EMBED = """
import json, sys, lusifer
from sentence_transformers import SentenceTransformer
texts = json.loads({texts!r})
print(json.dumps({{
    "load": lusifer.load({name!r}).encode(texts).tolist(),
    "plain": SentenceTransformer({name!r}).encode(texts).tolist(),
    "revision": lusifer.LusiferModel.from_pretrained({name!r}, revision={revision!r}).config.encoder_revision,
}}))
"""


def embed(call, name, revision="main", **options):
    done = call(EMBED.format(texts=json.dumps(CORPUS), name=name, revision=revision), **options)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_push_is_one_commit_of_the_whole_folder(hub, pushed, small):
    assert pushed.returncode == 0, pushed.stderr
    url = json.loads(pushed.stdout.splitlines()[-1])["url"]
    repo = hub.repos["acme/small"]
    assert repo["private"] and url.endswith(repo["branches"]["main"])
    assert len(repo["commits"]) == 2  # The empty one, and ours.
    files = {str(p.relative_to(small[0])): p.read_bytes() for p in small[0].rglob("*") if p.is_file()}
    assert repo["commits"][repo["branches"]["main"]] == files


@pytest.fixture(scope="module")
def fetched(call, pushed):
    return embed(call, "acme/small")


def test_what_comes_back_gives_the_same_embeddings(fetched, small):
    for way in ("load", "plain"):
        np.testing.assert_allclose(fetched[way], small[1], atol=CLOSE)


def test_once_fetched_it_works_offline(call, fetched, small, hub):
    asked = len(hub.requests)
    found = embed(call, "acme/small", HF_HUB_OFFLINE="1")
    assert len(hub.requests) == asked
    np.testing.assert_allclose(found["load"], small[1], atol=CLOSE)


def test_a_standalone_one_needs_no_backbones(call, hub, small, tmp_path, tiny_encoder, tiny_llm):
    model = LusiferModel.from_backbones(tiny_encoder, tiny_llm, max_seq_length=64)
    model.load_state_dict(lusifer_model(_local(small[0], tiny_encoder, tiny_llm, tmp_path)).state_dict())
    save_atomically(to_sentence_transformer(model.merge(), load_tokenizer("encoder", tiny_encoder)), tmp_path / "whole")
    done = call("push", tmp_path / "whole", "acme/whole")
    assert done.returncode == 0, done.stderr
    before = len([line for line in hub.requests if "acme/encoder" in line])
    found = embed(call, "acme/whole", home=tmp_path / "other")
    assert len([line for line in hub.requests if "acme/encoder" in line]) == before
    np.testing.assert_allclose(found["load"], small[1], atol=CLOSE)


def _local(folder, encoder, llm, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config |= {"encoder": encoder, "llm": llm, "encoder_revision": None}
    (copy / "config.json").write_text(json.dumps(config))
    return lusifer.load(str(copy))


def test_a_checkpoint_of_the_authors_converts_when_it_is_first_loaded(call, hub, made):  # noqa: F811
    folder, expected = made
    hub.put("acme/theirs", folder)
    code = (
        "import json, torch, lusifer\n"
        "model = lusifer.load('acme/theirs')[0].auto_model\n"
        f"print(json.dumps([model(torch.tensor([ids])).pooler_output[0].tolist() for ids in {IDS}]))"
    )
    done = call(code)
    assert done.returncode == 0, done.stderr[-2000:]
    np.testing.assert_allclose(json.loads(done.stdout.splitlines()[-1]), expected, atol=1e-4)  # Up to 2.2.


def test_backbones_from_a_hub_are_pinned(call, hub, small):
    code = (
        "from lusifer import LusiferModel; c = LusiferModel.from_backbones('acme/encoder', 'acme/llm').config;"
        "print(c.encoder_revision, c.llm_revision)"
    )
    done = call(code)
    assert done.stdout.split() == [hub.commits["acme/encoder"], hub.commits["acme/llm"]], done.stderr[-1000:]


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        (["push", None, "acme/other"], {"token": None}, "no token|token is missing"),
        (["push", None, "acme/other"], {"token": READER}, "may not write"),
        (["push", None, "acme/other"], {"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot reach the hub"),
        (["push", None, "a/b/c"], {}, "is not a valid repository name"),
        (["info", "acme/small"], {"token": None, "fresh": True}, "cannot"),
        (["info", "acme/none"], {}, "cannot"),
    ],
)
def test_what_the_hub_refuses_is_one_line(call, pushed, small, tmp_path, command, options, message):
    if options.pop("fresh", False):
        options["home"] = tmp_path
    done = call(*[small[0] if part is None else part for part in command], **options)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2, (done.stdout, done.stderr[-2000:])
    assert len(lines) == 1 and any(part in lines[0] for part in message.split("|")), lines
    assert "Traceback" not in done.stderr


def test_a_download_that_breaks_off_is_not_taken_for_whole(call, hub, pushed, small, tmp_path):
    hub.broken.add("model.safetensors")
    found = embed(call, "acme/small", home=tmp_path)
    assert "model.safetensors" not in hub.broken  # It did break off.
    np.testing.assert_allclose(found["load"], small[1], atol=CLOSE)


def test_the_card_tells_parts_and_training(small):
    card = ModelCard.load(small[0] / "README.md")
    assert card.data.base_model == ["acme/encoder", "acme/llm"] and card.data.library_name == "sentence-transformers"
    assert "Not evaluated yet" in card.text and "Not set. It depends" in card.text
    assert str(small[0].parent) not in card.text


def damaged(folder, tmp_path, change):
    copy = shutil.copytree(folder, tmp_path / "copy")
    change(copy)
    return copy


def edit(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: edit(f, encoder="runs/local/encoder"), "which exists only on this machine: `lusifer merge"),
        (lambda f: edit(f, llm_base_adapters=["./mntp"]), "adapter 1 of the llm"),
        (lambda f: edit(f, provenance={"data": "/home/me/pairs.jsonl"}), "contains a local path"),
        (lambda f: edit(f, model_type="llama"), "is not a LUSIFER checkpoint"),
        (lambda f: (f / "optimizer.pt").write_bytes(b"x"), r"'optimizer\.pt' in .* is not part"),
        (lambda f: (f / ".env").write_text("SECRET=1"), r"'\.env' in .* is not part"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x"), r"cannot read 'model\.safetensors'"),
        (lambda f: (f / "modules.json").unlink(), "has no modules.json"),
        (lambda f: (f / "config.json").write_text("{"), "its config.json cannot be read"),
    ],
)
def test_what_others_could_not_load_stays_here(small, tmp_path, change, message):
    with pytest.raises(LusiferError, match=message):
        check_shareable(damaged(small[0], tmp_path, change))


def test_starter_backbones_may_be_named(small, tmp_path):
    copy = damaged(small[0], tmp_path, lambda f: edit(f, encoder="starter:multilingual-e5-small"))
    assert check_shareable(copy)["encoder"] == "starter:multilingual-e5-small"
