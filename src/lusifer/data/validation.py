"""What counts as a text, an id and a training record: one rule for all commands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lusifer.data.reading import Block
from lusifer.errors import LusiferError

MAX_CHARACTERS = 1_000_000
_LEAST_ID, _GREATEST_ID = -(2**63), 2**64 - 1
_REMEDY = "remove the row or give it a text"
_KINDS: dict[type, str] = {bool: "true or false", int: "a number", float: "a decimal number", list: "a list"}
_KINDS |= {dict: "an object", type(None): "null"}


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), type(value).__name__)


def _surrogate(text: str) -> str | None:
    """What is wrong with a text that no UTF-8 can hold, or None."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"contains the lone surrogate U+{ord(text[error.start]):04X} at character {error.start + 1}; replace it"
    return None


def _text_problem(value: Any, column: str) -> str | None:
    if not isinstance(value, str):
        null = f"{column!r} is null; {_REMEDY}"
        return null if value is None else f"{column!r} must be text, not {_kind(value)}"
    if not value.strip():
        return f"{column!r} is empty; {_REMEDY}"
    problem = _surrogate(value)
    return problem and f"{column!r} {problem}"


def _id_problem(value: Any, column: str) -> str | None:
    if isinstance(value, str):
        problem = _surrogate(value) if value else "is empty"
        return problem and f"the id in {column!r} {problem}"
    if not isinstance(value, int) or isinstance(value, bool):
        return f"the id in {column!r} must be text or a whole number, not {_kind(value)}"
    if not _LEAST_ID <= value <= _GREATEST_ID:
        return f"the id in {column!r} is beyond 64 bits; write it as text"
    return None


def text_problems(values: list[Any], column: str) -> dict[int, str]:
    """What is wrong with texts, by their index: each must be a ``str`` that is not blank.

    Args:
        values: The texts as they were read.
        column: Name of their column, for the message.
    """
    try:
        "".join(values).encode()  # All at once is ten times as fast as one by one, and nearly all are good.
        if all(values) and not any(map(str.isspace, values)):
            return {}
    except (TypeError, UnicodeEncodeError):
        pass
    return _by_index(_text_problem, values, column)


def id_problems(values: list[Any], column: str) -> dict[int, str]:
    """What is wrong with ids, by their index: each must be text, or a whole number of 64 bits.

    Args:
        values: The ids as they were read.
        column: Name of their column, for the message.
    """
    if set(map(type, values)) == {int} and _LEAST_ID <= min(values) <= max(values) <= _GREATEST_ID:
        return {}
    return _by_index(_id_problem, values, column)


def _by_index(problem_of: Callable[[Any, str], str | None], values: list[Any], column: str) -> dict[int, str]:
    problems = ((index, problem_of(value, column)) for index, value in enumerate(values))
    return {index: problem for index, problem in problems if problem}


def repeated_id(value: Any, where: str, first: str) -> LusiferError:
    """The error for an id that occurs twice.

    Args:
        value: The id.
        where: File and row of the second occurrence.
        first: File and row of the first one.
    """
    problem = f"the id {value!r} is that of {first} already; give every record its own id, or remove one"
    return LusiferError(f"{where}: {problem}")


def _check_texts(block: Block, name: str, texts: pa.Array, parents: np.ndarray) -> None:
    """Refuses the first null, invalid, empty or huge text; ``parents`` are the records that the texts belong to."""
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid:
        for index in range(len(texts)):
            try:
                texts[index].as_py()
            except UnicodeDecodeError as error:
                problem = f"{name!r} is not valid UTF-8 ({error.reason}); convert the file to UTF-8"
                raise block.error(parents[index], problem) from None
        raise
    empty = pc.equal(pc.utf8_trim_whitespace(texts), "")
    long = pc.greater(pc.utf8_length(texts), MAX_CHARACTERS)
    index = pc.fill_null(pc.or_(empty, long), True).index(True).as_py()
    if index < 0:
        return
    text = texts[index].as_py()
    problem = _text_problem(text, name) or f"{name!r} is empty; {_REMEDY}"
    if text is not None and len(text) > MAX_CHARACTERS:
        problem = f"{name!r} has {len(text):,} characters, over {MAX_CHARACTERS:,}; split the text or remove the row"
    raise block.error(parents[index], problem)


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
            raise block.error(index, f"{name!r} must be text, not a list")
        for text in texts:
            if text is not None and not isinstance(text, str):
                wanted = "text or a list" if lists and text is value else "text"
                raise block.error(index, f"{name!r} must be {wanted}, not {_kind(text)}")
            if text is not None and (problem := _surrogate(text)):
                raise block.error(index, f"{name!r} {problem}")
    raise LusiferError(f"{block.file}: the column {name!r} cannot be read as text")


_LISTS = ("is_list", "is_large_list", "is_fixed_size_list", "is_list_view", "is_large_list_view")
_TEXTS = ("is_string", "is_large_string", "is_string_view")


def _is_one_of(kind: pa.DataType, tests: Sequence[str]) -> bool:
    return any(getattr(pa.types, test)(kind) for test in tests)


def _plain(values: pa.Array) -> pa.Array:
    """A column without a dictionary."""
    return values.dictionary_decode() if pa.types.is_dictionary(values.type) else values


def _from_arrow(block: Block, name: str, values: pa.Array, lists: bool) -> pa.ListArray:
    """A column of texts or of lists of texts, of any of Arrow's types for them, as lists."""
    kind = (values := _plain(values)).type
    if pa.types.is_null(kind):
        return pa.array([[]] * len(values), pa.list_(pa.string()))
    is_list = _is_one_of(kind, _LISTS)
    inner = kind.value_type if is_list else kind
    inner = inner.value_type if pa.types.is_dictionary(inner) else inner
    if not (_is_one_of(inner, _TEXTS) or (is_list and pa.types.is_null(inner))) or (is_list and not lists):
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
    if required and (index := pc.equal(pc.list_value_length(array), 0).index(True).as_py()) >= 0:
        null = f"{name!r} is {'empty' if lists else 'null'}" if block.has(name, index) else f"no {name!r}"
        raise block.error(index, f"{null}; {_REMEDY}")
    _check_texts(block, name, array.flatten(), _parents(array))
    return array


def _labels(block: Block, name: str) -> pa.Array:
    """``cluster`` or ``id`` as text, null where there is none; in a block with clusters every record has one."""
    if block.column(name) is None:
        return pa.nulls(len(block), pa.string())
    values = block.values(name)
    if name == "id":
        problems = {index: problem for index, problem in id_problems(values, name).items() if values[index] is not None}
    else:
        unfit = ((i, v) for i, v in enumerate(values) if isinstance(v, bool) or not isinstance(v, str | int))
        problems = {index: f"{name!r} must be text or a whole number, not {_kind(value)}" for index, value in unfit}
    for index, problem in problems.items():
        raise block.error(index, problem)
    return pa.array([None if value is None else str(value) for value in values], pa.string())


def _parents(lists: pa.ListArray) -> np.ndarray:
    """For every value of the lists, the list it belongs to, int64."""
    return np.repeat(np.arange(len(lists)), pc.list_value_length(lists).to_numpy())


def _without_copies(query: pa.Array, positive: pa.ListArray, negative: pa.ListArray) -> tuple[pa.ListArray, np.ndarray]:
    """The negatives that are neither query nor positive of their own row, and how many of each row are, int32."""
    flat = [query, positive.flatten(), negative.flatten()]
    codes = pa.chunked_array(flat).dictionary_encode().combine_chunks().indices.to_numpy().astype(np.int64)
    parents = np.concatenate([np.arange(len(query)), _parents(positive), _parents(negative)])
    keys = parents * (codes.max() + 1) + codes
    others = len(query) + len(flat[1])
    equal = np.isin(keys[others:], keys[:others])
    copies, kept = (np.bincount(parents[others:][chosen], minlength=len(query)) for chosen in (equal, ~equal))
    offsets = np.concatenate([[0], np.cumsum(kept)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), flat[2].filter(pa.array(~equal))), copies.astype(np.int32)


def canonical(block: Block, *, texts: bool) -> pa.RecordBatch:
    """A block as columns of fixed types, every text checked.

    Args:
        block: Raw records.
        texts: Whether to make ``text`` rows (of pair records: the query and every positive) or pairs.

    Returns:
        ``text`` string, or ``query`` string, ``positive`` and ``negative`` list of strings, and ``copies`` int32, how
        many negatives are left out because they are the query or a positive of their row; ``number`` int64 (line or
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
            flat = pa.concat_arrays([query, positive.flatten()])
            parents = np.concatenate([rows, _parents(positive)])
            order = np.argsort(parents, kind="stable")
            columns, rows = {"text": flat.take(pa.array(order))}, parents[order]
        else:
            negative = _lists(block, "negative", lists=True, required=False)
            columns["negative"], copies = _without_copies(query, positive, negative)
            columns["copies"] = pa.array(copies)
            columns["cluster"] = _labels(block, "cluster")
    ids = _labels(block, "id")
    # Exploded texts share their record's id.
    columns["id"] = ids if len(rows) == len(block) else pa.nulls(len(rows), pa.string())
    columns["number"] = pa.array(np.asarray(block.numbers, dtype=np.int64)[rows])
    columns["file"] = pa.array(np.full(len(rows), block.file_number, dtype=np.int32))
    return pa.RecordBatch.from_pydict(columns)
