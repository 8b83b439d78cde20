"""What the commands share: some options, and how JSON and tables are printed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer

from lusifer.terminal import visible, visible_json

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}  # For overrides of a recipe.
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars, warnings only.")]
Model = Annotated[
    str, typer.Argument(help="Checkpoint folder, hub id, or `starter` for the released model.", show_default=False)
]
AnyModel = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Any Sentence Transformers model: folder, hub id, or `starter` for the released model.",
        show_default=False,
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or mps; default: the best available.")]


def comma_separated(names: str) -> list[str]:
    """The names in an option that takes several."""
    return [name.strip() for name in names.split(",") if name.strip()]


def emit(value: dict[str, Any]) -> None:
    """Prints one JSON object."""
    typer.echo(visible_json(json.dumps(value, ensure_ascii=False)))


def say(text: str, *, err: bool = False) -> None:
    """Prints text, perhaps of strangers: nothing in it reaches the terminal but characters to see.

    Args:
        text: One or more lines.
        err: Whether to standard error.
    """
    typer.echo(visible(text), err=err)


def say_next(commands: Iterable[str]) -> None:
    """Prints what a user would run next, ready to be copied."""
    for number, command in enumerate(commands):
        say(f"{'next: ' if number == 0 else '      '}{command}")


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table of text to standard output."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*header)
    for row in rows:
        table.add_row(*(escape(visible(cell)) for cell in row))
    Console().print(table)
