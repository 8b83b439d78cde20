"""Results of an evaluation, read from their folders.

Folders may be partial, empty or of an earlier version (whose files lie in the folder itself, with ``main_scores`` in
place of mteb's rows), single files may be damaged. What cannot be read is kept as a line to show.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from lusifer.errors import LusiferError, first_line

# Joshi et al. 2020 (arXiv 2004.09095): 5 has the most labelled and unlabelled data, 0 none.
RESOURCES = {
    "en": 5, "es": 5, "fr": 5, "ar": 5, "de": 5, "ja": 5, "zh": 5, "ru": 4, "vi": 4, "ko": 4, "fa": 4, "fi": 4, "hi": 4,
    "it": 4, "nl": 4, "pl": 4, "pt": 4, "tr": 4, "id": 3, "bn": 3, "th": 3, "sw": 2, "te": 1,
}  # fmt: skip
BIAS = ("same_language", "alone", "mixed")
# mteb's repeats of a clustering are no sample of documents: no standard error, and earlier versions' are wrong.
FIXED = ("Clustering",)
_SETTINGS = ("prompts", "max_seq_length", "dtype")
Shared = set[tuple[str, str]]  # Task and subset.


@dataclass(frozen=True)
class Score:
    """A main score.

    Attributes:
        kind: Type of the task.
        languages: The subset's languages: one, or those of queries and of documents.
        value: Mean over splits, between -1 and 1.
        error: Standard error, where it is known.
    """

    task: str
    subset: str
    kind: str
    languages: tuple[str, ...]
    value: float
    error: float | None


@dataclass
class System:
    """The results of one model.

    Attributes:
        model: Name of the model; empty where it was not recorded.
        model_hash: Its hash, likewise.
        bias: Language to what `lusifer.evaluation.everyday.language_bias` says.
        tokens: Tokenizer to language to mean tokens of a sentence.
        plan: Task to ``splits`` and ``subsets`` that were ever asked for; empty where that was not recorded.
        asked: Task to the subsets that the last command asked for.
        days: When tasks were scored, as ``YYYY-MM-DD``.
        settings: What was recorded of how the model ran, to all values of it.
        revisions: Task to the revision of its data.
        own: Task of the user's own data to what it is about and its metric.
        failed: Task to what went wrong; subsets that were scored before are in ``rows``.
    """

    name: str
    model: str = ""
    model_hash: str = ""
    rows: list[Score] = field(default_factory=list)
    bias: dict[str, dict[str, float]] = field(default_factory=dict)
    tokens: dict[str, dict[str, float]] = field(default_factory=dict)
    plan: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    asked: dict[str, list[str]] = field(default_factory=dict)
    days: set[str] = field(default_factory=set)
    settings: dict[str, set[str]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    own: dict[str, tuple[str, str]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def cells(self) -> Shared:
        """Task and subset of every score."""
        return {(row.task, row.subset) for row in self.rows}

    @property
    def scored(self) -> dict[str, set[str]]:
        """Task to its subsets that are scored."""
        tasks: dict[str, set[str]] = {}
        for row in self.rows:
            tasks.setdefault(row.task, set()).add(row.subset)
        return tasks

    def _by_language(self, shared: Shared, kind: str | None = None) -> dict[str, dict[str, list[Score]]]:
        """Language to task to scores in that language alone, languages with the most resources first."""
        languages: dict[str, dict[str, list[Score]]] = {}
        for score in self.rows:
            if len(score.languages) == 1 and (score.task, score.subset) in shared and kind in (None, score.kind):
                languages.setdefault(score.languages[0], {}).setdefault(score.task, []).append(score)
        return {code: languages[code] for code in sorted(languages, key=lambda code: (-RESOURCES.get(code, 0), code))}

    def by_language(self, shared: Shared, kind: str | None = None) -> dict[str, float]:
        """Per cent by language: the mean over tasks of the mean over subsets, of the shared cells and of one type."""
        return {
            code: 100 * fmean(fmean(score.value for score in scores) for scores in tasks.values())
            for code, tasks in self._by_language(shared, kind).items()
        }

    def half_widths(self, shared: Shared) -> dict[str, float]:
        """Half of the 95 % interval of `by_language`, per cent, where every score has a standard error.

        Tasks are taken as independent, the bootstrap distribution of a mean as normal, scores of clustering as fixed.
        """
        widths = {}
        for code, tasks in self._by_language(shared).items():
            drawn = [scores for scores in tasks.values() if scores[0].kind not in FIXED]
            errors = [[score.error for score in scores if score.error is not None] for scores in drawn]
            if drawn and list(map(len, errors)) == list(map(len, drawn)):
                variance = sum(sum(error**2 for error in row) / len(row) ** 2 for row in errors)
                widths[code] = 100 * 1.96 * math.sqrt(variance) / len(tasks)
        return widths

    def mean_half_width(self, shared: Shared) -> float | None:
        """Half of the 95 % interval of the mean over languages; None where a score lacks its standard error.

        Errors of one task's languages add up, since they are often translations of the same texts.
        """
        languages, errors = self._by_language(shared), dict[str, float]()
        for tasks in languages.values():
            for task, scores in tasks.items():
                for score in scores if scores[0].kind not in FIXED else ():
                    if score.error is None:
                        return None
                    weight = len(languages) * len(tasks) * len(scores)
                    errors[task] = errors.get(task, 0.0) + score.error / weight
        return 100 * 1.96 * math.hypot(*errors.values()) if errors else None

    @property
    def absent(self) -> list[str]:
        """Tasks that the last command asked for, without a score, and not among what failed."""
        return sorted(self.asked.keys() - self.scored.keys() - self.failed.keys())

    def by_pair(self, shared: Shared, key: Callable[[Score], Any]) -> dict[Any, float]:
        """Per cent by the key of a score, of those in two languages."""
        groups: dict[Any, list[float]] = {}
        for score in self.rows:
            if len(score.languages) == 2 and (score.task, score.subset) in shared:
                groups.setdefault(key(score), []).append(score.value)
        return {name: 100 * fmean(groups[name]) for name in sorted(groups)}


def read(folders: Sequence[Path]) -> list[System]:
    """Reads folders of results.

    Args:
        folders: What `lusifer evaluate --out` wrote.

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
        # What was asked for comes first: it says which splits a task needs. Newer files replace an earlier version's.
        run = [folder / "run.json"] if (folder / "run.json").is_file() else []
        patterns = ("[!.]*.json", "results/*/*/[!.]*.json", "failures/[!.]*.json")
        others = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
        for path in [*run, *(path for path in others if path.name not in ("run.json", "model_meta.json"))]:
            _read_file(system, path)
        if not system.rows:
            system.problems.append("no finished task in this folder")
        systems.append(system)
    return systems


def _read_file(system: System, path: Path) -> None:
    read_content = {"run.json": _read_run, "languages.json": _read_profile}.get(path.name, _read_record)
    try:
        read_content(system, dict(json.loads(path.read_text(encoding="utf-8"))))
    except OSError as error:
        system.problems.append(f"{path.name}: {first_line(error)}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = "damaged" if isinstance(error, json.JSONDecodeError) else f"not in this version's form ({error!r})"
        system.problems.append(f"{path.name}: {reason}; score it again")


def _read_run(system: System, run: dict[str, Any]) -> None:
    system.model, system.model_hash = str(run.get("model", "")), str(run.get("model_hash", ""))
    if "prompts" in run:
        _set(system, "prompts", run["prompts"])
    for task, asked in dict(run.get("plan") or {}).items():
        system.plan[str(task)] = {key: [str(name) for name in asked[key]] for key in ("splits", "subsets")}
    # An earlier version recorded everything that was ever asked for, as one.
    last = run.get("asked") or {task: asked["subsets"] for task, asked in system.plan.items()}
    system.asked = {str(task): [str(name) for name in subsets] for task, subsets in last.items()}


def _set(system: System, key: str, value: Any) -> None:
    system.settings.setdefault(key, set()).add("none" if value is None else str(value))


def _read_profile(system: System, profile: dict[str, Any]) -> None:
    bias = {str(code): _numbers(system, f"bias of {code}", row) for code, row in profile["bias"].items()}
    system.bias = {code: {key: row[key] for key in BIAS} for code, row in bias.items() if set(BIAS) <= set(row)}
    if any(not set(BIAS) <= set(row) for row in profile["bias"].values()):
        system.problems.append("languages.json: not in this version's form (bias without all its parts)")
    system.tokens = {str(part): _numbers(system, f"tokens of {part}", row) for part, row in profile["tokens"].items()}


def _read_record(system: System, record: dict[str, Any]) -> None:
    task = str(record["task_name"] if "task_name" in record else record["task"])
    if record.get("status") == "failed":
        system.failed[task] = " ".join(str(record["error"]).split())
        if not record.get("main_scores"):
            return
    languages = {str(subset): tuple(codes) for subset, codes in record["languages"].items()}
    if not all(isinstance(code, str) for codes in languages.values() for code in codes):
        raise TypeError("languages are not named by text")
    kind = str(record["type"])
    splits = {str(name): _numbers(system, task, split) for name, split in _by_split(record).items()}
    # A run that broke off between two splits has the first alone: no mean over splits.
    planned = system.plan[task]["splits"] if task in system.plan else list(splits)
    values = _over_splits([splits.get(split, {}) for split in planned], fmean)
    standard_errors = (record.get("standard_errors") or {}).values()
    rows = [_numbers(system, f"standard error of {task}", split) for split in standard_errors]
    errors: dict[str, float] = {}
    if len(rows) == len(planned) and kind not in FIXED:
        errors = _over_splits(rows, lambda row: math.hypot(*row) / len(row))
    system.rows = [row for row in system.rows if row.task != task]
    for subset, value in values.items():
        if subset in languages:
            system.rows.append(Score(task, subset, kind, languages[subset], value, errors.get(subset)))
    if values:
        _read_settings(system, task, record)
    if own := record.get("own_data"):
        system.own[task] = (str(own["description"]), str(own["metric"]))


def _by_split(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Split to subset to main score, of mteb's rows or of an earlier version's own numbers."""
    if "main_scores" in record:
        return dict(record["main_scores"])
    return {name: {row["hf_subset"]: row["main_score"] for row in rows} for name, rows in record["scores"].items()}


def _read_settings(system: System, task: str, record: Mapping[str, Any]) -> None:
    for key in _SETTINGS:
        if key in record:
            _set(system, key, record[key])
    if re.match(r"\d{4}-\d\d-\d\d", str(record.get("date"))):
        system.days.add(str(record["date"])[:10])
    for package, number in dict(record.get("versions") or {}).items():
        _set(system, f"version of {package}", number)
    revisions = [record[key] for key in ("dataset_revision", "fingerprint", "revision") if record.get(key) is not None]
    if revisions:
        system.revisions[task] = str(revisions[0])


def _over_splits(rows: Sequence[Mapping[str, float]], mean: Callable[[list[float]], float]) -> dict[str, float]:
    """By subset, a mean over splits, of the subsets that all splits have."""
    shared = set.intersection(*(set(row) for row in rows)) if rows else set()
    return {subset: mean([row[subset] for row in rows]) for subset in sorted(shared)}


def _numbers(system: System, what: str, row: Mapping[str, Any]) -> dict[str, float]:
    """A row's numbers; NaN and None are left out and named."""
    numbers = {str(key): math.nan if value is None else float(value) for key, value in row.items()}
    if broken := [key for key, value in numbers.items() if not math.isfinite(value)]:
        system.problems.append(f"{what}: NaN, ignored: {few(broken)}")
    return {key: value for key, value in numbers.items() if math.isfinite(value)}


def few(names: Sequence[str]) -> str:
    """A dozen names in a line, the rest as a count."""
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
