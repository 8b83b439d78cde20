"""The report's sections, computed once for the page and for Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import NamedTuple

from lusifer.evaluation import benchmarks as suite
from lusifer.evaluation.report.results import BIAS, RESOURCES, Shared, System, few

_INTERVALS = (
    "± is half of a 95 % interval by bootstrap over queries, pairs or texts; clustering has no such items, its scores "
    "count as fixed"
)
Columns = Mapping[str, Mapping[str, float]]  # Column to row to number.


@dataclass(frozen=True)
class _Table:
    """A table of text; ``means`` is a last row set apart, ``heat`` says that the cells are per cent to shade."""

    header: list[str]
    rows: list[list[str]]
    means: list[str] = field(default_factory=list)
    heat: bool = False


class _Bar(NamedTuple):
    """A bar: number of its column, length and half of its interval in per cent of the line, text beside it."""

    column: int
    share: float
    half: float | None
    text: str


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        note: What to know before the figures.
        bars: Bars by the title of their row, for the page alone.
        columns: Names of the bars' columns.
        wordy: Whether the tables hold what the bars show, so that the page leaves them out.
    """

    title: str
    note: str = ""
    tables: list[_Table] = field(default_factory=list)
    bars: dict[str, list[_Bar]] = field(default_factory=dict)
    columns: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    wordy: bool = False


def sections(systems: Sequence[System], baselines: Sequence[str] = (), *, published: bool = False) -> list[Section]:
    """Everything the report shows, in order.

    Args:
        systems: What `lusifer.evaluation.report.results.read` gave.
        baselines: Names of the systems to compare with, each in a section of its own.
        published: Whether to add the paper's tables.
    """
    shared = _shared_cells(systems)
    columns = {system.name: system.by_language(shared) for system in systems}
    parts = [_summary(systems, columns, shared)]
    if any(columns.values()):
        widths = {system.name: system.half_widths(shared) for system in systems}
        table = _columns_table("language", columns, "mean", widths)
        bars = _bars(columns, widths)
        parts.append(Section("By language", tables=[table], bars=bars, columns=list(columns), wordy=True))
    parts += _own_data(systems)
    parts += [_gains(columns, baseline) for baseline in baselines if columns.get(baseline)]
    if not baselines and len(columns) > 1:
        parts.append(Section("", "For gains by language, name one of the systems with --baseline."))
    parts += [*_across(systems, shared), *_details(systems, shared), *_bias(systems), *_tokens(systems)]
    if published:
        parts.append(_published())
    if lines := _troubles(systems):
        parts.append(Section("Missing, failed and set differently", lines=lines))
    return parts


def _shared_cells(systems: Sequence[System]) -> Shared:
    """What every system that has scores has scored: only that is compared."""
    cells = [system.cells() for system in systems if system.rows]
    return set.intersection(*cells) if cells else set()


def _by_resources(codes: Iterable[str], *, least_first: bool = False) -> list[str]:
    sign = 1 if least_first else -1
    return sorted(set(codes), key=lambda code: (sign * RESOURCES.get(code, 0), code))


def _text(value: float | None, half: float | None = None) -> str:
    """A score, with its interval where there is one."""
    if value is None:
        return ""
    return f"{value:.1f}" if half is None else f"{value:.1f} ±{half:.1f}"


def _mean(values: Iterable[float]) -> float | None:
    numbers = list(values)
    return fmean(numbers) if numbers else None


def _keys(columns: Columns) -> list[str]:
    return list(dict.fromkeys(key for column in columns.values() for key in column))


def _columns_table(first: str, columns: Columns, means: str, widths: Columns | None = None) -> _Table:
    """Columns side by side, with a last row of their means."""
    rows = [
        [key, *[_text(column.get(key), (widths or {}).get(name, {}).get(key)) for name, column in columns.items()]]
        for key in _keys(columns)
    ]
    return _Table([first, *columns], rows, [means, *[_text(_mean(column.values())) for column in columns.values()]])


def _bars(columns: Columns, widths: Columns | None = None, full: float = 100) -> dict[str, list[_Bar]]:
    """Bars by row title; ``full`` fills the line."""
    rows: dict[str, list[_Bar]] = {key: [] for key in _keys(columns)}
    for number, (name, column) in enumerate(columns.items()):
        for key, value in column.items():
            half = (widths or {}).get(name, {}).get(key)
            reach = None if half is None else 100 * half / full
            rows[key].append(_Bar(number, 100 * max(value, 0) / full, reach, _text(value, half)))
    return rows


def _summary(systems: Sequence[System], columns: Columns, shared: Shared) -> Section:
    means = {"mean over languages": columns, "mean over pairs": _pair_tasks(systems, shared)}
    shown = {title: part for title, part in means.items() if any(part.values())}
    rows = []
    for system in systems:
        cells = [_text(_mean(part[system.name].values())) or "-" for part in shown.values()]
        counts = [str(len(part)) for part in (columns[system.name], system.scored, system.failed)]
        rows.append([system.name, *cells, *counts, system.model_hash])
    note = (
        f"Main scores in per cent, means over tasks, of the {len(shared)} scores (task and language) that all systems "
        f"have; {_INTERVALS}. Languages by resources, most first."
    )
    header = ["system", *shown, "languages", "tasks with scores", "failed", "model hash"]
    return Section("", note, [_Table(header, rows)])


def _gains(columns: Columns, baseline: str) -> Section:
    base = columns[baseline]
    others = {name: column for name, column in columns.items() if name != baseline and column}
    codes = _by_resources((code for column in others.values() for code in set(column) & set(base)), least_first=True)
    rows = []
    for code in codes:
        gains = [f"{column[code] - base[code]:+.1f}" if code in column else "" for column in others.values()]
        rows.append([code, *gains, str(RESOURCES.get(code, ""))])
    return Section(f"Gain against {baseline}", tables=[_Table(["language", *others, "resource level"], rows)])


def _own_data(systems: Sequence[System]) -> Iterator[Section]:
    """Every score on tasks of the user's own, whether all systems have it or not."""
    own = {task: facts for system in systems for task, facts in sorted(system.own.items())}
    scores = [{(row.task, row.subset): row for row in system.rows if row.task in own} for system in systems]
    cells = sorted({cell: row for part in scores for cell, row in part.items()}.items())
    rows = []
    for cell, row in cells:
        found = [part.get(cell) for part in scores]
        halves = [None if one is None or one.error is None else 196 * one.error for one in found]
        values = [
            _text(None if one is None else 100 * one.value, half) for one, half in zip(found, halves, strict=True)
        ]
        rows.append([row.task, " > ".join(row.languages), own[row.task][1], *values])
    if rows:
        header = ["task", "language", "metric", *[system.name for system in systems]]
        about = [f"{task}: {description}" for task, (description, _) in own.items() if description]
        yield Section("Your tasks", _INTERVALS[0].upper() + _INTERVALS[1:] + ".", [_Table(header, rows)], lines=about)


def _pair_tasks(systems: Sequence[System], shared: Shared) -> dict[str, dict[str, float]]:
    return {system.name: system.by_pair(shared, lambda score: score.task) for system in systems}


def _across(systems: Sequence[System], shared: Shared) -> Iterator[Section]:
    columns = _pair_tasks(systems, shared)
    if any(columns.values()):
        note = "Means over the pairs of two languages of a task, then over tasks, as published."
        yield Section("Across languages", note, [_columns_table("task", columns, "mean over tasks")])


def _details(systems: Sequence[System], shared: Shared) -> Iterator[Section]:
    for system in systems:
        kinds = {kind: system.by_language(shared, kind) for kind in sorted({row.kind for row in system.rows})}
        kinds = {kind: column for kind, column in kinds.items() if column}
        if kinds:
            codes = list(system.by_language(shared))
            rows = [[code, *[_text(column.get(code)) for column in kinds.values()]] for code in codes]
            table = _Table(["language", *kinds], rows, heat=True)
            yield Section(f"Language and task type: {system.name}", tables=[table])
        if pairs := system.by_pair(shared, lambda score: score.languages):
            queries, documents = (sorted({key[side] for key in pairs}) for side in (0, 1))
            rows = [[query, *[_text(pairs.get((query, document))) for document in documents]] for query in queries]
            table = _Table(["query \\ document", *documents], rows, heat=True)
            yield Section(f"Query language and document language: {system.name}", tables=[table])


def _bias(systems: Sequence[System]) -> Iterator[Section]:
    known = [system for system in systems if system.bias]
    if not known:
        return
    codes = _by_resources(code for system in known for code in system.bias)
    rows = [[code, *[cell for system in known for cell in _bias_cells(system.bias.get(code))]] for code in codes]
    titles = [f"{system.name}, {what}" for system in known for what in ("same language", "alone", "mixed", "change")]
    shares = {}
    for system in known:
        shares[system.name] = {code: 100 * system.bias[code]["same_language"] for code in _by_resources(system.bias)}
    note = (
        "Everyday sentences of all languages in one corpus. Bars, same language: the share of same-language ones among "
        "the ten nearest, per cent; 0 is best, since every sentence has its translations to find. How often a sentence "
        "finds its translation, per cent: alone, among English sentences only; mixed, as the nearest of all sentences "
        "in all languages."
    )
    table = _Table(["language", *titles], rows)
    yield Section("Language bias", note, [table], bars=_bars(shares), columns=list(shares))


def _bias_cells(row: Mapping[str, float] | None) -> list[str]:
    if row is None:
        return [""] * 4
    return [*[f"{100 * row[key]:.0f}" for key in BIAS], f"{100 * (row['mixed'] - row['alone']):+.0f}"]


def _tokens(systems: Sequence[System]) -> Iterator[Section]:
    columns: dict[str, dict[str, float]] = {}
    for system in systems:
        for part, counts in system.tokens.items():
            column = {code: counts[code] for code in _by_resources(counts)}
            if column and column not in columns.values():  # The same tokenizer in two systems is shown once.
                columns[f"{system.name}: {part}"] = column
    if columns:
        note = (
            "Mean over the everyday sentences. The LLM behind a connector reads as many positions as the encoder has "
            "tokens, whatever its own tokenizer would make of the language."
        )
        bars = _bars(columns, full=max(count for column in columns.values() for count in column.values()))
        table = _columns_table("language", columns, "mean")
        yield Section("Tokens of a sentence", note, [table], bars=bars, columns=list(columns), wordy=True)


def _published() -> Section:
    paper = suite.published()
    tables = [
        _Table(
            ["system", *table["columns"]], [[name, *map("{:.2f}".format, row)] for name, row in table["rows"].items()]
        )
        for table in (paper["table1"], paper["table2"])
    ]
    return Section("Published, not measured here", str(paper["source"]), tables)


def _troubles(systems: Sequence[System]) -> list[str]:
    """What failed, is missing, cannot be read, or was set differently, a line each."""
    every = {cell for system in systems for cell in system.cells()}
    lines = []
    for system in systems:
        tasks = system.scored
        for task, error in system.failed.items():
            some = f"; the {len(tasks[task])} scores it had before count" if task in tasks else ""
            lines.append(f"{system.name}: {task} failed: {error}{some}")
        lines += [f"{system.name}: {problem}" for problem in system.problems]
        lines += _unscored(system)
        if system.rows:  # A system without any takes nothing away from the others.
            lines += _left_out(system, every - system.cells())
    if len([system for system in systems if system.rows]) > 1 and not _shared_cells(systems):
        lines.append("no score is there in all systems: nothing can be compared")
    return lines + _differences([system for system in systems if system.rows])


def _unscored(system: System) -> list[str]:
    """What was asked for and is not there, and not among what failed."""
    tasks = system.scored
    absent = [task for task in sorted(system.plan) if task not in tasks and task not in system.failed]
    lines = [f"{system.name}: asked for, not scored: {few(absent)}"] if absent else []
    for task, asked in system.plan.items():
        if task in tasks and (lacking := sorted(set(asked["subsets"]) - tasks[task])):
            lines.append(f"{system.name}: {task}: asked for, not scored: {few(lacking)}")
    return lines


def _left_out(system: System, lost: Shared) -> list[str]:
    lines = []
    if absent := sorted({task for task, _ in lost} - set(system.scored)):
        lines.append(f"{system.name}: has no score of tasks that another system has; left out for all: {few(absent)}")
    for task, count in sorted(Counter(task for task, _ in lost if task not in absent).items()):
        lines.append(f"{system.name}: {task}: {count} scores missing that another system has; left out for all")
    return lines


def _differences(scored: Sequence[System]) -> list[str]:
    """What was recorded of versions, prompts and data and is not the same everywhere, a line each."""
    lines = []
    for key in dict.fromkeys(key for system in scored for key in sorted(system.settings)):
        values: dict[str, list[str]] = {}
        for system in scored:
            for value in sorted(system.settings.get(key, set())):
                values.setdefault(value, []).append(system.name)
        if len(values) > 1:
            shown = "; ".join(f"{value} ({few(names)})" for value, names in values.items())
            label = "most tokens of a text" if key == "max_seq_length" else key
            lines.append(f"not the same: {label}: {shown}")
    tasks = sorted({task for system in scored for task in system.revisions})
    unlike = [t for t in tasks if len({system.revisions[t] for system in scored if t in system.revisions}) > 1]
    return [*lines, f"not the same: data revision of {few(unlike)}"] if unlike else lines
