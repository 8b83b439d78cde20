"""The command ``lusifer convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lusifer.cli.console import Json, Quiet, emit
from lusifer.quiet import quiet_libraries

convert_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", help="Checkpoints of other formats as ours."
)


@convert_app.callback()
def _named() -> None:
    """Checkpoints of other formats as ours."""


@convert_app.command("authors")
def authors(
    source: Annotated[
        str, typer.Argument(help="Folder or hub id of a checkpoint the authors published.", show_default=False)
    ],
    output: Annotated[Path, typer.Argument(help="Folder for ours.", show_default=False)],
    merge: Annotated[
        bool, typer.Option("--merge", help="Store every weight, adapters merged; else backbones are named.")
    ] = False,
    encoder: Annotated[str | None, typer.Option(help="The encoder, where it is not what the checkpoint names.")] = None,
    llm: Annotated[str | None, typer.Option(help="The same for the LLM.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Converts a published LUSIFER checkpoint, tensor by tensor, in little memory.

    The embeddings are those of the authors' code on one text at a time. Both backbones' configurations must be in
    reach, and without `--merge` also their weights, which are compared with the checkpoint's.

    Examples:
    - `lusifer convert authors Hieuman/LUSIFER lusifer-published`
    - `lusifer convert authors ./LUSIFER standalone --merge`
    """
    quiet_libraries(quiet)
    from lusifer.interop.authors import convert_authors

    facts = convert_authors(source, output, merge=merge, encoder=encoder, llm=llm, progress=not quiet)
    emit(facts) if as_json else typer.echo(f"{facts['tensors']:,} tensors -> {facts['checkpoint']}")
