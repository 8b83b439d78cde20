"""From a file of texts to an index; what is there already is not embedded again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm.auto import tqdm

from lusifer.bulk.plan import make_plan
from lusifer.data.prompts import Prompted
from lusifer.data.rows import Columns, RowReader, find_files
from lusifer.errors import LusiferError
from lusifer.model.text_encoder import TextEncoder
from lusifer.search.filters import COLUMN_TYPES, Value
from lusifer.search.lexical import script
from lusifer.search.store import Entry, Store

# Texts embedded before they are written: a CPU needs seconds for so many, an accelerator less than a second.
_CHUNK = {"cpu": 256}
_CHUNK_ELSEWHERE = 4096
_TIDY_EVERY = 100  # Writes; each leaves a small file that tidying joins with others.


class Encoder(Protocol):
    """What texts are embedded with; `TextEncoder` is one."""

    @property
    def model(self) -> Prompted:
        """The model, for its prompts."""
        ...

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        ...

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """(n, dim) float32 unit vectors of texts."""
        ...


def read_entries(
    path: Path, *, text: str = "text", id: str | None = None, metadata: Sequence[str] = ()
) -> tuple[list[Entry], dict[str, str]]:
    """Reads the texts of a file with their metadata.

    A ``lang`` column gives the language; without one, or where it is empty, the script stands for it. Without an
    ``id`` column a text is named by a hash of itself, and repeated texts are kept once.

    Args:
        path: ``.txt`` (one text per line), ``.jsonl`` or ``.parquet``.
        text: Column of the text.
        id: Column of the id.
        metadata: Columns to keep: text, numbers or true/false.

    Returns:
        The texts, and the types of the metadata columns as in `IndexInfo.columns`.

    Raises:
        LusiferError: If the file cannot be read or a value is not as it should be; the message names the row.
    """
    texts = _texts(path, text)
    wanted = [name for name in metadata if name not in ("lang", id, text)]
    columns = _columns(path, [*wanted, "lang", *([id] if id else [])], needed=[*wanted, *([id] if id else [])])
    types = {name: _column_type(path, name, columns[name]) for name in wanted}
    names = _ids(path, id, columns[id]) if id else [_text_id(one) for one in texts]
    tags = columns.get("lang") or [None] * len(texts)
    found: dict[str, Entry] = {}
    for row, (name, one, tag) in enumerate(zip(names, texts, tags, strict=True)):
        values = {key: _as_type(columns[key][row], types[key]) for key in wanted}
        found.setdefault(name, Entry(name, one, str(tag) if tag else script(one), values))
    return list(found.values()), types


def add(store: Store, encoder: TextEncoder, entries: Sequence[Entry], *, progress: bool = False) -> dict[str, int]:
    """Brings texts into an index, a few hundred at a time; an interrupted call is taken up by the next.

    A text that is there with the same id is not embedded again; if only its metadata changed, these are replaced. Texts
    are embedded behind the prompt that the index records; see `IndexInfo.prompt`.

    Args:
        store: The index; `Store.check_model` has been called.
        encoder: The model of the index.
        entries: Texts, every id once.
        progress: Whether to show a bar.

    Returns:
        How many were ``added``, ``updated`` (other text), ``changed`` (other metadata) and ``unchanged``.

    Raises:
        LusiferError: If the index cannot be written.
    """
    prompt = store.info.prompt or ""
    counts = dict.fromkeys(("added", "updated", "changed", "unchanged"), 0)
    chunk = _CHUNK.get(encoder.model.device.type, _CHUNK_ELSEWHERE)
    with tqdm(total=len(entries), desc="indexing", unit="text", disable=not progress) as bar:
        for number, begin in enumerate(range(0, len(entries), chunk), start=1):
            part = [_complete(entry, store) for entry in entries[begin : begin + chunk]]
            known = store.fetch([entry.id for entry in part])
            same = [entry for entry in part if entry.id in known and known[entry.id][0].text == entry.text]
            changed = [entry for entry in same if known[entry.id][0] != entry]
            new = [entry for entry in part if entry.id not in known or known[entry.id][0].text != entry.text]
            if new or changed:
                vectors = np.empty((len(new) + len(changed), store.info.dimension), dtype=np.float32)
                vectors[: len(new)] = encoder.encode([prompt + entry.text for entry in new])
                vectors[len(new) :] = [known[entry.id][1] for entry in changed] or np.empty((0, store.info.dimension))
                store.upsert([*new, *changed], vectors)
            counts["added"] += sum(entry.id not in known for entry in new)
            counts["updated"] += sum(entry.id in known for entry in new)
            counts["changed"] += len(changed)
            counts["unchanged"] += len(same) - len(changed)
            bar.update(len(part))
            if number % _TIDY_EVERY == 0:
                store.tidy()
    if counts["unchanged"] < len(entries):
        store.tidy()
    return counts


def check_columns(store: Store, types: dict[str, str]) -> None:
    """Refuses metadata that the index has no place for.

    Raises:
        LusiferError: If a column is new or of another type.
    """
    for name, kind in types.items():
        known = store.info.columns.get(name)
        if known is None:
            has = ", ".join(store.info.columns) or "none"
            raise LusiferError(
                f"the index {store.location!r} has no metadata column {name!r} (it has {has}), and columns cannot be "
                f"added later; leave it out, or make a new index"
            )
        if kind != known and (kind, known) != ("int", "float"):
            raise LusiferError(
                f"metadata column {name!r} is of type {known} in the index {store.location!r}, but {kind} in the input"
            )


def _complete(entry: Entry, store: Store) -> Entry:
    """The entry with every column of the index, as the store gives it back."""
    values = {name: _as_type(entry.metadata.get(name), kind) for name, kind in store.info.columns.items()}
    return Entry(entry.id, entry.text, entry.lang, values)


def _texts(path: Path, column: str) -> list[str]:
    """The texts of one file, every row checked."""
    if path.suffix not in (".txt", ".jsonl", ".parquet") or path.is_dir():
        raise LusiferError(f"cannot read {str(path)!r}: name it .txt, .jsonl, .parquet")
    files, columns = find_files(str(path)), Columns(column)
    plan = make_plan(files, columns, shard_rows=None)
    return [text for _, text in RowReader(files, columns).read(plan.slices[0])]


def _columns(path: Path, names: Sequence[str], *, needed: Sequence[str]) -> dict[str, list[Any]]:
    """Values by column; the file has been read once, so its format is known to be right."""
    if path.suffix == ".parquet":
        from pyarrow import parquet

        have = parquet.read_schema(path).names
        read = parquet.read_table(path, columns=[name for name in names if name in have])
        found = {name: read[name].to_pylist() for name in read.column_names}
    elif path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
        have = list(dict.fromkeys(key for row in rows for key in row))
        found = {name: [row.get(name) for row in rows] for name in names if name in have}
    else:
        have, found = [], {}
    if missing := [name for name in needed if name not in found]:
        has = f"it has {', '.join(have)}" if have else "a .txt file has texts only"
        raise LusiferError(f"{str(path)!r} has no column {missing[0]!r}; {has}")
    return found


def _column_type(path: Path, name: str, values: Sequence[Any]) -> str:
    kinds = {type(value) for value in values if value is not None}
    for row, value in enumerate(values, start=1):
        if isinstance(value, list | dict | bytes):
            raise LusiferError(f"{path}, row {row}: {name!r} must be text, a number or true/false to be metadata")
    return next((kind for kind in ("bool", "int", "float") if kinds and kinds <= set(_HOLDS[kind])), "string")


# A column of true/false holds no numbers, though Python would let it; one of "int" no fractions.
_HOLDS = {"bool": COLUMN_TYPES["bool"], "int": (int,), "float": COLUMN_TYPES["float"]}


def _as_type(value: Any, kind: str) -> Value | None:
    if value is None:
        return None
    return {"string": str, "int": int, "float": float, "bool": bool}[kind](value)


def _ids(path: Path, column: str, values: Sequence[Any]) -> list[str]:
    seen: dict[str, int] = {}
    for row, value in enumerate(values, start=1):
        if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
            raise LusiferError(f"{path}, row {row}: the id in {column!r} must be a text or a whole number")
        if str(value) in seen:
            raise LusiferError(f"{path}, row {row}: the id {str(value)!r} stands in row {seen[str(value)]} already")
        seen[str(value)] = row
    return list(seen)


def _text_id(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=8).hexdigest()
