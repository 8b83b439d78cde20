"""The one exception that stands for a user's mistake, and one line of what other libraries say."""

from __future__ import annotations

import re

from lusifer.terminal import without_secrets

_LONGEST = 400  # Characters of another library's message; some list every model they know.
_FULL = "No space left on device"
# How a full disk is told: by the system's words, and by torch's writer of zip files, which only finds itself elsewhere.
_TELLS_FULL = re.compile(r"no space left on device|os error 28\b|unexpected pos \d+ vs \d+", re.IGNORECASE)


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
    if _TELLS_FULL.search(str(told)):
        return _FULL
    line = next((line.strip() for line in str(told).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} …"
