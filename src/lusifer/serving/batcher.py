"""Dynamic batching by tokens: one model, many callers, a queue that never grows without bound.

1. Callers submit tokenised texts. Whenever the model becomes free it takes what waits, up to a budget of tokens; there
   is no waiting for more. While the model is busy the next batch collects by itself, and when it is idle waiting would
   only add latency.
2. Turns are dealt round (deficit round robin, Shreedhar and Varghese 1995): each caller in turn gives at least one text
   and at most a quantum of tokens to the batch, so ten thousand texts of one caller delay another's single text by one
   quantum, not by all of them.
3. The queue is bounded by the tokens a newcomer would have to wait for, and by the seconds these take at the speed
   measured so far. A long request therefore weighs at most one batch: the rest of it waits behind everybody else.
   Beyond the bound, and where a request could not be finished in time, it is refused at once with the seconds after
   which to try again.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from lusifer.serving.condition import Condition
from lusifer.serving.limits import ApiError, try_again
from lusifer.serving.memory import return_freed

Ids = Sequence[int]
Embed = Callable[[Sequence[Ids]], np.ndarray]
# Called after each batch with its texts, its tokens and its seconds.
Observe = Callable[[int, int, float], None]

_QUANTA = 8  # Callers that fit into one batch beside each other.
_SMOOTHING = 0.3  # Weight of a full batch in the measured speed.
_ASK_AGAIN = 5.0  # Seconds between two attempts of a model that fails.
_IDLE = 2.0  # Seconds without work after which memory is returned.


@dataclass(eq=False, repr=False)
class _Job:
    """One caller's texts: ``next`` is the first one that no batch has taken yet."""

    ids: Sequence[Ids]
    future: asyncio.Future[np.ndarray]
    left: int
    next: int = 0
    missing: int = 0
    parts: dict[int, np.ndarray] = field(default_factory=dict)


_Part = tuple[_Job, int, int]


class Batcher:
    """Feeds one model from many callers; everything but the model itself runs in the event loop's thread.

    Args:
        embed: Token ids by text -> (n, dim) float32; called in one thread of its own.
        batch_tokens: Most tokens of a batch; a single longer text is a batch of its own.
        queue_tokens: Most tokens that may wait, each request counted with at most ``batch_tokens``; eight batches
            when None.
        max_wait: Most seconds that what waits, counted so, may take at the measured speed.
        timeout: Seconds in which a request has to be finished.
        observe: Called after each batch.
        condition: Is told how the model does.

    Attributes:
        rate: Tokens a second, measured; 0 before the first batch.
    """

    def __init__(
        self,
        embed: Embed,
        *,
        batch_tokens: int,
        queue_tokens: int | None = None,
        max_wait: float = 5.0,
        timeout: float = 60.0,
        observe: Observe | None = None,
        condition: Condition | None = None,
    ) -> None:
        self._embed = embed
        self.batch_tokens = batch_tokens
        self.queue_tokens = queue_tokens or _QUANTA * batch_tokens
        self.max_wait, self.timeout = max_wait, timeout
        self.rate = 0.0
        self._observe = observe
        self._condition = condition or Condition()
        self._known: Sequence[Ids] = ()  # Texts that went well.
        self._asked = -math.inf
        self._quantum = max(1, batch_tokens // _QUANTA)
        self._jobs: deque[_Job] = deque()
        self._running = 0
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")

    @property
    def waiting(self) -> int:
        """Tokens that no batch has taken yet, in full."""
        return sum(job.left for job in self._jobs)

    @property
    def weight(self) -> int:
        """Tokens that wait, as they count towards the bound."""
        return sum(min(job.left, self.batch_tokens) for job in self._jobs)

    @property
    def bound(self) -> float:
        """Most tokens that may wait: never less than one batch, or the model would idle between two."""
        fast = max(self.rate * self.max_wait - self._running, self.batch_tokens) if self.rate else math.inf
        return min(self.queue_tokens, fast)

    def check(self, tokens: int) -> None:
        """Whether a request of so many tokens would be taken now.

        Raises:
            ApiError: 413 if it could not be finished in time even alone; 429 if the queue is full, or it could not be
                finished in time behind what waits; 503 if the model does not return.
        """
        if stuck := self._condition.stuck():
            raise try_again(503, stuck, code="model_stuck", seconds=5)
        own = min(tokens, self.batch_tokens)
        missing = self.weight + own - self.bound
        # An empty queue takes whatever fits into the time, also where its bound is smaller than one text.
        if missing > 0 and self._jobs:
            raise self._full(missing)
        if not self.rate:
            return
        alone = tokens / self.rate
        if alone > self.timeout:
            message = f"this request would take about {alone:.0f} s, and {self.timeout:.0f} s are allowed"
            raise ApiError(413, f"{message}; send fewer texts at a time", code="request_too_large")
        # Until so many tokens of ours are through, every other caller has had as many, or all it wanted.
        ahead = self._running + sum(min(job.left, max(tokens, self._quantum)) for job in self._jobs)
        late = (ahead + tokens) / self.rate - self.timeout
        if late > 0:
            raise self._full(late * self.rate)

    def _full(self, tokens: float) -> ApiError:
        seconds = max(1, min(math.ceil(tokens / self.rate), math.ceil(self.timeout))) if self.rate else 1
        return try_again(429, "the queue is full", code="rate_limit_exceeded", seconds=seconds)

    async def submit(self, ids: Sequence[Ids]) -> np.ndarray:
        """Embeds one caller's texts; a caller that is cancelled leaves the queue at once.

        Args:
            ids: Token ids by text, none empty.

        Returns:
            (n, dim) float32, in the order of the texts.

        Raises:
            ApiError: As `check`.
            Exception: Whatever the model raised on these texts.
        """
        tokens = sum(map(len, ids))
        self.check(tokens)
        job = _Job(ids, asyncio.get_running_loop().create_future(), tokens, missing=len(ids))
        self._jobs.append(job)
        self._wake.set()
        try:
            return await job.future
        finally:
            if job.next < len(job.ids):
                self._jobs.remove(job)

    async def run(self) -> None:
        """Serves until cancelled."""
        loop, begin = asyncio.get_running_loop(), time.perf_counter()
        while True:
            await self._ask_if_suspicious()
            if not self._wake.is_set():
                await self._work()
                begin = time.perf_counter()
            await asyncio.sleep(0)  # Callers that became ready in the same turn of the loop come along.
            batch = self._take()
            if not batch:
                self._wake.clear()
                continue
            texts = [job.ids[begin:end] for job, begin, end in batch]
            self._running = tokens = sum(len(ids) for part in texts for ids in part)
            seconds, embedded = await loop.run_in_executor(self._thread, self._embed_parts, texts)
            self._running = 0
            # From one batch to the next: where cores are short, all the rest slows the model down as well.
            end = time.perf_counter()
            self._measure(tokens, end - begin)
            begin = end
            if self._observe is not None:
                self._observe(sum(map(len, texts)), tokens, seconds)
            for part, vectors in zip(batch, embedded, strict=True):
                self._deliver(part, vectors)

    async def _work(self) -> None:
        """Waits for work; where the model fails, no longer than until it should be asked again."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_IDLE):
                await self._wake.wait()
        if self._wake.is_set():
            return
        await asyncio.get_running_loop().run_in_executor(self._thread, return_freed)
        with suppress(TimeoutError):
            async with asyncio.timeout(_ASK_AGAIN - _IDLE if self._condition.suspicious else None):
                await self._wake.wait()

    async def _ask_if_suspicious(self) -> None:
        """Whether it is the model that fails, or what it was given."""
        condition, now = self._condition, time.monotonic()
        if self._known and condition.suspicious and not (condition.failing and now < self._asked + _ASK_AGAIN):
            self._asked = now
            ask = partial(self._embed_parts, [self._known], own=True)
            await asyncio.get_running_loop().run_in_executor(self._thread, ask)

    async def warm_up(self, ids: Sequence[Ids]) -> None:
        """Runs texts through the model twice, before the first caller, and takes the second time as its speed."""
        loop = asyncio.get_running_loop()
        for _ in range(2):
            seconds, embedded = await loop.run_in_executor(self._thread, self._embed_parts, [ids])
            if isinstance(embedded[0], Exception):
                raise embedded[0]
            self.rate = sum(map(len, ids)) / seconds
        self._known = ids[:1]

    def close(self) -> None:
        """Lets the batch in hand end, and no other begin."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _take(self) -> list[_Part]:
        """The next batch: from each caller in turn, until the budget is spent."""
        batch: list[_Part] = []
        room = self.batch_tokens
        while self._jobs:
            job = self._jobs.popleft()
            begin, quantum = job.next, self._quantum
            while job.next < len(job.ids):
                size = len(job.ids[job.next])
                first = job.next == begin  # At least one text a turn, whatever its length.
                if not (first and not batch) and (size > room or (size > quantum and not first)):
                    break
                job.next += 1
                job.left -= size
                room, quantum = room - size, quantum - size
            if job.next > begin:
                batch.append((job, begin, job.next))
            if job.next == begin:  # It does not fit any more: first in the next batch.
                self._jobs.appendleft(job)
                break
            if job.next < len(job.ids):
                self._jobs.append(job)
            if room <= 0:
                break
        return batch

    def _embed_parts(self, parts: list[Sequence[Ids]], own: bool = False) -> tuple[float, list[np.ndarray | Exception]]:
        """Seconds, and vectors by part; where the model fails, each part alone, so that one cannot spoil another's."""
        begin = time.perf_counter()
        results: list[np.ndarray | Exception] = []
        try:
            texts = [ids for part in parts for ids in part]
            with self._condition.call(sum(map(len, texts)) / self.rate if self.rate else 0.0, own=own) as found:
                found.append(vectors := self._embed(texts))
            results.extend(np.split(vectors, np.cumsum([len(part) for part in parts])[:-1]))
        except Exception as error:
            results = [error] if len(parts) == 1 else [self._embed_parts([part])[1][0] for part in parts]
        return max(time.perf_counter() - begin, 1e-9), results

    def _measure(self, tokens: int, seconds: float) -> None:
        # A small batch leaves the model half idle and says little about its speed under load.
        weight = _SMOOTHING * min(1.0, tokens / self.batch_tokens) if self.rate else 1.0
        self.rate += weight * (tokens / seconds - self.rate)

    def _deliver(self, part: _Part, vectors: np.ndarray | Exception) -> None:
        job, begin, end = part
        if job.future.done():
            return
        if isinstance(vectors, Exception):
            job.future.set_exception(vectors)
            return
        job.parts[begin] = vectors
        job.missing -= end - begin
        if not job.missing:
            job.future.set_result(np.concatenate([job.parts[row] for row in sorted(job.parts)]))
