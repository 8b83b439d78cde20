"""Passwords and keys in locations: masked wherever a location is told or stored."""

from __future__ import annotations

import base64
import functools
import http.server
import json
import logging
import threading

import pytest

from lusifer import LusiferError
from lusifer.bulk.run import encode
from lusifer.data.vectors.qdrant import connect
from lusifer.quiet import quiet_libraries
from lusifer.recipes.schema import Recipe
from lusifer.search.locations import open_store
from lusifer.storage import locate
from lusifer.terminal import without_secrets
from lusifer.training.run import recipe_for_provenance


@pytest.mark.parametrize(
    ("location", "shown"),
    [
        ("https://user:hidden@host/a.txt", "https://***@host/a.txt"),
        ("https://user:hid@den@host/a.txt", "https://***@host/a.txt"),
        ("https://hidden@host:80/a@b.txt", "https://***@host:80/a@b.txt"),
        ("s3://KEY:hidden@bucket/a.jsonl", "s3://***@bucket/a.jsonl"),
        ("qdrant+http://u:hidden@h:6333/news", "qdrant+http://***@h:6333/news"),
        ("qdrant+https://h:6333/news?api_key=hidden", "qdrant+https://h:6333/news?api_key=***"),
        ("https://h/a?X-Amz-Credential=hidden&x=1&X-Amz-Signature=hidden#f", "https://h/a?X-Amz-Credential=***&x=1"),
        ("https://h/a?sv=1&sig=hidden", "https://h/a?sv=1&sig=***"),
        ("no such file: 'https://u:hidden@h/a' and s3://k:hidden@b", "no such file: 'https://***@h/a' and s3://***@b"),
    ],
)
def test_a_secret_is_masked_and_nothing_else(location, shown):
    assert without_secrets(location).startswith(shown)
    assert "hidden" not in without_secrets(location)
    assert "hidden" not in str(LusiferError(location))
    assert without_secrets([{"a": (location, 1)}]) == [{"a": (without_secrets(location), 1)}]


@pytest.mark.parametrize(
    "text", ["https://host/a?page=1&q=b", "hf://datasets/a@main/b", "me@home.org", "a key=value", 3]
)
def test_what_is_no_secret_stays(text):
    assert without_secrets(text) == text


@pytest.mark.parametrize("location", ["qdrant+http://u:hidden@127.0.0.1:1/texts", "qdrant+http://u:hidden@h/a/b"])
def test_an_index_that_cannot_be_opened_keeps_its_secret(location):
    pytest.importorskip("qdrant_client")
    with pytest.raises(LusiferError) as caught:
        open_store(location) if location.endswith("texts") else connect(location)
    assert "hidden" not in str(caught.value)


def test_a_store_that_cannot_be_read_keeps_its_secret():
    with pytest.raises(LusiferError) as caught:
        locate("nothing://user:hidden@host/a")
    assert "nothing://***@host/a" in str(caught.value)


def test_a_log_keeps_secrets(capsys):
    before = logging.root.handlers[:]
    quiet_libraries(False)
    logging.getLogger("lusifer.test").info("reading %s", "s3://k:hidden@b/a")
    logging.root.handlers[:] = before
    assert capsys.readouterr().err == "reading s3://***@b/a\n"


def test_provenance_keeps_secrets():
    recipe = Recipe.model_validate(
        {
            "output": "x",
            "model": {"encoder": "e", "llm": "l"},
            "align": {"data": [{"source": "s3://k:hidden@b/a.jsonl", "task": "reconstruct"}]},
            "contrast": {"data": [{"source": "https://h/p.jsonl?token=hidden"}]},
        }
    )
    told = json.dumps(recipe_for_provenance(recipe))
    assert "hidden" not in told and "s3://***@b/a.jsonl" in told


class Guarded(http.server.SimpleHTTPRequestHandler):
    """Files for those who know the password."""

    def send_head(self):
        wanted = "Basic " + base64.b64encode(b"user:hidden").decode()
        if self.headers.get("Authorization") != wanted:
            self.send_error(401)
            return None
        return super().send_head()

    def log_message(self, *_): ...


@pytest.fixture
def served(tmp_path):
    pytest.importorskip("aiohttp")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("one\ntwo\nthree\n")
    handler = functools.partial(Guarded, directory=tmp_path / "in")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://user:hidden@127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_a_bulk_encoding_keeps_secrets_and_goes_on(served, tiny_st, tmp_path):
    tiny_st.save_pretrained(str(tmp_path / "model"))
    model, out = str(tmp_path / "model"), tmp_path / "out"
    assert encode(model, f"{served}a.txt", str(out), progress=False)["texts"] == 3
    manifest = out / "_manifest.json"
    assert "hidden" not in manifest.read_text() and "http://***@127.0.0.1" in manifest.read_text()
    # As an earlier version wrote it.
    stored = json.loads(manifest.read_text())
    stored["input"][0]["url"] = f"{served}a.txt"
    manifest.write_text(json.dumps(stored))
    assert encode(model, f"{served}a.txt", str(out), progress=False)["texts"] == 3
    with pytest.raises(LusiferError) as caught:
        encode(model, f"{served}b.txt", str(tmp_path / "other"), progress=False)
    assert "hidden" not in str(caught.value)
