"""Results of `lusifer.evaluation` as one self-contained HTML page and as Markdown; imports neither torch nor mteb.

Reads what is there: folders may be partial, empty or of another version, single files may be damaged. Whatever cannot
be read is listed on the page.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Sequence
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
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")  # Okabe and Ito, for all kinds of sight.
_STYLE = """
:root{color-scheme:light dark;--ink:#1b1b1f;--paper:#fff;--line:#d8d8de;--soft:#666}
@media(prefers-color-scheme:dark){:root{--ink:#ececf1;--paper:#17171b;--line:#3a3a42;--soft:#a5a5b0}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper)}
body{max-width:70rem;margin:auto;padding:1rem}
h1,h2{line-height:1.2}h2{margin-top:2.5rem}.soft{color:var(--soft)}.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .5rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--paper)}
.bar{display:grid;grid-template-columns:3rem 1fr;gap:.5rem;align-items:center;margin:.35rem 0}
.fill{display:flex;align-items:center;gap:.4rem;font-size:.8rem;height:1.05rem}
.fill i{display:block;height:.8rem;border-radius:2px}
.key i{display:inline-block;width:.8rem;height:.8rem;border-radius:2px}
.key{margin-right:1rem;white-space:nowrap}.heat td:not(:first-child){color:#111}.heat td.none{color:var(--soft)}
"""


@dataclass
class System:
    """The results of one model.

    Attributes:
        name: Its folder's name, made unique.
        facts: ``run.json``.
        scores: Task to subset to main score, between -1 and 1.
        languages: Task to subset to languages.
        types: Task to type.
        failed: Task to what went wrong.
        problems: What could not be read.
    """

    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    languages: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def by_language(self, shared: set[tuple[str, str]], kind: str | None = None) -> dict[str, float]:
        """Per cent by language: the mean over tasks of the mean over subsets, of the cells that are shared."""
        found: dict[str, dict[str, list[float]]] = {}
        for task, subsets in self.scores.items():
            for subset, score in subsets.items():
                codes = self.languages[task].get(subset, [])
                if len(codes) == 1 and (task, subset) in shared and kind in (None, self.types[task]):
                    found.setdefault(codes[0], {}).setdefault(task, []).append(score)
        return {
            code: 100 * fmean(fmean(values) for values in found[code].values())
            for code in sorted(found, key=lambda code: (-RESOURCES.get(code, 0), code))
        }

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
        task = str(found["task"])
        if found["status"] == "failed":
            system.failed[task] = str(found["error"])
            return
        splits = [dict(split) for split in found["main_scores"].values()]
        shared = set.intersection(*(set(split) for split in splits))
        scores = {subset: fmean(float(split[subset]) for split in splits) for subset in sorted(shared)}
        languages = {subset: list(codes) for subset, codes in found["languages"].items()}
        system.types[task] = str(found["type"])
        system.languages[task], system.scores[task] = languages, scores
    except OSError as error:
        system.problems.append(f"{path.name}: {error.strerror}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = "damaged" if isinstance(error, json.JSONDecodeError) else f"not in this version's form ({error!r})"
        system.problems.append(f"{path.name}: {reason}; score it again")


def _shared(systems: Sequence[System]) -> set[tuple[str, str]]:
    """What every system that has scores has scored: only that is compared."""
    cells = [{(task, s) for task, subsets in x.scores.items() for s in subsets} for x in systems if x.scores]
    return set.intersection(*cells) if cells else set()


def markdown(systems: Sequence[System], baseline: str | None = None) -> str:
    """The report as Markdown."""
    shared = _shared(systems)
    columns = {system.name: system.by_language(shared) for system in systems}
    lines = ["# Results", "", f"{len(shared)} scores that all systems have, per cent; means over tasks.", ""]
    lines += ["| language | " + " | ".join(columns) + " |", "|---" + "|---:" * len(columns) + "|"]
    for code in dict.fromkeys(code for column in columns.values() for code in column):
        lines.append(f"| {code} | " + " | ".join(_cell(column.get(code)) for column in columns.values()) + " |")
    means = [fmean(column.values()) if column else None for column in columns.values()]
    lines.append("| **mean** | " + " | ".join(_cell(mean) for mean in means) + " |")
    if baseline in columns:
        lines += ["", f"Gain against {baseline}, languages with the least resources first:", ""]
        for system in systems:
            if system.name != baseline and columns[system.name]:
                gains = _gains(columns[system.name], columns[baseline])
                lines.append(f"- {system.name}: " + ", ".join(f"{code} {gain:+.1f}" for code, gain in gains))
    lines += ["", *[f"- {line}" for line in _troubles(systems)]]
    return "\n".join(lines) + "\n"


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _gains(column: dict[str, float], base: dict[str, float]) -> list[tuple[str, float]]:
    codes = sorted(set(column) & set(base), key=lambda code: (RESOURCES.get(code, 0), code))
    return [(code, column[code] - base[code]) for code in codes]


def _troubles(systems: Sequence[System]) -> list[str]:
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


def page(systems: Sequence[System], baseline: str | None = None) -> str:
    """The report as one HTML page, with nothing loaded from elsewhere."""
    shared = _shared(systems)
    columns = {system.name: system.by_language(shared) for system in systems}
    colours = {system.name: _COLOURS[i % len(_COLOURS)] for i, system in enumerate(systems)}
    parts = ["<h1>Multilingual results</h1>"]
    parts.append(
        f'<p class="soft">Main scores in per cent, means over tasks, of the {len(shared)} scores (task and language) '
        "that all systems have. Languages by resources, most first.</p>"
    )
    parts += [_summary(systems, columns), "<h2>By language</h2>", _bars(columns, colours)]
    if baseline in columns:
        parts += [f"<h2>Gain against {html.escape(baseline)}</h2>", _gain_table(columns, baseline)]
    for system in systems:
        if system.scores:
            name = html.escape(system.name)
            parts += [f"<h2>Language and task type: {name}</h2>", _heat_map(system, shared)]
        if pairs := system.pairs():
            parts += [f"<h2>Query language and document language: {html.escape(system.name)}</h2>", _matrix(pairs)]
    if troubles := _troubles(systems):
        parts += ["<h2>Missing and failed</h2><ul>", *[f"<li>{html.escape(line)}</li>" for line in troubles], "</ul>"]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    return (
        f'<!doctype html><html lang="en"><head>{head}<title>Multilingual results</title><style>{_STYLE}</style></head>'
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(row) + "</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}"><tr>{head}</tr>{body}</table></div>'


def _summary(systems: Sequence[System], columns: dict[str, dict[str, float]]) -> str:
    rows = []
    for system in systems:
        column = columns[system.name]
        mean = _cell(fmean(column.values())) if column else "-"
        cells = [system.name, mean, str(len(column)), str(len(system.scores)), str(len(system.failed))]
        cells.append(str(system.facts.get("model_hash", "")))
        rows.append([f"<td>{html.escape(cell)}</td>" for cell in cells])
    return _table(["system", "mean over languages", "languages", "tasks done", "failed", "model hash"], rows)


def _bars(columns: dict[str, dict[str, float]], colours: dict[str, str]) -> str:
    keys = "".join(
        f'<span class="key"><i style="background:{colours[name]}"></i> {html.escape(name)}</span>' for name in columns
    )
    rows = [f"<p>{keys}</p>"]
    for code in dict.fromkeys(code for column in columns.values() for code in column):
        bars = "".join(
            f'<div class="fill"><i style="width:{max(column[code], 0) * 0.85:.1f}%;background:{colours[name]}"></i>'
            f"{column[code]:.1f}</div>"
            for name, column in columns.items()
            if code in column
        )
        rows.append(f'<div class="bar"><b>{html.escape(code)}</b><div>{bars}</div></div>')
    return "".join(rows)


def _gain_table(columns: dict[str, dict[str, float]], baseline: str) -> str:
    others = [name for name in columns if name != baseline and columns[name]]
    gains = {name: dict(_gains(columns[name], columns[baseline])) for name in others}
    codes = sorted({code for gain in gains.values() for code in gain}, key=lambda code: (RESOURCES.get(code, 0), code))
    rows = [
        [f"<td>{html.escape(code)}</td>", f"<td>{RESOURCES.get(code, '')}</td>"]
        + [f"<td>{gains[name][code]:+.1f}</td>" if code in gains[name] else "<td></td>" for name in others]
        for code in codes
    ]
    return _table(["language", "resource level", *others], rows)


def _shade(value: float | None) -> str:
    if value is None:
        return '<td class="none">&middot;</td>'
    share = min(max(value, 0), 100) / 100
    # One hue from pale to strong: readable in grey, dark ink on all of it.
    return f'<td style="background:hsl(205 75% {95 - 42 * share:.0f}%)">{value:.1f}</td>'


def _heat_map(system: System, shared: set[tuple[str, str]]) -> str:
    kinds = sorted(set(system.types.values()))
    columns = {kind: system.by_language(shared, kind) for kind in kinds}
    codes = list(system.by_language(shared))
    rows = [[f"<td>{html.escape(code)}</td>", *[_shade(columns[kind].get(code)) for kind in kinds]] for code in codes]
    return _table(["language", *kinds], rows, "heat")


def _matrix(pairs: dict[tuple[str, str], float]) -> str:
    queries, documents = (sorted({key[side] for key in pairs}) for side in (0, 1))
    rows = [[f"<td>{html.escape(q)}</td>", *[_shade(pairs.get((q, d))) for d in documents]] for q in queries]
    return _table(["query \\ document", *documents], rows, "heat")


def write(systems: Sequence[System], out: Path, baseline: str | None = None) -> list[Path]:
    """Writes ``report.html`` and ``report.md``, each whole or not at all.

    Raises:
        LusiferError: If the baseline is none of the systems.
    """
    names = [system.name for system in systems]
    if baseline is not None and baseline not in names:
        raise LusiferError(f"no system {baseline!r} to compare with; there are {', '.join(names)}")
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, text in (("report.html", page(systems, baseline)), ("report.md", markdown(systems, baseline))):
        staging = out / f".{name}-{os.getpid()}"
        staging.write_text(text, encoding="utf-8")
        os.replace(staging, out / name)
        paths.append(out / name)
    return paths
