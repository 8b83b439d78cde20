"""What requests and clients that leave take, a server gives back; benchmarks/serve_memory.py is the long form."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
import time

import psutil
import pytest

from lusifer.search.page import make_router
from lusifer.serving import batcher, memory
from support.serving import metric, serving, wait_for
from support.toy_model import Toy

# Lists that count as objects, where a request is kept.
BODY = json.dumps({"input": [[1] * 60] * 200}).encode()
EMBED = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY
SEARCH = b"GET /search?q=station HTTP/1.1\r\nHost: localhost\r\n\r\n"
# A request that is kept has 200 lists. An event loop drops cancelled timers, two objects each, when most of its timers
# are, from a hundred on.
BATCH, OBJECTS, MEGABYTES = 100, 1000, 10


class Quick(Toy):
    token_budget = 10_000


class Index:
    location, folder = "an index", None

    class info:
        dimension, model = 4, "toy"

    def search(self, vector, **options):
        return []


class Asked:
    dimension, model, service = 4, Toy.model, None

    async def embed(self, texts):
        return await self.service.embed_ids(Toy().tokenize(texts))


@pytest.fixture
def server():
    asked = Asked()
    gc.collect()
    gc.freeze()  # What is there before is neither searched nor counted.
    with serving(Quick, routers=[make_router(Index(), asked)]) as client:
        asked.service = client.service
        yield client
    gc.unfreeze()


async def stay(port, request):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
    assert (await reader.read()).split()[1] in (b"200", b"429")
    writer.close()


async def leave(port, request):
    """Within the request, or before the answer."""
    for part in (request[: len(request) // 2], request):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(part)
        await writer.drain()
        writer.transport.abort()


def objects():
    """How many there are, once connections of callers that left have ended."""
    before, now = -1, 0
    for _ in range(50):
        gc.collect()
        before, now = now, len(gc.get_objects())
        if now >= before > 0:
            break
        time.sleep(0.2)
    return now


def held(client, way, request):
    """Objects and megabytes of this process, the server's, after `BATCH` more requests."""

    async def many():
        for _ in range(BATCH // 4):
            await asyncio.gather(*[way(client.port, request) for _ in range(4)])

    asyncio.run(many())
    wait_for(lambda: metric(client, "lusifer_requests_in_flight") == 0)
    memory.return_freed()
    return objects(), psutil.Process().memory_info().rss / 1e6


@pytest.mark.parametrize("request_", [EMBED, SEARCH], ids=["embeddings", "search"])
@pytest.mark.parametrize("way", [stay, leave])
def test_nothing_stays_of_requests(server, way, request_):
    held(server, way, request_)
    before, after = held(server, way, request_), held(server, way, request_)
    assert after[0] - before[0] < OBJECTS, f"{after[0] - before[0]} objects of {BATCH} requests"
    assert after[1] - before[1] < MEGABYTES, f"{after[1] - before[1]:.0f} MB of {BATCH} requests"


def test_what_is_kept_is_noticed(server, monkeypatch):
    """So that the test above can fail."""
    kept, submit = [], batcher.Batcher.submit

    async def keep(self, ids):
        kept.append([list(row) for row in ids])
        return await submit(self, ids)

    monkeypatch.setattr(batcher.Batcher, "submit", keep)
    with pytest.raises(AssertionError, match=f"objects of {BATCH} requests"):
        test_nothing_stays_of_requests(server, stay, EMBED)


BEFORE_TORCH = """
import os, sys
from lusifer.cli import app, search, serve
def stop(quiet):
    print(os.environ["LRU_CACHE_CAPACITY"], os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"], "torch" in sys.modules)
    raise SystemExit
search.quiet_libraries = serve.quiet_libraries = stop
app.main()
"""


@pytest.mark.parametrize("command", [["serve", "model"], ["search", "index", "--ui"]])
def test_few_plans_are_kept_and_torch_reads_so_when_it_is_imported(command):
    unset = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    arguments = [sys.executable, "-c", BEFORE_TORCH, *command]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "16 64 False\n"


def test_an_idle_server_returns_memory_once(server, monkeypatch):
    calls = []
    monkeypatch.setattr(batcher, "_IDLE", 0.1)
    monkeypatch.setattr(batcher, "return_freed", lambda: calls.append(1))
    asyncio.run(stay(server.port, EMBED))
    wait_for(lambda: calls)
    time.sleep(0.4)
    count = len(calls)
    assert count <= 2, "once, or a second time where a wait had begun before"
    asyncio.run(stay(server.port, EMBED))
    wait_for(lambda: len(calls) == count + 1)
