"""The ``lusifer data`` commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lusifer.cli.console import PASS_ON, Device, Json, Quiet, emit, say
from lusifer.quiet import quiet_libraries
from lusifer.terminal import visible

data_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="Check training data, mine negatives.")


@data_app.command(context_settings=PASS_ON)
def check(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="A recipe, e.g. recipes/quickstart.yaml.", show_default=False)],
    against: Annotated[list[str] | None, typer.Option(help="File or folder of evaluation data; repeatable.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Checks and summarises all data of a recipe; exit code 1 on errors.

    Every record is checked. Texts are compared with the evaluation data (always including the bundled everyday set),
    ignoring case and punctuation. Overrides of the recipe work as in `lusifer train`.

    Examples:
    - `lusifer data check recipes/quickstart.yaml`
    - `lusifer data check recipes/quickstart.yaml --against eval-data --align.batch_size 64`
    """
    quiet_libraries(quiet)
    from lusifer.data.check import check as run
    from lusifer.recipes.files import load_recipe

    report = run(load_recipe(recipe, context.args), against=against or (), progress=not quiet)
    emit(report) if as_json else _print(report)
    if not report["ok"]:
        raise typer.Exit(1)


@data_app.command()
def mine(
    source: Annotated[str, typer.Argument(metavar="IN", help="Pairs: file, folder, glob, starter name or hub id.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="New .jsonl or .jsonl.gz file.")],
    model: Annotated[str, typer.Option(help="Teacher: any Sentence Transformers model, hub id or folder.")],
    negatives: Annotated[int, typer.Option(min=1, help="Maximum negatives per row.")] = 7,
    relative_margin: Annotated[
        float, typer.Option(help="A negative must score this share below the row's lowest-scoring positive.")
    ] = 0.05,
    range_min: Annotated[int, typer.Option(help="Number of top-ranked passages to skip.")] = 0,
    range_max: Annotated[int, typer.Option(help="Number of top-ranked passages to consider.")] = 100,
    corpus: Annotated[str | None, typer.Option(help="Additional passages: a dataset with a `text` column.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Prompt for every text; default: the teacher's query and document prompts.")
    ] = None,
    prompt_name: Annotated[
        str | None, typer.Option(help="Name of one of the teacher's prompts, for every text.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per forward pass.")] = 32,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Adds hard negatives to pairs: passages that the teacher scores close to a query, but clearly below its positive.

    Passages are the positives of all rows and those of `--corpus`. A row's own texts, and copies that differ only in
    case or punctuation, are never its negatives. The hardest come first. After an interruption, run the same command
    again to resume.

    Example: `lusifer data mine pairs.jsonl mined.jsonl.gz --model runs/quickstart/model`
    """
    quiet_libraries(quiet)
    from lusifer.data.mining import Settings, check_output
    from lusifer.data.mining import mine as run
    from lusifer.data.prompts import Role, prompt_for
    from lusifer.loading import load_checkpoint, resolve
    from lusifer.locks import alone_at
    from lusifer.model.fingerprint import model_hash
    from lusifer.recipes.schema import DataRecipe

    settings = Settings(negatives, relative_margin, range_min, range_max)
    check_output(output)
    with alone_at(output):
        content = model_hash(resolve(model))
        teacher = load_checkpoint(model, device=device)
        options: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": False}
        roles: tuple[Role, Role] = ("query", "document")
        prompts = {role: prompt_for(teacher, role, prompt=prompt, prompt_name=prompt_name) for role in roles}
        facts = run(
            DataRecipe(source=source),
            output,
            lambda texts: teacher.encode_document(texts, prompt=prompts["document"], **options),
            teacher=model,
            teacher_hash=content,
            settings=settings,
            corpus=DataRecipe(source=corpus) if corpus else None,
            device=str(teacher.device),
            embed_query=lambda texts: teacher.encode_query(texts, prompt=prompts["query"], **options),
            prompts=prompts,
            progress=not quiet,
        )
    emit(facts) if as_json else _print_mined(facts, output)


def _print_mined(facts: dict[str, Any], output: Path) -> None:
    say(f"{facts['rows']:,} rows, {facts['mean_negatives']:.2f} negatives each -> {output}")
    if facts["rows_short"]:
        say(
            f"warning: {facts['rows_short']:,} rows have fewer than {facts['negatives']} negatives, "
            f"{facts['rows_without']:,} none; raise --range-max or lower --relative-margin",
            err=True,
        )


def _print(report: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from lusifer.data.check import SAMPLE

    console = Console(width=None if Console().is_terminal else 140)
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("set", overflow="fold")
    tokens = [f"{part} tokens\nmean/p95/max" for part in ("encoder", "LLM")]
    for name in ("task", "rows", "steps", "epochs", *tokens, "truncated", "repeats", "negatives", "leaks"):
        table.add_column(name, justify="left" if name == "task" else "right", no_wrap=True)
    for fact in report["sets"]:
        counts = [fact[f"{kind}_tokens"] for kind in ("encoder", "llm")]
        name = fact["dataset"] if len(fact["dataset"]) <= 30 else Path(fact["dataset"]).name
        name = escape(visible(name))
        table.add_row(
            name + ("" if fact["clusters"] is None else f", {fact['clusters']:,} clusters"), fact["task"],
            f"{fact['rows']:,}", f"{fact['share']:.1%}", f"{fact['epochs']:.2f}",
            *(f"{count['mean']:.0f}/{count['p95']:.0f}/{count['max']}" for count in counts), f"{fact['truncated']:.1%}",
            f"{fact['duplicates']:,}", f"{fact['negatives_per_row']:.1f}", f"{fact['leaks']:,}",
        )  # fmt: skip
    if report["sets"]:
        console.print(table)
        console.print(
            f"tokens and truncated: from a seeded sample of at most {SAMPLE:,} rows per dataset",
            highlight=False,
        )
    console.print(f"compared with {report['evaluation_texts']:,} texts of evaluation data", highlight=False)
    for kind in ("warnings", "errors"):
        for line in report[kind]:
            say(f"{kind[:-1]}: {line}", err=True)
    say("no problems found" if report["ok"] else f"errors: {len(report['errors'])}", err=True)
