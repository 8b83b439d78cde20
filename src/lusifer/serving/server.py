"""uvicorn with the limits it lacks: slow clients, too many connections, and an orderly end."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from lusifer.errors import LusiferError
from lusifer.serving.limits import ApiError, Phase

HEADER_TIMEOUT = 10.0  # Seconds for the head of a request, from its first byte or from the connection on.
WRITE_TIMEOUT = 120.0  # Seconds for a client to take its answer.
KEEP_ALIVE = 30  # Seconds a connection may idle; longer than the intervals of health checks, shorter than NATs forget.
MAX_CONNECTIONS = 4096
_REFUSAL = ApiError(503, "too many connections; try again in 1 s", code="too_many_connections").body()


def _raw(status: bytes, body: bytes) -> bytes:
    head = b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n"
    return head % (status, len(body)) + b"retry-after: 1\r\n" * status.startswith(b"503") + b"\r\n" + body


class GuardedProtocol(H11Protocol):
    """HTTP/1.1 whose clients may neither dawdle with a request's head nor leave an answer unread for ever."""

    header_timeout = HEADER_TIMEOUT
    write_timeout = WRITE_TIMEOUT
    max_connections = MAX_CONNECTIONS
    _head_timer: asyncio.TimerHandle | None = None
    _refused = False

    def connection_made(self, transport: Any) -> None:
        """Starts the clock; beyond the limit of connections, answers 503 and closes."""
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            self._refused = True
            self.connections.discard(self)
            transport.write(_raw(b"503 Service Unavailable", _REFUSAL))
            # At once, the client's own bytes would reset the connection before it has read this.
            self.loop.call_later(1.0, transport.abort)
            return
        self._start_head_timer()

    def data_received(self, data: bytes) -> None:
        """Feeds the parser and keeps the clock of the request's head."""
        if self._refused:
            return
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_head_timer()
        elif self._head_timer is None and not self.transport.is_closing():
            self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the clock."""
        self._stop_head_timer()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Looks again whether the client has taken its answer."""
        super().on_response_complete()
        if self.transport.get_write_buffer_size():
            self.loop.call_later(self.write_timeout, self._abort_unread)

    def send_400_response(self, msg: str) -> None:
        """Answers what is not HTTP."""
        self.transport.write(_raw(b"400 Bad Request", ApiError(400, msg, code="invalid_http").body()))
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
            error = ApiError(408, f"the head of the request did not arrive within {self.header_timeout:g} s")
            self.transport.write(_raw(b"408 Request Timeout", error.body()))
            self.transport.close()

    def _abort_unread(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()


class DrainingServer(uvicorn.Server):
    """A server that, told to end, refuses what is new, finishes what is in hand, and exits with 0.

    Args:
        config: uvicorn's.
        phase: Shared with the application.
        drain_timeout: Seconds for what is in hand.
    """

    def __init__(self, config: uvicorn.Config, phase: Phase, drain_timeout: float) -> None:
        super().__init__(config)
        self.phase, self.drain_timeout = phase, drain_timeout
        self._deadline = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins to drain; a second Ctrl-C ends at once.

        uvicorn would raise the signal again at its end, and the exit code would be that of a kill.
        """
        if not self.phase.draining:
            self.phase.draining = True
            self._deadline = time.monotonic() + self.drain_timeout
        elif sig == signal.SIGINT:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Whether to end: ten times a second."""
        if self.phase.failure is not None:
            return True
        if self.phase.draining and (not self.phase.in_flight or time.monotonic() > self._deadline):
            return True
        return await super().on_tick(counter)


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to an address, before anything costly is done.

    Args:
        host: Name or address, IPv4 or IPv6.
        port: 0 for any that is free.

    Raises:
        LusiferError: If the address cannot be had.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, kind, proto)
        try:
            # A server that was stopped a moment ago does not block its successor.
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
            made.listen(1024)
        except OSError:
            made.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise LusiferError(
            f"cannot listen on {host}:{port}: {reason.lower()}; choose another --port or --host"
        ) from None
    return made


def run(app: Any, listening: socket.socket, phase: Phase, *, drain_timeout: float) -> None:
    """Serves until told to end.

    Args:
        app: The application.
        listening: From `listen`.
        phase: Shared with the application.
        drain_timeout: Seconds for requests in hand after SIGTERM or Ctrl-C.

    Raises:
        Exception: What loading the model raised.
    """
    config = uvicorn.Config(
        app,
        http=GuardedProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=2,  # After the draining above, only idle connections are left.
    )
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    DrainingServer(config, phase, drain_timeout).run(sockets=[listening])
    if phase.failure is not None:
        raise phase.failure
