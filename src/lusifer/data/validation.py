"""Raw records to columns of fixed types, every text checked on the way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lusifer.data.reading import Block
from lusifer.errors import LusiferError

MAX_CHARACTERS = 1_000_000


def _fail(block: Block, index: int, problem: str) -> LusiferError:
    return LusiferError(f"{block.where(index)}: {problem}")


def _check_texts(block: Block, name: str, texts: pa.Array, parents: np.ndarray) -> None:
    """Refuses the first null, invalid, empty or huge text; ``parents`` are the records the texts belong to."""
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid:
        for index in range(len(texts)):
            try:
                texts[index].as_py()
            except UnicodeDecodeError as error:
                problem = f"{name!r} is not valid UTF-8 ({error.reason}); convert the file to UTF-8"
                raise _fail(block, parents[index], problem) from None
        raise
    empty = pc.equal(pc.utf8_trim_whitespace(texts), "")
    long = pc.greater(pc.utf8_length(texts), MAX_CHARACTERS)
    bad = pc.or_(pc.fill_null(empty, True), pc.fill_null(long, True))
    index = bad.index(True).as_py()
    if index < 0:
        return
    text = texts[index].as_py()
    if text is None:
        raise _fail(block, parents[index], f"{name!r} is null; remove the row or give it a text")
    if len(text) > MAX_CHARACTERS:
        problem = f"{name!r} has {len(text):,} characters, over {MAX_CHARACTERS:,}; split the text or remove the row"
        raise _fail(block, parents[index], problem)
    raise _fail(block, parents[index], f"{name!r} is empty; remove the row or give it a text")


def _array(block: Block, name: str, values: list[list[Any]]) -> pa.ListArray:
    """Lists of Python values as an Arrow list of texts; names the first that is no text."""
    try:
        return pa.array(values, pa.list_(pa.string()))
    except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError):
        pass
    for index, several in enumerate(values):
        for value in several:
            if value is not None and not isinstance(value, str):
                raise _fail(block, index, f"{name!r} must be text, not {_kind(value)}")
            try:
                str(value).encode()
            except UnicodeEncodeError as error:
                code = ord(str(value)[error.start])
                problem = f"{name!r} holds the lone surrogate U+{code:04X} at character {error.start + 1}; replace it"
                raise _fail(block, index, problem) from None
    raise LusiferError(f"{block.file}: the column {name!r} cannot be read as text")


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a decimal number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _lists(block: Block, name: str, *, lists: bool, required: bool) -> pa.ListArray:
    """A column as lists of texts, checked; a single text is a list of one, null a list of none."""
    values = block.column(name)
    if values is None and required:
        raise LusiferError(f"{block.where(0)}: no column {name!r}; it has {', '.join(block.names())} (map it: columns)")
    if values is None:
        values = [None] * len(block)
    if isinstance(values, pa.Array):
        array = _from_arrow(block, name, values, lists)
    else:
        for index, value in enumerate(values):
            if isinstance(value, list) and not lists:
                raise _fail(block, index, f"{name!r} must be text, not a list")
            if isinstance(value, dict | bool | int | float):
                raise _fail(
                    block, index, f"{name!r} must be {'text or a list' if lists else 'text'}, not {_kind(value)}"
                )
        array = _array(block, name, [v if isinstance(v, list) else [] if v is None else [v] for v in values])
    lengths = pc.list_value_length(array)
    if required and (index := pc.equal(lengths, 0).index(True).as_py()) >= 0:
        absent = not isinstance(values, pa.Array) and not block.has(name, index)
        problem = f"no {name!r}" if absent else f"{name!r} is {'empty' if lists else 'null'}"
        raise _fail(block, index, f"{problem}; remove the row or give it a text")
    _check_texts(block, name, array.flatten(), np.repeat(np.arange(len(array)), lengths.to_numpy()))
    return array


def _from_arrow(block: Block, name: str, values: pa.Array, lists: bool) -> pa.ListArray:
    kind = values.type
    if pa.types.is_dictionary(kind):
        values, kind = values.dictionary_decode(), kind.value_type
    if pa.types.is_null(kind):
        return pa.array([[]] * len(values), pa.list_(pa.string()))
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    inner = kind.value_type if is_list else kind
    text = pa.types.is_string(inner) or pa.types.is_large_string(inner) or (is_list and pa.types.is_null(inner))
    if not text or (is_list and not lists):
        raise LusiferError(f"{block.file}: {name!r} must be {'text or a list' if lists else 'text'}, not {kind}")
    if is_list:
        return pc.fill_null(values.cast(pa.list_(pa.string())), pa.scalar([], pa.list_(pa.string())))
    flat = values.cast(pa.string())
    present = pc.is_valid(flat).to_numpy(zero_copy_only=False)
    offsets = np.concatenate([[0], np.cumsum(present)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), flat.drop_null())


def _labels(block: Block, name: str, *, required: bool) -> pa.Array | None:
    """``cluster`` or ``id`` as text, or None where the block has no such column."""
    values = block.column(name)
    if values is None:
        return None
    plain = values.to_pylist() if isinstance(values, pa.Array) else values
    for index, value in enumerate(plain):
        if required and (isinstance(value, bool) or not isinstance(value, str | int)):
            kind = "null" if value is None else _kind(value)
            raise _fail(block, index, f"{name!r} must be text or a whole number, not {kind}")
    return pa.array([str(v) if isinstance(v, str | int) else None for v in plain], pa.string())


def _check_negatives(block: Block, query: pa.Array, positive: pa.ListArray, negative: pa.ListArray) -> None:
    """Refuses a negative that is the query or a positive of its own row."""
    flat = [query, positive.flatten(), negative.flatten()]
    lengths = [pc.list_value_length(part).to_numpy() for part in (positive, negative)]
    rows = np.arange(len(query))
    codes = pa.chunked_array(flat).dictionary_encode().combine_chunks().indices.to_numpy().astype(np.int64)
    parents = np.concatenate([rows, np.repeat(rows, lengths[0]), np.repeat(rows, lengths[1])])
    keys = parents * (codes.max() + 1) + codes
    others = len(flat[0]) + len(flat[1])
    equal = np.isin(keys[others:], keys[:others])
    if equal.any():
        index = int(parents[others:][equal.argmax()])
        problem = "a text of 'negative' is also the query or a positive; remove it from 'negative'"
        raise _fail(block, index, problem)


def canonical(block: Block, *, texts: bool) -> pa.RecordBatch:
    """A block as columns of fixed types, every text checked.

    Args:
        block: Raw records.
        texts: Whether to make ``text`` rows (of pair records: the query and every positive) or pairs.

    Returns:
        ``text`` string, or ``query`` string, ``positive`` and ``negative`` list of strings; ``number`` int64 (line or
        row) and ``file`` int32 tell where a row comes from; ``cluster`` and ``id`` strings, null where there is none.

    Raises:
        LusiferError: At the first record that is not usable, with file, line and remedy.
    """
    rows = np.arange(len(block))
    if texts and block.column("text") is not None:
        columns = {"text": _lists(block, "text", lists=False, required=True).flatten()}
    else:
        query = _lists(block, "query", lists=False, required=True).flatten()
        positive = _lists(block, "positive", lists=True, required=True)
        columns = {"query": query, "positive": positive}
        if texts:
            lengths = pc.list_value_length(positive).to_numpy()
            flat = pa.concat_arrays([query, positive.flatten()])
            parents = np.concatenate([rows, np.repeat(rows, lengths)])
            order = np.argsort(parents, kind="stable")
            columns, rows = {"text": flat.take(pa.array(order))}, parents[order]
        else:
            columns["negative"] = _lists(block, "negative", lists=True, required=False)
            _check_negatives(block, query, positive, columns["negative"])
            labels = _labels(block, "cluster", required=True)
            columns["cluster"] = pa.nulls(len(block), pa.string()) if labels is None else labels
    ids = _labels(block, "id", required=False)
    # Exploded texts share their record's id.
    columns["id"] = pa.nulls(len(rows), pa.string()) if ids is None or len(rows) != len(block) else ids
    columns["number"] = pa.array(np.asarray(block.numbers, dtype=np.int64)[rows])
    columns["file"] = pa.array(np.full(len(rows), block.file_number, dtype=np.int32))
    return pa.RecordBatch.from_pydict(columns)
