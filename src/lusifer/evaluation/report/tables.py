"""Systems side by side: what all have scored, gains, and what stands in the way of comparing them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean

from lusifer.evaluation.report.results import RESOURCES, System, few

INTERVALS = (
    "± is half of a 95 % interval by bootstrap over queries, pairs or texts; clustering has no such items, its scores "
    "count as fixed"
)
PAIRS = "Means over the pairs of two languages of a task, then over tasks, as published"
TROUBLES = "Missing, failed and set differently"
_LABELS = {"max_seq_length": "most tokens of a text", "revision": "data revision"}
NO_BASELINE = "For gains by language, name one of the systems with --baseline."


def shared_cells(systems: Sequence[System]) -> set[tuple[str, str]]:
    """What every system that has scores has scored: only that is compared."""
    cells = [_cells(system) for system in systems if system.scores]
    return set.intersection(*cells) if cells else set()


def _cells(system: System) -> set[tuple[str, str]]:
    return {(task, subset) for task, subsets in system.scores.items() for subset in subsets}


def by_resources(codes: Iterable[str], *, least_first: bool = False) -> list[str]:
    """Language codes by how many resources they have, then by name."""
    sign = 1 if least_first else -1
    return sorted(set(codes), key=lambda code: (sign * RESOURCES.get(code, 0), code))


def gains(column: dict[str, float], base: dict[str, float]) -> dict[str, float]:
    """By language, how far one column is above another; languages with the least resources first."""
    return {code: column[code] - base[code] for code in by_resources(set(column) & set(base), least_first=True)}


def kinds_of(system: System, shared: set[tuple[str, str]]) -> dict[str, dict[str, float]]:
    """Type of task to language to per cent; types without any score left out."""
    found = {kind: system.by_language(shared, kind) for kind in sorted(set(system.types.values()))}
    return {kind: column for kind, column in found.items() if column}


def token_columns(systems: Sequence[System]) -> dict[str, dict[str, float]]:
    """Tokens by language, of every tokenizer once; languages with the most resources first."""
    columns: dict[str, dict[str, float]] = {}
    for system in systems:
        for part, counts in system.tokens.items():
            shown = {code: counts[code] for code in by_resources(counts)}
            if shown and shown not in columns.values():
                columns[f"{system.name}: {part}"] = shown
    return columns


def mean(values: Iterable[float]) -> float | None:
    """The mean, or None of nothing."""
    found = list(values)
    return fmean(found) if found else None


def with_interval(value: float | None, half: float | None = None) -> str:
    """A score as text, with its interval where there is one."""
    if value is None:
        return ""
    return f"{value:.1f}" if half is None else f"{value:.1f} ±{half:.1f}"


def troubles(systems: Sequence[System]) -> list[str]:
    """What failed, is missing, cannot be read, or was set differently, a line each."""
    every = {cell for system in systems for cell in _cells(system)}
    lines = []
    for system in systems:
        for task, error in system.failed.items():
            some = f"; the {len(system.scores[task])} scores it had before count" if task in system.scores else ""
            lines.append(f"{system.name}: {task} failed: {error}{some}")
        lines += [f"{system.name}: {problem}" for problem in system.problems]
        lines += _unscored(system)
        if system.scores:  # A system without any takes nothing away from the others.
            lines += _left_out(system, every - _cells(system))
    if len([system for system in systems if system.scores]) > 1 and not shared_cells(systems):
        lines.append("no score is there in all systems: nothing can be compared")
    return lines + differences(systems)


def _unscored(system: System) -> list[str]:
    """What was asked for and is not there, and not among what failed."""
    absent = [task for task in sorted(system.plan) if task not in system.scores and task not in system.failed]
    lines = [f"{system.name}: asked for, not scored: {few(absent)}"] if absent else []
    for task, subsets in system.plan.items():
        if lacking := sorted(set(subsets) - set(system.scores.get(task, subsets))):
            lines.append(f"{system.name}: {task}: asked for, not scored: {few(lacking)}")
    return lines


def _left_out(system: System, lost: set[tuple[str, str]]) -> list[str]:
    lines = []
    if absent := sorted({task for task, _ in lost} - set(system.scores)):
        lines.append(f"{system.name}: has no score of tasks that another system has; left out for all: {few(absent)}")
    for task in sorted({task for task, _ in lost} - set(absent)):
        count = len([cell for cell in lost if cell[0] == task])
        lines.append(f"{system.name}: {task}: {count} scores missing that another system has; left out for all")
    return lines


def differences(systems: Sequence[System]) -> list[str]:
    """What was recorded of versions, prompts, budget and data and is not the same everywhere, a line each."""
    lines = []
    scored = [system for system in systems if system.scores]
    for key in dict.fromkeys(key for system in scored for key in sorted(system.settings)):
        values: dict[str, list[str]] = {}
        for system in scored:
            for value in sorted(system.settings.get(key, set())):
                values.setdefault(value, []).append(system.name)
        if len(values) > 1:
            shown = "; ".join(f"{value} ({few(names)})" for value, names in values.items())
            lines.append(f"not the same: {_LABELS.get(key, key.replace('_', ' '))}: {shown}")
    for key in dict.fromkeys(key for system in scored for key in system.data):
        rows = [system.data.get(key, {}) for system in scored]
        tasks = sorted({task for row in rows for task in row})
        if unlike := [task for task in tasks if len({row[task] for row in rows if task in row}) > 1]:
            lines.append(f"not the same: {_LABELS.get(key, key.replace('_', ' '))} of {few(unlike)}")
    return lines
