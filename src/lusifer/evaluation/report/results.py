"""Results of `lusifer.evaluation.run`, read from their folders. Imports neither torch nor mteb.

Reads what is there: folders may be partial, empty or of another version, single files may be damaged. Whatever cannot
be read is kept as a line to show.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
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
BIAS = ("same_language", "alone", "mixed")
# mteb's repeats of a clustering are no sample of documents: no standard error, and older records' are wrong.
FIXED = ("Clustering",)
_NO_SETTINGS = ("model", "model_hash", "plan", "date", "seconds")
_RECORDED = ("prompts", "max_seq_length", "token_budget", "max_tokens", "dtype")
_DATA = ("revision", "fingerprint", "data_fingerprint", "data_hash")


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
        bias: Language to what `lusifer.evaluation.everyday.language_bias` says.
        tokens: Tokenizer to language to mean tokens of a sentence.
        plan: Task to the subsets that were asked for; empty where that was not recorded.
        plan_splits: Task to the splits that were asked for.
        settings: What was recorded of how the model ran, to all values of it.
        data: What was recorded of the data, to task to value.
        failed: Task to what went wrong; subsets that were scored before are in ``scores``.
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
    plan: dict[str, list[str]] = field(default_factory=dict)
    plan_splits: dict[str, list[str]] = field(default_factory=dict)
    settings: dict[str, set[str]] = field(default_factory=dict)
    data: dict[str, dict[str, str]] = field(default_factory=dict)
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

        Tasks are taken as independent, the bootstrap distribution of a mean as normal, scores of clustering as fixed.
        """
        found = {}
        for code, tasks in self._cells(shared, None).items():
            known = [error for name, cells in tasks.items() if self.types[name] not in FIXED for _, error in cells]
            if not known or None in known:
                continue
            variances = [
                sum((error or 0.0) ** 2 for _, error in cells) / len(cells) ** 2
                for name, cells in tasks.items()
                if self.types[name] not in FIXED
            ]
            found[code] = 100 * 1.96 * math.sqrt(sum(variances)) / len(tasks)
        return found

    def pairs(self, shared: set[tuple[str, str]]) -> dict[tuple[str, str], float]:
        """Per cent by query language and document language, of the cells that are shared."""
        found: dict[tuple[str, str], list[float]] = {}
        for _, codes, score in self._cross_lingual(shared):
            found.setdefault(codes, []).append(score)
        return {key: 100 * fmean(values) for key, values in found.items()}

    def by_pair_task(self, shared: set[tuple[str, str]]) -> dict[str, float]:
        """Per cent by task: the mean over its pairs of two languages, of the cells that are shared."""
        found: dict[str, list[float]] = {}
        for task, _, score in self._cross_lingual(shared):
            found.setdefault(task, []).append(score)
        return {task: 100 * fmean(found[task]) for task in sorted(found)}

    def _cross_lingual(self, shared: set[tuple[str, str]]) -> list[tuple[str, tuple[str, str], float]]:
        return [
            (task, (codes[0], codes[1]), score)
            for task, subsets in self.scores.items()
            for subset, score in subsets.items()
            if len(codes := self.languages[task].get(subset, [])) == 2 and (task, subset) in shared
        ]


def read(folders: Sequence[Path]) -> list[System]:
    """Reads folders of results.

    Raises:
        LusiferError: If a folder does not exist.
    """
    systems: list[System] = []
    for folder in folders:
        if not folder.is_dir():
            raise LusiferError(f"no results at {str(folder)!r}: give folders that `lusifer evaluate --out` wrote")
        whole = Path(os.path.abspath(folder))  # "." has no name of its own.
        name = whole.name or "results"
        while name in [system.name for system in systems]:
            name = f"{whole.parent.name}/{name}" if "/" not in name else name + "'"
        system = System(name)
        # What was asked for comes first: it says which splits a task needs.
        for path in sorted(folder.glob("*.json"), key=lambda path: (path.name != "run.json", path.name)):
            _take(system, path)
        if not system.scores:
            system.problems.append("no finished task in this folder")
        systems.append(system)
    return systems


def _take(system: System, path: Path) -> None:
    take = {"run.json": _take_run, "languages.json": _take_profile}.get(path.name, _take_record)
    try:
        take(system, dict(json.loads(path.read_text(encoding="utf-8"))))
    except OSError as error:
        system.problems.append(f"{path.name}: {error.strerror}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = "damaged" if isinstance(error, json.JSONDecodeError) else f"not in this version's form ({error!r})"
        system.problems.append(f"{path.name}: {reason}; score it again")


def _take_run(system: System, found: dict[str, Any]) -> None:
    system.facts = found
    for key, value in found.items():
        if key not in _NO_SETTINGS:
            _set(system, key, value)
    for task, asked in dict(found.get("plan") or {}).items():
        system.plan[str(task)] = [str(subset) for subset in asked["subsets"]]
        system.plan_splits[str(task)] = [str(split) for split in asked["splits"]]


def _set(system: System, key: str, value: Any) -> None:
    if key == "versions":
        for name, number in dict(value).items():
            system.settings.setdefault(f"version of {name}", set()).add(str(number))
    elif isinstance(value, dict):
        system.data.setdefault(key, {}).update({str(name): json.dumps(part) for name, part in value.items()})
    else:
        system.settings.setdefault(key, set()).add("none" if value is None else str(value))


def _take_profile(system: System, found: dict[str, Any]) -> None:
    bias = {str(code): _numbers(system, f"bias of {code}", row) for code, row in found["bias"].items()}
    system.bias = {code: {key: row[key] for key in BIAS} for code, row in bias.items() if set(BIAS) <= set(row)}
    if any(not set(BIAS) <= set(row) for row in found["bias"].values()):
        system.problems.append("languages.json: not in this version's form (bias without all its parts)")
    system.tokens = {str(part): _numbers(system, f"tokens of {part}", row) for part, row in found["tokens"].items()}


def _take_record(system: System, found: dict[str, Any]) -> None:
    task, failed = str(found["task"]), found["status"] == "failed"
    if failed:
        system.failed[task] = " ".join(str(found["error"]).split())
        if not found.get("main_scores"):
            return
    splits = {str(name): _numbers(system, task, split) for name, split in found["main_scores"].items()}
    languages = {str(subset): list(codes) for subset, codes in found["languages"].items()}
    if not all(isinstance(code, str) for codes in languages.values() for code in codes):
        raise TypeError("languages are not named by text")
    kind = str(found["type"])
    # A run that broke off between two splits has the first alone: no mean over splits.
    wanted = system.plan_splits.get(task, list(splits)) if failed else list(splits)
    rows = [splits.get(split, {}) for split in wanted]
    scores = _over_splits(rows, lambda values: fmean(values))
    if not scores:
        return
    errors = [
        _numbers(system, f"standard error of {task}", split) for split in (found.get("standard_errors") or {}).values()
    ]
    if len(errors) == len(rows) and kind not in FIXED:
        system.errors[task] = _over_splits(errors, lambda values: math.hypot(*values) / len(values))
    system.types[task], system.languages[task], system.scores[task] = kind, languages, scores
    for key in ("versions", *_RECORDED):
        if key in found:
            _set(system, key, found[key])
    for key in _DATA:
        if key in found:
            system.data.setdefault(key, {})[task] = str(found[key])


def _over_splits(rows: Sequence[Mapping[str, float]], mean: Any) -> dict[str, float]:
    """By subset, a mean over splits, of the subsets that all splits have."""
    shared = set.intersection(*(set(row) for row in rows))
    return {subset: mean([row[subset] for row in rows]) for subset in sorted(shared)}


def _numbers(system: System, what: str, row: Mapping[str, Any]) -> dict[str, float]:
    """A row's numbers; what is none, as older versions wrote, is left out and named."""
    found = {str(key): math.nan if value is None else float(value) for key, value in row.items()}
    if wrong := [key for key, value in found.items() if not math.isfinite(value)]:
        system.problems.append(f"{what}: no number, ignored: {few(wrong)}")
    return {key: value for key, value in found.items() if math.isfinite(value)}


def few(names: Sequence[str], most: int = 12) -> str:
    """Names in a line, the rest of a long list as a count."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
