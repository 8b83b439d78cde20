"""Vectors that are there already, brought into an index: those of ``lusifer encode``, or of something else.

What ``lusifer encode`` wrote says which model made it, by its weights; no model has to be loaded. Of other vectors a
sample is compared with those of the model that is said to have made them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from lusifer.data.prompts import prompt_for
from lusifer.data.rows import as_type
from lusifer.data.sources import format_of
from lusifer.data.validation import repeated_id
from lusifer.data.vector_tables import open_vectors
from lusifer.data.vectors.encoded import MANIFEST, MadeBy, made_by
from lusifer.data.vectors.files import ArrayTable, ParquetTable, parquet_files
from lusifer.data.vectors.rows import Rows
from lusifer.errors import LusiferError
from lusifer.loading import load_for_inference
from lusifer.model.fingerprint import weights_hash
from lusifer.model.text_encoder import TextEncoder
from lusifer.search.agreement import measure
from lusifer.search.foreign import TableStore
from lusifer.search.indexing import Part, bring, check_columns, text_id
from lusifer.search.lexical import script
from lusifer.search.locations import create_store, open_store, store_exists, writing
from lusifer.search.store import Entry, IndexInfo, Store, is_column_name
from lusifer.storage import Folder, open_file

_ROWS = 4096  # Rows read and written at once.


@dataclass(frozen=True)
class Asked:
    """What a caller says of an input; whatever is None follows from it.

    Attributes:
        text: Column of the text.
        id: Column of the id.
        metadata: Columns to keep and filter by.
        vector: Column of the vector.
        model: Name of the model that made the vectors.
        prompt: What stood in front of every text.
        prompt_name: Name of the model's prompt that did.
        device: Torch device, where the model has to be loaded.
    """

    text: str | None = None
    id: str | None = None
    metadata: list[str] | None = None
    vector: str | None = None
    model: str | None = None
    prompt: str | None = None
    prompt_name: str | None = None
    device: str | None = None


@dataclass
class Done:
    """An index after vectors were added, and what is to be said of it.

    Attributes:
        counts: As `lusifer.search.indexing.add` gives them.
        left_out: Rows without text or vector.
        columns: Columns that an index cannot keep under their names.
    """

    store: Store
    counts: dict[str, int]
    left_out: int = 0
    columns: list[str] = field(default_factory=list)


def has_vectors(source: str, vector: str | None = None) -> bool:
    """Whether an input comes with its vectors, as far as can be said without reading it.

    Args:
        source: The input: ``vectors.npy+texts.jsonl``, what ``lusifer encode`` wrote, or anything else.
        vector: Column of the vector, if the caller names one.
    """
    if vector is not None or source.endswith(".npy") or ".npy+" in source or _manifest(source) is not None:
        return True
    for file in parquet_files(source)[:1]:
        with suppress(pa.ArrowException, OSError), open_file(file.url) as raw:
            return made_by(parquet.ParquetFile(raw)) is not False
    return False


def _manifest(source: str) -> dict[str, Any] | None:
    """What ``lusifer encode`` noted in a folder."""
    if format_of(source) is not None or "*" in source:
        return None
    with suppress(LusiferError):
        manifest = Folder(source).read_json(MANIFEST)
        return manifest if manifest and "model_hash" in manifest else None
    return None


def add_vectors(index: str, source: str, asked: Asked, *, progress: bool = False) -> Done:
    """Adds texts and the vectors they come with to an index, which is made where there is none.

    Args:
        index: As for `lusifer.search.locations.open_store`.
        source: As for `has_vectors`.
        asked: What is known of it.
        progress: Whether to show a bar.

    Raises:
        LusiferError: If the vectors are another model's than those of the index, of queries, shortened or quantised; if
            nobody says which model made them; or if source or index cannot be read.
    """
    manifest = _manifest(source)
    if manifest is not None and not manifest.get("complete"):
        raise LusiferError(f"{source!r} is not finished; run the same `lusifer encode` again, which resumes it")
    with writing(index):
        store = open_store(index) if store_exists(index) else None
        table = _Source(source, asked, store)
        facts = _known(table, asked, store) if table.made_by is not None else _measured(table, asked, store)
        table.check_ids()
        if store is None:
            store = create_store(index, facts)
        else:
            check_columns(store, table.types)
            store.check_model(facts.model, facts.model_hash, facts.dimension)
            store.check_prompt(facts.prompt or "", explicit=True)
        counts = bring(store, table.parts(), table.rows, progress=progress)
    return Done(store, counts, table.left_out, table.unfit)


class _Source:
    """Texts with vectors, as entries of an index."""

    def __init__(self, location: str, asked: Asked, store: Store | None) -> None:
        self.location, self.unfit = location, list[str]()
        table = open_vectors(location, text=asked.text, vector=asked.vector)
        if not isinstance(table, ParquetTable | ArrayTable):
            raise LusiferError(f"{location!r}: vectors are taken from Parquet or vectors.npy+texts.jsonl only")
        self.table, self.rows = table, table.rows
        self.made_by: MadeBy | None = getattr(table, "made_by", None)
        known = table.column_types()
        self._names = self._input_names()
        by_ids = self.made_by is not None and self.made_by.id_column is not None
        self.id = self._column(asked.id, known) if asked.id is not None else "id" if by_ids else None
        if asked.metadata is None and self.made_by is not None:
            names = [name for name in known if name not in ("id", "lang", self.id)]
            names = [name for name in names if store is None or name in store.info.columns]
            self.unfit = [name for name in names if not is_column_name(name)]
            names = [name for name in names if name not in self.unfit]
        else:
            names = [name for name in dict.fromkeys(asked.metadata or []) if name not in ("lang", asked.id, asked.text)]
        self.columns = {name: self._column(name, known) for name in names}
        self.types = {name: known[theirs] for name, theirs in self.columns.items()}
        self.lang = "lang" if "lang" in known else None
        wanted = [*self.columns.values(), self.id, self.lang]
        table.more = list(dict.fromkeys(name for name in wanted if name is not None))

    def _input_names(self) -> dict[str, str]:
        """What columns of the input that was encoded are called here."""
        if (facts := self.made_by) is None:
            return {}
        return {facts.text_column: "text", **({facts.id_column: "id"} if facts.id_column else {}), **facts.columns}

    def _column(self, name: str, known: dict[str, str]) -> str:
        theirs = self._names.get(name, name)
        if theirs not in known:
            raise LusiferError(f"{self.location!r} has no column {name!r}; it has {', '.join(known) or 'none'}")
        return theirs

    def check_ids(self) -> None:
        """Refuses ids that are missing or stand twice, before anything is written."""
        first: dict[str, int] = {}
        for row, value in enumerate(self.table.column(self.id) if self.id is not None else (), start=1):
            if value is None or value == "":
                raise LusiferError(f"{self.location!r}, row {row}: no id in {self.id!r}; give every text one")
            if (before := first.setdefault(str(value), row)) != row:
                raise repeated_id(value, f"{self.location}, row {row}", f"row {before}")

    @property
    def left_out(self) -> int:
        """Rows without text or vector, once all are read."""
        return self.table.left_out

    def parts(self) -> Iterator[Part]:
        """The rows, some thousand at a time."""
        seen: set[str] = set()
        for rows in self.table.blocks(_ROWS):
            entries, kept = [], []
            for row, entry in enumerate(self._entries(rows)):
                if entry.id not in seen:  # A text that stands there twice, named by its hash.
                    seen.add(entry.id)
                    entries.append(entry)
                    kept.append(row)
            yield Part(entries, _Picked(rows.vectors[kept]))

    def _entries(self, rows: Rows) -> Iterator[Entry]:
        for row, text in enumerate(rows.texts):
            name = rows.more[self.id][row] if self.id is not None else text_id(text)
            tag = rows.more[self.lang][row] if self.lang is not None else None
            kept = {ours: as_type(rows.more[theirs][row], self.types[ours]) for ours, theirs in self.columns.items()}
            yield Entry(str(name), text, str(tag) if tag else script(text), kept)


@dataclass(frozen=True)
class _Picked:
    """Vectors by the places of their entries."""

    vectors: np.ndarray

    def __call__(self, places: list[int]) -> np.ndarray:
        return self.vectors[places]


def _known(source: _Source, asked: Asked, store: Store | None) -> IndexInfo:
    """What an index of these vectors records, by what they say of themselves."""
    facts, where = source.made_by, source.location
    assert facts is not None
    if source.table.dimension != facts.dimension:
        raise LusiferError(
            f"{where!r} keeps {source.table.dimension} of the {facts.dimension} dimensions of {facts.model!r}, and "
            "queries have all of them; encode without --dim"
        )
    prompt = asked.prompt
    if prompt is None:  # An index that is there decides for itself.
        prompt = facts.document_prompt if store is None else facts.prompt
    if asked.model is not None or asked.prompt_name is not None:
        encoder = TextEncoder(load_for_inference(asked.model or facts.model, device=asked.device))
        if (found := weights_hash(encoder.model)) != facts.model_hash:
            raise LusiferError(
                f"{where!r} holds vectors of {facts.model!r} (hash {facts.model_hash}), not of "
                f"{asked.model or facts.model!r} (hash {found}); encode the texts with that model, or leave --model out"
            )
        if asked.prompt_name is not None:
            prompt = prompt_for(encoder.model, "document", prompt=asked.prompt, prompt_name=asked.prompt_name)
    if facts.prompt != prompt:
        raise LusiferError(
            f"{where!r} was encoded with the prompt {facts.prompt!r}, not as documents with {prompt!r}; "
            f"encode it again, or give --prompt {facts.prompt!r} if it is meant"
        )
    name = asked.model or facts.model
    return IndexInfo(name, facts.model_hash, facts.dimension, source.types, facts.prompt)


def _measured(source: _Source, asked: Asked, store: Store | None) -> IndexInfo:
    """The same of vectors that say nothing: the model embeds a sample of their texts."""
    name = asked.model or (store.info.model if store is not None else None)
    if name is None:
        raise LusiferError(f"{source.location!r} does not say which model made its vectors; name it with --model")
    encoder = TextEncoder(load_for_inference(name, device=asked.device))
    prompt = prompt_for(encoder.model, "document", prompt=asked.prompt, prompt_name=asked.prompt_name)
    agreement = measure(TableStore(source.table), encoder, prompt=prompt)
    if agreement.verdict != "same":
        raise LusiferError(
            f"{source.location!r} does not hold the vectors that {name!r} makes of its texts with the prompt "
            f"{prompt!r}: {agreement.measured}; name the model that made them, or encode the texts"
        )
    return IndexInfo(name, weights_hash(encoder.model), encoder.dimension, source.types, prompt)
