"""Results to Markdown and a plot; imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lusifer.evaluation.report.render import template
from lusifer.publishing import publish_file

NAMES = {"encoder": "encoder alone", "llm": "English LLM alone", "lusifer": "LUSIFER"}
_COLOURS = {"encoder": "#999999", "llm": "#D55E00", "lusifer": "#0072B2"}  # Okabe and Ito's, for all kinds of sight.
_HATCHES = {"encoder": "", "llm": "//", "lusifer": ""}
TASKS = {"translation_retrieval": "Translation retrieval", "topic_retrieval": "Topic retrieval"}


def language_order(results: dict[str, Any]) -> list[str]:
    """Languages the encoder was trained on first, then the others, each by LUSIFER's translation score."""
    scores = results["systems"]["lusifer"]["topic_retrieval"]
    translation = results["systems"]["lusifer"]["translation_retrieval"]
    seen = set(results["seen_languages"])
    return sorted(scores, key=lambda code: (code != "en", code not in seen, -translation.get(code, 0.0), code))


def markdown(results: dict[str, Any]) -> str:
    """The report: one table per task, means over seen and unseen languages, how the run went."""
    systems = {name: NAMES.get(name, name) for name in results["systems"]}
    seen, order = set(results["seen_languages"]), language_order(results)
    groups = {"seen, en aside": [code for code in order if code in seen and code != "en"]}
    groups["not seen †"] = [code for code in order if code not in seen]
    tables = {}
    for task, title in TASKS.items():
        scores = {name: results["systems"][name][task] for name in systems}
        codes = [code for code in order if code in scores["lusifer"]]
        rows = [[code if code in seen else f"{code} †", *[_cell([s[code]]) for s in scores.values()]] for code in codes]
        for label, group in groups.items():
            if members := [code for code in group if code in codes]:
                means = [_cell([column[code] for code in members]) for column in scores.values()]
                rows.append([f"**{cell}**" for cell in (f"mean, {label}", *means)])
        tables[title] = rows
    values = {"stages": {}, **results, "systems": list(systems.values()), "tables": tables}
    values["unseen"] = bool(groups["not seen †"])
    return template("quickstart.md.j2").render(values)


def _cell(accuracies: list[float]) -> str:
    return f"{100 * sum(accuracies) / len(accuracies):.1f}"


def plot(results: dict[str, Any], path: Path) -> None:
    """Draws the systems side by side per language, both tasks, unseen languages shaded; a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    systems, seen, order = list(results["systems"]), set(results["seen_languages"]), language_order(results)
    figure, axes = plt.subplots(2, 1, figsize=(11, 7), layout="constrained")
    for axis, (task, title) in zip(axes, TASKS.items(), strict=True):
        codes = [code for code in order if code in results["systems"]["lusifer"][task]]
        width = 0.8 / len(systems)
        for number, name in enumerate(systems):
            values = [100 * results["systems"][name][task][code] for code in codes]
            places = [x + (number - (len(systems) - 1) / 2) * width for x in range(len(codes))]
            axis.bar(
                places, values, width, label=NAMES.get(name, name), color=_COLOURS.get(name), hatch=_HATCHES.get(name),
                edgecolor="white", linewidth=0.5,
            )  # fmt: skip
        unseen = [x for x, code in enumerate(codes) if code not in seen]
        if unseen:
            axis.axvspan(unseen[0] - 0.5, unseen[-1] + 0.5, color="#000000", alpha=0.06, lw=0)
            axis.text(unseen[0] - 0.4, 97, "not on the encoder's list", fontsize=9, va="top")
        axis.set_xticks(range(len(codes)), codes)
        axis.set(xlim=(-0.6, len(codes) - 0.4), ylim=(0, 100), ylabel="accuracy, %")
        axis.set_title(title, loc="left", fontweight="bold")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_axisbelow(True)
        axis.grid(axis="y", alpha=0.3)
    axes[0].legend(ncols=len(systems), loc="lower left", bbox_to_anchor=(0.35, 1.0), frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write_report(results: dict[str, Any], folder: Path) -> None:
    """Writes ``report.md`` and ``scores.png`` beside the results, into an existing folder."""
    plot(results, folder / "scores.png")
    with publish_file(folder / "report.md") as staging:
        staging.write_text(markdown(results), encoding="utf-8")
