"""The command, run in this process."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout

import pytest

from lusifer.cli import app as cli


@pytest.fixture
def call(monkeypatch):
    """Runs the command in this process: exit code, standard output, standard error."""
    handlers, level = logging.root.handlers[:], logging.root.level

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lusifer", *map(str, arguments)])
        # Set here and not by pytest for the whole test, since what ends meanwhile may put older streams back.
        out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", newline="", write_through=True) for _ in range(2))
        with warnings.catch_warnings(), redirect_stdout(out), redirect_stderr(err):
            try:
                cli.main()
                code = 0
            except SystemExit as stop:
                code = stop.code or 0
        return code, *(stream.buffer.getvalue().decode() for stream in (out, err))

    yield run
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


def mistake(code, out, err):
    """A user's mistake: one line on standard error, exit code 2, nothing else."""
    assert code == 2, (out, err)
    assert err.startswith("lusifer: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert "Traceback" not in err and out == ""
    return err
