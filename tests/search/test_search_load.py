"""Many at the search page at a time: those that can be served in time are, the others are told when to come back."""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from collections import Counter
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from lusifer.search.page import make_router
from lusifer.search.turns import BusyError, Turns
from support.serving import metric, serving, wait_for
from support.toy_model import Toy


class Slow:
    """An index whose searches take a while."""

    location, info, folder = "slow", SimpleNamespace(dimension=4, model="toy"), None

    def __init__(self):
        self.searches, self.seconds, self.go_on = 0, 0.03, threading.Event()
        self.go_on.set()

    def search(self, vector, **options):
        self.searches += 1
        assert self.go_on.wait(20)
        time.sleep(self.seconds)
        return []


class Asked:
    """The server's model as `lusifer serve --ui` gives it to the page."""

    dimension, model = 4, Toy.model
    service = None

    async def embed(self, texts):
        self.service.check_load()
        return await self.service.embed_ids(Toy().tokenize(texts))


@pytest.fixture
def page():
    store, asked = Slow(), Asked()
    with serving(Toy, routers=[make_router(store, asked)]) as client:
        client.store, asked.service = store, client.service
        yield client


async def ask(client):
    """Status, seconds and whether a search is told when to come back; by hand, as the server needs the cores."""
    begin = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
    try:
        writer.write(b"GET /search?q=station HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = await reader.read()
    finally:
        writer.close()
    return int(answer.split()[1]), time.perf_counter() - begin, b"retry-after: " in answer


async def crowd(client, count):
    return await asyncio.gather(*[ask(client) for _ in range(count)])


def test_four_hundred_at_once_are_served_in_time_or_refused(page):
    told = asyncio.run(crowd(page, 400))
    counts = Counter(status for status, _, _ in told)
    assert set(counts) == {200, 429} and counts[200] >= 50 and counts[429] >= 50, counts
    assert all(later for status, _, later in told if status == 429)
    served = sorted(seconds for status, seconds, _ in told if status == 200)
    print(counts, f"p50 {statistics.median(served):.2f} s, most {served[-1]:.2f} s")
    assert page.store.searches == counts[200]
    assert asyncio.run(crowd(page, 1))[0][0] == 200, "and afterwards there is room again"


def test_searches_of_callers_that_left_are_dropped(page):
    page.store.go_on.clear()

    async def leave():
        asking = [asyncio.create_task(ask(page)) for _ in range(40)]
        await asyncio.to_thread(wait_for, lambda: metric(page, "lusifer_requests_in_flight") == 40)
        for one in asking:
            one.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        await asyncio.to_thread(wait_for, lambda: metric(page, "lusifer_requests_in_flight") == 0)

    asyncio.run(leave())
    page.store.go_on.set()
    assert asyncio.run(crowd(page, 1))[0][0] == 200
    assert page.store.searches <= 3, "two were in hand, and one came afterwards"


def test_a_caller_is_let_in_if_it_can_be_served_in_time():
    async def steps():
        turns = Turns(max_wait=1.0)
        for _ in range(60):
            await turns.run(lambda: time.sleep(0.005))
        inside = 0
        with ExitStack() as stack, pytest.raises(BusyError, match="try again in 1 s") as caught:
            while inside < 5000:
                stack.enter_context(turns.turn())
                inside += 1
        assert caught.value.seconds == 1 and 100 < inside < 500

    asyncio.run(steps())
