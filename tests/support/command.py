"""The command, run in this process."""

from __future__ import annotations

import logging
import sys
import warnings

import pytest

from lusifer.cli import app as cli


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs the command in this process: exit code, standard output, standard error."""
    handlers, level = logging.root.handlers[:], logging.root.level

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lusifer", *map(str, arguments)])
        capsys.readouterr()  # What fixtures printed is not the command's.
        with warnings.catch_warnings():
            try:
                cli.main()
                code = 0
            except SystemExit as stop:
                code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield run
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


def mistake(code, out, err):
    """A user's mistake: one line on standard error, exit code 2, nothing else."""
    assert code == 2, (out, err)
    assert err.startswith("lusifer: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert "Traceback" not in err and out == ""
    return err
