"""Texts to vectors for many callers at a time: tokenised in a thread, batched, counted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import numpy as np

from lusifer.model.text_encoder import TextEncoder
from lusifer.serving.batcher import Batcher, Overloaded, TooLarge
from lusifer.serving.limits import ApiError, Phase
from lusifer.serving.metrics import Metrics

logger = logging.getLogger(__name__)

_CHARACTERS = 32  # Characters a token, more than any script has: so many are looked at first of a very long text.
_GIVE_UP = 256  # After so many characters a token of the window, what follows is not looked at.
_JOB = 65_536  # Characters tokenised in one go; callers take turns.


class EmbeddingService:
    """Texts to vectors for many callers at a time; ``app.state.service`` for routers that need embeddings.

    Args:
        encoder: The model, or what loads it.
        phase: Becomes ready when the model is loaded and warm.
        metrics: What is counted.
        batch_tokens: Most tokens of a batch; the encoder's own budget when None.
        queue_tokens: See `lusifer.serving.batcher.Batcher`.
        max_wait: See there.
        timeout: Seconds in which a request has to be finished.
    """

    def __init__(
        self,
        encoder: TextEncoder | Callable[[], TextEncoder],
        phase: Phase,
        metrics: Metrics,
        *,
        batch_tokens: int | None = None,
        queue_tokens: int | None = None,
        max_wait: float = 5.0,
        timeout: float = 60.0,
    ) -> None:
        self._source, self.phase, self.metrics = encoder, phase, metrics
        self._settings: dict[str, Any] = {"queue_tokens": queue_tokens, "max_wait": max_wait, "timeout": timeout}
        self._batch_tokens = batch_tokens
        self._encoder: TextEncoder | None = None
        self._batcher: Batcher | None = None
        # One thread: a tokenizer that cuts must not be used by two.
        self._words = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")
        self.json_threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="json")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Loads the model in the background and serves until left."""
        self._loop = asyncio.get_running_loop()
        work = asyncio.create_task(self._run())
        try:
            yield
        finally:
            work.cancel()
            with suppress(asyncio.CancelledError):
                await work
            if self._batcher is not None:
                await asyncio.to_thread(self._batcher.close)
            self._words.shutdown(wait=False, cancel_futures=True)
            self.json_threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self) -> None:
        try:
            source = self._source
            encoder = source if isinstance(source, TextEncoder) else await asyncio.to_thread(source)
            tokens = self._batch_tokens or encoder.token_budget
            batcher = Batcher(encoder.encode_ids, batch_tokens=tokens, observe=self.metrics.batch, **self._settings)
            self._encoder, self._batcher = encoder, batcher
            self.metrics.queue.set_function(lambda: batcher.waiting)
            self.metrics.in_flight.set_function(lambda: self.phase.in_flight)
            sentence = encoder.tokenize(["the cat sat on the mat and looked at the dog " * 3])[0]
            await batcher.warm_up([sentence] * max(1, min(batcher.batch_tokens, 1024) // len(sentence)))
        except Exception as error:
            self.phase.failure = error
            return
        self.phase.ready = True
        await batcher.run()

    @property
    def encoder(self) -> TextEncoder:
        """The loaded model.

        Raises:
            ApiError: 503 while there is none.
        """
        if self._encoder is None or not self.phase.ready:
            raise ApiError(503, "the model is still being loaded", code="not_ready", headers={"retry-after": "5"})
        return self._encoder

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """As `embed`, for threads other than the event loop's, which would wait for itself."""
        return asyncio.run_coroutine_threadsafe(self.embed(texts), self._loop).result()

    def check_load(self) -> None:
        """Refuses a request before any work is spent on it, if even the shortest would not be taken.

        Raises:
            ApiError: 429 or 503.
        """
        assert self.encoder and self._batcher
        with _as_answers():
            self._batcher.check(1)

    async def tokenize(self, texts: Sequence[str], *, truncate: bool = True) -> tuple[list[list[int]], int]:
        """Token ids of texts, and how many of them were cut to the model's window.

        Raises:
            ApiError: 400 naming the first text that is too long, unless they may be cut.
        """
        encoder, loop = self.encoder, asyncio.get_running_loop()
        found: list[list[int]] = []
        cut = 0
        for chunk in _chunks(texts):
            ids, long = await loop.run_in_executor(self._words, token_ids, encoder, chunk)
            if long and not truncate:
                message = (
                    f"input[{len(found) + long[0]}] is longer than the {encoder.max_seq_length} tokens of the model"
                )
                raise ApiError(400, message, param="input", code="context_length_exceeded")
            found += ids
            cut += len(long)
        self.metrics.truncated.inc(cut)
        return found, cut

    async def embed_ids(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        """Embeds tokenised texts: (n, dim) float32 unit vectors.

        Raises:
            ApiError: 413, 429 or 500.
        """
        assert self.encoder and self._batcher
        with _as_answers():
            vectors = await self._batcher.submit(ids)
        if not np.isfinite(vectors).all():
            message = "the model gave numbers that are not finite; the operator may try --precision float32"
            raise ApiError(500, message, code="not_finite")
        return vectors

    async def embed(self, texts: Sequence[str], prompt: str = "") -> np.ndarray:
        """Embeds texts behind a prompt, cut to the model's window: (n, dim) float32 unit vectors."""
        self.check_load()
        ids, _ = await self.tokenize([prompt + text for text in texts])
        return await self.embed_ids(ids)


@contextmanager
def _as_answers() -> Iterator[None]:
    """Turns the queue's refusals into answers."""
    try:
        yield
    except Overloaded as error:
        headers = {"retry-after": str(error.retry_after)}
        raise ApiError(429, str(error), code="rate_limit_exceeded", headers=headers) from None
    except TooLarge as error:
        raise ApiError(413, f"{error}; send fewer texts at a time", code="request_too_large") from None


def _chunks(texts: Sequence[str]) -> list[list[str]]:
    found: list[list[str]] = []
    room = 0
    for text in texts:
        if room <= 0:
            found.append([])
            room = _JOB
        found[-1].append(text)
        room -= len(text) + 64
    return found


def token_ids(encoder: TextEncoder, texts: Sequence[str]) -> tuple[list[list[int]], list[int]]:
    """Token ids as `TextEncoder.tokenize` gives them, and the rows that were cut.

    A text of a megabyte costs no more than the part of it that the model reads.
    """
    heads = [_head(encoder, text) for text in texts]
    found = encoder.tokenize(heads)
    long = []
    for row, (head, text) in enumerate(zip(heads, texts, strict=True)):
        if len(head) < len(text):
            long.append(row)
        elif len(found[row]) == encoder.max_seq_length:  # Cut, or just as long as that.
            long += [row] if len(_whole(encoder, head)) > encoder.max_seq_length else []
    return found, long


def _whole(encoder: TextEncoder, text: str) -> list[int]:
    return encoder.tokenizer(text, truncation=False, verbose=False)["input_ids"]


def _head(encoder: TextEncoder, text: str) -> str:
    """As much of a text as holds twice the tokens that are read, so that where it ends makes no difference."""
    size, last = _CHARACTERS * encoder.max_seq_length, _GIVE_UP * encoder.max_seq_length
    while size < min(len(text), last):
        if len(_whole(encoder, text[:size])) >= 2 * encoder.max_seq_length:
            return text[:size]
        size *= 2
    return text[:last]
