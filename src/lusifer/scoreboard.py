"""Results of `lusifer.evaluation`, read and put side by side; as Markdown. Imports neither torch nor mteb.

Reads what is there: folders may be partial, empty or of another version, single files may be damaged. Whatever cannot
be read is listed on the page.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from lusifer.errors import LusiferError

# Joshi et al. 2020 (arXiv 2004.09095): 5 has the most labelled and unlabelled data, 0 none.
RESOURCES = {
    "en": 5, "es": 5, "fr": 5, "ar": 5, "de": 5, "ja": 5, "zh": 5, "ru": 4, "vi": 4, "ko": 4, "fa": 4, "fi": 4, "hi": 4,
    "it": 4, "nl": 4, "pl": 4, "pt": 4, "tr": 4, "id": 3, "bn": 3, "th": 3, "sw": 2, "te": 1,
}  # fmt: skip
INTERVALS = "± is half of a 95 % interval by bootstrap over queries, pairs or texts"
BIAS = ("same_language", "alone", "mixed")


@dataclass
class System:
    """The results of one model.

    Attributes:
        name: Its folder's name, made unique.
        facts: ``run.json``.
        scores: Task to subset to main score, between -1 and 1.
        languages: Task to subset to languages.
        errors: Task to subset to standard error, where it is known.
        types: Task to type.
        bias: Language to what `lusifer.everyday.language_bias` says.
        tokens: Tokenizer to language to mean tokens of a sentence.
        failed: Task to what went wrong.
        problems: What could not be read.
    """

    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    languages: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    bias: dict[str, dict[str, float]] = field(default_factory=dict)
    tokens: dict[str, dict[str, float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def _cells(
        self, shared: set[tuple[str, str]], kind: str | None
    ) -> dict[str, dict[str, list[tuple[float, float | None]]]]:
        """Scores with standard errors by language and task, languages with the most resources first."""
        found: dict[str, dict[str, list[tuple[float, float | None]]]] = {}
        for task, subsets in self.scores.items():
            for subset, score in subsets.items():
                codes = self.languages[task].get(subset, [])
                if len(codes) == 1 and (task, subset) in shared and kind in (None, self.types[task]):
                    cell = (score, self.errors.get(task, {}).get(subset))
                    found.setdefault(codes[0], {}).setdefault(task, []).append(cell)
        return dict(sorted(found.items(), key=lambda item: (-RESOURCES.get(item[0], 0), item[0])))

    def by_language(self, shared: set[tuple[str, str]], kind: str | None = None) -> dict[str, float]:
        """Per cent by language: the mean over tasks of the mean over subsets, of the cells that are shared."""
        return {
            code: 100 * fmean(fmean(score for score, _ in cells) for cells in tasks.values())
            for code, tasks in self._cells(shared, kind).items()
        }

    def half_widths(self, shared: set[tuple[str, str]]) -> dict[str, float]:
        """Half of the 95 % interval of `by_language`, per cent, where every score has a standard error.

        Tasks are taken as independent, the bootstrap distribution of a mean as normal.
        """
        found = {}
        for code, tasks in self._cells(shared, None).items():
            variances = [
                sum(error**2 for _, error in cells if error is not None) / len(cells) ** 2 for cells in tasks.values()
            ]
            if all(error is not None for cells in tasks.values() for _, error in cells):
                found[code] = 100 * 1.96 * math.sqrt(sum(variances)) / len(variances)
        return found

    def pairs(self) -> dict[tuple[str, str], float]:
        """Per cent by query language and document language."""
        found: dict[tuple[str, str], list[float]] = {}
        for task, subsets in self.scores.items():
            for subset, score in subsets.items():
                codes = self.languages[task].get(subset, [])
                if len(codes) == 2:
                    found.setdefault((codes[0], codes[1]), []).append(score)
        return {key: 100 * fmean(values) for key, values in found.items()}


def read(folders: Sequence[Path]) -> list[System]:
    """Reads folders of results.

    Raises:
        LusiferError: If a folder does not exist.
    """
    systems: list[System] = []
    for folder in folders:
        if not folder.is_dir():
            raise LusiferError(f"no results at {str(folder)!r}: give folders that `lusifer evaluate --out` wrote")
        name = folder.name
        while name in [system.name for system in systems]:
            name = f"{folder.parent.name}/{name}" if "/" not in name else name + "'"
        system = System(name)
        for path in sorted(folder.glob("*.json")):
            _take(system, path)
        if not system.scores:
            system.problems.append("no finished task in this folder")
        systems.append(system)
    return systems


def _take(system: System, path: Path) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if path.name == "run.json":
            system.facts = dict(found)
            return
        if path.name == "languages.json":
            system.bias = {str(code): {key: float(row[key]) for key in BIAS} for code, row in found["bias"].items()}
            system.tokens = {
                str(part): {str(code): float(count) for code, count in row.items()}
                for part, row in found["tokens"].items()
            }
            return
        task = str(found["task"])
        if found["status"] == "failed":
            system.failed[task] = str(found["error"])
            return
        splits = [dict(split) for split in found["main_scores"].values()]
        shared = set.intersection(*(set(split) for split in splits))
        scores = {subset: fmean(float(split[subset]) for split in splits) for subset in sorted(shared)}
        languages = {subset: list(codes) for subset, codes in found["languages"].items()}
        system.types[task] = str(found["type"])
        known = [dict(split) for split in found.get("standard_errors", {}).values()]
        if len(known) == len(splits):
            system.errors[task] = {
                subset: math.sqrt(sum(float(split[subset]) ** 2 for split in known)) / len(known)
                for subset in set.intersection(*(set(split) for split in known))
            }
        system.languages[task], system.scores[task] = languages, scores
    except OSError as error:
        system.problems.append(f"{path.name}: {error.strerror}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = "damaged" if isinstance(error, json.JSONDecodeError) else f"not in this version's form ({error!r})"
        system.problems.append(f"{path.name}: {reason}; score it again")


def shared_cells(systems: Sequence[System]) -> set[tuple[str, str]]:
    """What every system that has scores has scored: only that is compared."""
    cells = [{(task, s) for task, subsets in x.scores.items() for s in subsets} for x in systems if x.scores]
    return set.intersection(*cells) if cells else set()


def by_resources(codes: Iterable[str], *, least_first: bool = False) -> list[str]:
    """Language codes by how many resources they have, then by name."""
    sign = 1 if least_first else -1
    return sorted(set(codes), key=lambda code: (sign * RESOURCES.get(code, 0), code))


def gains(column: dict[str, float], base: dict[str, float]) -> dict[str, float]:
    """By language, how far one column is above another; languages with the least resources first."""
    return {code: column[code] - base[code] for code in by_resources(set(column) & set(base), least_first=True)}


def troubles(systems: Sequence[System]) -> list[str]:
    """What failed, is missing or cannot be read, a line each."""
    every = {(task, subset) for x in systems for task, subsets in x.scores.items() for subset in subsets}
    lines = []
    for system in systems:
        lines += [f"{system.name}: {task} failed: {error}" for task, error in system.failed.items()]
        lines += [f"{system.name}: {problem}" for problem in system.problems]
        own = {(task, subset) for task, subsets in system.scores.items() for subset in subsets}
        for task in sorted({task for task, _ in every - own}):
            count = len([1 for cell in every - own if cell[0] == task])
            lines.append(f"{system.name}: {task}: {count} scores missing that another system has; left out for all")
    return lines


def with_interval(value: float | None, half: float | None) -> str:
    """A score as text, with its interval where there is one."""
    if value is None:
        return ""
    return f"{value:.1f}" if half is None else f"{value:.1f} ±{half:.1f}"


def markdown(systems: Sequence[System], baseline: str | None = None) -> str:
    """The report as Markdown."""
    shared = shared_cells(systems)
    columns = {system.name: system.by_language(shared) for system in systems}
    widths = {system.name: system.half_widths(shared) for system in systems}
    lines = ["# Results", "", f"{len(shared)} scores that all systems have, per cent; means over tasks; {INTERVALS}."]
    lines += ["", "| language | " + " | ".join(columns) + " |", "|---" + "|---:" * len(columns) + "|"]
    for code in dict.fromkeys(code for column in columns.values() for code in column):
        cells = [with_interval(column.get(code), widths[name].get(code)) for name, column in columns.items()]
        lines.append(f"| {code} | " + " | ".join(cells) + " |")
    means = [fmean(column.values()) if column else None for column in columns.values()]
    lines.append("| **mean** | " + " | ".join(with_interval(mean, None) for mean in means) + " |")
    if baseline in columns:
        lines += ["", f"Gain against {baseline}, languages with the least resources first:", ""]
        for system in systems:
            if system.name != baseline and columns[system.name]:
                found = gains(columns[system.name], columns[baseline]).items()
                lines.append(f"- {system.name}: " + ", ".join(f"{code} {gain:+.1f}" for code, gain in found))
    lines += ["", *[f"- {line}" for line in troubles(systems)]]
    return "\n".join(lines) + "\n"
