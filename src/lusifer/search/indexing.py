"""From a file of texts to an index; what is there already is not embedded again."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lusifer.data.prompts import Prompted
from lusifer.data.reading import Block
from lusifer.data.rows import Columns, read_rows
from lusifer.data.sources import find_files
from lusifer.data.validation import repeated_id
from lusifer.data.vectors.agreement import unit
from lusifer.errors import LusiferError
from lusifer.progress import bar
from lusifer.search.filters import COLUMN_TYPES, Value
from lusifer.search.lexical import script
from lusifer.search.store import Entry, Store

if TYPE_CHECKING:
    from lusifer.model.text_encoder import TextEncoder

logger = logging.getLogger(__name__)

# Texts embedded before they are written: a CPU needs seconds for so many, an accelerator less than a second.
_CHUNK = {"cpu": 256}
_CHUNK_ELSEWHERE = 4096
_TIDY_EVERY = 100  # Writes; each leaves a small file that tidying joins with others.


class Encoder(Protocol):
    """What texts are embedded with; `TextEncoder` is one."""

    @property
    def model(self) -> Prompted:
        """The model, for its prompts."""

    @property
    def dimension(self) -> int:
        """Length of a vector."""

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """(n, dim) float32 unit vectors of texts."""


def read_entries(
    source: str | Path,
    *,
    text: str = "text",
    id: str | None = None,
    metadata: Sequence[str] = (),
    index: str | None = None,
) -> tuple[list[Entry], dict[str, str]]:
    """Reads texts with their metadata.

    A ``lang`` column gives the language; without one, or where it is empty, the script stands for it. Without an
    ``id`` column a text is named by a hash of itself, and repeated texts are kept once.

    Args:
        source: A file, a folder or a glob; see `lusifer.data.sources.find_files`.
        text: Column of the text.
        id: Column of the id.
        metadata: Columns to keep: text, numbers or true/false.
        index: Folder of the index, which is no input where it lies inside a folder of texts.

    Returns:
        The texts, and the types of the metadata columns as in `IndexInfo.columns`.

    Raises:
        LusiferError: If a file cannot be read or a value is not as it should be; the message names the row.
    """
    wanted = [name for name in dict.fromkeys(metadata) if name not in ("lang", id, text)]
    entries: dict[str, Entry] = {}
    places: dict[str, str] = {}
    known: dict[str, None] = {}
    files = find_files(str(source), output=index)
    for rows in read_rows(files, Columns(text, id), more=(*wanted, "lang")):
        block = rows.block
        block.refuse_problems()
        known |= dict.fromkeys(block.names())
        cells = {name: _metadata(block, name) for name in wanted}
        names = map(_text_id, rows.texts) if rows.ids is None else map(str, rows.ids)
        for row, (name, one, tag) in enumerate(zip(names, rows.texts, block.values("lang"), strict=True)):
            if name not in entries:
                kept = {column: values[row] for column, values in cells.items()}
                entries[name] = Entry(name, one, str(tag) if tag else script(one), kept)
                places[name] = "" if rows.ids is None else block.where(row)
            elif rows.ids is not None:
                raise repeated_id(name, block.where(row), places[name])
    if missing := sorted(set(wanted) - set(known)):
        raise LusiferError(f"{str(source)!r} has no column {missing[0]!r}; it has {', '.join(known)}")
    if not entries:
        raise LusiferError(f"{str(source)!r} holds no texts")
    in_cells = all(file.format.kind in (".csv", ".tsv") for file in files)
    types = {}
    for name in wanted:
        column: list[Any] = [entry.metadata[name] for entry in entries.values()]
        column = _from_cells(column) if in_cells else column
        types[name] = _column_type(column)
        for entry, value in zip(entries.values(), column, strict=True):
            entry.metadata[name] = _as_type(value, types[name])
    return list(entries.values()), types


def add(store: Store, encoder: TextEncoder, entries: Sequence[Entry], *, progress: bool = False) -> dict[str, int]:
    """Brings texts into an index, a few hundred at a time; an interrupted call is taken up by the next.

    A text that is there with the same id is not embedded again; if only its metadata changed, these are replaced.

    Args:
        store: The index; `Store.check_model` has been called.
        encoder: The model of the index.
        entries: Texts, every id once.
        progress: Whether to show a bar.

    Returns:
        How many were ``added``, ``updated`` (other text), ``changed`` (other metadata) and ``unchanged``.

    Raises:
        LusiferError: If the index cannot be written, or another process writes to it.
    """
    with store.writing():
        if doubled := store.heal():
            logger.warning("%s: %d rows of ids that stood there twice are removed", store.location, doubled)
        counts = _add(store, encoder, entries, progress)
        if counts["unchanged"] < len(entries) or doubled:
            store.tidy()
    return counts


def _add(store: Store, encoder: TextEncoder, entries: Sequence[Entry], progress: bool) -> dict[str, int]:
    prompt = store.info.prompt or ""
    counts = dict.fromkeys(("added", "updated", "changed", "unchanged"), 0)
    chunk = _CHUNK.get(encoder.model.device.type, _CHUNK_ELSEWHERE)
    with bar(len(entries), "indexing", "text", show=progress) as shown:
        for number, begin in enumerate(range(0, len(entries), chunk), start=1):
            part = [_complete(entry, store) for entry in entries[begin : begin + chunk]]
            known = store.fetch([entry.id for entry in part])
            same = [entry for entry in part if entry.id in known and known[entry.id][0].text == entry.text]
            changed = [entry for entry in same if known[entry.id][0] != entry]
            new = [entry for entry in part if entry.id not in known or known[entry.id][0].text != entry.text]
            if new or changed:
                # A model may end without a layer that makes its vectors unit vectors.
                vectors = unit(encoder.encode([prompt + entry.text for entry in new]))
                store.upsert(
                    [*new, *changed], np.concatenate([vectors, *(known[entry.id][1][None] for entry in changed)])
                )
            counts["added"] += sum(entry.id not in known for entry in new)
            counts["updated"] += sum(entry.id in known for entry in new)
            counts["changed"] += len(changed)
            counts["unchanged"] += len(same) - len(changed)
            shown.update(len(part))
            if number % _TIDY_EVERY == 0:
                store.tidy()
    return counts


def check_columns(store: Store, types: dict[str, str]) -> None:
    """Refuses metadata that the index has no place for.

    Args:
        store: The index.
        types: Types of the metadata columns, see `read_entries`.

    Raises:
        LusiferError: If a column is new or of another type.
    """
    for name, kind in types.items():
        known = store.info.columns.get(name)
        if known is None:
            has = ", ".join(store.info.columns) or "none"
            missing = f"the index {store.location!r} has no metadata column {name!r} (it has {has})"
            raise LusiferError(f"{missing}, and columns cannot be added later; leave it out, or make a new index")
        if kind != known and (kind, known) != ("int", "float"):
            was = f"metadata column {name!r} is of type {known} in the index {store.location!r}"
            raise LusiferError(f"{was}, but {kind} in the input")


def _complete(entry: Entry, store: Store) -> Entry:
    """The entry with every column of the index, as the store gives it back."""
    values = {name: _as_type(entry.metadata.get(name), kind) for name, kind in store.info.columns.items()}
    return Entry(entry.id, entry.text, entry.lang, values)


_INT64 = range(-(2**63), 2**63)
# A column of true/false holds no numbers, though Python would let it; one of "int" no fractions.
_HOLDS = {"bool": COLUMN_TYPES["bool"], "int": (int,), "float": COLUMN_TYPES["float"]}
# What a cell of CSV looks like; 007 is a name, not a number.
_CELLS: tuple[tuple[Callable[[str], Value], re.Pattern[str]], ...] = (
    (int, re.compile(r"-?(0|[1-9]\d{0,17})")),
    (float, re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?")),
    (lambda cell: cell.lower() == "true", re.compile(r"true|false", re.IGNORECASE)),
)


def _metadata(block: Block, name: str) -> list[Any]:
    values = block.values(name)
    for row, value in enumerate(values):
        if isinstance(value, list | dict | bytes):
            raise block.error(row, f"{name!r} must be text, a number or true/false to be metadata")
        if isinstance(value, int) and value not in _INT64:
            raise block.error(row, f"{name!r} is beyond 64 bits; write it as text")
    return values


def _from_cells(cells: list[str | None]) -> list[Value | None]:
    for kind, pattern in _CELLS:
        if all(cell is None or pattern.fullmatch(cell) for cell in cells):
            return [None if cell is None else kind(cell) for cell in cells]
    return list(cells)


def _column_type(values: Sequence[Any]) -> str:
    kinds = {type(value) for value in values if value is not None}
    return next((kind for kind in ("bool", "int", "float") if kinds and kinds <= set(_HOLDS[kind])), "string")


def _as_type(value: Any, kind: str) -> Value | None:
    if value is None:
        return None
    return {"string": str, "int": int, "float": float, "bool": bool}[kind](value)


def _text_id(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=8).hexdigest()
