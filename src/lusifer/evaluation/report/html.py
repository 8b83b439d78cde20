"""Results as one self-contained HTML page; imports neither torch nor mteb."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from lusifer.errors import LusiferError
from lusifer.evaluation import benchmarks as suite
from lusifer.evaluation.report.markdown import markdown
from lusifer.evaluation.report.results import RESOURCES, System
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

_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")  # Okabe and Ito, for all kinds of sight.
_STYLE = """
:root{color-scheme:light dark;--ink:#1b1b1f;--paper:#fff;--line:#d8d8de;--soft:#666}
@media(prefers-color-scheme:dark){:root{--ink:#ececf1;--paper:#17171b;--line:#3a3a42;--soft:#a5a5b0}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper)}
body{max-width:70rem;margin:auto;padding:1rem}
h1,h2{line-height:1.2;overflow-wrap:anywhere}li{overflow-wrap:anywhere}.hint{display:none}
@media(max-width:48rem){.hint{display:block}}
h2{margin-top:2.5rem}.soft{color:var(--soft)}.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .5rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{white-space:normal;vertical-align:bottom}
td:first-child{white-space:normal;overflow-wrap:break-word;max-width:10rem}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--paper)}
.bar{display:grid;grid-template-columns:3rem 1fr;gap:.5rem;align-items:center;margin:.35rem 0}
.fill{display:grid;grid-template-columns:1fr 6rem;align-items:center;gap:.4rem;font-size:.8rem;height:1.05rem}
.track{position:relative}.track i{display:block;height:.8rem;border-radius:2px}
.track s{position:absolute;top:.15rem;height:.5rem;border:solid var(--ink);border-width:0 1.5px}
.track s::after{content:"";position:absolute;top:50%;left:0;right:0;border-top:1.5px solid var(--ink)}
.key i{display:inline-block;width:.8rem;height:.8rem;border-radius:2px}
.key{margin-right:1rem;white-space:nowrap}.heat td:not(:first-child){color:#111}.heat td.none{color:var(--soft)}
"""


def page(systems: Sequence[System], baseline: str | None = None, *, published: bool = False) -> str:
    """The report as one HTML page, with nothing loaded from elsewhere."""
    shared = shared_cells(systems)
    columns = {system.name: system.by_language(shared) for system in systems}
    widths = {system.name: system.half_widths(shared) for system in systems}
    parts = ["<h1>Multilingual results</h1>"]
    parts.append(
        f'<p class="soft">Main scores in per cent, means over tasks, of the {len(shared)} scores (task and language) '
        f"that all systems have; {INTERVALS}. Languages by resources, most first.</p>"
    )
    parts += [_summary(systems, columns, shared), '<p class="soft hint">Wide tables scroll sideways.</p>']
    if any(columns.values()):
        parts += ["<h2>By language</h2>", _bars(columns, widths)]
    if baseline in columns and columns[baseline]:
        parts += [f"<h2>Gain against {html.escape(baseline)}</h2>", _gain_table(columns, baseline)]
    elif baseline is None and len(columns) > 1:
        parts.append(f'<p class="soft">{NO_BASELINE}</p>')
    parts += _across(systems, shared)
    for system in systems:
        name = html.escape(system.name)
        if columns[system.name]:
            parts += [f"<h2>Language and task type: {name}</h2>", _heat_map(system, shared)]
        if pairs := system.pairs(shared):
            parts += [f"<h2>Query language and document language: {name}</h2>", _matrix(pairs)]
    parts += _bias(systems) + _tokens(systems)
    if published:
        parts += _published()
    if found := troubles(systems):
        parts += [f"<h2>{TROUBLES}</h2><ul>", *[f"<li>{html.escape(line)}</li>" for line in found], "</ul>"]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    return (
        f'<!doctype html><html lang="en"><head>{head}<title>Multilingual results</title><style>{_STYLE}</style></head>'
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(row) + "</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}"><tr>{head}</tr>{body}</table></div>'


def _summary(systems: Sequence[System], columns: dict[str, dict[str, float]], shared: set[tuple[str, str]]) -> str:
    pairs = {system.name: system.by_pair_task(shared) for system in systems}
    means = {"mean over languages": columns, "mean over pairs": pairs}
    shown = {title: found for title, found in means.items() if any(found.values())}
    rows = []
    for system in systems:
        cells = [system.name, *[with_interval(mean(found[system.name].values())) or "-" for found in shown.values()]]
        cells += [str(len(columns[system.name])), str(len(system.scores)), str(len(system.failed))]
        cells.append(str(system.facts.get("model_hash", "")))
        rows.append([f"<td>{html.escape(cell)}</td>" for cell in cells])
    return _table(["system", *shown, "languages", "tasks with scores", "failed", "model hash"], rows)


def _across(systems: Sequence[System], shared: set[tuple[str, str]]) -> list[str]:
    columns = {system.name: system.by_pair_task(shared) for system in systems}
    tasks = dict.fromkeys(task for column in columns.values() for task in column)
    if not tasks:
        return []
    rows = [[task, *[with_interval(column.get(task)) for column in columns.values()]] for task in tasks]
    rows.append(["mean over tasks", *[with_interval(mean(column.values())) for column in columns.values()]])
    cells = [[f"<td>{html.escape(cell)}</td>" for cell in row] for row in rows]
    return ["<h2>Across languages</h2>", f'<p class="soft">{PAIRS}.</p>', _table(["task", *columns], cells)]


def _bars(
    columns: Mapping[str, Mapping[str, float]],
    widths: Mapping[str, Mapping[str, float]] | None = None,
    full: float = 100,
) -> str:
    """A bar per language and column, with whiskers where there are widths; ``full`` fills the line."""
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(columns)}
    keys = "".join(
        f'<span class="key"><i style="background:{colours[name]}"></i> {html.escape(name)}</span>' for name in columns
    )
    rows = [f"<p>{keys}</p>"]
    for code in dict.fromkeys(code for column in columns.values() for code in column):
        bars = ""
        for name, column in columns.items():
            if code not in column:
                continue
            share, half = 100 * max(column[code], 0) / full, (widths or {}).get(name, {}).get(code)
            whisker = ""
            if half is not None:
                reach = 100 * half / full
                whisker = f'<s style="left:{share - reach:.2f}%;width:{2 * reach:.2f}%"></s>'
            bars += (
                f'<div class="fill"><div class="track"><i style="width:{share:.1f}%;background:{colours[name]}"></i>'
                f"{whisker}</div><span>{with_interval(column[code], half)}</span></div>"
            )
        rows.append(f'<div class="bar"><b>{html.escape(code)}</b><div>{bars}</div></div>')
    return "".join(rows)


def _bias(systems: Sequence[System]) -> list[str]:
    known = [system for system in systems if system.bias]
    if not known:
        return []
    shares = {
        system.name: {code: 100 * system.bias[code]["same_language"] for code in by_resources(system.bias)}
        for system in known
    }
    rows = []
    for code in by_resources(code for system in known for code in system.bias):
        cells = [f"<td>{html.escape(code)}</td>"]
        for system in known:
            row = system.bias.get(code)
            cells += (
                [f"<td>{100 * row[key]:.0f}</td>" for key in ("alone", "mixed")]
                + [f"<td>{100 * (row['mixed'] - row['alone']):+.0f}</td>"]
                if row
                else ["<td></td>"] * 3
            )
        rows.append(cells)
    header = ["language", *[f"{system.name}, {what}" for system in known for what in ("alone", "mixed", "change")]]
    return [
        "<h2>Language bias</h2>",
        '<p class="soft">Everyday sentences of all languages in one corpus. Bars: share of same-language sentences '
        "among the ten nearest, per cent. 0 is best: every sentence has its translations to find.</p>",
        _bars(shares),
        '<p class="soft">How often a sentence finds its translation, per cent: alone, among English sentences only; '
        "mixed, as the nearest of all sentences in all languages.</p>",
        _table(header, rows),
    ]


def _tokens(systems: Sequence[System]) -> list[str]:
    columns = token_columns(systems)
    if not columns:
        return []
    return [
        "<h2>Tokens of a sentence</h2>",
        '<p class="soft">Mean over the everyday sentences. The LLM behind a connector reads as many positions as the '
        "encoder has tokens, whatever its own tokenizer would make of the language.</p>",
        _bars(columns, full=max(count for column in columns.values() for count in column.values())),
    ]


def _published() -> list[str]:
    found = suite.published()
    parts = ["<h2>Published, not measured here</h2>", f'<p class="soft">{html.escape(found["source"])}</p>']
    for table in (found["table1"], found["table2"]):
        rows = [
            [f"<td>{html.escape(name)}</td>", *[f"<td>{value:.2f}</td>" for value in values]]
            for name, values in table["rows"].items()
        ]
        parts += [_table(["system", *table["columns"]], rows), "<br>"]
    return parts


def _gain_table(columns: dict[str, dict[str, float]], baseline: str) -> str:
    others = [name for name in columns if name != baseline and columns[name]]
    above = {name: gains(columns[name], columns[baseline]) for name in others}
    codes = by_resources((code for gain in above.values() for code in gain), least_first=True)
    rows = [
        [f"<td>{html.escape(code)}</td>"]
        + [f"<td>{above[name][code]:+.1f}</td>" if code in above[name] else "<td></td>" for name in others]
        + [f"<td>{RESOURCES.get(code, '')}</td>"]
        for code in codes
    ]
    return _table(["language", *others, "resource level"], rows)


def _shade(value: float | None) -> str:
    if value is None:
        return '<td class="none">&middot;</td>'
    share = min(max(value, 0), 100) / 100
    # One hue from pale to strong: readable in grey, dark ink on all of it.
    return f'<td style="background:hsl(205 75% {95 - 42 * share:.0f}%)">{value:.1f}</td>'


def _heat_map(system: System, shared: set[tuple[str, str]]) -> str:
    kinds = kinds_of(system, shared)
    codes = list(system.by_language(shared))
    rows = [
        [f"<td>{html.escape(code)}</td>", *[_shade(column.get(code)) for column in kinds.values()]] for code in codes
    ]
    return _table(["language", *kinds], rows, "heat")


def _matrix(pairs: dict[tuple[str, str], float]) -> str:
    queries, documents = (sorted({key[side] for key in pairs}) for side in (0, 1))
    rows = [[f"<td>{html.escape(q)}</td>", *[_shade(pairs.get((q, d))) for d in documents]] for q in queries]
    return _table(["query \\ document", *documents], rows, "heat")


def write(systems: Sequence[System], out: Path, baseline: str | None = None, *, published: bool = False) -> list[Path]:
    """Writes ``report.html`` and ``report.md``, each whole or not at all.

    Raises:
        LusiferError: If the baseline is none of the systems.
    """
    names = [system.name for system in systems]
    if baseline is not None and baseline not in names:
        raise LusiferError(f"no system {baseline!r} to compare with; there are {', '.join(names)}")
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, text in (
        ("report.html", page(systems, baseline, published=published)),
        ("report.md", markdown(systems, baseline, published=published)),
    ):
        staging = out / f".{name}-{os.getpid()}"
        staging.write_text(text, encoding="utf-8")
        os.replace(staging, out / name)
        paths.append(out / name)
    return paths
