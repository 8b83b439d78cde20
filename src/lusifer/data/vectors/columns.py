"""Which column of a table made by somebody else is the text, and which the vector."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lusifer.errors import LusiferError

# What others call the text of a row, the likeliest first.
# fmt: off
TEXT_NAMES = (
    "text", "content", "document", "page_content", "body", "chunk", "chunk_text", "passage", "sentence",
    "contents", "documents", "texts", "context", "abstract", "description", "title",
)
# Strings that are no texts, or not the row's.
_NO_TEXT = (
    "id", "_id", "uuid", "key", "lang", "language", "url", "uri", "path", "file", "filename", "file_name",
    "file_path", "source", "hash", "words", "metadata", "split", "label", "category", "topic", "model",
)
# fmt: on
_NODE = "_node_content"  # LlamaIndex keeps a row as JSON under this name.


def is_text(value: Any) -> bool:
    """Whether a value is a text that can be embedded."""
    return isinstance(value, str) and bool(value.strip())


def choose_columns(what: str, schema: pa.Schema, text: str | None, vector: str | None) -> tuple[str, str, str | None]:
    """The columns of the text, of the vector and, where there is one called so, of the id.

    Args:
        what: What is read, for the messages.
        schema: Its columns.
        text: Column of the text, found by type and name when None.
        vector: Column of the vector, found by type when None.

    Raises:
        LusiferError: If there is none, or more than one could be meant.
    """
    strings = [field.name for field in schema if _is_string(field.type)]
    lists = [field.name for field in schema if _is_vector(field.type)]
    has = ", ".join(f"{field.name} ({field.type})" for field in schema)
    if vector is None and not lists:
        raise LusiferError(f"{what} has no vectors: no column is a list of floating-point numbers; it has {has[:300]}")
    chosen = choose(what, "vector", lists, vector, schema.names)
    if text is None and not likely_texts(strings):
        raise LusiferError(
            f"{what} has vectors but no texts: it has {has[:300]}; write the texts beside their vectors, "
            "or name their column with --text-column"
        )
    return choose(what, "text", strings, text, schema.names), chosen, "id" if "id" in schema.names else None


def choose(what: str, kind: str, names: Sequence[str], asked: str | None, all_names: Sequence[str]) -> str:
    """The column of the text or of the vector: the one asked for, the only one, or the one with the likeliest name.

    Args:
        what: What is read, for the messages.
        kind: ``text`` or ``vector``.
        names: Columns whose type fits.
        asked: The column asked for.
        all_names: All columns.

    Raises:
        LusiferError: If there is none, or more than one could be meant.
    """
    option = f"--{kind}-column"
    if asked is not None:
        if asked not in names:
            why = "is of another type" if asked in all_names else "is not there"
            raise LusiferError(f"{what}: the {kind} column {asked!r} {why}; there are {', '.join(names) or 'none'}")
        return asked
    likely = likely_texts(names) if kind == "text" else list(names)
    if len(likely) == 1:
        return likely[0]
    if not likely:
        raise LusiferError(f"{what}: no column looks like the {kind}; it has {', '.join(all_names)} (choose: {option})")
    raise LusiferError(f"{what}: which column is the {kind}: {', '.join(likely)}? Choose with {option}")


def likely_texts(names: Sequence[str]) -> list[str]:
    """The columns that may be the text: the one with the likeliest name, else all whose names rule nothing out."""
    for known in TEXT_NAMES:
        if found := [name for name in names if name.lower() == known]:
            return found
    return [name for name in names if name.lower() not in _NO_TEXT and not name.lower().endswith(("_id", "_url"))]


def _is_string(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _is_vector(kind: pa.DataType) -> bool:
    return _is_list(kind) and pa.types.is_floating(kind.value_type)


def arrow_vectors(what: str, column: pa.Array | pa.ChunkedArray, dimension: int | None) -> tuple[np.ndarray, Any]:
    """The vectors of a list column as (n, dim) float32, and which rows have one as (n,) bool.

    Args:
        what: What is read, for the message.
        column: The column.
        dimension: Numbers of a vector; that of the first when None.

    Raises:
        LusiferError: If a vector has another length.
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # Nothing to combine.
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    has = np.asarray(array.is_valid().to_numpy(zero_copy_only=False), dtype=bool)
    there = array.filter(pa.array(has))
    lengths = np.asarray(pc.list_value_length(there).to_numpy(zero_copy_only=False), dtype=np.int64)
    width = dimension if dimension is not None else int(lengths[0]) if len(lengths) else 0
    if (other := lengths[lengths != width]).size:
        raise LusiferError(f"{what}: a vector has {int(other[0])} dimensions, another {width}")
    vectors = np.zeros((len(array), width), dtype=np.float32)
    flat = there.flatten().to_numpy(zero_copy_only=False)
    vectors[has] = np.asarray(flat, dtype=np.float32).reshape(-1, width)
    return vectors, has


def text_getter(
    what: str, payloads: Sequence[Mapping[str, Any]], asked: str | None
) -> tuple[str, Callable[[Mapping[str, Any]], Any]]:
    """Where the text stands in the payloads of a vector database: what to call the place, and what gets it.

    It may stand in the payload, below ``metadata``, or in the JSON that LlamaIndex writes.

    Args:
        what: What is read, for the messages.
        payloads: Some of them.
        asked: The key asked for, with dots between the keys of nested ones; found by name when None.

    Raises:
        LusiferError: If there is none, or more than one could be meant.
    """
    keys = list(dict.fromkeys(path for payload in payloads for path in _string_paths(payload)))
    if asked is not None:
        if not any(is_text(_at(payload, asked)) for payload in payloads):
            raise LusiferError(f"{what}: no text at the key {asked!r}; there are {', '.join(keys)[:300] or 'none'}")
        return asked, lambda payload: _at(payload, asked)
    named = [f"{prefix}{name}" for prefix in ("", "metadata.") for name in TEXT_NAMES]
    # The likeliest name, but not one that only few points have.
    counts = {key: sum(is_text(_at(payload, key)) for payload in payloads) for key in (*named, f"{_NODE}.text")}
    most = max(counts.values())
    best = next(key for key, count in counts.items() if 2 * count >= most)
    if not most:
        others = [key for key in keys if "." not in key and key != _NODE]
        if not likely_texts(others):
            raise LusiferError(
                f"{what} has vectors but no texts: its keys are {', '.join(keys)[:300] or 'none'}; "
                "write the texts beside their vectors, or name their key with --text-column"
            )
        best = choose(what, "text", others, None, keys)
    return best, lambda payload: _at(payload, best)


def _string_paths(payload: Mapping[str, Any]) -> Iterator[str]:
    for key, value in payload.items():
        if is_text(value):
            yield key
        elif isinstance(value, Mapping):
            yield from (f"{key}.{inner}" for inner in _string_paths(value))


def _at(payload: Mapping[str, Any], path: str) -> Any:
    """What stands at a path of keys, in nested payloads and in JSON; a key may itself hold dots."""
    if path in payload:
        return payload[path]
    head, _, rest = path.partition(".")
    value = payload.get(head)
    if head == _NODE and isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return _at(value, rest) if rest and isinstance(value, Mapping) else None
