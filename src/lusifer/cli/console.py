"""What the commands share: the options ``--json`` and ``--quiet``, and how JSON is printed."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to standard output, for programs.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars, warnings only.")]


def emit(value: dict[str, Any]) -> None:
    """Prints one JSON object."""
    typer.echo(json.dumps(value, ensure_ascii=False))
