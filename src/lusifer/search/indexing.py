"""From a file of texts to an index; what is there already is not embedded again."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from lusifer.data.prompts import Prompted
from lusifer.data.reading import Block
from lusifer.data.rows import INT64, Columns, ColumnTypes, as_type, read_rows
from lusifer.data.sources import find_files
from lusifer.data.validation import repeated_id
from lusifer.data.vectors.agreement import unit
from lusifer.errors import LusiferError
from lusifer.progress import bar
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
    column_types = ColumnTypes()
    files = find_files(str(source), output=index)
    for rows in read_rows(files, Columns(text, id), more=(*wanted, "lang")):
        block = rows.block
        block.refuse_problems()
        known |= dict.fromkeys(block.names())
        column_types.add(block, wanted)
        cells = {name: _metadata(block, name) for name in wanted}
        names = map(text_id, rows.texts) if rows.ids is None else map(str, rows.ids)
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
    types = {name: column_types.types().get(name, "string") for name in wanted}
    for entry in entries.values():
        for name, kind in types.items():
            entry.metadata[name] = as_type(entry.metadata[name], kind)
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
    prompt = store.info.prompt or ""
    chunk = _CHUNK.get(encoder.model.device.type, _CHUNK_ELSEWHERE)

    def part(begin: int) -> Part:
        some = entries[begin : begin + chunk]
        return Part(some, lambda places: encoder.encode([prompt + some[place].text for place in places]))

    return bring(store, map(part, range(0, len(entries), chunk)), len(entries), progress=progress)


class Part(NamedTuple):
    """Some texts, every id once, and what gives the (n, dim) vectors of those at some places."""

    entries: Sequence[Entry]
    vectors_at: Callable[[list[int]], np.ndarray]


def bring(store: Store, parts: Iterable[Part], total: int, *, progress: bool = False) -> dict[str, int]:
    """As `add`, of texts whose vectors come from anywhere; they are asked for where a text is new or has changed.

    Args:
        store: The index.
        parts: The texts, to be written a part at a time.
        total: How many there are.
        progress: Whether to show a bar.

    Raises:
        LusiferError: If the index cannot be written, or another process writes to it.
    """
    with store.writing():
        if doubled := store.heal():
            logger.warning("%s: %d rows of duplicate ids are removed", store.location, doubled)
        counts = dict.fromkeys(("added", "updated", "changed", "unchanged"), 0)
        with bar(total, "indexing", "text", show=progress) as shown:
            for number, part in enumerate(parts, start=1):
                _bring(store, part, counts)
                shown.update(len(part.entries))
                if number % _TIDY_EVERY == 0:
                    store.tidy()
        if counts["unchanged"] < sum(counts.values()) or doubled:
            store.tidy()
    return counts


def _bring(store: Store, part: Part, counts: dict[str, int]) -> None:
    entries = [_complete(entry, store) for entry in part.entries]
    known = store.fetch([entry.id for entry in entries])
    new = [at for at, entry in enumerate(entries) if entry.id not in known or known[entry.id][0].text != entry.text]
    changed = [entry for entry in entries if entry.id in known and known[entry.id][0] != entry]
    changed = [entry for entry in changed if known[entry.id][0].text == entry.text]
    if new or changed:
        # A model may end without a layer that makes its vectors unit vectors.
        vectors = unit(part.vectors_at(new))
        kept = (known[entry.id][1][None] for entry in changed)
        store.upsert([*(entries[at] for at in new), *changed], np.concatenate([vectors, *kept]))
    counts["added"] += sum(entries[at].id not in known for at in new)
    counts["updated"] += sum(entries[at].id in known for at in new)
    counts["changed"] += len(changed)
    counts["unchanged"] += len(entries) - len(new) - len(changed)


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
    values = {name: as_type(entry.metadata.get(name), kind) for name, kind in store.info.columns.items()}
    return Entry(entry.id, entry.text, entry.lang, values)


def _metadata(block: Block, name: str) -> list[Any]:
    values = block.values(name)
    for row, value in enumerate(values):
        if isinstance(value, list | dict | bytes):
            raise block.error(row, f"{name!r} must be text, a number or true/false to be metadata")
        if isinstance(value, int) and value not in INT64:
            raise block.error(row, f"{name!r} is beyond 64 bits; write it as text")
    return values


def text_id(text: str) -> str:
    """The id of a text that has no other."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=8).hexdigest()
