"""The ``lusifer`` command."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

# The bars of the libraries beneath would drown our own.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")  # A default only: our own bars say for themselves whether they show.

import typer

from lusifer.console import Json, Quiet, emit, quiet_libraries
from lusifer.convert_cli import convert_app
from lusifer.data_cli import data_app
from lusifer.encode_cli import encode as encode_command
from lusifer.errors import LusiferError
from lusifer.eval_cli import benchmark_app
from lusifer.eval_cli import diagnose as diagnose_command
from lusifer.eval_cli import evaluate as evaluate_command
from lusifer.eval_cli import report as report_command
from lusifer.hub_cli import card as card_command
from lusifer.hub_cli import push as push_command
from lusifer.init_cli import init as init_command
from lusifer.search_cli import index_app
from lusifer.search_cli import search as search_command
from lusifer.serve_cli import serve as serve_command

app = typer.Typer(
    name="lusifer",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Give an English-centric LLM embedder every language its multilingual encoder knows.\n\n"
    "Start with `lusifer quickstart`: it fetches two small backbones, trains on English and scores "
    "23 languages it never trained on.",
)
app.add_typer(convert_app, name="convert", rich_help_panel="Using a model")
app.add_typer(data_app, name="data", rich_help_panel="Data and backbones")
app.add_typer(benchmark_app, name="benchmark", rich_help_panel="Using a model")
app.add_typer(index_app, name="index", rich_help_panel="Search")
app.command("search", rich_help_panel="Search")(search_command)
app.command("encode", rich_help_panel="Using a model")(encode_command)
app.command("evaluate", rich_help_panel="Using a model")(evaluate_command)
app.command("report", rich_help_panel="Using a model")(report_command)
app.command("diagnose", rich_help_panel="Using a model")(diagnose_command)
app.command("serve", rich_help_panel="Using a model")(serve_command)
app.command("card", rich_help_panel="Using a model")(card_command)
app.command("push", rich_help_panel="Using a model")(push_command)
app.command("init", rich_help_panel="Training")(init_command)
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}

Model = Annotated[
    str, typer.Argument(help="Checkpoint folder, hub id, or `starter`: the released model.", show_default=False)
]


@app.command(rich_help_panel="Data and backbones")
def fetch(
    names: Annotated[list[str] | None, typer.Argument(help="Starter names; all when left out.")] = None,
    force: Annotated[bool, typer.Option(help="Fetch again even what is there.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fetches the starter backbones once; everything works offline afterwards.

    They go to `$LUSIFER_CACHE` (else `~/.cache/lusifer`): about 130 MB to download, 410 MB on disk.

    Example: `lusifer fetch`
    """
    quiet_libraries(quiet)
    from lusifer.starter import fetch as fetch_starters

    found = fetch_starters(names or None, force=force)
    if as_json:
        emit({name: str(path) for name, path in found.items()})
    else:
        for name, path in found.items():
            typer.echo(f"{name}  {path}")


@app.command(rich_help_panel="Training", context_settings=_PASS_ON)
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
    from lusifer.recipe_files import load_recipe

    checked = load_recipe(recipe, context.args)
    if dry_run:
        from lusifer.dryrun import dry_run as plan

        facts = plan(checked, recipe, ranks=ranks)
        emit(facts) if as_json else _show_plan(facts)
        return
    from lusifer.baselines import train_llm_alone
    from lusifer.training import train as run

    folder = (train_llm_alone if llm_alone else run)(checked, progress=not quiet)
    emit({"model": str(folder)}) if as_json else typer.echo(f"model: {folder}")


def _show_plan(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("part", "parameters", "learn in the last stage")
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


@app.command(rich_help_panel="Using a model")
def info(model: Model, as_json: Json = False) -> None:
    """Shows what a checkpoint is made of: parameters by part, size, languages, provenance.

    Example: `lusifer info runs/quickstart/model`
    """
    quiet_libraries(True)
    from lusifer.encoding import describe

    facts = describe(model)
    if as_json:
        emit(facts)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("part", "parameters", "learned in training", "frozen")
    for part, row in facts["parameters"].items():
        table.add_row(part, f"{row['total']:,}", f"{row['trainable']:,}", f"{row['total'] - row['trainable']:,}")
    console = Console()
    console.print(table)
    for key in (
        "encoder",
        "llm",
        "llm_layers",
        "dimension",
        "max_seq_length",
        "pooling",
        "checkpoint_mb",
        "languages",
    ):
        value = facts[key]
        console.print(f"{key}: {', '.join(value) if isinstance(value, list) else value}")
    console.print(f"provenance: {json.dumps(facts['provenance'], ensure_ascii=False)}")


@app.command(rich_help_panel="Using a model")
def merge(
    model: Model,
    output: Annotated[Path, typer.Argument(help="New folder for the standalone checkpoint.")],
    quiet: Quiet = False,
) -> None:
    """Folds the adapters into the backbones and writes a checkpoint that needs neither by name.

    Example: `lusifer merge runs/quickstart/model runs/quickstart/standalone`
    """
    quiet_libraries(quiet)
    from lusifer.encoding import load_checkpoint, lusifer_model
    from lusifer.sentence import save_atomically

    if output.exists():
        raise LusiferError(f"{str(output)!r} exists already; choose a new folder")
    loaded = load_checkpoint(model)
    lusifer_model(loaded).merge()
    save_atomically(loaded, output)
    typer.echo(f"standalone checkpoint: {output}")


@app.command(rich_help_panel="Training", context_settings=_PASS_ON)
def quickstart(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="Where to write.")] = Path("runs/quickstart"),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fetches the starter, trains on English, scores three systems in 23 languages, writes a report.

    Interrupt it whenever you like: the same command goes on where it was.

    Example: `lusifer quickstart`
    """
    quiet_libraries(quiet)
    from lusifer.everyday import mean_score
    from lusifer.quickstart import quickstart as run

    results = run(output, overrides=context.args, progress=not quiet)
    if as_json:
        emit(results)
        return
    seen = results["seen_languages"]
    for name, scores in results["systems"].items():
        mean = mean_score(scores["translation_retrieval"], seen)
        typer.echo(f"{name:8}  translation retrieval, mean over {len(seen) - 1} languages: {100 * mean:.1f} %")
    typer.echo(f"report: {output / 'report.md'}   plot: {output / 'scores.png'}   model: {output / 'model'}")


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2, Ctrl-C is 130."""
    try:
        app()
    except LusiferError as error:
        typer.echo(f"lusifer: {error}", err=True)
        raise SystemExit(2) from None
    except SystemExit as stop:
        if stop.code == 130:  # Typer's answer to Ctrl-C.
            typer.echo("lusifer: interrupted; the same command goes on from here", err=True)
        raise
    except OSError as error:
        typer.echo(f"lusifer: {error.filename or 'cannot write'}: {error.strerror or error}", err=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
