"""Texts to vectors for many callers at a time: tokenised in a thread, batched, counted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import numpy as np

from lusifer.model.text_encoder import TextEncoder, token_ids
from lusifer.serving.batcher import Batcher
from lusifer.serving.limits import ApiError, Phase
from lusifer.serving.metrics import Metrics

Result = TypeVar("Result")

_CHARACTERS = 32  # Characters a token, more than any script has: so many are looked at first of a very long text.
_GIVE_UP = 256  # After so many characters a token of the window, what follows is not looked at.
_JOB = 65_536  # Characters tokenised in one go; callers take turns.
_CLOSE = 2.0  # Seconds for the batch in hand to end, when nobody waits for it any more.
_INLINE = 65_536  # Bytes of a body or numbers of an answer that the event loop handles itself.


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
        # One thread: a tokenizer that truncates must not be used by two.
        self._tokenizer_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")
        self._json_threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="json")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Loads the model in the background and serves until left."""
        work = asyncio.create_task(self._run())
        try:
            yield
        finally:
            self.phase.end_within(_CLOSE)
            work.cancel()
            with suppress(asyncio.CancelledError):
                await work
            if self._batcher is not None:
                await asyncio.to_thread(self._batcher.close)
            self._tokenizer_thread.shutdown(wait=False, cancel_futures=True)
            self._json_threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self) -> None:
        try:
            source = self._source
            encoder = source if isinstance(source, TextEncoder) else await asyncio.to_thread(source)
            tokens = self._batch_tokens or encoder.token_budget
            told: dict[str, Any] = {"observe": self.metrics.batch, "condition": self.phase.model}
            batcher = Batcher(encoder.encode_ids, batch_tokens=tokens, **told, **self._settings)
            self._encoder, self._batcher = encoder, batcher
            self.metrics.queue.set_function(lambda: batcher.waiting)
            self.metrics.in_flight.set_function(lambda: self.phase.in_flight)
            self.metrics.batch_age.set_function(self.phase.model.age)
            self.metrics.failing.set_function(lambda: self.phase.model.trouble() is not None)
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

    async def run_json(self, size: int, work: Callable[[], Result]) -> Result:
        """Reads or writes JSON, in a thread where it is large.

        Args:
            size: Bytes of a body, or numbers of an answer.
            work: Reads or writes it.
        """
        if size < _INLINE:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._json_threads, work)

    def check_load(self) -> None:
        """Refuses a request before any work is spent on it, if even the shortest would not be taken.

        Raises:
            ApiError: 429 or 503.
        """
        assert self.encoder and self._batcher
        self._batcher.check(1)

    async def tokenize(self, texts: Sequence[str], *, truncate: bool = True) -> tuple[list[list[int]], int]:
        """Token ids of texts, and how many texts were truncated to the model's window.

        Args:
            texts: With their prompt.
            truncate: Whether texts may be truncated.

        Raises:
            ApiError: 400 naming the first text that is too long, unless texts may be truncated.
        """
        encoder, loop = self.encoder, asyncio.get_running_loop()
        ids: list[list[int]] = []
        truncated = 0
        for chunk in _chunks(texts):
            chunk_ids, long = await loop.run_in_executor(self._tokenizer_thread, truncated_ids, encoder, chunk)
            if long and not truncate:
                message = f"input[{len(ids) + long[0]}] is longer than the {encoder.max_seq_length} tokens of the model"
                raise ApiError(400, message, param="input", code="context_length_exceeded")
            ids += chunk_ids
            truncated += len(long)
        self.metrics.truncated.inc(truncated)
        return ids, truncated

    async def embed_ids(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        """Embeds tokenised texts.

        Args:
            ids: Token ids by text, none empty.

        Returns:
            (n, dim) float32 unit vectors.

        Raises:
            ApiError: 413, 429 or 500.
        """
        assert self.encoder and self._batcher
        vectors = await self._batcher.submit(ids)
        if not np.isfinite(vectors).all():
            message = "an embedding has NaN or infinite values; the operator can try --precision float32"
            raise ApiError(500, message, code="not_finite")
        return vectors

    async def embed(self, texts: Sequence[str], prompt: str = "") -> np.ndarray:
        """Embeds texts, truncated to the model's window.

        Args:
            texts: Any number.
            prompt: Put in front of every text.

        Returns:
            (n, dim) float32 unit vectors.

        Raises:
            ApiError: 413, 429, 500 or 503.
        """
        self.check_load()
        ids, _ = await self.tokenize([prompt + text for text in texts])
        return await self.embed_ids(ids)


def _chunks(texts: Sequence[str]) -> list[list[str]]:
    """Texts in lists of about `_JOB` characters."""
    chunks: list[list[str]] = []
    room = 0
    for text in texts:
        if room <= 0:
            chunks.append([])
            room = _JOB
        chunks[-1].append(text)
        room -= len(text) + 64
    return chunks


def truncated_ids(encoder: TextEncoder, texts: Sequence[str]) -> tuple[list[list[int]], list[int]]:
    """Token ids of texts, truncated to what the model reads, and the rows that were longer.

    A text of a megabyte costs no more than the part of it that the model reads.

    Args:
        encoder: The model.
        texts: Any number.
    """
    heads = [_head(encoder, text) for text in texts]
    ids, longer = token_ids(encoder.tokenizer, heads, encoder.max_seq_length)
    parts = zip(longer, heads, texts, strict=True)
    return ids, [row for row, (more, head, text) in enumerate(parts) if more or len(head) < len(text)]


def _head(encoder: TextEncoder, text: str) -> str:
    """As much of a text as holds twice the tokens that are read, so that where it ends makes no difference."""
    size, last = _CHARACTERS * encoder.max_seq_length, _GIVE_UP * encoder.max_seq_length
    while size < min(len(text), last):
        if len(token_ids(encoder.tokenizer, [text[:size]], len(text))[0][0]) >= 2 * encoder.max_seq_length:
            return text[:size]
        size *= 2
    return text[:last]
