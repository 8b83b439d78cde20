"""The report as one page that loads nothing, and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template

from lusifer.errors import LusiferError, first_line
from lusifer.evaluation.report.results import System
from lusifer.evaluation.report.sections import report
from lusifer.publishing import make_folder, publish_file


def render(systems: Sequence[System], form: str, baselines: Sequence[str] = (), *, published: bool = False) -> str:
    """The report as text; Markdown has the tables of the page, without its bars.

    Args:
        systems: What `lusifer.evaluation.report.results.read` gave.
        form: ``html`` or ``md``.
        baselines: Names of the systems to compare with.
        published: Whether to add the paper's tables.
    """
    return template(f"report.{form}.j2").render(vars(report(systems, baselines, published=published)))


def write(
    systems: Sequence[System], out: Path, baselines: Sequence[str] = (), *, published: bool = False
) -> list[Path]:
    """Writes ``report.html`` and ``report.md``, each whole or not at all; arguments as in `render`.

    Raises:
        LusiferError: If a baseline is none of the systems, or the folder cannot be written.
    """
    names = [system.name for system in systems]
    if unknown := [name for name in baselines if name not in names]:
        raise LusiferError(f"no system {unknown[0]!r} to compare with; there are {', '.join(names)}")
    texts = {out / f"report.{form}": render(systems, form, baselines, published=published) for form in ("html", "md")}
    for path, text in texts.items():
        try:
            make_folder(out)
            with publish_file(path) as staging:
                staging.write_text(text, encoding="utf-8")
        except OSError as error:
            raise LusiferError(f"cannot write {str(path)!r}: {first_line(error)}") from error
    return list(texts)


@cache
def template(name: str) -> Template:
    """A template of ``lusifer/resources``."""
    # Results are foreign text: the page escapes all of it, Markdown what would end a cell or a line.
    environment = Environment(
        autoescape=".html" in name, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters["cell"] = lambda text: " ".join(str(text).split()).replace("|", "\\|")
    return environment.from_string((files("lusifer") / "resources" / name).read_text(encoding="utf-8"))
