"""What the commands share: options, and quiet libraries."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to standard output, for programs.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars, warnings only.")]


def quiet_libraries(quiet: bool) -> None:
    """Logs our own messages to standard error and silences the libraries beneath, whose bars drown ours."""
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging as transformers_logging

    logging.basicConfig(
        level=logging.WARNING if quiet else logging.INFO, format="%(message)s", stream=sys.stderr, force=True
    )
    # What goes wrong inside datasets reaches the user as one line of ours.
    logging.getLogger("datasets").setLevel(logging.CRITICAL)
    for name in ("httpx", "sentence_transformers", "transformers", "filelock", "mteb"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bar()
    warnings.filterwarnings("ignore")


def emit(value: dict[str, Any]) -> None:
    """Prints one JSON object."""
    typer.echo(json.dumps(value, ensure_ascii=False))
