"""The commands ``lusifer fetch`` and ``lusifer quickstart``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lusifer.cli.console import Json, Quiet, emit
from lusifer.quiet import quiet_libraries


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
    from lusifer.starter.fetch import fetch as fetch_starters

    folders = fetch_starters(names or None, force=force)
    if as_json:
        emit({name: str(path) for name, path in folders.items()})
    else:
        for name, path in folders.items():
            typer.echo(f"{name}  {path}")


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
    from lusifer.evaluation.everyday import mean_score
    from lusifer.quickstart.run import quickstart as run

    results = run(output, overrides=context.args, progress=not quiet)
    if as_json:
        emit(results)
        return
    seen = results["seen_languages"]
    for name, scores in results["systems"].items():
        mean = mean_score(scores["translation_retrieval"], seen)
        typer.echo(f"{name:8}  translation retrieval, mean over {len(seen) - 1} languages: {100 * mean:.1f} %")
    typer.echo(f"report: {output / 'report.md'}   plot: {output / 'scores.png'}   model: {output / 'model'}")
