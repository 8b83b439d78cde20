"""Ends the process where nothing else can: when it drains and the model does not return, or when a watchdog bites.

Python waits for its threads before it ends, and no thread can be made to return. So a thread of its own looks at the
clock and, beyond the limits, leaves without waiting for anybody.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from types import TracebackType

from lusifer.serving.limits import Phase

logger = logging.getLogger(__name__)

GRACE = 3.0  # Seconds beyond the end of the draining in which everything closes by itself.
_TICK = 0.1


class Ending:
    """Around the server's run: sees to it that the process ends within its limits.

    Args:
        phase: Where the server stands; its ``deadline`` holds, `GRACE` added.
        watchdog: Seconds without anything from the model after which the process ends; None: it never does.
    """

    def __init__(self, phase: Phase, watchdog: float | None) -> None:
        self._phase, self._watchdog = phase, watchdog
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, name="ending", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._phase.model.age():  # Python would wait for it.
            leave("stopped with a batch still in the model")
        self._done.set()

    def _look(self) -> None:
        while not self._done.wait(_TICK):
            if time.monotonic() > self._phase.deadline + GRACE:
                age = self._phase.model.age()
                still = f"the model has not responded for {age:.0f} s" if age else "the model is still being loaded"
                leave(f"stopped without waiting further: {still}", code=int(self._phase.ready))
            if self._watchdog is not None and (lost := self._phase.model.lost(self._watchdog)):
                leave(f"stopped by the watchdog: {lost}")


def leave(message: str, *, code: int = 1) -> None:
    """Ends the process at once, with a line in the log.

    Args:
        message: Why.
        code: Exit code.
    """
    logger.critical(message)
    for handler in [*logger.handlers, *logging.root.handlers]:
        handler.flush()
    sys.stderr.flush()
    os._exit(code)
