"""A server with a tiny model on a free port, and what its clients do."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager

import httpx
import numpy as np
import torch

from lusifer import LusiferModel
from lusifer.model.backbones import load_tokenizer
from lusifer.model.sentence_transformer import to_sentence_transformer
from lusifer.model.text_encoder import TextEncoder
from lusifer.serving import server as httpserver
from lusifer.serving.app import create_app
from lusifer.serving.limits import Phase
from support.tiny import sharpen


class Gated(TextEncoder):
    """A model that can be held, to see what happens while it is busy; keeps what it was given."""

    def __init__(self, model, **settings):
        super().__init__(model, **settings)
        self.open, self.busy, self.seen = threading.Event(), threading.Event(), []
        self.open.set()

    def encode_ids(self, ids, *how):
        self.busy.set()
        assert self.open.wait(20)
        self.seen += [list(row) for row in ids]
        return super().encode_ids(ids, *how)

    @contextmanager
    def held(self):
        """With a first request in the model that stays there."""
        self.open.clear()
        self.busy.clear()
        try:
            yield
        finally:
            self.open.set()


def build(tiny_encoder, tiny_llm):
    torch.manual_seed(0)
    model = LusiferModel.from_backbones(tiny_encoder, tiny_llm, max_seq_length=64)
    sharpen(model.connector)
    found = to_sentence_transformer(model, load_tokenizer("encoder", tiny_encoder))
    found.prompts = {"query": "she reads ", "document": ""}
    return found


@contextmanager
def serving(source, **options):
    """A server on a free port; gives a client, and stops it in an orderly way."""
    phase = Phase()
    app = create_app(source, "tiny", phase=phase, **options)
    listening = httpserver.listen("127.0.0.1", 0)
    port = listening.getsockname()[1]
    thread = threading.Thread(target=httpserver.run, args=(app, listening, phase), kwargs={"drain_timeout": 20})
    thread.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            wait_for(lambda: client.get("/ready").status_code == 200)
            client.port, client.service = port, app.state.service
            yield client
    finally:
        phase.draining = True
        thread.join(20)
        assert not thread.is_alive()


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def embed(client, value, **more):
    return client.post("/v1/embeddings", json={"input": value, **more})


def vectors(answer):
    assert answer.status_code == 200, answer.text
    return np.array([row["embedding"] for row in answer.json()["data"]], dtype=np.float32)


def metric(client, name, **labels):
    text = ",".join(f'{key}="{value}"' for key, value in labels.items())
    line = f"{name}{{{text}}} " if labels else f"{name} "
    return sum(float(row.split()[-1]) for row in client.get("/metrics").text.splitlines() if row.startswith(line))
