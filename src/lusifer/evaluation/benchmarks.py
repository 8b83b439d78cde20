"""The benchmarks as data: which mteb tasks, splits and subsets they are, and how their scores are averaged.

``resources/suite.json`` is made by ``tools/build_suite.py``. Imports neither mteb nor torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lusifer.evaluation.own.content import OwnTask

MAIN, CROSS_LINGUAL, BITEXT, QUICK = "LUSIFER", "LUSIFER-xling", "LUSIFER-100", "LUSIFER-quick"
BENCHMARKS = (MAIN, CROSS_LINGUAL, QUICK, BITEXT)
# Task name to subset name to main score.
Scores = Mapping[str, Mapping[str, float]]
# Small tasks: together they cover the kinds of score and the languages; docs/evaluation.md has how well they predict.
_QUICK = (
    "SIB200Classification", "SIB200ClusteringS2S", "STSBenchmarkMultilingualSTS", "KLUE-STS", "FarsTail", "indonli",
    "AfriSentiClassification", "MasakhaNEWSClassification",
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """One mteb task as far as a benchmark uses it.

    Attributes:
        published_name: The paper's name.
        group: The paper's group; mteb's type where the benchmark is ours.
        revision: Revision of the data set when the suite was written.
        subsets: Subset to the languages of its score: one code, or those of queries and documents, or of both sides.
        pivot_free: Those of the subsets without English that make up the sample of `BITEXT`.
        own: The content of a task of the user's own data; None of one that mteb knows.
    """

    name: str
    published_name: str
    group: str
    type: str
    revision: str
    splits: tuple[str, ...]
    subsets: dict[str, tuple[str, ...]]
    pivot_free: frozenset[str] = frozenset()
    own: OwnTask | None = None


@dataclass(frozen=True)
class Mean:
    """A mean of main scores, None if nothing was scored, and how many of its parts are scored in full."""

    score: float | None
    scored: int
    of: int


@cache
def _resource(name: str) -> dict[str, Any]:
    return dict(json.loads((files("lusifer") / "resources" / name).read_text(encoding="utf-8")))


def languages() -> list[str]:
    """The languages of `MAIN`, in the paper's order."""
    return list(_resource("suite.json")[MAIN]["languages"])


def superseded() -> dict[str, str]:
    """Pinned task to the newer one that mteb names in its place."""
    return dict(_resource("suite.json")["superseded"])


def tasks(benchmark: str) -> list[Task]:
    """The tasks of one of `BENCHMARKS`.

    Raises:
        KeyError: If there is no such benchmark.
    """
    if benchmark == QUICK:
        return [task for task in tasks(MAIN) if task.name in _QUICK]
    return [_task(entry) for entry in _resource("suite.json")[benchmark]["tasks"]]


def _task(entry: dict[str, Any]) -> Task:
    sample = entry.get("pivot_free", [])
    subsets = entry["subsets"]
    if isinstance(subsets, list):
        subsets = {subset: [side.replace("_", "-") for side in subset.split("-")] for subset in [*subsets, *sample]}
    return Task(
        name=entry["name"],
        published_name=entry.get("published_name", entry["name"]),
        group=entry.get("group", entry["type"]),
        type=entry["type"],
        revision=entry["revision"],
        splits=tuple(entry["splits"]),
        subsets={key: (value,) if isinstance(value, str) else tuple(value) for key, value in subsets.items()},
        pivot_free=frozenset(sample),
    )


def published() -> dict[str, Any]:
    """The paper's Tables 1 and 2, read from its figure: never measured by us.

    Returns:
        ``source``; ``table1`` and ``table2``: ``columns`` (the last is the mean), ``rows`` by system, in per cent.
    """
    return _resource("published.json")


def counts() -> dict[str, dict[str, int]]:
    """Datasets of `MAIN` per language and group, ``all`` last; a published name counts once."""
    names: dict[str, dict[str, set[str]]] = {language: {} for language in languages()}
    for task in tasks(MAIN):
        for language in {spoken for subset in task.subsets.values() for spoken in subset}:
            for group in (task.group, "all"):
                names[language].setdefault(group, set()).add(task.published_name)
    return {
        language: {group: len(groups[group]) for group in sorted(groups, key=lambda group: group == "all")}
        for language, groups in names.items()
    }


def language_means(scores: Scores, chosen: list[Task] | None = None) -> dict[str, Mean]:
    """Per language, the mean over its tasks, each the mean over its subsets in that language (paper, Table 1).

    Subsets in two languages count for neither, see `pair_means`. A task with only some of a language's subsets scored
    counts as not scored.

    Args:
        scores: Main scores by task and subset.
        chosen: The tasks; those of `MAIN` when None.
    """
    chosen = tasks(MAIN) if chosen is None else chosen
    spoken = {codes[0] for task in chosen for codes in task.subsets.values() if len(set(codes)) == 1}
    order = [*[code for code in languages() if code in spoken], *sorted(spoken - set(languages()))]
    means = {}
    for language in order:
        wanted = [(task.name, [s for s, codes in task.subsets.items() if set(codes) == {language}]) for task in chosen]
        means[language] = _mean(scores, [(name, subsets) for name, subsets in wanted if subsets])
    return means


def overall(means: Mapping[str, Mean]) -> Mean:
    """The mean over languages (or tasks) of their means: the paper's last column."""
    scored = [mean.score for mean in means.values() if mean.score is not None]
    return Mean(fmean(scored) if scored else None, len(scored), len(means))


def joined(parts: Sequence[Task]) -> list[Task]:
    """Tasks with the subsets of all parts of the same name."""
    by_name: dict[str, Task] = {}
    for part in parts:
        before = by_name.get(part.name, part)
        by_name[part.name] = replace(before, subsets={**before.subsets, **part.subsets})
    return list(by_name.values())


def pair_means(scores: Scores, wanted: Sequence[Task]) -> dict[str, Mean]:
    """Per task the mean over its subsets in two languages; tasks without any are left out.

    The pivot-free sample of a task is a row of its own, ``NAME (pivot-free)``.
    """
    means = {}
    for task in wanted:
        pairs = [subset for subset, codes in task.subsets.items() if len(set(codes)) > 1]
        free = sorted(task.pivot_free.intersection(pairs))
        for name, subsets in ((task.name, sorted(set(pairs) - set(free))), (f"{task.name} (pivot-free)", free)):
            if subsets:
                means[name] = _mean(scores, [(task.name, [subset]) for subset in subsets])
    return means


def _mean(scores: Scores, wanted: list[tuple[str, list[str]]]) -> Mean:
    complete = [
        fmean(scores[name][subset] for subset in subsets)
        for name, subsets in wanted
        if all(subset in scores.get(name, {}) for subset in subsets)
    ]
    return Mean(fmean(complete) if complete else None, len(complete), len(wanted))
