"""What counts as a text, an id and a training record: one rule for all commands."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lusifer.data.reading import Block
from lusifer.errors import LusiferError

MAX_CHARACTERS = 1_000_000
_LEAST_ID, _GREATEST_ID = -(2**63), 2**64 - 1
_REMEDY = "remove the row or give it a text"
_KINDS = {
    bool: "true or false",
    int: "a number",
    float: "a decimal number",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), type(value).__name__)


def _surrogate(text: str) -> str | None:
    """What is wrong with a text that no UTF-8 can hold, or None."""
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"holds the lone surrogate U+{ord(text[error.start]):04X} at character {error.start + 1}; replace it"
    return None


def text_problem(value: Any, column: str) -> str | None:
    """What is wrong with a text, or None.

    Args:
        value: The text as it was read.
        column: Name of its column, for the message.
    """
    if not isinstance(value, str):
        null = f"{column!r} is null; {_REMEDY}"
        return null if value is None else f"{column!r} must be text, not {_kind(value)}"
    if not value.strip():
        return f"{column!r} is empty; {_REMEDY}"
    problem = _surrogate(value)
    return problem and f"{column!r} {problem}"


def id_problem(value: Any, column: str) -> str | None:
    """What is wrong with an id, or None: it must be text that is not empty, or a whole number of 64 bits.

    Args:
        value: The id as it was read.
        column: Name of its column, for the message.
    """
    if isinstance(value, str):
        problem = _surrogate(value) if value else "is empty"
        return problem and f"the id in {column!r} {problem}"
    if not isinstance(value, int) or isinstance(value, bool):
        return f"the id in {column!r} must be text or a whole number, not {_kind(value)}"
    if not _LEAST_ID <= value <= _GREATEST_ID:
        return f"the id in {column!r} is beyond 64 bits; write it as text"
    return None


def text_problems(values: list[Any], column: str) -> dict[int, str]:
    """What is wrong with texts, by their index.

    Args:
        values: The texts as they were read.
        column: Name of their column, for the message.
    """
    try:
        "".join(values).encode()  # All at once is ten times as fast as one by one, and nearly all are good.
    except (TypeError, UnicodeEncodeError):
        pass
    else:
        if all(values) and not any(map(str.isspace, values)):
            return {}
    found = ((index, text_problem(value, column)) for index, value in enumerate(values))
    return {index: problem for index, problem in found if problem}


def id_problems(values: list[Any], column: str) -> dict[int, str]:
    """What is wrong with ids, by their index.

    Args:
        values: The ids as they were read.
        column: Name of their column, for the message.
    """
    if set(map(type, values)) == {int} and _LEAST_ID <= min(values) <= max(values) <= _GREATEST_ID:
        return {}
    found = ((index, id_problem(value, column)) for index, value in enumerate(values))
    return {index: problem for index, problem in found if problem}


def _fail(block: Block, index: int, problem: str) -> LusiferError:
    return LusiferError(f"{block.where(index)}: {problem}")


def repeated_id(value: Any, where: str, first: str) -> LusiferError:
    """The error for an id that occurs twice.

    Args:
        value: The id.
        where: File and row of the second occurrence.
        first: File and row of the first one.
    """
    return LusiferError(
        f"{where}: the id {value!r} is that of {first} already; give every record its own id, or remove one"
    )


# ------------------------------------------------------------------------------------------------ training records


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
    index = pc.or_(pc.fill_null(empty, True), pc.fill_null(long, True)).index(True).as_py()
    if index < 0:
        return
    text = texts[index].as_py()
    problem = text_problem(text, name) or f"{name!r} is empty; {_REMEDY}"
    if text is not None and len(text) > MAX_CHARACTERS:
        problem = f"{name!r} has {len(text):,} characters, over {MAX_CHARACTERS:,}; split the text or remove the row"
    raise _fail(block, parents[index], problem)


def _from_python(block: Block, name: str, values: list[Any], lists: bool) -> pa.ListArray:
    """Python values, each a text or a list of texts, as lists; names the first that is no text."""
    rows = [value if isinstance(value, list) else [] if value is None else [value] for value in values]
    try:
        if lists or not any(isinstance(value, list) for value in values):
            return pa.array(rows, pa.list_(pa.string()))
    except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError):
        pass
    for index, (value, texts) in enumerate(zip(values, rows, strict=True)):
        if isinstance(value, list) and not lists:
            raise _fail(block, index, f"{name!r} must be text, not a list")
        for text in texts:
            if text is not None and not isinstance(text, str):
                wanted = "text or a list" if lists and text is value else "text"
                raise _fail(block, index, f"{name!r} must be {wanted}, not {_kind(text)}")
            if text is not None and (problem := _surrogate(text)):
                raise _fail(block, index, f"{name!r} {problem}")
    raise LusiferError(f"{block.file}: the column {name!r} cannot be read as text")


def _is_list(kind: pa.DataType) -> bool:
    tests = ("is_list", "is_large_list", "is_fixed_size_list", "is_list_view", "is_large_list_view")
    return any(getattr(pa.types, test)(kind) for test in tests)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _plain(values: pa.Array) -> pa.Array:
    """A column without a dictionary."""
    return values.dictionary_decode() if pa.types.is_dictionary(values.type) else values


def _from_arrow(block: Block, name: str, values: pa.Array, lists: bool) -> pa.ListArray:
    """A column of texts or of lists of texts, of any of Arrow's types for them, as lists."""
    kind = (values := _plain(values)).type
    if pa.types.is_null(kind):
        return pa.array([[]] * len(values), pa.list_(pa.string()))
    is_list = _is_list(kind)
    inner = kind.value_type if is_list else kind
    inner = inner.value_type if pa.types.is_dictionary(inner) else inner
    if not (_is_text(inner) or (is_list and pa.types.is_null(inner))) or (is_list and not lists):
        raise LusiferError(f"{block.file}: {name!r} must be {'text or a list' if lists else 'text'}, not {kind}")
    if is_list:
        flat = _plain(pc.list_flatten(values)).cast(pa.string())
        lengths = pc.fill_null(pc.list_value_length(values), 0).to_numpy(zero_copy_only=False)
    else:
        flat, lengths = values.cast(pa.string()).drop_null(), pc.is_valid(values).to_numpy(zero_copy_only=False)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), flat)


def _lists(block: Block, name: str, *, lists: bool, required: bool) -> pa.ListArray:
    """A column as lists of texts, checked; a single text is a list of one, null a list of none."""
    values = block.column(name)
    if values is None and required:
        raise LusiferError(f"{block.where(0)}: no column {name!r}; it has {', '.join(block.names())} (map it: columns)")
    convert = _from_arrow if isinstance(values, pa.Array) else _from_python
    array = convert(block, name, [None] * len(block) if values is None else values, lists)
    lengths = pc.list_value_length(array)
    if required and (index := pc.equal(lengths, 0).index(True).as_py()) >= 0:
        null = f"{name!r} is {'empty' if lists else 'null'}" if block.has(name, index) else f"no {name!r}"
        raise _fail(block, index, f"{null}; {_REMEDY}")
    _check_texts(block, name, array.flatten(), np.repeat(np.arange(len(array)), lengths.to_numpy()))
    return array


def _no_labels(values: list[Any]) -> Iterator[tuple[int, Any]]:
    for index, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, str | int):
            yield index, value


def _labels(block: Block, name: str, *, required: bool) -> pa.Array | None:
    """``cluster`` or ``id`` as text, or None where the block has no such column."""
    if block.column(name) is None:
        return None
    values = block.values(name)
    if required:
        problems = {i: f"{name!r} must be text or a whole number, not {_kind(v)}" for i, v in _no_labels(values)}
    else:
        problems = {i: problem for i, problem in id_problems(values, name).items() if values[i] is not None}
    for index, problem in problems.items():
        raise _fail(block, index, problem)
    return pa.array([None if value is None else str(value) for value in values], pa.string())


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
    block.refuse_problems()
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
