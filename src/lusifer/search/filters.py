"""Filters on metadata: one small language for every store.

``lang = 'te' AND (year >= 2000 OR topic IN ('food', 'travel')) AND NOT draft = true``: comparisons, ``IN``, ``AND``,
``OR``, ``NOT`` and brackets, as in SQL. A missing value equals nothing, so ``topic != 'food'`` holds where no topic is
given.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Decimal, InvalidOperation
from typing import TypeVar

from lusifer.errors import LusiferError

Value = str | int | float | bool
_Part = TypeVar("_Part")
# The Python types of the values that a column of each type takes.
COLUMN_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "int": (int, float),
    "float": (int, float),
    "bool": (bool,),
}
# The smallest and the largest number a column can hold.
_RANGES = {
    "int": (Decimal(-(2**63)), Decimal(2**63 - 1)),
    "float": (Decimal(-sys.float_info.max), Decimal(sys.float_info.max)),
}
_DEEPEST = 30  # Brackets within brackets: DataFusion reads no more than some 50.
_TOKEN = re.compile(
    r"\s*(?:(?P<text>'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\")|(?P<number>-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)(?!\w)"
    r"|(?P<word>[^\W\d]\w*)|(?P<sign><=|>=|!=|<>|[=<>(),]))"
)


@dataclass(frozen=True)
class OneOf:
    """The column has one of the values; never, if there are none."""

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
class Several:
    """All conditions hold (``AND``), or at least one does (``OR``)."""

    word: str
    parts: tuple[Filter, ...]


Filter = OneOf | Compare | Not | Several


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
        case OneOf(_, ()):
            return "FALSE"
        case OneOf(column, values):
            return f"`{column}` IN ({', '.join(map(sql_value, values))})"
        case Compare(column, sign, value):
            return f"`{column}` {sign} {sql_value(value)}"
        case Not(inner):
            return f"({to_sql(inner)}) IS NOT TRUE"
        case Several(word, parts):
            return f" {word} ".join(f"({to_sql(part)})" for part in parts)


def sql_value(value: Value) -> str:
    """A value as an SQL literal."""
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    if isinstance(value, int) and value == -(2**63):  # DataFusion reads the digits first, and they alone are too large.
        return f"CAST('{value}' AS BIGINT)"
    return str(value).lower()


def _equal(column: str, kind: str, values: Sequence[str | bool | Decimal]) -> OneOf:
    """The column has one of the values; numbers that a column of this type cannot hold are left out."""
    exact = [value for value in values if isinstance(value, Decimal) and _RANGES[kind][0] <= value <= _RANGES[kind][1]]
    if kind == "float":
        return OneOf(column, tuple(map(float, exact)))
    if kind == "int":
        return OneOf(column, tuple(int(value) for value in exact if value == value.to_integral_value()))
    return OneOf(column, tuple(value for value in values if not isinstance(value, Decimal)))


def _ordered(column: str, kind: str, sign: str, value: Decimal) -> Compare:
    """The same comparison with a number that a column of this type can hold."""
    smallest, largest = _RANGES[kind]
    if value > largest:
        sign, value = "<=" if "<" in sign else ">", largest
    elif value < smallest:
        sign, value = ">=" if ">" in sign else "<", smallest
    elif kind == "int" and value != (below := value.to_integral_value(ROUND_FLOOR)):
        sign, value = "<=" if "<" in sign else ">", below
    return Compare(column, sign, int(value) if kind == "int" else float(value))


def _number(text: str) -> Decimal:
    try:
        return Decimal(text)
    except InvalidOperation:  # An exponent of nineteen digits.
        return Decimal(float(text))


class _Parser:
    """Recursive descent, one method for each level of precedence."""

    def __init__(self, text: str, columns: Mapping[str, str]) -> None:
        self.text, self.columns = text, columns
        self.tokens = self._split()
        self.next = self.depth = 0

    def parse(self) -> Filter:
        condition = self._either()
        if self._kind:
            raise self._error("AND, OR or the end")
        return condition

    def _split(self) -> list[tuple[str, str]]:
        tokens, position = [], 0
        while position < len(self.text.rstrip()):
            token = _TOKEN.match(self.text, position)
            if token is None:
                raise LusiferError(
                    f"cannot read the filter {self.text!r} at character {position + 1}: "
                    f"write it like lang = 'te' AND year >= 2000"
                )
            tokens.append((str(token.lastgroup), token[str(token.lastgroup)]))
            position = token.end()
        return [*tokens, ("", "")]

    @property
    def _kind(self) -> str:
        """Kind of the next token; empty at the end."""
        return self.tokens[self.next][0]

    @property
    def _token(self) -> str:
        return self.tokens[self.next][1]

    def _error(self, wanted: str) -> LusiferError:
        where = f"{self._token!r} stands" if self._kind else "it ends"
        return LusiferError(f"cannot read the filter {self.text!r}: {where} where {wanted} is expected")

    def _take(self, *wanted: str) -> str | None:
        """The next word or sign if it is one of these, in any letter case."""
        token = self._token.upper()
        if self._kind not in ("word", "sign") or token not in wanted:
            return None
        self.next += 1
        return token

    def _need(self, sign: str) -> None:
        if not self._take(sign):
            raise self._error(repr(sign))

    def _either(self) -> Filter:
        return self._joined(lambda: self._joined(self._unary, "AND"), "OR")

    def _joined(self, part: Callable[[], Filter], word: str) -> Filter:
        parts = self._several(part, word)
        return parts[0] if len(parts) == 1 else Several(word, parts)

    def _several(self, part: Callable[[], _Part], separator: str) -> tuple[_Part, ...]:
        """One or more parts with a word or sign between them."""
        parts = [part()]
        while self._take(separator):
            parts.append(part())
        return tuple(parts)

    def _unary(self) -> Filter:
        if not (opened := self._take("NOT", "(")):
            return self._comparison()
        self.depth += 1
        if self.depth > _DEEPEST:
            raise LusiferError(f"cannot read the filter: more than {_DEEPEST} brackets or NOT nested")
        condition = self._either() if opened == "(" else Not(self._unary())
        if opened == "(":
            self._need(")")
        self.depth -= 1
        return condition

    def _comparison(self) -> Filter:
        column = self._column()
        kind = self.columns[column]
        negated = self._take("NOT")
        if self._take("IN"):
            self._need("(")
            values = self._several(lambda: self._value(column), ",")
            self._need(")")
            condition = _equal(column, kind, values)
            return Not(condition) if negated else condition
        sign = None if negated else self._take("=", "!=", "<>", "<", "<=", ">", ">=")
        if sign is None:
            raise self._error("IN" if negated else "one of = != < <= > >= IN")
        value = self._value(column)
        if sign in ("=", "!=", "<>"):
            condition = _equal(column, kind, [value])
            return condition if sign == "=" else Not(condition)
        if not isinstance(value, Decimal):
            raise LusiferError(f"in the filter {self.text!r}, {sign} compares numbers only, not {value!r}")
        return _ordered(column, kind, sign, value)

    def _column(self) -> str:
        if self._kind != "word":
            raise self._error("the name of a column")
        name = self._token
        if name not in self.columns:
            raise LusiferError(
                f"in the filter {self.text!r}, there is no column {name!r}; there are {', '.join(self.columns)} "
                f"(texts go in quotes: lang = 'te')"
            )
        self.next += 1
        return name

    def _value(self, column: str) -> str | bool | Decimal:
        kind, text = self.tokens[self.next]
        value: str | bool | Decimal
        if kind == "text":
            value, types = text[1:-1].replace(text[0] * 2, text[0]), ["string"]
        elif kind == "number":
            value, types = _number(text), ["int", "float"]
        elif kind == "word" and text.lower() in ("true", "false"):
            value, types = text.lower() == "true", ["bool"]
        else:
            raise self._error("a value ('text', 12, true)")
        if (expected := self.columns[column]) not in types:
            raise LusiferError(f"in the filter {self.text!r}, {column!r} is of type {expected}, but {text} is not")
        self.next += 1
        return value
