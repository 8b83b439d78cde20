"""The one exception that stands for a user's mistake, and one line of what other libraries say."""

from __future__ import annotations


class LusiferError(Exception):
    """A mistake of the user. The command line shows its message, one line, and exits with 2."""


def first_line(error: BaseException) -> str:
    """What an exception says, in one line: the system's words for an OSError, else the first line that is not blank."""
    told = getattr(error, "strerror", None) or str(error)
    return next((line.strip() for line in str(told).splitlines() if line.strip()), type(error).__name__)
