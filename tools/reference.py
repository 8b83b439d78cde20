"""Writes docs/reference/recipes.md, tasks.md and cli.md from the types of both files and from the commands themselves.

python tools/reference.py            writes all
python tools/reference.py --check    fails where a page is not what it would write
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

FOLDER = Path(__file__).parent.parent / "docs" / "reference"
_HEAD = "<!-- Made by tools/reference.py: change the docstrings, not this page. -->\n"
_UNWRAPPED = re.compile(r"\s*\n\s*")
_FIELD = re.compile(r"((?:^ {4}# .*\n)*)^ {4}(\w+): (?:(?!  # ).)*(?:  # (.*))?$", re.M)


def meanings(model: type[BaseModel]) -> dict[str, str]:
    """Field to meaning, from the comment above or behind each field of a class and of those it is made of."""
    found: dict[str, str] = {}
    for owner in reversed(model.__mro__):
        if issubclass(owner, BaseModel) and owner is not BaseModel:
            for above, name, behind in _FIELD.findall(inspect.getsource(owner)):
                found[name] = " ".join([*re.findall("# (.*)", above), behind]).strip()
    return found


def kind(annotation: Any) -> str:
    """A type as a reader of YAML would call it."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(kind(part) for part in inner if part is not NoneType))
    if origin is list:
        return f"list of {kind(inner[0])}"
    if origin is tuple:
        return f"[{', '.join(kind(part) for part in inner)}]"
    if origin is dict:
        return "mapping"
    if hasattr(annotation, "__metadata__"):
        return kind(annotation.__origin__)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    return {str: "text", int: "whole number", float: "number", bool: "true or false"}.get(annotation, str(annotation))


def default(field: Any) -> str:
    """What holds where a field is left out."""
    if field.default is PydanticUndefined:
        return "**required**"
    value = field.default
    if isinstance(value, BaseModel):
        changed = value.model_dump(exclude_defaults=True)
        return f"`{changed}`" if changed else "its defaults"
    return (
        "none"
        if value is None or value in ([], {})
        else f"`{str(value).lower() if value is True or value is False else value}`"
    )


def bounds(field: Any) -> str:
    """Limits of a number, as pydantic keeps them."""
    signs = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    found = [f"{word} {getattr(m, sign):g}" for m in field.metadata for sign, word in signs.items() if hasattr(m, sign)]
    return f" ({', '.join(found)})" if found else ""


def recipes() -> str:
    """The page on recipes.

    Raises:
        ValueError: If a field has no meaning written down.
    """
    from lusifer.recipes import schema as module

    parts = [
        _HEAD,
        "# Recipes\n\nA recipe is one YAML file. Unknown keys are refused with the nearest name, and every value is "
        "checked before any weight is loaded. Every field can be overridden on the command line by its dotted name, "
        "also in lists: `--contrast.steps 400`, `--contrast.data.0.weight 2`. [Training](../training.md) says how to "
        "use them.\n",
    ]
    names = "Recipe ModelRecipe Lora WarmStartRecipe AlignRecipe ContrastRecipe DataRecipe ScaleRecipe"
    return "\n".join([*parts, *_types(module, names.split())])


def _types(module: Any, names: list[str]) -> list[str]:
    """A table of every type's fields."""
    parts = []
    for name in names:
        model = getattr(module, name)
        said = meanings(model)
        first = _UNWRAPPED.sub(" ", model.__doc__ or "").strip()
        rows = [f"## {name}\n\n{first}\n", "| field | type | default | |", "|---|---|---|---|"]
        for field, info in model.model_fields.items():
            if not said.get(field):
                raise ValueError(f"{name}.{field} has no comment that says what it is")
            rows.append(f"| `{field}` | {kind(info.annotation)}{bounds(info)} | {default(info)} | {said[field]} |")
        parts.append("\n".join(rows) + "\n")
    return parts


def tasks() -> str:
    """The page on tasks of own data."""
    from lusifer.evaluation.own import schema as module

    rows = ["| type | columns of `data` | or these files, with their columns | main score |", "|---|---|---|---|"]
    for name, facts in module.KINDS.items():
        columns = [f"`{column}`" for column in facts.data]
        columns += [f"`{column}` if there is one" for column in facts.optional if column == "negative"]
        files = "; ".join(
            f"`{part}`: " + ", ".join(f"`{column}`" for column in names) for part, names in facts.parts.items()
        )
        rows.append(f"| `{name}` | {', '.join(columns)} | {files} | `{facts.metric}` |")
    head = (
        "# Task files\n\nA task of your own data is one YAML file, for `lusifer evaluate --task`. Unknown keys are "
        "refused with the nearest name, and everything is checked before the model loads. [Your own "
        "data](../own-data.md) says how to use them.\n"
    )
    return "\n".join([_HEAD, head, "\n".join(rows) + "\n", *_types(module, ["TaskFile", "Files", "Source"])])


def commands() -> str:
    """The page on commands."""
    from lusifer.cli.app import app

    root = typer.main.get_command(app)
    parts = [_HEAD, "# Commands\n\n`lusifer COMMAND --help` says the same. Mistakes give one line and exit code 2.\n"]
    for path, command in _leaves(root, ("lusifer",)):
        parts.append(_command(path, command))
    return "\n".join(parts)


def _leaves(command: Any, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], Any]]:
    if not hasattr(command, "commands"):
        return [(path, command)]
    found = []
    for name, inner in sorted(command.commands.items()):
        if not inner.hidden:
            found += _leaves(inner, (*path, name))
    return found


def _command(path: tuple[str, ...], command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and "--help" not in p.opts]
    usage = " ".join([*path, *(_name(p) if p.required else f"[{_name(p)}]" for p in arguments)])
    text = re.sub(r"\n- ", "\n\n- ", (command.help or "").strip(), count=1)
    rows = [f"## {' '.join(path)}\n\n`{usage}`\n\n{text}\n"]
    if arguments or options:
        rows += ["| | | default |", "|---|---|---|"]
    for p in arguments:
        rows.append(f"| `{_name(p)}` | {_cell(p.help)} | {'' if p.required else _default(p)} |")
    for p in options:
        names = ", ".join(f"`{name}`" for name in [*p.opts, *p.secondary_opts])
        rows.append(f"| {names} | {_cell(p.help)} | {_default(p)} |")
    return "\n".join(rows) + "\n"


def _name(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name).upper()


def _cell(text: str | None) -> str:
    return _UNWRAPPED.sub(" ", text or "").replace("|", "\\|")


def _default(parameter: Any) -> str:
    value = parameter.default
    if value is None or value is False or callable(value) or type(value).__name__ == "Sentinel":
        return ""
    return f"`{value}`"


def main() -> None:
    """Writes or checks."""
    pages = {FOLDER / "recipes.md": recipes(), FOLDER / "tasks.md": tasks(), FOLDER / "cli.md": commands()}
    stale = [path for path, text in pages.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv[1:]:
        sys.exit(f"run python tools/reference.py: {', '.join(p.name for p in stale)} would change" if stale else 0)
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(pages[path], encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
