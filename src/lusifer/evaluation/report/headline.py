"""What a reader with two minutes wants first: the result in a sentence, how sure it is, what was scored and when."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from statistics import fmean

from lusifer.evaluation.report.languages import language_name
from lusifer.evaluation.report.results import Shared, System, few


@dataclass(frozen=True)
class Headline:
    """The top of the report.

    Attributes:
        sentences: The result; the first one says it all.
        facts: What was scored, and when.
    """

    sentences: list[str]
    facts: list[str]


@dataclass(frozen=True)
class _Result:
    name: str
    mean: float
    half: float | None

    def __str__(self) -> str:
        return f"{self.mean:.1f} %" if self.half is None else f"{self.mean:.1f} ±{self.half:.1f} %"


def headline(systems: Sequence[System], shared: Shared, baselines: Sequence[str]) -> Headline:
    """The result in words.

    Args:
        systems: All systems.
        shared: The scores that are compared.
        baselines: Names of the systems to compare with.
    """
    columns = {system.name: system.by_language(shared) for system in systems}
    languages = len({code for column in columns.values() for code in column})
    over = f"{languages} language{'s' * (languages != 1)}"
    results = [
        _Result(system.name, fmean(columns[system.name].values()), system.mean_half_width(shared))
        for system in systems
        if columns[system.name]
    ]
    if not results:
        over = "pairs of languages"
        pairs = {system.name: system.by_pair(shared, lambda score: score.task) for system in systems}
        results = [_Result(name, fmean(row.values()), None) for name, row in pairs.items() if row]
    width = 1 if any(columns.values()) else 2  # Of what the mean is over: languages, or pairs of them.
    tasks = sorted(
        {row.task for s in systems for row in s.rows if len(row.languages) == width} & {t for t, _ in shared}
    )
    on = f"on average over {over}, {len(tasks)} task{'s' * (len(tasks) != 1)}"
    sentences = _compared(results, on, baselines) + _extremes(results, columns) + _gaps(systems)
    return Headline(sentences, [_dates(systems), f"tasks: {few(tasks)}" if tasks else ""])


def _compared(results: Sequence[_Result], on: str, baselines: Sequence[str]) -> list[str]:
    if not results:
        return ["There are no scores that all systems have: nothing can be compared."]
    ranked = sorted(results, key=lambda result: -result.mean)
    others = [result for result in ranked if result.name not in baselines]
    best = (others or ranked)[0]
    against = [result for result in ranked if result.name in baselines and result is not best]
    if not baselines and len(ranked) > 1:
        against = ranked[1:2]
    sentence = f"{best.name} scores {best} {on}"
    sentences = [sentence + (f": {_difference(best, against[0])}." if against else ".")]
    sentences += [f"{best.name} is {_difference(best, other)}." for other in against[1:]]
    if best.half is None:
        sentences.append("How sure that is cannot be said: some scores have no standard error.")
    return sentences


def _difference(best: _Result, other: _Result) -> str:
    points = best.mean - other.mean
    where = f"{'below' if points < 0 else 'above'} {other.name} ({other})"
    if best.half is None or other.half is None:
        return f"{abs(points):.1f} points {where}"
    half = math.hypot(best.half, other.half)
    verdict = "more than chance explains" if abs(points) > half else "too close to tell from these scores"
    return f"{abs(points):.1f} ±{half:.1f} points {where}, {verdict}"


def _extremes(results: Sequence[_Result], columns: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Where the best system is strong and where it is weak."""
    best = max(results, key=lambda result: result.mean, default=None)
    column = columns.get(best.name, {}) if best else {}
    if best is None or len(column) < 2:
        return []
    (low, least), *_, (high, most) = sorted(column.items(), key=lambda item: item[1])
    strong, weak = (f"{language_name(code)}, {value:.1f} %" for code, value in ((high, most), (low, least)))
    return [f"{best.name} is best in {strong}, and weakest in {weak}."]


def _gaps(systems: Sequence[System]) -> list[str]:
    failed, absent = sum(len(s.failed) for s in systems), sum(len(s.absent) for s in systems)
    parts = [f"{failed} failed"] * bool(failed) + [f"{absent} asked for but not scored"] * bool(absent)
    return [f"Tasks that are missing: {', '.join(parts)}; see the end."] if parts else []


def _dates(systems: Sequence[System]) -> str:
    days = sorted({day for system in systems for day in system.days})
    today = f"report of {_written(date.today())}"
    if not days:
        return today
    first, last = (_written(datetime.fromisoformat(day).date()) for day in (days[0], days[-1]))
    return f"scored on {first}; {today}" if first == last else f"scored from {first} to {last}; {today}"


def _written(day: date) -> str:
    return f"{day.day} {day:%B %Y}"
