"""ASGI middleware between the network and the application: keys, sizes, times, and clients that went away.

Every answer that is an error has the body of OpenAI's: ``{"error": {"message", "type", "param", "code"}}``.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import anyio

from lusifer.serving.condition import Condition
from lusifer.serving.unread import Unread

if TYPE_CHECKING:
    from lusifer.serving.access import Access

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
# Called with path, status and seconds of each request.
Observe = Callable[[str, int, float], None]

OPEN_PATHS = frozenset({"/health", "/ready", "/metrics"})
_CLIENT_LEFT = 499  # The status that servers log for a client that did not wait.
_LINGER = 2.0  # Seconds in which a refused client may end its sending, so that it reads why.


class ApiError(Exception):
    """An answer other than 200.

    Args:
        status: HTTP status.
        message: One line: what is wrong, how to fix it.
        code: Short name for programs.
        param: The field at fault.
        headers: Further headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}

    def body(self) -> bytes:
        """The JSON of the answer, in ASCII: a message may quote what UTF-8 cannot hold."""
        kind = "rate_limit_error" if self.status == 429 else "invalid_request_error"
        kind = "server_error" if self.status >= 500 else kind
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode("ascii")


def try_again(status: int, message: str, *, code: str, seconds: int) -> ApiError:
    """A refusal that says when to try again.

    Args:
        status: 429 or 503.
        message: What is short.
        code: Short name for programs.
        seconds: For ``Retry-After``.
    """
    return ApiError(status, f"{message}; try again in {seconds} s", code=code, headers={"retry-after": str(seconds)})


@dataclass(frozen=True)
class Limits:
    """What one client may ask for.

    Args:
        max_body: Bytes of a request body; all bodies in hand together may hold eight times as many.
        max_requests: Requests in hand at a time.
        timeout: Seconds from the whole request to its answer.
        body_timeout: Seconds in which a body has to arrive.
        max_unread: Bytes of answers that wait for their clients, of all together; with more than half, requests are
            refused.
    """

    max_body: int = 8 << 20
    max_requests: int = 1024
    timeout: float = 60.0
    body_timeout: float = 20.0
    max_unread: int = 256 << 20


@dataclass
class Phase:
    """Where a server stands in its life.

    Args:
        ready: The model is loaded.
        draining: New requests are refused, those in hand are finished.
        in_flight: Requests in hand.
        failure: Why the model could not be loaded.
        deadline: `time.monotonic` at which draining ends, whatever is in hand.
        model: How the model does.
    """

    ready: bool = False
    draining: bool = False
    in_flight: int = 0
    failure: Exception | None = None
    deadline: float = math.inf
    model: Condition = field(default_factory=Condition)

    def drain(self, seconds: float) -> None:
        """Refuses new requests, and gives those in hand some seconds."""
        self.draining = True
        self.end_within(seconds)

    def end_within(self, seconds: float) -> None:
        """Brings the deadline forward."""
        self.deadline = min(self.deadline, time.monotonic() + seconds)

    def finished(self) -> bool:
        """Whether the server may end."""
        late = time.monotonic() > self.deadline or self.model.stuck() is not None
        drained = self.draining and (not self.in_flight or late)
        return drained or self.failure is not None


class Guard:
    """ASGI middleware around everything.

    A body is read whole before the application sees it, within its size and time. The application is cancelled when
    the client goes away, also when it closes only its sending half, and when its time is over.

    Args:
        app: The application.
        limits: Sizes and times.
        phase: Shared with the server; counts the requests in hand, `OPEN_PATHS` aside.
        access: Whose requests are answered.
        unread: Counts the answers that wait for their clients.
        observe: Called after each request.
    """

    def __init__(
        self,
        app: App,
        *,
        limits: Limits,
        phase: Phase,
        access: Access,
        unread: Unread,
        observe: Observe | None = None,
    ) -> None:
        self.app, self.limits, self.phase = app, limits, phase
        self._access, self._unread = access, unread
        self._observe = observe
        self._buffered = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = _Answer(send, self.phase, self._unread)
        begin = time.perf_counter()
        counted = scope["path"] not in OPEN_PATHS
        self.phase.in_flight += counted
        try:
            self._admit(scope)
            await self._serve(scope, receive, answer)
        except ApiError as error:
            await answer.refuse(error, receive)
        except Exception:
            logger.exception("a request failed")
            await answer.refuse(ApiError(500, "internal error; see the server's log", code="internal"), receive)
        finally:
            self.phase.in_flight -= counted
            if self._observe is not None:
                self._observe(scope["path"], answer.status, time.perf_counter() - begin)

    def _admit(self, scope: Message) -> None:
        """Refuses what need not be read."""
        if scope.get("state", {}).get("too_many_connections"):
            raise try_again(503, "too many connections", code="too_many_connections", seconds=1)
        self._access.check(scope)
        if scope["path"] not in OPEN_PATHS:
            if self.phase.draining:
                raise ApiError(503, "the server is shutting down", code="draining", headers={"retry-after": "5"})
            if self.phase.in_flight > self.limits.max_requests:
                message = f"more than {self.limits.max_requests} requests at a time"
                raise try_again(429, message, code="rate_limit_exceeded", seconds=1)
            if self._unread.crowded():
                raise try_again(429, "too many responses are unread", code="rate_limit_exceeded", seconds=1)
        size = dict(scope["headers"]).get(b"content-length", b"")
        if size.isdigit() and int(size[:20]) > self.limits.max_body:
            raise self._too_big()

    async def _serve(self, scope: Message, receive: Receive, answer: _Answer) -> None:
        if scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, answer.send)
            return
        chunks: list[bytes] = []
        try:
            if await self._read(receive, chunks):
                await self._run(scope, b"".join(chunks), receive, answer)
        finally:
            self._buffered -= sum(map(len, chunks))

    def _too_big(self) -> ApiError:
        message = f"the body is larger than {self.limits.max_body} bytes; send fewer texts at a time"
        return ApiError(413, message, code="body_too_large")

    async def _read(self, receive: Receive, chunks: list[bytes]) -> bool:
        """Collects the body; whether the client was there until its end."""
        size, more = 0, True
        try:
            with anyio.fail_after(self.limits.body_timeout):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return False
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    self._buffered += len(chunks[-1])
                    if size > self.limits.max_body:
                        raise self._too_big()
                    if self._buffered > 8 * self.limits.max_body:
                        raise try_again(429, "too many bytes are arriving", code="rate_limit_exceeded", seconds=1)
                    more = message.get("more_body", False)
        except TimeoutError:
            late = f"the body did not arrive within {self.limits.body_timeout:g} s"
            raise ApiError(408, late, code="body_timeout") from None
        return True

    async def _run(self, scope: Message, body: bytes, receive: Receive, answer: _Answer) -> None:
        """Runs the application on a body, for as long as the client waits for it."""
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            if not unread:
                await anyio.sleep_forever()  # Until the client goes away, which cancels the application.
            return unread.pop()

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            if not answer.complete:
                answer.status = _CLIENT_LEFT
                group.cancel_scope.cancel()

        with anyio.move_on_after(self.limits.timeout) as answer.time:
            async with anyio.create_task_group() as group:
                group.start_soon(watch)
                await self.app(scope, replay, answer.send)
                group.cancel_scope.cancel()
        if answer.time.cancelled_caught:
            message = f"no answer within {self.limits.timeout:g} s; send less per request, or try again later"
            raise ApiError(504, message, code="timeout")


class _Answer:
    """What has been sent of one answer."""

    def __init__(self, send: Send, phase: Phase, unread: Unread) -> None:
        self._send, self._phase, self._unread = send, phase, unread
        self.time: anyio.CancelScope | None = None
        self.status = _CLIENT_LEFT
        self.started = self.complete = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started, self.status = True, message["status"]
            if self.time is not None:  # How long a client may take to read is the connection's affair.
                self.time.deadline = math.inf
            if self._phase.draining and (b"connection", b"close") not in message["headers"]:
                message["headers"] = [*message["headers"], (b"connection", b"close")]
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self.complete = True
        size = len(message.get("body", b""))
        self._unread.begin(size)
        try:
            await self._send(message)
        finally:
            self._unread.end(size)

    async def refuse(self, error: ApiError, receive: Receive) -> None:
        """Answers with an error and closes; discards what the client still sends, for a short time."""
        if self.started:
            return
        body = error.body()
        headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        headers |= error.headers
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": error.status, "headers": raw})
        await self.send({"type": "http.response.body", "body": body, "more_body": True})
        # A connection closed on unread bytes is reset, and the client would never see the answer.
        if error.status != 500:
            with anyio.move_on_after(_LINGER):
                while (message := await receive())["type"] != "http.disconnect" and message.get("more_body"):
                    pass
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})
