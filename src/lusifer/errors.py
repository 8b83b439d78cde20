"""The one exception that stands for a user's mistake, and one line of what other libraries say."""

from __future__ import annotations

from lusifer.terminal import without_secrets


class LusiferError(Exception):
    """A mistake of the user. The command line shows its message, one line, and exits with 2.

    Args:
        message: What, where, and the remedy; passwords and keys in URLs are masked.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(without_secrets(message))


def first_line(error: BaseException) -> str:
    """What an exception says, in one line: the system's words for an OSError, else the first line that is not blank."""
    told = getattr(error, "strerror", None) or str(error)
    return next((line.strip() for line in str(told).splitlines() if line.strip()), type(error).__name__)
