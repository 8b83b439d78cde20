"""Words of strangers on a terminal, and locations without their passwords: how both are shown, stored and logged."""

from __future__ import annotations

import re
from typing import Any

# What moves the cursor, writes over lines or turns the order of letters around, and what no terminal can show: control
# characters but tab and line break, line separators, embeddings and overrides of direction, halves of a character.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
_USER = re.compile(r"(?P<scheme>\b[A-Za-z][\w+.-]*://)[^/?#\s'\"]*@")
_SECRET = re.compile(
    r"(?P<name>[?&;](?:[\w.-]*(?:key|token|secret|password|passwd|credential|signature)[\w.-]*|pwd|pass|sig|auth)=)"
    r"[^&;#\s'\"]+",
    re.IGNORECASE,
)


def visible(text: str, *, lines: bool = True) -> str:
    """A text whose characters for terminals stand as escapes, as ``repr`` writes them.

    Args:
        text: The text.
        lines: Whether it may go over several lines; else line breaks and tabs are escaped too.
    """
    shown = _HIDDEN.sub(lambda match: _escaped(match[0]), text)
    return shown if lines else shown.replace("\n", "\\n").replace("\t", "\\t")


def visible_json(text: str) -> str:
    """The same of JSON, which says the same with escapes."""
    return _HIDDEN.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _escaped(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"


def without_secrets(value: Any) -> Any:
    """Texts with the passwords and keys of the URLs in them masked, also within lists and mappings.

    Args:
        value: A text, a list or mapping of some, or anything else, which stays as it is.
    """
    if isinstance(value, dict):
        return {key: without_secrets(part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(without_secrets, value))
    if not isinstance(value, str) or not ("://" in value or "=" in value):
        return value
    return _SECRET.sub(r"\g<name>***", _USER.sub(r"\g<scheme>***@", value))
