"""Searches for many callers at a time: in a few threads, with a queue that is as long as can be worked off in time."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Result = TypeVar("Result")

_THREADS = 2  # An index uses several cores for one search.
_FIRST = 0.05  # Seconds that a search is taken to last before one has been measured.
_SMOOTHING = 0.1


class BusyError(Exception):
    """There are too many callers.

    Args:
        seconds: After which to try again.
    """

    def __init__(self, seconds: int) -> None:
        super().__init__(f"too many searches at a time; try again in {seconds} s")
        self.seconds = seconds


class Turns:
    """Lets callers in while those that are in can be served in time; one event loop only.

    Args:
        max_wait: Seconds that those who are in may take, at the speed measured so far.
    """

    def __init__(self, max_wait: float = 5.0) -> None:
        self.max_wait = max_wait
        self._inside, self._seconds = 0, _FIRST
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="search")

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Around everything that one caller asks for.

        Raises:
            BusyError: If there are too many.
        """
        late = (self._inside + 1) * self._seconds / _THREADS - self.max_wait
        if late > 0 and self._inside >= _THREADS:
            raise BusyError(max(1, math.ceil(late)))
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    async def run(self, work: Callable[[], Result]) -> Result:
        """Runs work in a thread; if the caller is cancelled before it begins, it never does.

        Args:
            work: Blocks.
        """

        def timed() -> tuple[float, Result]:
            begin = time.perf_counter()
            result = work()
            return time.perf_counter() - begin, result

        seconds, result = await asyncio.get_running_loop().run_in_executor(self._threads, timed)
        self._seconds += _SMOOTHING * (seconds - self._seconds)
        return result
