"""Results to Markdown and a plot; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lusifer.evaluation.benchmarks import languages
from lusifer.evaluation.report.render import template
from lusifer.publishing import publish_file

NAMES = {
    "encoder": "encoder alone",
    "llm": "English LLM alone",
    "teacher": "English teacher alone",
    "adapted": "adapted",
    "lusifer": "LUSIFER",
}
TASKS = {"translation_retrieval": "Translation retrieval", "topic_retrieval": "Topic retrieval"}
# Okabe and Ito's colours, for all kinds of sight; hatched what knows English alone, dotted what grey would not tell
# from LUSIFER.
_COLOURS = {
    "encoder": "#999999",
    "llm": "#D55E00",
    "teacher": "#E69F00",
    "adapted": "#009E73",
    "lusifer": "#0072B2",
}
_HATCHES = {"llm": "///", "teacher": "///", "adapted": "..."}
# Steps whose time is told, and what they are called.
_PARTS = {
    "index, adapting, six languages": ("index", "adapt", "queries"),
    "LUSIFER": ("lusifer",),
    "English LLM alone": ("llm",),
}


def groups(scores: dict[str, float]) -> dict[str, list[str]]:
    """The scored languages, English aside: those of the paper in its order, then the others."""
    paper = [code for code in languages() if code in scores and code != "en"]
    others = sorted(code for code in scores if code not in paper and code != "en")
    return {f"{len(paper)} languages of the paper": paper, f"{len(others)} others": others}


def means(scores: dict[str, float]) -> dict[str, float]:
    """Mean score of each group that has languages."""
    return {label: sum(scores[code] for code in codes) / len(codes) for label, codes in groups(scores).items() if codes}


def _order(scores: dict[str, float]) -> list[str]:
    paper, others = groups(scores).values()
    return [*(["en"] if "en" in scores else []), *paper, *others]


def markdown(results: dict[str, Any]) -> str:
    """The report: queries and what they found, one table per task, how the run went."""
    systems = {name: NAMES.get(name, name) for name in results["systems"]}
    tables = {}
    for task, title in TASKS.items():
        columns = [results["systems"][name][task] for name in systems]
        rows = [
            [f"**mean, {label}**", *[f"**{100 * means(column)[label]:.1f}**" for column in columns]]
            for label in means(columns[0])
        ]
        rows += [[code, *[f"{100 * column[code]:.1f}" for column in columns]] for code in _order(columns[0])]
        tables[title] = rows
    seconds = results["seconds"]
    parts = {part: sum(seconds.get(step, 0.0) for step in steps) for part, steps in _PARTS.items()}
    values = {**results, "systems": list(systems.values()), "tables": tables, "parts": parts}
    values |= {"total": sum(seconds.values()), "right": right(results["queries"])}
    return template("quickstart.md.j2").render(values)


def right(answers: Sequence[dict[str, str]]) -> int:
    """How many queries found their own translation."""
    return sum(answer["found"] == answer["wanted"] for answer in answers)


def plot(results: dict[str, Any], path: Path) -> None:
    """Draws the systems side by side per language, both tasks, languages beyond the paper's shaded; a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    systems = list(results["systems"])
    figure, axes = plt.subplots(2, 1, figsize=(13, 7), layout="constrained")
    for axis, (task, title) in zip(axes, TASKS.items(), strict=True):
        by_system = {name: results["systems"][name][task] for name in systems}
        codes = _order(by_system[systems[0]])
        width = 0.84 / len(systems)
        for number, (name, scores) in enumerate(by_system.items()):
            places = [x + (number - (len(systems) - 1) / 2) * width for x in range(len(codes))]
            axis.bar(
                places, [100 * scores[code] for code in codes], width, label=NAMES.get(name, name),
                color=_COLOURS.get(name), hatch=_HATCHES.get(name), edgecolor="white", linewidth=0.4,
            )  # fmt: skip
        others = len(list(groups(by_system[systems[0]]).values())[1])
        if others:
            first = len(codes) - others - 0.5
            axis.axvspan(first, len(codes) - 0.5, color="#000000", alpha=0.06, lw=0, zorder=0)
            axis.text(len(codes) - 0.55, 104, "beyond the paper's languages", fontsize=9, ha="right", va="bottom")
        axis.set_xticks(range(len(codes)), codes)
        axis.set(xlim=(-0.5, len(codes) - 0.5), ylim=(0, 103), yticks=range(0, 101, 20), ylabel="accuracy, %")
        axis.set_title(title, loc="left", fontweight="bold")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_axisbelow(True)
        axis.grid(axis="y", alpha=0.3)
    axes[0].legend(ncols=len(systems), loc="lower left", bbox_to_anchor=(0.17, 1.0), frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write_report(results: dict[str, Any], folder: Path) -> None:
    """Writes ``report.md`` and ``scores.png`` beside the results, into an existing folder."""
    plot(results, folder / "scores.png")
    with publish_file(folder / "report.md") as staging:
        staging.write_text(markdown(results), encoding="utf-8")
