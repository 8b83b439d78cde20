"""The ``lusifer`` command: puts the commands together; each is a function in a module of this package."""

from __future__ import annotations

import os

# The bars of the libraries beneath would drown our own.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")  # A default only: our own bars say for themselves whether they show.

import typer

from lusifer.cli.convert import convert_app
from lusifer.cli.data import data_app
from lusifer.cli.encode import encode as encode_command
from lusifer.cli.evaluate import benchmark_app
from lusifer.cli.evaluate import diagnose as diagnose_command
from lusifer.cli.evaluate import evaluate as evaluate_command
from lusifer.cli.evaluate import report as report_command
from lusifer.cli.hub import card as card_command
from lusifer.cli.hub import push as push_command
from lusifer.cli.init import init as init_command
from lusifer.cli.model import info as info_command
from lusifer.cli.model import merge as merge_command
from lusifer.cli.search import index_app
from lusifer.cli.search import search as search_command
from lusifer.cli.serve import serve as serve_command
from lusifer.cli.starter import fetch as fetch_command
from lusifer.cli.starter import quickstart as quickstart_command
from lusifer.cli.train import PASS_ON
from lusifer.cli.train import train as train_command
from lusifer.errors import LusiferError

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
app.command("quickstart", rich_help_panel="Training", context_settings=PASS_ON)(quickstart_command)
app.command("train", rich_help_panel="Training", context_settings=PASS_ON)(train_command)
app.command("fetch", rich_help_panel="Data and backbones")(fetch_command)
app.command("info", rich_help_panel="Using a model")(info_command)
app.command("merge", rich_help_panel="Using a model")(merge_command)


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
