"""The command ``lusifer init``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from lusifer.cli.console import Json, emit, say
from lusifer.quiet import quiet_libraries


def init(
    output: Annotated[Path, typer.Argument(help="Recipe file to write; in a folder, recipe.yaml.", show_default=False)],
    llm: Annotated[
        str,
        typer.Option(help="Your English embedder: folder or hub id of an LLM, or of an adapter.", show_default=False),
    ],
    encoder: Annotated[
        str, typer.Option(help="The multilingual encoder: folder, hub id or starter name.")
    ] = "FacebookAI/xlm-roberta-large",
    adapter: Annotated[
        list[str] | None, typer.Option(help="A LoRA adapter for the LLM; repeatable, applied in order.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="English pairs (query, positive) to train on; default: the starter's verses.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="English texts for stages 0 and 1; default: the starter's.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing recipe.")] = False,
    as_json: Json = False,
) -> None:
    """Writes a recipe that makes an English LLM embedder multilingual.

    Reads pooling, prompts, attention, adapters and tokenizer from the embedder's files (Sentence Transformers folder,
    LLM2Vec or GritLM style model, adapter, plain LLM). Shows each property with its source file and its effect, here
    and in the recipe.

    Examples:
    - `lusifer init --llm intfloat/e5-mistral-7b-instruct mine.yaml`
    - `lusifer init --llm ./english-embedder --encoder jhu-clsp/mmBERT-base mine/`
    - `lusifer init --llm ./base --adapter ./mntp --adapter ./supervised --data pairs.jsonl mine.yaml`
    """
    quiet_libraries(True)
    from lusifer.data.records import look_up
    from lusifer.errors import LusiferError
    from lusifer.interop.llm_embedder import inspect_embedder
    from lusifer.interop.recipe_writer import compose, recipe_path, write_recipe
    from lusifer.recipes.files import load_recipe
    from lusifer.recipes.schema import DataRecipe
    from lusifer.training.planning.dry_run import limits_here

    path = recipe_path(output)
    if path.exists() and not force:
        raise LusiferError(f"{str(path)!r} exists; choose another name, or --force to replace it")
    for source in (data, text):
        if source is not None:
            look_up(DataRecipe(source=source))
    embedder = inspect_embedder(llm, adapter)
    name = path.stem if path.stem != "recipe" else path.resolve().parent.name
    options: dict[str, Any] = {"pairs": data, "text": text, "output": f"runs/{name}"}
    write_recipe(path, compose(encoder, embedder, **options))
    if limits := limits_here(recipe := load_recipe(path), ranks=8 if recipe.scale.strategy == "fsdp2" else 1):
        write_recipe(path, compose(encoder, embedder, limits=limits, **options))
    if as_json:
        emit({"recipe": str(path), **asdict(embedder), "config": embedder.config.model_type})
        return
    for note in embedder.notes:
        say(f"{note.what}  ({note.where})" + (f"\n    {note.so}" if note.so else ""))
    say(f"recipe: {path}\nnext: lusifer train {path} --dry-run")
