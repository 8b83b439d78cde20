"""Is it the same content? Hashes of sets, whatever their files are called and whenever they were written, and of what a
stage of training reads: one whose data or backbones have changed meanwhile is not gone on with.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lusifer.data.records import Records, as_texts, open_records
from lusifer.data.sources import InputFile, files_of_recipe
from lusifer.errors import LusiferError, first_line
from lusifer.model.fingerprint import files_fingerprint
from lusifer.publishing import publish_file, write_json
from lusifer.recipes.schema import DataRecipe, Recipe
from lusifer.storage import is_remote, open_file, storage_errors

_READ = ("text", "query", "positive", "negative", "cluster")  # Columns that training reads.
_INPUTS = "inputs.json"
_PIECE = 1 << 16  # Bytes read at each of three places of a file that is streamed.


def set_hash(item: DataRecipe) -> str | None:
    """Hash of a set's content, 16 hexadecimal digits; of one that is streamed, of its files' sizes and a sample.

    Args:
        item: The set.

    Returns:
        None for a set that is streamed from a hub, which says nothing of its content.

    Raises:
        LusiferError: If it cannot be read.
    """
    if not item.streaming:
        # Without what chooses among rows: it is the recipe's, and tells of rows left out, again.
        return content_hash(open_records(item.model_copy(update={"cap": None, "hard_negatives": 0})))
    files = files_of_recipe(item)
    if files is None:
        return None
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.size} ".encode() + _sample(file))
    return digest.hexdigest()[:16]


def content_hash(records: Records) -> str:
    """Hash of all texts and clusters of a set, 16 hexadecimal digits; kept beside the set in the cache.

    Args:
        records: The set; rows that it does not choose count too.
    """
    kept = records.path.with_suffix(".content")
    with suppress(OSError):
        return kept.read_text(encoding="utf-8")
    whole = hashlib.sha256()
    for name in records.table.column_names:
        if name in _READ:
            whole.update(name.encode() + _column(records.table[name]))
    digest = whole.hexdigest()[:16]
    with suppress(OSError), publish_file(kept) as staging:  # Who may only read the cache computes it again.
        staging.write_text(digest, encoding="utf-8")
    return digest


def _column(column: pa.ChunkedArray) -> bytes:
    """Hash of a column of texts or of lists of them; the same however it is cut into chunks."""
    counts, lengths, texts = (hashlib.sha256() for _ in range(3))
    for chunk in column.chunks:
        if pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type):
            counts.update(_numbers(pc.list_value_length(chunk)))
            chunk = chunk.flatten()
        lengths.update(_numbers(pc.binary_length(chunk)))
        filled: Any = pc.fill_null(chunk, "").cast(pa.large_string())
        _, ends, data = filled.buffers()
        if data is not None and len(filled):
            first, last = np.frombuffer(ends, np.int64)[[filled.offset, filled.offset + len(filled)]]
            texts.update(memoryview(data)[first:last])
    return b"".join(part.digest() for part in (counts, lengths, texts))


def _numbers(array: Any) -> bytes:
    return pc.fill_null(array, -1).cast(pa.int64()).to_numpy(zero_copy_only=False).tobytes()


def _sample(file: InputFile) -> bytes:
    """Begin, middle and end of a file; of one in a store, what the store says changes with its content."""
    if is_remote(file.url):
        return file.version.encode()
    with storage_errors(file.url), open_file(file.url) as opened:
        pieces = []
        for place in (0, file.size // 2, max(0, file.size - _PIECE)):
            opened.seek(place)
            pieces.append(opened.read(_PIECE))
    return hashlib.sha256(b"".join(pieces)).digest()


def inputs_of(recipe: Recipe, name: str) -> dict[str, str]:
    """Hashes of what a stage reads, by its name in the recipe; what has none is left out.

    Args:
        recipe: The recipe.
        name: A stage.

    Raises:
        LusiferError: If a set cannot be read.
    """
    stage, model = getattr(recipe, name), recipe.model
    sets = list(stage.data) if name != "warm_start" else []
    if name == "warm_start" and (first := recipe.warm_start_data()) is not None:
        sets = [as_texts(first)]  # As stage 0 reads it.
    hashes = {f"{name}.data.{number}: {item.source}": set_hash(item) for number, item in enumerate(sets)}
    backbones: dict[str, tuple[str | None, dict[str, Any]]] = {
        "model.encoder": (model.encoder, {"revision": model.encoder_revision}),
        "model.llm": (model.llm, {"revision": model.llm_revision}),
    }
    backbones |= {f"{name}.{field}": (getattr(stage, field, None), {}) for field in ("teacher", "guide")}
    for key, (where, hub) in backbones.items():
        if where and where != "encoder":  # A guide may be the encoder itself.
            hashes[f"{key}: {where}"] = files_fingerprint(where, **{k: v for k, v in hub.items() if v})
    return {key: value for key, value in hashes.items() if value is not None}


def check_inputs_unchanged(folder: Path, inputs: dict[str, str]) -> None:
    """Refuses to go on with a stage that was begun with other content; earlier versions did not record it.

    Args:
        folder: The stage's.
        inputs: From `inputs_of`.

    Raises:
        LusiferError: If something has changed.
    """
    path = folder / _INPUTS
    if not path.is_file():
        return
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))
        changed = [key for key, value in inputs.items() if begun.get(key, value) != value]
    except (OSError, ValueError, AttributeError) as error:
        raise LusiferError(f"{str(path)!r} is damaged: {first_line(error)}; remove it") from error
    if changed:
        raise LusiferError(
            f"{changed[0]} has changed since {str(folder)!r} was started with it; restore it, choose another "
            "output, or remove that folder to start again"
        )


def keep_inputs(folder: Path, inputs: dict[str, str], *, begun: bool) -> None:
    """Writes down what a stage is begun with.

    Args:
        folder: The stage's.
        inputs: From `inputs_of`.
        begun: Whether it was begun before: what is written down then stays.
    """
    if not begun or not (folder / _INPUTS).is_file():
        write_json(folder / _INPUTS, inputs)
