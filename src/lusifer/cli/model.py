"""The commands ``lusifer info`` and ``lusifer merge``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lusifer.cli.console import Json, Quiet, emit
from lusifer.errors import LusiferError
from lusifer.quiet import quiet_libraries

Model = Annotated[
    str, typer.Argument(help="Checkpoint folder, hub id, or `starter`: the released model.", show_default=False)
]


def info(model: Model, as_json: Json = False) -> None:
    """Shows what a checkpoint is made of: parameters by part, size, languages, provenance.

    Example: `lusifer info runs/quickstart/model`
    """
    quiet_libraries(True)
    from lusifer.loading import describe

    facts = describe(model)
    if as_json:
        emit(facts)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("part", "parameters", "trained", "frozen")
    for part, row in facts["parameters"].items():
        table.add_row(part, f"{row['total']:,}", f"{row['trainable']:,}", f"{row['total'] - row['trainable']:,}")
    console = Console()
    console.print(table)
    for key in ("encoder", "llm", "llm_layers", "dimension", "max_seq_length", "pooling", "checkpoint_mb", "languages"):
        value = facts[key]
        console.print(f"{key}: {', '.join(value) if isinstance(value, list) else value}")
    console.print(f"provenance: {json.dumps(facts['provenance'], ensure_ascii=False)}")


def merge(
    model: Model,
    output: Annotated[Path, typer.Argument(help="New folder for the standalone checkpoint.")],
    quiet: Quiet = False,
) -> None:
    """Merges the adapters into the backbones and writes a checkpoint that needs neither by name.

    Example: `lusifer merge runs/quickstart/model runs/quickstart/standalone`
    """
    quiet_libraries(quiet)
    from lusifer.loading import load_checkpoint
    from lusifer.model.sentence_transformer import lusifer_model, save_atomically

    if output.exists():
        raise LusiferError(f"{str(output)!r} exists already; choose a new folder")
    loaded = load_checkpoint(model)
    lusifer_model(loaded).merge()
    save_atomically(loaded, output)
    typer.echo(f"standalone checkpoint: {output}")
