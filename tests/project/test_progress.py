"""Progress: a bar on a screen, lines in a log, nothing when quiet, and no log line through a bar."""

from __future__ import annotations

import io
import logging
import re
from types import SimpleNamespace

import pytest
from tqdm.std import tqdm

from lusifer import progress, quiet


class Screen(io.StringIO):
    def isatty(self):
        return True


class Clock:
    """A clock that stands still unless moved."""

    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    moved = Clock()
    monkeypatch.setattr("tqdm.std.time", moved)
    monkeypatch.setattr(tqdm, "monitor_interval", 0)
    return moved


@pytest.fixture
def log(monkeypatch):
    stream = io.StringIO()
    for module in (progress, quiet):  # Pytest sets that of sys anew for each test.
        monkeypatch.setattr(module, "sys", SimpleNamespace(stderr=stream))
    return stream


@pytest.fixture
def screen(monkeypatch):
    stream = Screen()
    for module in (progress, quiet):  # Pytest sets that of sys anew for each test.
        monkeypatch.setattr(module, "sys", SimpleNamespace(stderr=stream))
    return stream


@pytest.fixture
def logging_as_it_was():
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


def last(screen):
    return re.split(r"[\r\n]+", screen.getvalue().strip())[-1]


def test_a_log_gets_a_line_every_few_seconds_and_one_at_the_end(log, clock):
    with progress.bar(1500, "training", "step", show=True) as shown:
        for _ in range(12):
            clock.now += 1
            shown.update(125)
            shown.note(f"loss {shown.n / 1000:.1f}")
    lines = log.getvalue().splitlines()
    assert lines == [
        "training: 625 of 1,500 steps (42 %), 125 steps/s, 0:07 left, loss 0.5",
        "training: 1,250 of 1,500 steps (83 %), 125 steps/s, 0:01 left, loss 1.1",
        "training: 1,500 steps, in 0:12, 125 steps/s, loss 1.5",
    ]


def test_the_last_line_is_not_written_twice(log, clock):
    with progress.bar(2, "training", "step", show=True) as shown:
        clock.now += 6
        shown.update(2)
    assert log.getvalue() == "training: 2 steps, in 0:06, 0.3 steps/s\n".replace("0.3 steps/s", "3.0 s/step")


@pytest.mark.parametrize("where", ["log", "screen"])
def test_a_note_shows_that_a_long_step_goes_on(where, clock, request):
    stream = request.getfixturevalue(where)
    with progress.bar(2, "evaluating", "task", show=True) as shown:
        for number in range(3):
            clock.now += 6
            shown.note(f"{number} embedded")
        assert "1 embedded" in stream.getvalue()


def test_lines_get_rarer_in_a_job_of_hours(log, clock):
    with progress.bar(36_000, "training", "step", show=True) as shown:
        for _ in range(7200):
            clock.now += 5
            shown.update(5)
    assert 500 < len(log.getvalue().splitlines()) < 700


def test_a_short_job_leaves_nothing_in_a_log_nor_does_a_note(log, clock):
    with progress.bar(2, "reading", "row", show=True) as shown:
        shown.note("loss 1")
        shown.update(1)
        clock.now += 4
        shown.update(1)
    assert log.getvalue() == ""


def test_a_screen_gets_a_bar_with_speed_time_and_figures(screen, clock):
    shown = progress.bar(200, "stage 1, align", "step", show=True)
    clock.now += 10
    shown.update(50)
    shown.note("loss 6.36, 7,340 tokens/s")
    clock.now += 10
    shown.update(50)
    line = last(screen)
    assert line.startswith("stage 1, align  50% |")
    assert line.endswith("| 100/200, 5.0 steps/s, 0:20 left, loss 6.36, 7,340 tokens/s")
    shown.update(100)
    shown.close()
    assert last(screen).endswith("| 200/200, in 0:20, 10.0 steps/s, loss 6.36, 7,340 tokens/s")


@pytest.mark.parametrize(
    ("total", "unit", "done", "expected"),
    [(None, "row", 0, "reading: 20, 0:10, 2.0 rows/s"), (40, "query", 10, "| 30/40, 2.0 queries/s, 0:05 left"),
     (2e6, "B", 0, "| 20.0B/2.00MB, 2.00B/s, 277:46:30 left"), (20.5, "", 0, "| 0:00 left"),
     (100, "step", 95, "| 115, "), (400, "batch", 0, "| 20/400, 2.0 batches/s, 3:10 left")],
)  # fmt: skip
def test_other_bars(screen, clock, total, unit, done, expected):
    shown = progress.bar(total, "reading", unit, show=True, done=done)
    clock.now += 10
    shown.update(20)
    if done != 95:
        assert last(screen).endswith(expected)
    shown.close()


def test_slow_steps_are_counted_in_seconds(log, clock):
    with progress.bar(10, "training", "step", show=True) as shown:
        clock.now += 20
        shown.update(1)
    assert "training: 1 of 10 steps (10 %), 20.0 s/step, 3:00 left" in log.getvalue()


def test_nothing_is_shown_where_it_is_not_wanted(screen, clock, monkeypatch, logging_as_it_was):
    def run(show):
        with progress.bar(2, "reading", "row", show=show) as shown:
            clock.now += 100
            shown.note("x")
            shown.update(2)
        assert list(progress.track([1, 2], "reading", "row", show=show)) == [1, 2]
        text = screen.getvalue()
        screen.truncate(0)
        return text

    assert run(False) == "" and "reading" in run(True)
    quiet.quiet_libraries(True)
    assert run(None) == ""
    quiet.quiet_libraries(False)
    assert "reading" in run(None)
    monkeypatch.setenv("RANK", "1")
    assert run(True) == ""


def test_the_end_is_written_however_early_the_line_before_was(log, clock, monkeypatch):
    monkeypatch.setattr(progress, "_FIRST", 0.0)
    with progress.bar(2, "training", "step", show=True) as shown:
        shown.note("loss 1.000")
        shown.update(2)
    assert log.getvalue().splitlines()[-1].startswith("training: 2 steps")


def test_without_a_command_a_log_gets_only_what_was_asked_for(log, clock):
    with progress.bar(2, "reading", "row") as shown:
        clock.now += 100
        shown.update(2)
    assert log.getvalue() == ""


def test_log_lines_do_not_cut_bars_up(screen, clock, logging_as_it_was):
    quiet.quiet_libraries(False)
    with progress.bar(4, "training", "step", show=True) as shown:
        clock.now += 1
        shown.update(1)
        logging.getLogger("lusifer.x").warning("a row is left out")
        clock.now += 1
        shown.update(1)
    # What a terminal would show: each piece between line breaks from its last return on.
    seen = [piece.rsplit("\r", 1)[-1] for piece in screen.getvalue().split("\n")]
    assert seen[0] == "a row is left out"
    assert len([line for line in seen if "training" in line]) == 1


def test_a_terminal_that_does_not_say_its_width_gets_a_bar(screen, clock, monkeypatch):
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda stream: (0, 0))
    shown = progress.bar(2, "training", "step", show=True)
    clock.now += 1
    shown.update(1)
    assert len(last(screen)) == 79 and "training  50%" in last(screen)
    shown.close()


def test_names_of_strangers_move_no_cursor(screen, clock):
    progress.bar(2, "a\x1b[2Jb\nc", "row", show=True).close()
    assert "\x1b[2J" not in screen.getvalue() and "\\nc" in screen.getvalue()
