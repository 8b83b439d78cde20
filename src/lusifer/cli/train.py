"""The command ``lusifer train``: runs a recipe, or says what it would take."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lusifer.cli.console import Json, Quiet, emit
from lusifer.quiet import quiet_libraries

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def train(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="A recipe, e.g. recipes/quickstart.yaml.", show_default=False)],
    llm_alone: Annotated[bool, typer.Option("--llm-alone", help="Train the baseline instead: the LLM alone.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would take; loads no weights.")] = False,
    ranks: Annotated[int, typer.Option(min=1, help="Processes to plan for, with --dry-run.")] = 1,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Runs a recipe: stage 0, 1 and 2. Call it again after an interruption and it goes on.

    Every field can be overridden by its dotted name.

    Examples:
    - `lusifer train recipes/quickstart.yaml`
    - `lusifer train recipes/quickstart.yaml --contrast.steps 400 --output runs/longer`
    - `lusifer train recipes/quickstart.yaml --align.enabled false`
    - `lusifer train recipes/quickstart.yaml --contrast.data.0.weight 2`
    - `lusifer train recipes/quickstart.yaml --llm-alone`
    """
    quiet_libraries(quiet)
    from lusifer.recipes.files import load_recipe

    checked = load_recipe(recipe, context.args)
    if dry_run:
        from lusifer.training.dry_run import dry_run as plan

        facts = plan(checked, recipe, ranks=ranks)
        emit(facts) if as_json else _show_plan(facts)
        return
    from lusifer.training.llm_baseline import train_llm_alone
    from lusifer.training.run import train as run

    folder = (train_llm_alone if llm_alone else run)(checked, progress=not quiet)
    emit({"model": str(folder)}) if as_json else typer.echo(f"model: {folder}")


def _show_plan(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("part", "parameters", "trainable in the last stage")
    for part, row in facts["parameters"].items():
        table.add_row(part, f"{row['total']:,}", f"{row['trainable']:,}")
    console.print(table)
    table = Table("", *facts["stages"])
    for key in next(iter(facts["stages"].values()), {}):
        cells = [stage[key] for stage in facts["stages"].values()]
        if key == "memory_gb":
            cells = ["\n".join(f"{part} {gb:.2f}" for part, gb in cell.items()) for cell in cells]
        table.add_row(key, *[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in cells])
    console.print(table)
    console.print(facts["launch"], soft_wrap=True)
