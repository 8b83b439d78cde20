"""The commands ``lusifer fetch``, ``lusifer quickstart`` and ``lusifer train``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from lusifer.cli.console import Json, Quiet, emit, print_table, say, say_next
from lusifer.quiet import quiet_libraries


def fetch(
    names: Annotated[list[str] | None, typer.Argument(help="Starter names; all by default.")] = None,
    force: Annotated[bool, typer.Option(help="Fetch again even if present.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fetches the starter backbones once; everything works offline afterwards.

    They are stored in `$LUSIFER_CACHE` (default `~/.cache/lusifer`): about 270 MB to download, 590 MB on disk.

    Example: `lusifer fetch`
    """
    quiet_libraries(quiet)
    from lusifer.starter.fetch import fetch as fetch_starters

    folders = fetch_starters(names or None, force=force)
    if as_json:
        emit({name: str(path) for name, path in folders.items()})
    else:
        for name, path in folders.items():
            say(f"{name}  {path}")


def quickstart(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="Output folder.")] = Path("runs/quickstart"),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Adds languages to an English embedder, trains a small LUSIFER, scores five systems in 23 languages.

    First all-MiniLM-L6-v2 fills an index with English sentences, a multilingual encoder is adapted to it with English
    text, and queries in six languages search that index. Then LUSIFER is trained by the paper's stages.

    After an interruption, run the same command again to resume.

    Example: `lusifer quickstart`
    """
    quiet_libraries(quiet)
    from lusifer.quickstart.report import NAMES, means
    from lusifer.quickstart.run import quickstart as run

    answered = None if as_json else partial(_show_answers, output)
    results = run(output, overrides=context.args, progress=not quiet, answered=answered)
    if as_json:
        emit(results)
        return
    scores = {NAMES[name]: means(system["translation_retrieval"]) for name, system in results["systems"].items()}
    rows = [[name, *[f"{100 * mean:.1f}" for mean in by_group.values()]] for name, by_group in scores.items()]
    print_table(("translation retrieval, %", *next(iter(scores.values()))), rows)
    say(f"report: {output / 'report.md'}   plot: {output / 'scores.png'}   LUSIFER: {output / 'model'}")


def _show_answers(output: Path, answers: Sequence[dict[str, str]]) -> None:
    """What the queries in other languages found in the English index; lines, since scripts differ in width."""
    say(f"queries and their top result in {output / 'index'}:")
    for one in answers:
        verdict = "right" if one["found"] == one["wanted"] else "WRONG"
        say(f"{one['language']}  {verdict}  {one['query']}  ->  {one['found']}")
    say(f'try your own: lusifer search {output / "index"} "..." --model {output / "adapted" / "model"}')


def train(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="A recipe, e.g. recipes/quickstart.yaml.", show_default=False)],
    llm_alone: Annotated[bool, typer.Option("--llm-alone", help="Train the baseline instead: the LLM alone.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only estimate memory, time and disk; loads no weights.")
    ] = False,
    ranks: Annotated[int, typer.Option(min=1, help="Processes to plan for, with --dry-run.")] = 1,
    gpu: Annotated[
        str | None, typer.Option(help="Card to plan for, with --dry-run: h100, rtx4090, ..., or its memory in GB.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Trains a recipe: stages 0, 1 and 2. After an interruption, run it again to resume.

    Any field can be overridden by its dotted name.

    Examples:
    - `lusifer train recipes/quickstart.yaml`
    - `lusifer train recipes/quickstart.yaml --contrast.steps 400 --output runs/longer`
    - `lusifer train recipes/quickstart.yaml --align.enabled false`
    - `lusifer train recipes/quickstart.yaml --contrast.data.0.weight 2`
    - `lusifer train recipes/quickstart.yaml --llm-alone`
    - `lusifer train recipes/modern.yaml --dry-run --gpu rtx4090`
    """
    quiet_libraries(quiet)
    from lusifer.recipes.files import load_recipe

    checked = load_recipe(recipe, context.args)
    if dry_run:
        from lusifer.training.planning.dry_run import dry_run as plan

        facts = plan(checked, recipe, ranks=ranks, gpu=gpu, overrides=context.args)
        emit(facts) if as_json else _show_plan(facts)
        return
    from lusifer.training.llm_baseline import train_llm_alone
    from lusifer.training.run import train as run

    folder = (train_llm_alone if llm_alone else run)(checked, progress=not quiet)
    if as_json:
        emit({"model": str(folder)})
        return
    if not llm_alone and not quiet:
        _show_outcome(Path(checked.output))
    say(f"model: {folder}")
    if not quiet:
        say_next(
            [f"lusifer evaluate {quote(str(folder))}", f"lusifer index add my-index FILES --model {quote(str(folder))}"]
        )


def _show_outcome(output: Path) -> None:
    from lusifer.training.outcome import outcome

    if rows := outcome(output):
        print_table(list(rows[0]), [list(row.values()) for row in rows])
        say("English, other languages: mean cosine with the embeddings before the stage, of everyday sentences")


def _show_sets(sets: list[dict[str, Any]]) -> None:
    readable = [row for row in sets if "rows" in row]
    if readable:
        cells = [(row["stage"], row["source"], f"{row['rows']:,}", str(row.get("epochs", ""))) for row in readable]
        print_table(("stage", "set", "rows", "epochs"), cells)
    if problems := [row for row in sets if "problem" in row]:
        say(f"{len(problems)} of {len(sets)} datasets cannot be read here: {problems[0]['problem']}")


def _show_verdict(name: str, stage: dict[str, Any], card: str) -> None:
    total = f"{name}: {stage['memory_gb_total']:g} GB per process"
    if stage["fits"]:
        say(f"{total} fits in {card}")
    else:
        remedy = f"it would fit with {stage['advice']}" if stage["advice"] else "nothing in the recipe makes it fit"
        say(f"{total} does not fit in {card}; {remedy}")


def _show_plan(facts: dict[str, Any]) -> None:
    parts = [(part, f"{row['total']:,}", f"{row['trainable']:,}") for part, row in facts["parameters"].items()]
    print_table(("part", "parameters", "trainable in the last stage"), parts)
    rows = []
    for key in next(iter(facts["stages"].values()), {}):
        cells = [stage[key] for stage in facts["stages"].values()]
        if key == "memory_gb":
            cells = ["\n".join(f"{part} {gb:.2f}" for part, gb in cell.items()) for cell in cells]
        if key not in ("fits", "advice"):
            rows.append([key, *[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in cells]])
    print_table(("", *facts["stages"]), rows)
    _show_sets(facts["sets"])
    say(f"host memory {facts['host_gb']:g} GB, disk {facts['disk_gb']:g} GB plus the data")
    for name, stage in facts["stages"].items():
        if "fits" in stage:
            _show_verdict(name, stage, facts["card"])
    if "auto" in facts:
        say(f"precision auto is {facts['auto']}")
    say(facts["launch"])
