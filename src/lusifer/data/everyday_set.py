"""The bundled parallel sentences: everyday life in many languages, for a first look at a model."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import NamedTuple


class EverydaySet(NamedTuple):
    """The bundled parallel sentences.

    Attributes:
        names: Name of each sentence (``id`` is taken: it is Indonesian).
        topics: Topic of each sentence.
        sentences: Language code to sentences, all in the order of ``names``.
    """

    names: list[str]
    topics: list[str]
    sentences: dict[str, list[str]]


def load_everyday() -> EverydaySet:
    """Reads the bundled set."""
    text = (files("lusifer") / "resources" / "everyday.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    return EverydaySet(columns.pop("name"), columns.pop("topic"), columns)
