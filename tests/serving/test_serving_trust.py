"""A model that fails or never returns: the server says so, and ends when it is told to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import pytest

import support
from lusifer.serving import batcher as batching
from lusifer.serving.condition import Condition
from support.serving import embed, metric, serving, wait_for
from support.toy_model import FAILS, HANGS, Toy

PROGRAM = Path(next(iter(support.__path__))) / "toy_model.py"


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(Condition, "least", 0.3)
    monkeypatch.setattr(batching, "_ASK_AGAIN", 0.1)
    made = Toy()
    yield made
    made.go_on.set()


def test_a_model_that_fails_makes_the_server_unready_until_it_works_again(toy):
    with serving(lambda: toy) as client:
        toy.broken = True
        assert [embed(client, [[1]]).status_code for _ in range(20)] == [500] * 20
        wait_for(lambda: client.get("/ready").status_code == 503, 2)
        answer = client.get("/ready")
        assert answer.json()["status"] == "failing" and answer.headers["retry-after"]
        assert answer.json()["reason"] == "the model fails: RuntimeError: CUDA error: device-side assert triggered"
        assert client.get("/health").status_code == 200 and metric(client, "lusifer_model_failing") == 1
        toy.broken = False  # Nobody asks any more, as the balancer sends nothing: it finds out by itself.
        wait_for(lambda: client.get("/ready").status_code == 200)
        assert metric(client, "lusifer_model_failing") == 0


def test_a_model_of_nothing_but_nan_is_a_model_that_fails(toy):
    with serving(lambda: toy) as client:
        toy.number = np.nan
        assert [embed(client, [[1]]).status_code for _ in range(3)] == [500] * 3
        wait_for(lambda: "NaN" in client.get("/ready").text, 2)


def test_texts_that_make_a_good_model_fail_do_not_make_it_unready(toy):
    with serving(lambda: toy) as client:
        states = set()
        for _ in range(20):
            assert embed(client, [[FAILS]]).status_code == 500
            states.add(client.get("/ready").status_code)
        assert states == {200} and embed(client, [[1]]).status_code == 200


def test_a_model_that_does_not_return_makes_the_server_unready(toy):
    with serving(lambda: toy) as client, ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(embed, client, [[HANGS]])
        wait_for(lambda: client.get("/ready").status_code == 503, 3)
        assert "has not responded for" in client.get("/ready").json()["reason"]
        assert metric(client, "lusifer_batch_age_seconds") > 0.3
        refused = embed(client, [[1]])  # At once, not after a minute.
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "model_stuck"
        toy.go_on.set()
        assert hanging.result().status_code == 200 and client.get("/ready").status_code == 200


def hang(port, pool):
    """Waits for a server, and has its model never return."""

    def ready():
        with suppress(httpx.TransportError):
            return httpx.get(f"{url}/ready").status_code == 200

    def ask():
        with suppress(httpx.TransportError):
            httpx.post(f"{url}/v1/embeddings", json={"input": [[HANGS]]}, timeout=60)

    url = f"http://127.0.0.1:{port}"
    wait_for(ready)
    pool.submit(ask)
    with httpx.Client(base_url=url) as client:
        wait_for(lambda: metric(client, "lusifer_batch_age_seconds") > 0)


def test_a_model_that_hangs_does_not_keep_the_process():
    program = subprocess.Popen(
        [sys.executable, str(PROGRAM)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    servers = [[int(word) for word in program.stdout.readline().split()] for _ in range(3)]
    drained, interrupted, watched = (process for process, _ in servers)
    try:
        with ThreadPoolExecutor(3) as pool:
            for _, port in servers:
                hang(port, pool)
            begin = time.monotonic()
            os.kill(drained, signal.SIGTERM)
            os.kill(interrupted, signal.SIGINT)
            time.sleep(0.3)
            os.kill(interrupted, signal.SIGINT)
            ended = {}
            for _ in servers:
                process, code = map(int, program.stdout.readline().split())
                ended[process] = (code, time.monotonic() - begin)
        assert {code for code, _ in ended.values()} == {1}
        assert ended[drained][1] < 8 and ended[interrupted][1] < 5 and ended[watched][1] < 8, ended
        told = program.communicate()[1]
        assert told.count("stopped") == 3 and "stopped by the watchdog: the model has not responded for" in told, told
    finally:
        program.kill()
        for process, _ in servers:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
