"""The report's sections, computed once for the page and for Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import NamedTuple

from lusifer.evaluation import benchmarks as suite
from lusifer.evaluation.report.headline import Headline, headline
from lusifer.evaluation.report.languages import language_name
from lusifer.evaluation.report.results import BIAS, RESOURCES, Shared, System, few

_INTERVALS = (
    "± is half of a 95 % interval by bootstrap over queries, pairs or texts; clustering has no such items, its scores "
    "count as fixed. Tasks count as independent. The interval of a mean over languages lets the errors of a task's "
    "languages add up, as they do where the texts are translations of each other; that of a difference takes two "
    "systems as independent, though they are scored on the same texts: both are on the wide side"
)
_MOST_BARS = 4  # Systems side by side as bars; more are rows of a table.
Columns = Mapping[str, Mapping[str, float]]  # Column to row to number.


@dataclass(frozen=True)
class _Table:
    """A table of text; ``means`` is a last row set apart, ``heat`` says that the cells are per cent to shade."""

    header: list[str]
    rows: list[list[str]]
    means: list[str] = field(default_factory=list)
    heat: bool = False
    caption: str = ""


class _Bar(NamedTuple):
    """A bar: number of its column, length and ends of its interval in per cent of the line, text beside it."""

    column: int
    share: float
    interval: tuple[float, float] | None
    text: str


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        note: What to know before the figures.
        bars: Bars by the title of their row, for the page alone.
        columns: Names of the bars' columns.
        scale: What the ends of a bar's line mean.
        wordy: Whether the tables hold what the bars show, so that the page leaves them out.
        folded: Whether the page shows it only when asked.
    """

    title: str
    note: str = ""
    tables: list[_Table] = field(default_factory=list)
    bars: dict[str, list[_Bar]] = field(default_factory=dict)
    columns: list[str] = field(default_factory=list)
    scale: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    wordy: bool = False
    folded: bool = False


@dataclass(frozen=True)
class Report:
    """All of it: the top, and the parts in order."""

    headline: Headline
    sections: list[Section]


def report(systems: Sequence[System], baselines: Sequence[str] = (), *, published: bool = False) -> Report:
    """Everything the report shows.

    Args:
        systems: What `lusifer.evaluation.report.results.read` gave.
        baselines: Names of the systems to compare with.
        published: Whether to add the paper's tables.
    """
    shared = _shared_cells(systems)
    columns = {system.name: system.by_language(shared) for system in systems}
    columns = {name: column for name, column in columns.items() if column}
    parts = [_summary(systems, columns, shared)]
    if columns:
        parts.append(_languages(columns, {system.name: system.half_widths(shared) for system in systems}))
    parts += _own_data(systems)
    chosen = [name for name in dict.fromkeys(baselines) if columns.get(name)]
    parts += [_gains(columns, name, folded=name != chosen[0]) for name in chosen]
    if not baselines and len(columns) > 1:
        parts.append(Section("", "For gains by language, name one or more of the systems with --baseline."))
    parts += [*_across(systems, shared), *_details(systems, shared), *_bias(systems), *_tokens(systems)]
    if published:
        parts.append(_published())
    if lines := _troubles(systems):
        parts.append(Section("Missing, failed and set differently", lines=lines, folded=True))
    return Report(headline(systems, shared, baselines), [*parts, _measured(systems, shared)])


def _languages(columns: Columns, widths: Columns) -> Section:
    note = "Mean main score of the tasks in a language, per cent; languages by resources, most first"
    few_systems = len(columns) <= _MOST_BARS
    if not few_systems:
        return Section("By language", f"{note}.", [_systems_table(columns)])
    named = {name: _named(column) for name, column in columns.items()}
    spans = {name: _named(column) for name, column in widths.items()}
    table = _columns_table("language", named, "mean", spans)
    note += "; the line across a bar's end is its 95 % interval." if any(map(len, widths.values())) else "."
    scale = ["0", "25", "50", "75", "100 %"]
    return Section("By language", note, [table], _bars(named, spans), list(columns), scale, wordy=True)


def _named(column: Mapping[str, float]) -> dict[str, float]:
    return {language_name(code): value for code, value in column.items()}


def _systems_table(columns: Columns) -> _Table:
    """A row for each system, the best first, and a column for each language."""
    means = {name: fmean(column.values()) for name, column in columns.items()}
    codes = _keys(columns)
    rows = [
        [name, _text(means[name]), *[_text(columns[name].get(code)) for code in codes]]
        for name in sorted(columns, key=lambda name: -means[name])
    ]
    return _Table(["system", "mean", *map(language_name, codes)], rows, heat=True)


def _measured(systems: Sequence[System], shared: Shared) -> Section:
    note = (
        f"Main scores of mteb in per cent, means over tasks, of the {len(shared)} scores (task and language) that all "
        f"systems have; {_INTERVALS}."
    )
    lines = [f"{system.name}: {system.model or 'model not recorded'}, hash {system.model_hash}" for system in systems]
    return Section("How it was measured", note, lines=lines if any(s.model_hash for s in systems) else [], folded=True)


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
            ends = None if half is None else (max(0, value - half) / full, min(full, value + half) / full)
            interval = ends and (100 * ends[0], 100 * ends[1])
            rows[key].append(_Bar(number, 100 * max(value, 0) / full, interval, _text(value, half)))
    return rows


def _summary(systems: Sequence[System], columns: Columns, shared: Shared) -> Section:
    means = {"mean over languages": columns, "mean over pairs": _pair_tasks(systems, shared)}
    shown = {title: part for title, part in means.items() if any(part.values())}
    rows = []
    for system in systems:
        cells = [_text(_mean(part.get(system.name, {}).values())) or "-" for part in shown.values()]
        half = system.mean_half_width(shared) if columns.get(system.name) else None
        if half is not None:
            cells[0] = _text(_mean(columns[system.name].values()), half)
        counts = [str(len(part)) for part in (columns.get(system.name, ()), system.scored)]
        rows.append([system.name, *cells, *counts, system.model])
    table = _Table(["system", *shown, "languages", "tasks with scores", "model"], rows)
    return Section("", "Per cent; ± is half of a 95 % interval.", [table])


def _gains(columns: Columns, baseline: str, *, folded: bool) -> Section:
    base = columns[baseline]
    others = {name: column for name, column in columns.items() if name != baseline}
    codes = _by_resources((code for column in others.values() for code in set(column) & set(base)), least_first=True)
    rows = []
    for code in codes:
        gains = [f"{column[code] - base[code]:+.1f}" if code in column else "" for column in others.values()]
        rows.append([language_name(code), *gains, str(RESOURCES.get(code, ""))])
    note = "Points; languages with the least resources first (5 most, 0 none: Joshi et al. 2020)."
    table = _Table(["language", *others, "resource level"], rows)
    return Section(f"Gain against {baseline}", note, tables=[table], folded=folded)


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
        yield Section("Across languages", note, [_columns_table("task", columns, "mean over tasks")], folded=True)


def _details(systems: Sequence[System], shared: Shared) -> Iterator[Section]:
    by_kind, by_pair = [], []
    for system in systems:
        kinds = {kind: system.by_language(shared, kind) for kind in sorted({row.kind for row in system.rows})}
        kinds = {kind: column for kind, column in kinds.items() if column}
        if kinds:
            codes = list(system.by_language(shared))
            rows = [[language_name(code), *[_text(column.get(code)) for column in kinds.values()]] for code in codes]
            by_kind.append(_Table(["language", *kinds], rows, heat=True, caption=system.name))
        if pairs := system.by_pair(shared, lambda score: score.languages):
            queries, documents = (sorted({key[side] for key in pairs}) for side in (0, 1))
            rows = [[query, *[_text(pairs.get((query, document))) for document in documents]] for query in queries]
            by_pair.append(_Table(["query \\ document", *documents], rows, heat=True, caption=system.name))
    if by_kind:
        yield Section("Language and task type", tables=by_kind, folded=True)
    if by_pair:
        yield Section("Query language and document language", tables=by_pair, folded=True)


def _bias(systems: Sequence[System]) -> Iterator[Section]:
    known = [system for system in systems if system.bias]
    if not known:
        return
    codes = _by_resources(code for system in known for code in system.bias)
    rows = [
        [language_name(code), *[cell for system in known for cell in _bias_cells(system.bias.get(code))]]
        for code in codes
    ]
    titles = [f"{system.name}, {what}" for system in known for what in ("same language", "alone", "mixed", "change")]
    shares = {}
    for system in known:
        shares[system.name] = {
            language_name(code): 100 * system.bias[code]["same_language"] for code in _by_resources(system.bias)
        }
    note = (
        "Everyday sentences of all languages in one corpus. Bars, same language: the share of same-language ones among "
        "the ten nearest, per cent; 0 is best, since every sentence has its translations to find. How often a sentence "
        "finds its translation, per cent: alone, among English sentences only; mixed, as the nearest of all sentences "
        "in all languages."
    )
    table = _Table(["language", *titles], rows)
    bars = _bars(shares) if len(known) <= _MOST_BARS else {}
    scale = ["0", "25", "50", "75", "100 %"]
    yield Section("Language bias", note, [table], bars, list(shares), scale, folded=True)


def _bias_cells(row: Mapping[str, float] | None) -> list[str]:
    if row is None:
        return [""] * 4
    return [*[f"{100 * row[key]:.0f}" for key in BIAS], f"{100 * (row['mixed'] - row['alone']):+.0f}"]


def _tokens(systems: Sequence[System]) -> Iterator[Section]:
    columns: dict[str, dict[str, float]] = {}
    for system in systems:
        for part, counts in system.tokens.items():
            column = {language_name(code): counts[code] for code in _by_resources(counts)}
            if column and column not in columns.values():  # The same tokenizer in two systems is shown once.
                columns[f"{system.name}: {part}"] = column
    if columns:
        note = (
            "Mean over the everyday sentences. The LLM behind a connector reads as many positions as the encoder has "
            "tokens, whatever its own tokenizer would make of the language."
        )
        most = max(count for column in columns.values() for count in column.values())
        bars = _bars(columns, full=most) if len(columns) <= _MOST_BARS else {}
        table, scale = _columns_table("language", columns, "mean"), ["0", f"{most:.0f} tokens"]
        titles = list(columns)
        yield Section("Tokens of a sentence", note, [table], bars, titles, scale, wordy=bool(bars), folded=True)


def _published() -> Section:
    paper = suite.published()
    tables = [
        _Table(
            ["system", *table["columns"]], [[name, *map("{:.2f}".format, row)] for name, row in table["rows"].items()]
        )
        for table in (paper["table1"], paper["table2"])
    ]
    return Section("Published, not measured here", str(paper["source"]), tables, folded=True)


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
    lines = [f"{system.name}: requested, not scored: {few(system.absent)}"] if system.absent else []
    for task, subsets in system.asked.items():
        if task in tasks and (lacking := sorted(set(subsets) - tasks[task])):
            lines.append(f"{system.name}: {task}: requested, not scored: {few(lacking)}")
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
