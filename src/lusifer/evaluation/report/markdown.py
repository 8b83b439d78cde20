"""Results side by side as Markdown: the tables of the page, without its bars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lusifer.evaluation import benchmarks as suite
from lusifer.evaluation.report.results import BIAS, System
from lusifer.evaluation.report.tables import (
    INTERVALS,
    NO_BASELINE,
    PAIRS,
    TROUBLES,
    by_resources,
    gains,
    kinds_of,
    mean,
    shared_cells,
    token_columns,
    troubles,
    with_interval,
)

_WIDEST = 12  # Languages; a matrix of more is told pair by pair.


def markdown(systems: Sequence[System], baseline: str | None = None, *, published: bool = False) -> str:
    """The report as Markdown."""
    shared = shared_cells(systems)
    columns = {system.name: system.by_language(shared) for system in systems}
    lines = ["# Results", "", f"{len(shared)} scores that all systems have, per cent; means over tasks; {INTERVALS}."]
    lines += _by_language(systems, shared, columns) + _by_pair(systems, shared)
    if baseline in columns and columns[baseline]:
        lines += ["", f"Gain against {baseline}, languages with the least resources first:", ""]
        for name, column in columns.items():
            if name != baseline and column:
                found = gains(column, columns[baseline]).items()
                lines.append(f"- {name}: " + ", ".join(f"{code} {gain:+.1f}" for code, gain in found))
    elif baseline is None and len(columns) > 1:
        lines += ["", NO_BASELINE]
    for system in systems:
        lines += _heat_map(system, shared)
    lines += _matrices(systems, shared) + _bias(systems) + _tokens(systems)
    if published:
        lines += _published()
    if found_troubles := troubles(systems):
        lines += ["", f"## {TROUBLES}", "", *[f"- {line}" for line in found_troubles]]
    return "\n".join(lines) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    found = ["", _row(header), "|---" + "|---:" * (len(header) - 1) + "|"]
    return found + [_row(row) for row in rows]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _across(columns: dict[str, dict[str, float]], last: str, first: str) -> list[str]:
    """A table of columns with a row of means at its end."""
    keys = list(dict.fromkeys(key for column in columns.values() for key in column))
    rows = [[key, *[with_interval(column.get(key)) for column in columns.values()]] for key in keys]
    means = [with_interval(mean(column.values())) for column in columns.values()]
    return _table([first, *columns], [*rows, [last, *means]])


def _by_language(
    systems: Sequence[System], shared: set[tuple[str, str]], columns: dict[str, dict[str, float]]
) -> list[str]:
    codes = list(dict.fromkeys(code for column in columns.values() for code in column))
    if not codes:
        return []
    widths = {system.name: system.half_widths(shared) for system in systems}
    rows = [
        [code, *[with_interval(column.get(code), widths[name].get(code)) for name, column in columns.items()]]
        for code in codes
    ]
    rows.append(["**mean**", *[with_interval(mean(column.values())) for column in columns.values()]])
    return _table(["language", *columns], rows)


def _by_pair(systems: Sequence[System], shared: set[tuple[str, str]]) -> list[str]:
    columns = {system.name: system.by_pair_task(shared) for system in systems}
    if not any(columns.values()):
        return []
    return ["", "## Across languages", "", f"{PAIRS}.", *_across(columns, "**mean over tasks**", "task")]


def _heat_map(system: System, shared: set[tuple[str, str]]) -> list[str]:
    kinds = kinds_of(system, shared)
    if not kinds:
        return []
    rows = [
        [code, *[with_interval(column.get(code)) for column in kinds.values()]] for code in system.by_language(shared)
    ]
    return ["", f"## Language and task type: {system.name}", *_table(["language", *kinds], rows)]


def _matrices(systems: Sequence[System], shared: set[tuple[str, str]]) -> list[str]:
    found = {system.name: pairs for system in systems if (pairs := system.pairs(shared))}
    every = sorted({key for pairs in found.values() for key in pairs})
    queries, documents = (sorted({key[side] for key in every}) for side in (0, 1))
    if max(len(queries), len(documents)) > _WIDEST:
        rows = [
            [f"{query} > {document}", *[with_interval(pairs.get((query, document))) for pairs in found.values()]]
            for query, document in every
        ]
        return ["", "## Query language and document language", *_table(["query > document", *found], rows)]
    lines = []
    for name, pairs in found.items():
        rows = [[q, *[with_interval(pairs.get((q, d))) for d in documents]] for q in queries]
        lines += ["", f"## Query language and document language: {name}"]
        lines += _table(["query \\ document", *documents], rows)
    return lines


def _bias(systems: Sequence[System]) -> list[str]:
    known = [system for system in systems if system.bias]
    if not known:
        return []
    header = ["language", *[f"{system.name}: {key.replace('_', ' ')}" for system in known for key in BIAS]]
    rows = []
    for code in by_resources(code for system in known for code in system.bias):
        cells = [
            f"{100 * system.bias[code][key]:.0f}" if code in system.bias else "" for system in known for key in BIAS
        ]
        rows.append([code, *cells])
    told = (
        "Same language: share of same-language sentences among the ten nearest, per cent, 0 is best. Alone, mixed: how "
        "often a sentence finds its translation among English sentences, and among those of all languages."
    )
    return ["", "## Language bias", "", told, *_table(header, rows)]


def _tokens(systems: Sequence[System]) -> list[str]:
    columns = token_columns(systems)
    if not columns:
        return []
    return ["", "## Tokens of a sentence", *_across(columns, "**mean**", "language")]


def _published() -> list[str]:
    found: dict[str, Any] = suite.published()
    lines = ["", "## Published, not measured here", "", str(found["source"])]
    for name in ("table1", "table2"):
        rows = [[system, *[f"{value:.2f}" for value in values]] for system, values in found[name]["rows"].items()]
        lines += _table(["system", *found[name]["columns"]], rows)
    return lines
