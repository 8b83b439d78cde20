"""The commands ``lusifer info``, ``lusifer merge`` and ``lusifer convert``: what is done with a checkpoint."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated

import typer

from lusifer.cli.console import Json, Model, Quiet, emit, print_table, say
from lusifer.quiet import quiet_libraries

logger = logging.getLogger(__name__)

convert_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", help="Convert checkpoints from other formats."
)


@convert_app.callback()
def _named() -> None:
    """Convert checkpoints from other formats."""


def info(model: Model, as_json: Json = False) -> None:
    """Shows a model's parameters by part, size, languages and provenance; for other embedders, what they declare.

    Example: `lusifer info runs/quickstart/model`
    """
    quiet_libraries(True)
    from lusifer.loading import describe

    facts = describe(model)
    if as_json:
        emit(facts)
        return
    rows = [
        (part, f"{row['total']:,}", f"{row['trainable']:,}", f"{row['total'] - row['trainable']:,}")
        for part, row in facts["parameters"].items()
    ]
    print_table(("part", "parameters", "trained", "frozen"), rows)
    for key, value in facts.items():
        if key != "parameters" and value is not None:
            say(f"{key}: {_shown(value)}")


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)


def merge(
    model: Model,
    output: Annotated[Path, typer.Argument(help="New folder for the standalone checkpoint.")],
    quiet: Quiet = False,
) -> None:
    """Merges the adapters into the backbones and writes a standalone checkpoint.

    Example: `lusifer merge runs/quickstart/model runs/quickstart/standalone`
    """
    quiet_libraries(quiet)
    from lusifer.loading import load_checkpoint
    from lusifer.locks import alone_at_new
    from lusifer.model.sentence_transformer import lusifer_model, save_atomically

    with alone_at_new(output):
        logger.info("loading %s", model)
        loaded = load_checkpoint(model)
        logger.info("merging the adapters")
        lusifer_model(loaded).merge()
        logger.info("writing %s", output)
        save_atomically(loaded, output)
    say(f"standalone checkpoint: {output}")


@convert_app.command("pickled")
def pickled(
    source: Annotated[
        str, typer.Argument(help="Folder or hub id of a model with pytorch_model.bin.", show_default=False)
    ],
    output: Annotated[Path, typer.Argument(help="New folder for the converted model.", show_default=False)],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Converts the weights of a backbone published only as a pickle to safetensors.

    Reads tensors only: no code in the file runs. Use the new folder as encoder or llm.

    Example: `lusifer convert pickled google/mt5-large mt5-large`
    """
    quiet_libraries(quiet)
    from lusifer.interop.pickled import convert_pickled

    facts = convert_pickled(source, output)
    emit(facts) if as_json else say(f"{facts['tensors']:,} tensors -> {facts['checkpoint']}")


@convert_app.command("authors")
def authors(
    source: Annotated[
        str, typer.Argument(help="Folder or hub id of a checkpoint published by the authors.", show_default=False)
    ],
    output: Annotated[Path, typer.Argument(help="Folder for the converted checkpoint.", show_default=False)],
    merge: Annotated[
        bool, typer.Option("--merge", help="Store all weights with adapters merged, not the backbones' names.")
    ] = False,
    encoder: Annotated[str | None, typer.Option(help="The encoder, if not the one the checkpoint names.")] = None,
    llm: Annotated[str | None, typer.Option(help="The LLM, if not the one the checkpoint names.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Converts a published LUSIFER checkpoint, tensor by tensor, in little memory.

    The embeddings equal those of the authors' code on one text at a time. Both backbones' configurations must be
    available and, without `--merge`, their weights too, which are compared with the checkpoint's.

    Examples:
    - `lusifer convert authors Hieuman/LUSIFER lusifer-published`
    - `lusifer convert authors ./LUSIFER standalone --merge`
    """
    quiet_libraries(quiet)
    from lusifer.interop.authors import convert_authors

    facts = convert_authors(source, output, merge=merge, encoder=encoder, llm=llm, progress=not quiet)
    emit(facts) if as_json else say(f"{facts['tensors']:,} tensors -> {facts['checkpoint']}")
