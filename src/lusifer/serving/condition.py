"""How the model does: whether its last calls failed, and how long the one in hand has taken.

A client's own texts may make the model fail, so failures alone say nothing. After two in a row the batcher asks the
model for a sentence that went well before; if that fails too, it is the model.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from lusifer.errors import first_line

_SUSPICIOUS = 2  # Calls that failed in a row, before the model is asked for a sentence of our own.


class Condition:
    """How the model does; its thread reports here, and everything else asks.

    Attributes:
        failures: Calls in a row that failed.
        failing: Why the model fails on a sentence of our own, and since when (`time.monotonic`); None if it does not.
        least: Seconds that any call may take before the model counts as stuck.
        times: How many times as long as the measured speed lets expect a call may take.
    """

    least = 10.0
    times = 10.0

    def __init__(self) -> None:
        self.failures = 0
        self.failing: tuple[str, float] | None = None
        self._call: tuple[float, float] | None = None  # Its begin, and the seconds it may take.

    @contextmanager
    def call(self, expected: float, *, own: bool = False) -> Iterator[list[np.ndarray]]:
        """Around one call of the model, in its thread; what is put into the list is looked at.

        Args:
            expected: Seconds that the measured speed lets expect; 0 where it is not known.
            own: Whether the texts are ours.
        """
        found: list[np.ndarray] = []
        self._call = (time.monotonic(), max(self.least, self.times * expected))
        error: str | None = None
        try:
            yield found
            if not any(np.isfinite(vectors).any() for vectors in found):
                error = "every number is NaN or infinite"
        except Exception as raised:
            error = f"{type(raised).__name__}: {first_line(raised)[:200]}"
            raise
        finally:
            self._call = None
            self._end(error, own)

    def _end(self, error: str | None, own: bool) -> None:
        if error is None:
            self.failures, self.failing = 0, None
        else:
            self.failures += 1
            if own:  # What the model says of a client's texts may quote them, and `/ready` has no key.
                self.failing = (error, self.failing[1] if self.failing else time.monotonic())

    @property
    def suspicious(self) -> bool:
        """Whether the model should be asked for a sentence of our own."""
        return self.failures >= _SUSPICIOUS

    def age(self) -> float:
        """Seconds that the call in hand has taken; 0 where there is none."""
        call = self._call
        return time.monotonic() - call[0] if call else 0.0

    def stuck(self) -> str | None:
        """That the call in hand takes longer than it may, in words."""
        call = self._call
        seconds = time.monotonic() - call[0] if call else 0.0
        if call is None or seconds <= call[1]:
            return None
        return f"the model has not responded for {seconds:.0f} s"

    def trouble(self) -> str | None:
        """What is wrong with the model, in words."""
        failing = self.failing
        return self.stuck() or (f"the model fails: {failing[0]}" if failing else None)

    def lost(self, seconds: float) -> str | None:
        """That nothing has come of the model for so long, in words.

        Args:
            seconds: How long a call may take, or the model fail.
        """
        failing = self.failing
        if self.age() > seconds:
            return f"the model has not responded for {self.age():.0f} s"
        if failing and time.monotonic() - failing[1] > seconds:
            return f"the model has failed for {time.monotonic() - failing[1]:.0f} s: {failing[0]}"
        return None
