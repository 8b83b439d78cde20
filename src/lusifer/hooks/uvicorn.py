"""uvicorn with the limits it lacks: deadlines for a connection, and an orderly end with exit code 0."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from http import HTTPStatus
from types import FrameType
from typing import Any, Protocol

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol


class Holding(Protocol):
    """Who is told which clients do not take their answers."""

    def hold(self, transport: asyncio.Transport) -> None:
        """A client has not taken all that was written."""

    def release(self, transport: asyncio.Transport) -> None:
        """It has, or it has left."""


class LimitedProtocol(H11Protocol):
    """HTTP/1.1 with deadlines for a request's head and for an unread answer; errors have the body the server chooses.

    A request that a client sends before it has taken its last answer waits until it has. Where the application's
    lifespan gives a state with ``unread``, a `Holding`, that is told who takes its time.

    Private: the methods of `H11Protocol` overridden here, its attributes ``app_state``, ``connections``, ``cycle``,
    ``loop`` and ``transport``, and ``RequestResponseCycle.response_complete``.

    Attributes:
        header_timeout: Seconds for the head of a request, from the connection or from its first byte on.
        write_timeout: Seconds for a client to take its answer.
        max_connections: Beyond so many, the scope's ``state`` has ``too_many_connections``.
        error_body: (status, message, code) -> body of an answer that the application does not give; JSON.
    """

    header_timeout = 10.0
    write_timeout = 120.0
    max_connections = 4096
    error_body: Callable[[int, str, str], bytes]
    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _answered = False  # An answer is complete, and its client has not taken all of it.

    def connection_made(self, transport: Any) -> None:
        """Starts the clock of the first head."""
        super().connection_made(transport)
        self._unread: Holding | None = self.app_state.get("unread")
        transport.set_write_buffer_limits(high=0)  # So that we are told of every byte that waits.
        if len(self.connections) > self.max_connections:
            self.app_state = {**self.app_state, "too_many_connections": True}
        self._start_head_timer()

    def data_received(self, data: bytes) -> None:
        """Feeds the parser; the clock stops when a head is complete, and starts with the next."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_head_timer()
        elif self._head_timer is None and not self.transport.is_closing():
            self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the clocks."""
        self._stop_head_timer()
        self._stop_holding()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Starts the clock of an answer that waits for its client."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.write_timeout, self.transport.abort)
        if self._unread is not None:
            self._unread.hold(self.transport)

    def resume_writing(self) -> None:
        """Goes on with the next request, if the answer before has been waited for."""
        super().resume_writing()
        self._stop_holding()
        if self._answered:
            self._answered = False
            super().on_response_complete()

    def on_response_complete(self) -> None:
        """Begins with the next request, unless the client has not taken its answer yet."""
        if self.transport.get_write_buffer_size():
            self._answered = True
        else:
            super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Answers what is not HTTP."""
        self._refuse(400, msg, "invalid_http")

    def _refuse(self, status: int, message: str, code: str) -> None:
        body = self.error_body(status, message, code)
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(self.header_timeout, self._head_late)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_late(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            message = f"the head of the request did not arrive within {self.header_timeout:g} s"
            self._refuse(408, message, "head_timeout")

    def _stop_holding(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        if self._unread is not None:
            self._unread.release(self.transport)


class DrainingServer(uvicorn.Server):
    """A server that keeps answering while it drains, and whose exit code is 0 after SIGTERM or Ctrl-C.

    uvicorn's own refuses connections at once, so that nobody learns why, and raises the signal again at its end.

    Private: the methods of `uvicorn.Server` overridden here, called at each signal and ten times a second, and its
    attributes ``should_exit`` and ``force_exit``.

    Args:
        config: uvicorn's.
        drain: Called at the first signal.
        finished: Whether the server may end.
        force: Called at a second Ctrl-C.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        drain: Callable[[], None],
        finished: Callable[[], bool],
        force: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._drain, self._finished, self._force = drain, finished, force
        self._draining = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins to drain; a second Ctrl-C ends at once."""
        if not self._draining:
            self._draining = True
            self._drain()
        elif sig == signal.SIGINT:
            self.should_exit = self.force_exit = True
            self._force()

    async def on_tick(self, counter: int) -> bool:
        """Whether to end."""
        return self._finished() or await super().on_tick(counter)
