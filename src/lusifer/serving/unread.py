"""Answers that their clients have not taken yet, and a bound on their bytes.

An answer is many times as large as its request: 2,048 vectors of 1,024 numbers are 40 MB of JSON. Without a bound,
clients that ask and do not read fill the memory of the server.
"""

from __future__ import annotations

import asyncio
import time

_SLOW = 5.0  # Seconds after which a client that has not taken its answer counts as slow.


class Unread:
    """Counts the bytes of answers that wait for their clients; the event loop's thread only.

    Args:
        most: Bytes.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._waiting = 0  # Bytes that no transport has yet.
        self._held: dict[asyncio.Transport, float] = {}  # Since when, oldest first.

    @property
    def size(self) -> int:
        """Bytes that wait."""
        return self._waiting + sum(transport.get_write_buffer_size() for transport in self._held)

    def hold(self, transport: asyncio.Transport) -> None:
        """A client does not take its answer as fast as it is written."""
        self._held.setdefault(transport, time.monotonic())

    def release(self, transport: asyncio.Transport) -> None:
        """It has taken all of it, or has left."""
        self._held.pop(transport, None)

    def crowded(self) -> bool:
        """Whether more than half waits, after closing the connections of clients that are slow."""
        self._make_room(self.most // 2, older=_SLOW)
        return self.size > self.most // 2

    def begin(self, size: int) -> None:
        """Part of an answer is to be written: the connections that have waited longest are closed to make room."""
        self._waiting += size
        self._make_room(self.most, older=0.0)

    def end(self, size: int) -> None:
        """It has been written, or never will be."""
        self._waiting -= size

    def _make_room(self, most: int, *, older: float) -> None:
        before = time.monotonic() - older
        for transport, since in list(self._held.items()):
            if since > before or self.size <= most:
                break
            transport.abort()
            self.release(transport)
