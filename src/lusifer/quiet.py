"""One place that sets what a command writes to standard error: our own lines, not those of the libraries beneath."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from lusifer.terminal import visible, without_secrets


class _Shown(logging.Formatter):
    """Lines of a log as a terminal may show them."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(without_secrets(super().format(record)))


class _BesideBars(logging.StreamHandler[TextIO]):
    """Lines of a log that leave bars on the screen whole."""

    def emit(self, record: logging.LogRecord) -> None:
        from lusifer.progress import beside_bars

        with beside_bars(self.stream):
            super().emit(record)


@contextmanager
def muted(*names: str) -> Iterator[None]:
    """Lets loggers say errors only while a block runs.

    Args:
        *names: The loggers.
    """
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def quiet_libraries(quiet: bool) -> None:
    """Logs our own messages to standard error and silences the libraries beneath, whose bars drown ours.

    Args:
        quiet: Whether only warnings of ours are shown.
    """
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging as transformers_logging

    shown = _BesideBars(sys.stderr)
    shown.setFormatter(_Shown("%(message)s"))
    logging.basicConfig(level=logging.WARNING if quiet else logging.INFO, handlers=[shown], force=True)
    # What goes wrong inside datasets reaches the user as one line of ours.
    logging.getLogger("datasets").setLevel(logging.CRITICAL)
    for name in ("httpx", "sentence_transformers", "transformers", "filelock", "mteb"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bar()
    warnings.filterwarnings("ignore")
