"""The queue in front of the model: fair, bounded, and nobody's mistake is another's."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from lusifer.serving.batcher import Batcher
from lusifer.serving.limits import ApiError


def retry_after(error):
    assert error.status == 429
    return int(error.headers["retry-after"])


class Model:
    """Embeds a text as its first id; waits where told to, records what it was given."""

    def __init__(self):
        self.batches, self.free = [], threading.Event()
        self.free.set()
        self.busy = threading.Event()

    def __call__(self, ids):
        self.busy.set()
        assert self.free.wait(10)
        self.batches.append([row[0] for row in ids])
        if any(row[0] == 666 for row in ids):
            raise RuntimeError("poison")
        return np.array([[row[0]] for row in ids], dtype=np.float32)


def scenario(steps, **settings):
    """Runs ``steps(batcher, model)`` beside a running batcher."""

    async def main():
        model = Model()
        batcher = Batcher(model, **{"batch_tokens": 80, "queue_tokens": 640, **settings})
        task = asyncio.create_task(batcher.run())
        try:
            await asyncio.wait_for(steps(batcher, model), 20)
        finally:
            model.free.set()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            batcher.close()

    asyncio.run(main())


def texts(value, count, length=5):
    return [[value + row] * length for row in range(count)]


async def block(batcher, model):
    """A text in the model that stays there until ``model.free`` is set."""
    model.free.clear()
    model.busy.clear()
    task = asyncio.create_task(batcher.submit([[1]]))
    await asyncio.to_thread(model.busy.wait, 10)
    model.batches.clear()
    return task


async def submitted(batcher, ids):
    task = asyncio.create_task(batcher.submit(ids))
    await asyncio.sleep(0)
    return task


def test_vectors_come_back_in_order_however_they_are_cut():
    async def steps(batcher, model):
        jobs = [texts(1000 * caller, count) for caller, count in enumerate((1, 70, 3, 17), start=1)]
        found = await asyncio.gather(*[batcher.submit(ids) for ids in jobs])
        for ids, vectors in zip(jobs, found, strict=True):
            assert vectors[:, 0].tolist() == [row[0] for row in ids]
        assert len(model.batches) > 4 and all(len(batch) <= 80 // 5 for batch in model.batches)

    scenario(steps)


def test_callers_that_wait_share_a_batch_and_nobody_waits_for_company():
    async def steps(batcher, model):
        first = await block(batcher, model)
        rest = [await submitted(batcher, [[10 + i] * 3]) for i in range(5)]
        model.free.set()
        await asyncio.gather(first, *rest)
        assert model.batches == [[1], [10, 11, 12, 13, 14]]

    scenario(steps)


def test_a_long_request_does_not_starve_a_short_one():
    async def steps(batcher, model):
        first = await block(batcher, model)
        long = await submitted(batcher, texts(1000, 500))
        short = await submitted(batcher, [[7] * 5])
        model.free.set()
        await short
        assert not long.done() and 7 in model.batches[1], "the short one goes with the first batch of the long one"
        assert len(model.batches[1]) == 80 // 5, "which is full nevertheless"
        assert (await long)[:, 0].tolist() == [1000 + row for row in range(500)]
        await first

    scenario(steps)


def test_a_text_longer_than_a_batch_is_served_and_not_overtaken_for_ever():
    async def steps(batcher, model):
        first = await block(batcher, model)
        small = [await submitted(batcher, [[10] * 30]) for _ in range(2)]
        huge = await submitted(batcher, [[5] * 500])
        later = [await submitted(batcher, [[20] * 30]) for _ in range(4)]
        model.free.set()
        await asyncio.gather(first, huge, *small, *later)
        assert model.batches[:4] == [[1], [10, 10], [5], [20, 20]]

    scenario(steps, queue_tokens=2000)


def test_the_queue_is_bounded_and_says_when_to_come_back():
    async def steps(batcher, model):
        await batcher.warm_up([[1] * 10])
        batcher.rate = 100.0
        first = await block(batcher, model)
        taken, refused = [], []
        for _ in range(100):
            try:
                batcher.check(10)
                taken.append(await submitted(batcher, texts(3, 2)))
            except ApiError as error:
                refused.append(retry_after(error))
            assert batcher.weight <= 640 and batcher.waiting == 10 * len(taken)
        assert len(taken) == 64 and len(refused) == 36
        # Ten tokens have to go, at a hundred a second.
        assert set(refused) == {1}
        with pytest.raises(ApiError, match="the queue is full") as caught:
            await batcher.submit(texts(3, 60))
        assert retry_after(caught.value) == 1  # It weighs one batch: 80 tokens.
        batcher.rate = 10.0  # At which it all takes 64 of the allowed 1000 seconds.
        with pytest.raises(ApiError, match="the queue is full") as caught:
            batcher.check(80)
        assert retry_after(caught.value) == 8
        model.free.set()
        await asyncio.gather(first, *taken)
        assert batcher.waiting == 0
        batcher.check(10)

    scenario(steps, timeout=1000, max_wait=1000)


def test_a_slow_model_has_a_shorter_queue():
    async def steps(batcher, model):
        first = await block(batcher, model)
        assert batcher.bound == 640, "before the speed is known"
        # Two seconds less the token in the model, and never less than a batch.
        for rate, bound in ((1000.0, 640), (100.0, 199), (10.0, 80)):
            batcher.rate = rate
            assert batcher.bound == bound
        taken = [await submitted(batcher, [[1] * 10]) for _ in range(8)]
        with pytest.raises(ApiError, match="the queue is full") as caught:
            batcher.check(10)
        assert retry_after(caught.value) == 1
        model.free.set()
        await asyncio.gather(first, *taken)

    scenario(steps, max_wait=2)


def test_a_long_request_weighs_one_batch():
    async def steps(batcher, model):
        first = await block(batcher, model)
        long = await submitted(batcher, texts(1000, 500))
        assert batcher.weight == 80 and batcher.waiting == 2500
        short = await submitted(batcher, [[7] * 5])
        model.free.set()
        await asyncio.gather(first, long, short)

    scenario(steps)


def test_what_cannot_be_finished_in_time_is_refused_at_once():
    async def steps(batcher, model):
        first = await block(batcher, model)
        batcher.rate = 100.0  # Ten seconds: a thousand tokens.
        with pytest.raises(ApiError, match="about 20 s, and 10 s are allowed"):
            batcher.check(2000)
        long = await submitted(batcher, texts(1000, 120))
        with pytest.raises(ApiError, match="the queue is full") as caught:
            batcher.check(600)  # Beside the long one it would get half of the model: twelve seconds.
        assert retry_after(caught.value) == 3
        batcher.check(100)
        model.free.set()
        await asyncio.gather(first, long)

    scenario(steps, timeout=10)


def test_a_cancelled_caller_never_reaches_the_model():
    async def steps(batcher, model):
        first = await block(batcher, model)
        gone, stays = await submitted(batcher, [[66]]), await submitted(batcher, [[7]])
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        assert batcher.waiting == 1
        model.free.set()
        await asyncio.gather(first, stays)
        assert model.batches == [[1], [7]]

    scenario(steps)


def test_a_batch_that_fails_fails_only_the_one_who_spoiled_it():
    async def steps(batcher, model):
        first = await block(batcher, model)
        good, bad = await submitted(batcher, [[7], [8]]), await submitted(batcher, [[666]])
        model.free.set()
        assert (await good)[:, 0].tolist() == [7, 8]
        with pytest.raises(RuntimeError, match="poison"):
            await bad
        await first
        assert (await batcher.submit([[9]]))[0, 0] == 9, "and the server goes on"

    scenario(steps)


def test_the_speed_is_measured():
    async def steps(batcher, model):
        assert batcher.rate == 0
        await batcher.warm_up([[1] * 40])
        before = batcher.rate
        assert before > 0
        await batcher.submit([[1] * 80])
        assert batcher.rate != before

    scenario(steps)


class Unprintable(np.ndarray):
    def __repr__(self):
        raise AssertionError("a queue that prints what it holds, as a failed deque.remove does, takes ten times longer")


def test_nothing_is_printed_on_the_way():
    async def steps(batcher, model):
        batcher._embed = lambda ids: model(ids).view(Unprintable)
        assert len(await batcher.submit(texts(1, 30))) == 30

    scenario(steps)
