"""A hub that cannot be reached: asked once, not for every file."""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants, hf_hub_download, is_offline_mode
from huggingface_hub.errors import LocalEntryNotFoundError

import lusifer
from lusifer import LusiferError
from lusifer.hooks import huggingface_hub
from lusifer.hooks.huggingface_hub import settle_hub, why_not_loaded


@pytest.fixture
def hub(monkeypatch):
    """Says where the hub is, as if nobody had asked yet."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "_WAIT", 0.0)
    settle_hub.cache_clear()
    yield lambda url: monkeypatch.setattr(constants, "ENDPOINT", url)
    settle_hub.cache_clear()


def test_a_hub_that_is_not_there_is_asked_once(hub, caplog):
    hub("http://127.0.0.1:1")
    begun = time.perf_counter()
    for name in ("run/model", "nobody/nothing"):
        with pytest.raises(LusiferError, match=f"'{name}': there is no such folder, and the hub cannot be reached"):
            lusifer.load(name)
    assert time.perf_counter() - begun < 10  # Retries of one file took 23 s.
    assert [record.name for record in caplog.records if "cannot be reached" in record.getMessage()] == [
        "lusifer.hooks.huggingface_hub"
    ]


def test_the_libraries_follow(hub):
    hub("http://127.0.0.1:1")
    assert not settle_hub() and is_offline_mode()
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download("nobody/nothing", "config.json")


def test_what_is_broken_is_not_called_absent(hub):
    hub("http://127.0.0.1:1")
    assert not settle_hub()
    assert why_not_loaded("nobody/nothing", ValueError("the header is too large")) == "the header is too large"


def test_a_hub_that_answers_anything_is_there(hub):
    class Refuses(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(401)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub(f"http://127.0.0.1:{server.server_port}")
    assert settle_hub() and not is_offline_mode()
    server.shutdown()
    server.server_close()
