"""The commands ``lusifer export onnx`` and ``lusifer export static``: models for places without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lusifer.cli.console import Device, Json, Model, Quiet, emit, say
from lusifer.quiet import quiet_libraries

export_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="Export models for use without torch.")
Output = Annotated[Path, typer.Argument(help="New folder for it.", show_default=False)]


@export_app.callback()
def _named() -> None:
    """Export models for use without torch."""


@export_app.command("onnx")
def onnx(model: Model, output: Output, as_json: Json = False, quiet: Quiet = False) -> None:
    """Writes a whole model as one ONNX graph, from token ids to unit vectors, and its tokenizer.

    Takes a LUSIFER checkpoint, a model of `lusifer adapt`, or any Sentence Transformers model of one transformer. ONNX
    Runtime must give torch's vectors to 1e-4 before the folder appears. Needs `lusifer[onnx]`.

    Example: `lusifer export onnx starter starter-onnx`
    """
    quiet_libraries(quiet)
    from lusifer.export.onnx import export_onnx

    facts = export_onnx(model, output)
    line = f"{facts['megabytes']:,} MB, within {facts['difference']:.0e} of torch -> {facts['model']}"
    emit(facts) if as_json else say(line)


@export_app.command("static")
def static(
    model: Model,
    output: Output,
    dimensions: Annotated[int, typer.Option(min=1, help="Dimensions of the new vectors; at most the model's.")] = 256,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Writes a table of one vector per token: a text's embedding is their weighted mean, without any transformer.

    Far faster and far less accurate than the model: score both before you choose. Its vectors are a space of their own,
    so an index is built anew. The folder is a Sentence Transformers model of built-in modules.

    Example: `lusifer export static starter starter-static`
    """
    quiet_libraries(quiet)
    from lusifer.export.static import export_static

    facts = export_static(model, output, dimensions=dimensions, device=device, progress=not quiet)
    line = f"{facts['tokens']:,} tokens x {facts['dimension']}, {facts['megabytes']:,} MB -> {facts['model']}"
    emit(facts) if as_json else say(line)
