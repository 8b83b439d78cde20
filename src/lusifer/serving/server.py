"""Runs the application under uvicorn, with the limits of `lusifer.hooks.uvicorn`."""

from __future__ import annotations

import logging
import socket
from typing import Any

import uvicorn

from lusifer.errors import LusiferError, first_line
from lusifer.hooks.uvicorn import DrainingServer, LimitedProtocol
from lusifer.serving.ending import GRACE, Ending
from lusifer.serving.limits import ApiError, Phase

_KEEP_ALIVE = 30  # Seconds a connection may idle; longer than the intervals of health checks, shorter than NATs forget.
_FORCED = 1.0  # Seconds in which the process may end by itself after a second Ctrl-C.


class Protocol(LimitedProtocol):
    """HTTP/1.1 whose errors have OpenAI's body."""

    @staticmethod
    def error_body(status: int, message: str, code: str) -> bytes:
        """The JSON of an error that never reached the application."""
        return ApiError(status, message, code=code).body()


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to an address, before anything costly is done.

    Args:
        host: Name or address, IPv4 or IPv6; empty for every address of this machine.
        port: 0 for any that is free.

    Raises:
        LusiferError: If the address cannot be had.
    """
    try:
        family = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        listening = socket.create_server((host, port), family=family, backlog=1024, dualstack_ipv6=both)
    except (OSError, UnicodeError) as error:
        reason = first_line(error).split(" (while")[0].lower()
        raise LusiferError(f"cannot listen on {host}:{port}: {reason}; choose another --port or --host") from None
    # Connections inherit it; asyncio sets it only where a socket names its protocol. Without, an answer waits 40 ms.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def run(
    app: Any, listening: socket.socket, phase: Phase, *, drain_timeout: float, watchdog: float | None = None
) -> None:
    """Serves until SIGTERM or Ctrl-C, or until the model cannot be loaded.

    The process ends then, also if the model never returns: see `lusifer.serving.ending`.

    Args:
        app: The application.
        listening: From `listen`.
        phase: Shared with the application.
        drain_timeout: Seconds for requests in hand after SIGTERM or Ctrl-C.
        watchdog: Seconds without anything from the model after which the process ends.

    Raises:
        Exception: What loading the model raised.
    """
    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=2,  # After the draining, only idle connections are left.
    )
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    server = DrainingServer(
        config,
        drain=lambda: phase.drain(drain_timeout),
        finished=phase.finished,
        force=lambda: phase.end_within(_FORCED - GRACE),
    )
    with Ending(phase, watchdog):
        server.run(sockets=[listening])
    if phase.failure is not None:
        raise phase.failure
