"""Filters on metadata: one small language for every store.

``lang = 'te' AND (year >= 2000 OR topic IN ('food', 'travel')) AND NOT draft = true``: comparisons, ``IN``, ``AND``,
``OR``, ``NOT`` and brackets, as in SQL. A missing value equals nothing, so ``topic != 'food'`` holds where no topic is
given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lusifer.errors import LusiferError

Value = str | int | float | bool
# The Python types a column of each type may be compared with.
COLUMN_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "int": (int, float),
    "float": (int, float),
    "bool": (bool,),
}
_TOKEN = re.compile(
    r"\s*(?:(?P<text>'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\")|(?P<number>-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)(?!\w)"
    r"|(?P<word>[^\W\d]\w*)|(?P<sign><=|>=|!=|<>|[=<>(),]))"
)


@dataclass(frozen=True)
class OneOf:
    """The column has one of the values."""

    column: str
    values: tuple[Value, ...]


@dataclass(frozen=True)
class Compare:
    """The column is ordered before or behind a value; ``sign`` is one of ``< <= > >=``."""

    column: str
    sign: str
    value: Value


@dataclass(frozen=True)
class Not:
    """The condition does not hold, or a value it needs is missing."""

    inner: Filter


@dataclass(frozen=True)
class Both:
    """All conditions hold."""

    parts: tuple[Filter, ...]


@dataclass(frozen=True)
class Either:
    """At least one condition holds."""

    parts: tuple[Filter, ...]


Filter = OneOf | Compare | Not | Both | Either


def parse_filter(text: str, columns: Mapping[str, str]) -> Filter:
    """Reads a filter.

    Args:
        text: The filter.
        columns: Column names and their types: ``string``, ``int``, ``float`` or ``bool``.

    Raises:
        LusiferError: If it is not a filter, names an unknown column or compares it with a value of another type.
    """
    return _Parser(text, columns).parse()


def to_sql(condition: Filter) -> str:
    """The condition in the SQL of DataFusion, which LanceDB reads."""
    match condition:
        case OneOf(column, values):
            return f"`{column}` IN ({', '.join(map(sql_value, values))})"
        case Compare(column, sign, value):
            return f"`{column}` {sign} {sql_value(value)}"
        case Not(inner):
            return f"({to_sql(inner)}) IS NOT TRUE"
        case Both(parts):
            return " AND ".join(f"({to_sql(part)})" for part in parts)
        case Either(parts):
            return " OR ".join(f"({to_sql(part)})" for part in parts)


def sql_value(value: Value) -> str:
    """A value as an SQL literal."""
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return str(value).lower()


class _Parser:
    """Recursive descent, one method for each level of precedence."""

    def __init__(self, text: str, columns: Mapping[str, str]) -> None:
        self.text, self.columns = text, columns
        self.tokens = self._split()
        self.next = 0

    def parse(self) -> Filter:
        found = self._either()
        if self.next < len(self.tokens):
            raise self._error("AND, OR or the end")
        return found

    def _split(self) -> list[tuple[str, str, int]]:
        tokens, position = [], 0
        end = len(self.text.rstrip())
        while position < end:
            found = _TOKEN.match(self.text, position)
            if found is None:
                raise LusiferError(
                    f"cannot read the filter {self.text!r} at character {position + 1}: "
                    f"write it like lang = 'te' AND year >= 2000"
                )
            kind = str(found.lastgroup)
            tokens.append((kind, found[kind], found.start(kind)))
            position = found.end()
        return tokens

    def _error(self, wanted: str) -> LusiferError:
        at_end = self.next >= len(self.tokens)
        where = "it ends" if at_end else f"{self.tokens[self.next][1]!r} stands"
        return LusiferError(f"cannot read the filter {self.text!r}: {where} where {wanted} should stand")

    def _take(self, *wanted: str) -> str | None:
        """The next word or sign if it is one of these, in any letter case."""
        if self.next < len(self.tokens):
            kind, text, _ = self.tokens[self.next]
            if kind in ("word", "sign") and text.upper() in wanted:
                self.next += 1
                return text.upper()
        return None

    def _need(self, sign: str) -> None:
        if not self._take(sign):
            raise self._error(repr(sign))

    def _either(self) -> Filter:
        parts = [self._both()]
        while self._take("OR"):
            parts.append(self._both())
        return parts[0] if len(parts) == 1 else Either(tuple(parts))

    def _both(self) -> Filter:
        parts = [self._unary()]
        while self._take("AND"):
            parts.append(self._unary())
        return parts[0] if len(parts) == 1 else Both(tuple(parts))

    def _unary(self) -> Filter:
        if self._take("NOT"):
            return Not(self._unary())
        if self._take("("):
            found = self._either()
            self._need(")")
            return found
        return self._comparison()

    def _comparison(self) -> Filter:
        column = self._column()
        negated = self._take("NOT")
        if self._take("IN"):
            self._need("(")
            values = [self._value(column)]
            while self._take(","):
                values.append(self._value(column))
            self._need(")")
            found = OneOf(column, tuple(values))
            return Not(found) if negated else found
        sign = None if negated else self._take("=", "!=", "<>", "<", "<=", ">", ">=")
        if sign is None:
            raise self._error("IN" if negated else "one of = != < <= > >= IN")
        value = self._value(column)
        if sign == "=":
            return OneOf(column, (value,))
        if sign in ("!=", "<>"):
            return Not(OneOf(column, (value,)))
        if isinstance(value, bool | str):
            raise LusiferError(f"in the filter {self.text!r}, {sign} compares numbers only, not {value!r}")
        return Compare(column, sign, value)

    def _column(self) -> str:
        if self.next >= len(self.tokens) or self.tokens[self.next][0] != "word":
            raise self._error("the name of a column")
        name = self.tokens[self.next][1]
        if name not in self.columns:
            raise LusiferError(
                f"in the filter {self.text!r}, there is no column {name!r}; there are {', '.join(self.columns)} "
                f"(texts stand in quotes: lang = 'te')"
            )
        self.next += 1
        return name

    def _value(self, column: str) -> Value:
        kind, text, _ = self.tokens[self.next] if self.next < len(self.tokens) else ("", "", 0)
        found: Value
        if kind == "text":
            found = text[1:-1].replace(text[0] * 2, text[0])
        elif kind == "number":
            found = int(text) if text.lstrip("-").isdigit() else float(text)
        elif kind == "word" and text.lower() in ("true", "false"):
            found = text.lower() == "true"
        else:
            raise self._error("a value ('text', 12, true)")
        expected = self.columns[column]
        if type(found) not in COLUMN_TYPES[expected]:
            raise LusiferError(f"in the filter {self.text!r}, {column!r} is of type {expected}, but {text} is not")
        self.next += 1
        return found
