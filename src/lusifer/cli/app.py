"""The ``lusifer`` command: puts the commands together; each is a function in a module of this package."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Annotated

# The bars of the libraries beneath would drown our own.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")  # A default only: our own bars say for themselves whether they show.

import typer

from lusifer import __version__
from lusifer.cli.adapt import adapt
from lusifer.cli.console import PASS_ON, say
from lusifer.cli.data import data_app
from lusifer.cli.encode import encode
from lusifer.cli.evaluate import benchmark_app, diagnose, evaluate, report
from lusifer.cli.export import export_app
from lusifer.cli.hub import card, push
from lusifer.cli.init import init
from lusifer.cli.model import convert_app, info, merge
from lusifer.cli.search import index_app, search
from lusifer.cli.serve import serve
from lusifer.cli.train import fetch, quickstart, train
from lusifer.errors import LusiferError
from lusifer.terminal import visible

app = typer.Typer(
    name="lusifer",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        names = ("torch", "transformers", "sentence-transformers", "peft")
        versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
        say(f"lusifer {__version__} (Python {platform.python_version()}, {versions})")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print versions and exit.")
    ] = False,
) -> None:
    """Extend an English-centric LLM embedder to every language of a multilingual encoder.

    Start with `lusifer quickstart`: it fetches small backbones, trains on English and scores
    23 languages.
    """


app.add_typer(convert_app, name="convert", rich_help_panel="Using a model")
app.add_typer(export_app, name="export", rich_help_panel="Using a model")
app.add_typer(data_app, name="data", rich_help_panel="Data and backbones")
app.add_typer(benchmark_app, name="benchmark", rich_help_panel="Using a model")
app.add_typer(index_app, name="index", rich_help_panel="Search")
app.command(rich_help_panel="Search")(search)
for command in (encode, evaluate, report, diagnose, serve, card, push, info, merge):
    app.command(rich_help_panel="Using a model")(command)
app.command(rich_help_panel="Training")(adapt)
app.command(rich_help_panel="Training")(init)
app.command(rich_help_panel="Training", context_settings=PASS_ON)(quickstart)
app.command(rich_help_panel="Training", context_settings=PASS_ON)(train)
app.command(rich_help_panel="Data and backbones")(fetch)


def _kept(stop: BaseException | None) -> str:
    """What a command says of its work when it is interrupted."""
    while stop is not None:
        if isinstance(stop, KeyboardInterrupt) and stop.args:
            return str(stop)
        stop = stop.__context__
    return ""


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2, Ctrl-C is 130."""
    try:
        app()
    except LusiferError as error:
        say(f"lusifer: {visible(str(error), lines=False)}", err=True)
        raise SystemExit(2) from None
    except SystemExit as stop:
        if stop.code == 130:  # Typer's answer to Ctrl-C.
            say(f"lusifer: interrupted; {_kept(stop) or 'run the same command again to resume'}", err=True)
        raise
    except OSError as error:
        say(f"lusifer: {error.filename or 'cannot write'}: {error.strerror or error}", err=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
