"""How long jobs show where they are: a bar in a terminal or notebook, now and then a line in a log, nothing when quiet.

Bars are tqdm's, in one style: what is done, how fast, how long it still takes, and a job's own figures.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from operator import length_hint
from typing import Any, TypeVar

from tqdm.auto import tqdm as _shown_tqdm
from tqdm.std import tqdm as _plain_tqdm

from lusifer.terminal import visible

Item = TypeVar("Item")

_FIRST, _MOST = 5.0, 60.0  # Seconds between two lines of a log: at first, and in a job of hours.
_SOON = 1.0  # Seconds between two figures on a screen.
_WIDTH = 79  # Of a terminal that does not say its own, as some containers' do not.
_LAYOUT = {True: "{desc} {percentage:3.0f}% |{bar}| {state}", False: "{desc}: {state}"}
logger = logging.getLogger(__name__)


def beside_bars(stream: Any) -> AbstractContextManager[None]:
    """Takes bars off the screen while something is written to a stream, and draws them again below it."""
    mode: AbstractContextManager[None] = _plain_tqdm.external_write_mode(file=stream)
    return mode


def _clock(seconds: float) -> str:
    text: str = _plain_tqdm.format_interval(max(0, seconds))
    return text.removeprefix("0") if text.startswith("0") else text


def _amount(number: float, unit: str) -> str:
    return f"{_plain_tqdm.format_sizeof(number)}B" if unit == "B" else f"{number:,.0f}"


def _several(unit: str) -> str:
    return {"query": "queries", "batch": "batches"}.get(unit, f"{unit}s")


def _speed(rate: float, unit: str) -> str:
    if unit == "B":
        return f"{_amount(rate, unit)}/s"
    if rate < 1:
        return f"{1 / rate:.1f} s/{unit}"
    return f"{rate:.1f} {_several(unit)}/s" if rate < 100 else f"{rate:,.0f} {_several(unit)}/s"


class _Job(_plain_tqdm):
    """What both kinds of bars have in common: the text beside it."""

    _note, _noted = "", 0.0

    def note(self, text: str) -> None:
        """A job's own figures, shown after the others from now on, also where nothing is done for long."""
        self._note = text
        if not self.disable and (elapsed := self.format_dict["elapsed"]) - self._noted >= _SOON:
            self._noted = elapsed
            self.refresh()

    def _rate(self, facts: dict[str, Any]) -> float | None:
        rate, elapsed = facts["rate"], facts["elapsed"]
        ended = self.total is not None and self.n >= self.total
        if (rate is None or ended) and elapsed:
            rate = (facts["n"] - facts["initial"]) / elapsed
        return rate or None

    def _parts(self, facts: dict[str, Any]) -> list[str]:
        """Speed, time and figures."""
        rate, unit, ended = self._rate(facts), facts["unit"], self.total is not None and self.n >= self.total
        parts = [_speed(rate, unit)] if rate and unit else []
        if ended or self.total is None:
            parts.insert(0, f"in {_clock(facts['elapsed'])}" if ended else _clock(facts["elapsed"]))
        elif rate:
            parts.append(f"{_clock((self.total - self.n) / rate)} left")
        return [*parts, self._note] if self._note else parts


class _Bar(_Job, _shown_tqdm):
    """A bar on a screen."""

    @property
    def format_dict(self) -> dict[str, Any]:
        facts = dict(super().format_dict)
        if facts["ncols"] == 0:
            facts["ncols"] = _WIDTH
        unit, parts = facts["unit"], self._parts(facts)
        if unit:
            whole = "" if self.total is None else f"/{_amount(self.total, unit)}"
            parts.insert(0, _amount(self.n, unit) + whole)
        return {**facts, "state": ", ".join(parts), "bar_format": _LAYOUT[bool(self.total)]}


class _Lines(_Job):
    """The same for a file: whole lines, seldom."""

    _written: float | None = None  # When the last line was written, in seconds after the begin.
    _reached = 0.0  # What it said.

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Writes a line, unless the one before is not long ago."""
        facts = dict(self.format_dict)
        pause = min(_MOST, max(_FIRST, facts["elapsed"] / 20))
        if msg is None and facts["elapsed"] - (self._written or 0.0) >= pause:
            self._write(facts)

    def _write(self, facts: dict[str, Any]) -> None:
        self._written, self._reached = facts["elapsed"], self.n
        self.fp.write(f"{self.desc}: {', '.join([*self._count(facts['unit']), *self._parts(facts)])}\n")
        self.fp.flush()

    def _count(self, unit: str) -> Iterator[str]:
        share = f"{100 * self.n / self.total:.0f} %" if self.total else ""
        if unit:
            number = _amount(self.n, unit)
            whole = f" of {_amount(self.total, unit)}" if self.total and self.n < self.total else ""
            what = "" if unit == "B" else f" {_several(unit)}"
            yield number + whole + what + (f" ({share})" if whole else "")
        elif share:
            yield share

    def clear(self, nolock: bool = False) -> None:
        """Does nothing: a line stays."""

    def close(self) -> None:
        """Writes how it ended, of a job that was long enough for lines."""
        if not self.disable and self._written is not None and self._reached < self.n:
            self._write(dict(self.format_dict))
        super().close()


def bar(
    total: float | None, what: str, unit: str = "", *, show: bool | None = None, done: float = 0, keep: bool = True
) -> Any:
    """A bar, or lines where standard error is no screen; a context manager with ``update`` and ``note``.

    Args:
        total: Where it ends; None where that is not known.
        what: What is done, in a word or two.
        unit: What is counted, in the singular, ``B`` for bytes; shares alone are shown where it is empty.
        show: Whether to show anything; when None, as messages of level INFO are, which ``--quiet`` switches off.
        done: What was done before.
        keep: Whether the bar stays on the screen at the end.
    """
    on_screen = sys.stderr.isatty() or any(one.__module__ == "tqdm.notebook" for one in _shown_tqdm.__mro__)
    wanted = logger.isEnabledFor(logging.INFO) if show is None else show
    if os.environ.get("RANK", "0") != "0":  # Of several processes, one speaks for all.
        wanted = False
    # Said here, since our command switches the bars of libraries off by tqdm's environment variable.
    options: dict[str, Any] = {"total": total, "desc": visible(what, lines=False), "unit": unit, "initial": done}
    options["file"] = sys.stderr
    if wanted and on_screen:
        return _Bar(**options, disable=False, leave=keep, dynamic_ncols=True, bar_format=_LAYOUT[bool(total)])
    return _Lines(**options, disable=not wanted, leave=False, mininterval=1.0)


def track(items: Iterable[Item], what: str, unit: str, **options: Any) -> Iterator[Item]:
    """Items, one by one, with a `bar` that goes away at the end.

    Args:
        items: The items.
        what: What is done.
        unit: What an item is.
        **options: ``total``, if the items have no length; else as for `bar`.
    """
    total = options.pop("total", None) or length_hint(items) or None
    with bar(total, what, unit, **{"keep": False, **options}) as shown:
        for item in items:
            yield item
            shown.update(1)
