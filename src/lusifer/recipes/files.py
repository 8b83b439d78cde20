"""Recipes as YAML files, and overrides from the command line; every mistake becomes one line with the nearest name."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from lusifer.errors import LusiferError, first_line
from lusifer.recipes.schema import Recipe

_MOST = 10_000_000  # Characters of a file whose aliases are written out.


def load_yaml(text: str) -> Any:
    """Reads YAML of plain values whose aliases, written out, stay of a size that people write.

    Args:
        text: The YAML.

    Raises:
        yaml.YAMLError: If it is not valid, or unfolds to far more than it is.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        # Before values are made: merged mappings are written out there.
        if node is not None and _unfolded(node, {}) > _MOST:
            raise yaml.YAMLError(f"its aliases expand to more than {_MOST:,} characters")
        return None if node is None else loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except ValueError as error:  # A date or a number that is none.
        raise yaml.YAMLError(first_line(error)) from error
    finally:
        loader.dispose()


def _unfolded(node: Any, known: dict[int, float]) -> float:
    """Characters of a node with its aliases written out; infinite where one stands within itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        if isinstance(node, yaml.ScalarNode):
            size: float = 1 + len(node.value)
        else:
            parts = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
            size = 1 + sum(_unfolded(part, known) for part in parts)
        known[id(node)] = size
    return known[id(node)]


def load_mapping(what: str, path: Path, shape: str) -> dict[str, Any]:
    """Reads a YAML file whose content is a mapping.

    Args:
        what: What it is, for the message.
        path: The file.
        shape: What it should look like, for the message.

    Raises:
        LusiferError: If it cannot be read, or is not such a file.
    """
    try:
        tree = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LusiferError(f"cannot read the {what} {str(path)!r}: {first_line(error)}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LusiferError(f"the {what} {str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise LusiferError(f"the {what} {str(path)!r} must be a mapping {shape}")
    return tree


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and applies command-line overrides.

    Args:
        path: A YAML file.
        overrides: Alternating ``--section.field`` and value, or ``--section.field=value``.

    Raises:
        LusiferError: If the file cannot be read, a key is unknown, or a value is not valid.
    """
    tree = load_mapping("recipe", Path(path), "of sections, see recipes/quickstart.yaml")
    for name, value in parse_overrides(overrides):
        _set(tree, name, value)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise LusiferError(f"recipe {str(path)!r}: {explain(error, Recipe)}") from None


def parse_overrides(arguments: Sequence[str]) -> list[tuple[str, Any]]:
    """Splits ``--a.b value`` and ``--a.b=value`` into names and YAML values.

    Raises:
        LusiferError: If an argument is no option or lacks its value.
    """
    pairs, rest = [], list(arguments)
    while rest:
        option = rest.pop(0)
        if not option.startswith("--"):
            raise LusiferError(f"unexpected argument {option!r}; overrides look like --align.steps 100")
        name, equals, text = option[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise LusiferError(f"the override {option!r} lacks a value")
            text = rest.pop(0)
        try:
            pairs.append((name.replace("-", "_"), load_yaml(text)))
        except yaml.YAMLError as error:
            raise LusiferError(f"the value of {option!r} is not valid YAML: {text!r}") from error
    return pairs


def _set(tree: dict[str, Any], name: str, value: Any) -> None:
    *sections, field = name.split(".")
    node: Any = tree
    for section in sections:
        node = node[_index(node, section, name)] if isinstance(node, list) else node.setdefault(section, {})
        if not isinstance(node, dict | list):
            raise LusiferError(f"cannot override {name!r}: {section!r} is not a section")
    node[_index(node, field, name) if isinstance(node, list) else field] = value


def _index(items: list[Any], text: str, name: str) -> int:
    if not text.isdecimal() or int(text) >= len(items):
        raise LusiferError(f"cannot override {name!r}: the list has {len(items)} items, counted from 0, not {text!r}")
    return int(text)


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """One line that says what is wrong with the first bad field, where, and how to mend it.

    Args:
        error: What pydantic says.
        root: The type that was read.
    """
    # A misspelt key explains why the right one is missing.
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    *path, field = [str(part) for part in first["loc"]] or [""]
    where = ".".join([*path, field])
    if first["type"] == "extra_forbidden":
        known = sorted(_section(root, path).model_fields)
        near = difflib.get_close_matches(field, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {where!r}; {hint}"
    if first["type"] == "missing":
        return f"{where} is required"
    if first["type"] == "value_error":
        return ": ".join(part for part in (where, str(first["ctx"]["error"])) if part)
    return f"{where}: {first['msg'][0].lower()}{first['msg'][1:]}, not {first['input']!r}"


def _section(root: type[BaseModel], path: list[str]) -> type[BaseModel]:
    """The type of a section; an item of a list or of a mapping has the one of its values."""
    owner = root
    for part in path:
        if part in owner.model_fields:
            annotation = owner.model_fields[part].annotation
            options = [annotation, *getattr(annotation, "__args__", ())]
            owner = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return owner
