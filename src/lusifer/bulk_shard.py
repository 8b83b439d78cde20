"""One shard of a bulk encoding: its rows read, embedded and written by one process.

A shard's bytes depend on its rows, the settings and what `ShardEncoder.prepare` found once for the whole run (data type
of the computation, ranges of int8), never on which process made it or when.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet
from sentence_transformers.util import quantize_embeddings

from lusifer.bulk_input import Columns, InputFile, Plan, RowReader, Slice
from lusifer.encoding import load_checkpoint
from lusifer.errors import LusiferError
from lusifer.prompts import with_instruction
from lusifer.storage import Folder
from lusifer.textencoder import WINDOW, TextEncoder, set_precision

_ARROW = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8(), "ubinary": pa.uint8()}
OUTPUT_DTYPES = tuple(_ARROW)
_FACTS = b"lusifer"

Tick = Callable[[int], object]
_Row = tuple[int | str, str]


@dataclass(frozen=True)
class Settings:
    """What decides the content of the output.

    Attributes:
        column: Column of the texts.
        id_column: Column of the ids; rows are numbered when None.
        instruction: Task instruction in front of every text.
        text: Whether the output holds the texts.
        dim: First so many dimensions, normalised again; all when None.
        output_dtype: ``float32``, ``float16``, ``int8`` or ``ubinary`` (one bit a dimension).
        precision: Data type of the computation; see `lusifer.textencoder.PRECISIONS`.
        shard_rows: Rows of a shard.
        batch_tokens: Padded tokens of a forward pass; by the device when None.
        skip_bad: Whether bad rows are left out and counted instead of refused.
    """

    column: str = "text"
    id_column: str | None = None
    instruction: str | None = None
    text: bool = True
    dim: int | None = None
    output_dtype: str = "float32"
    precision: str = "auto"
    shard_rows: int = 50_000
    batch_tokens: int | None = None
    skip_bad: bool = False


@dataclass(frozen=True)
class Job:
    """All a process needs to make shards; small, and can be pickled.

    Attributes:
        model: Checkpoint folder or hub id.
        files: The input.
        plan: Its shards.
        settings: What to make of it.
        threads: Torch threads of a process. Sums of other thread counts differ in the last digits.
        output: Folder, path or URL; a file when ``single``.
        single: Whether the output is one file.
    """

    model: str
    files: list[InputFile]
    plan: Plan
    settings: Settings
    threads: int
    output: str
    single: bool = False


@dataclass(frozen=True)
class Prepared:
    """What is found once, by measuring, and holds for every shard of a run.

    Attributes:
        precision: Data type of the computation.
        device: ``cpu``, ``cuda``, ...
        dimension: Of the embeddings in the output.
        ranges: int8 only: smallest and largest value of each dimension, (2, dimension).
    """

    precision: str
    device: str
    dimension: int
    ranges: list[list[float]] | None = None


@dataclass(frozen=True)
class ShardFacts:
    """A finished shard: its number, rows written, texts that were cut to the model's window."""

    number: int
    rows: int
    cut: int


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"part-{number:05}.parquet"


class ShardEncoder:
    """A loaded model that makes shards of a job.

    Args:
        job: The job.
        device: Torch device; the best there is when None.

    Raises:
        LusiferError: If the model cannot be loaded.
    """

    def __init__(self, job: Job, device: str | None = None) -> None:
        self.job = job
        if torch.get_num_threads() != job.threads:
            torch.set_num_threads(job.threads)
        model = load_checkpoint(job.model, **({"device": device} if device else {}))
        self.encoder = TextEncoder(model, token_budget=job.settings.batch_tokens)
        self.reader = RowReader(job.files, Columns(job.settings.column, job.settings.id_column))
        self.folder = Folder(job.output.rpartition("/")[0] or "." if job.single else job.output)
        self._precision: str | None = None

    def prepare(self) -> Prepared:
        """Measures what a whole run shares.

        int8 takes the ranges of the first 4,096 texts: components of unit vectors lie around 1/sqrt(dimension), so a
        fixed scale would use a few of the 256 levels; and ranges of each shard's own would make shards incomparable.

        Raises:
            LusiferError: If the model has fewer dimensions than asked for.
        """
        settings = self.job.settings
        precision = self._compute_in(settings.precision)
        size = self.encoder.dimension
        if settings.dim is not None and not 1 <= settings.dim <= size:
            raise LusiferError(f"cannot cut embeddings to {settings.dim} dimensions: the model has {size}")
        device = self.encoder.model.device.type
        prepared = Prepared(precision, device, settings.dim or size)
        if settings.output_dtype != "int8":
            return prepared
        rows = list(islice(self._good_rows(), WINDOW))
        found = np.concatenate([vectors for _, vectors in self._vectors(rows, prepared, None)])
        ranges = [found.min(axis=0).tolist(), found.max(axis=0).tolist()]
        return Prepared(precision, device, prepared.dimension, ranges)

    def encode(self, part: Slice, prepared: Prepared, tick: Tick | None = None) -> ShardFacts:
        """Makes one shard; it appears in the output complete or not at all.

        Args:
            part: Its rows.
            prepared: What `prepare` found in this run.
            tick: Is told after each batch how many texts it held.

        Raises:
            LusiferError: If rows cannot be read any more, the output cannot be written, an embedding is not finite, or
                the run was begun on another kind of device.
        """
        if prepared.device != (device := self.encoder.model.device.type):
            raise LusiferError(f"this output was begun on {prepared.device}, not {device}; go on there (--device)")
        self._compute_in(prepared.precision)
        self.encoder.cut = 0
        name = self.job.output.rpartition("/")[2] if self.job.single else shard_name(part.number)
        with self.folder.put(name) as path:
            pieces = self._finished(part, prepared, tick)
            if name.endswith(".npy"):
                rows = self._write_npy(path, pieces, prepared)
            else:
                rows = self._write_parquet(path, pieces, prepared)
        return ShardFacts(part.number, rows, self.encoder.cut)

    def _compute_in(self, precision: str) -> str:
        if self._precision is None:
            self._precision = set_precision(self.encoder.model, precision)
        return self._precision

    def _good_rows(self) -> Iterator[_Row]:
        for part in self.job.plan.slices:
            yield from self.reader.read(part)

    def _vectors(
        self, rows: Iterable[_Row], prepared: Prepared, tick: Tick | None
    ) -> Iterator[tuple[list[_Row], np.ndarray]]:
        """Windows of rows and their (rows, dimension) float32 embeddings."""
        kept: deque[_Row] = deque()
        settings = self.job.settings

        def texts() -> Iterator[str]:
            for row in rows:
                kept.append(row)
                yield with_instruction(settings.instruction, row[1])

        for vectors in self.encoder.stream(texts(), tick):
            window = [kept.popleft() for _ in vectors]
            wrong = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
            if len(wrong):
                raise LusiferError(
                    f"the embedding of {window[wrong[0]][0]!r} is not finite in {prepared.precision}; "
                    "try --precision float32"
                )
            if settings.dim is not None:
                vectors = vectors[:, : settings.dim]
                vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
            yield window, vectors

    def _finished(self, part: Slice, prepared: Prepared, tick: Tick | None) -> Iterator[tuple[list[_Row], np.ndarray]]:
        """Windows of rows and their embeddings as they are stored."""
        kind = self.job.settings.output_dtype
        ranges = None if prepared.ranges is None else np.array(prepared.ranges, dtype=np.float32)
        for window, vectors in self._vectors(self.reader.read(part), prepared, tick):
            if kind == "float16":
                yield window, vectors.astype(np.float16)
            else:
                yield window, quantize_embeddings(vectors, kind, ranges=ranges)

    def _write_npy(self, path: Path, pieces: Iterable[tuple[list[_Row], np.ndarray]], prepared: Prepared) -> int:
        rows, kind = 0, self.job.settings.output_dtype
        expected = self.job.plan.rows - self.job.plan.bad
        dtype = np.dtype("uint8" if kind == "ubinary" else kind)
        shape = (expected, stored_width(prepared.dimension, kind))
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for window, vectors in pieces:
                file.write(np.ascontiguousarray(vectors).tobytes())
                rows += len(window)
        if rows != expected:
            raise LusiferError(f"the input has {rows} rows to encode, not {expected}: it changed while it was read")
        return rows

    def _write_parquet(self, path: Path, pieces: Iterable[tuple[list[_Row], np.ndarray]], prepared: Prepared) -> int:
        rows = 0
        settings = self.job.settings
        form = schema(settings, self.job.plan.id_type, prepared.dimension)
        options: dict[str, Any] = {"compression": "zstd", "write_statistics": ["id"]}
        # Parquet stores a byte as four; a dictionary of the 256 there are brings it back to one.
        whole_numbers = settings.output_dtype in ("int8", "ubinary")
        options["use_dictionary"] = ["embedding.list.element"] if whole_numbers else False
        with parquet.ParquetWriter(path, form, **options) as writer:
            for window, vectors in pieces:
                flat = pa.array(np.ascontiguousarray(vectors).reshape(-1), type=_ARROW[settings.output_dtype])
                columns = {
                    "id": pa.array([given for given, _ in window], type=form.field("id").type),
                    "text": [text for _, text in window] if settings.text else None,
                    "embedding": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
                }
                writer.write_table(pa.table({name: columns[name] for name in form.names}, schema=form))
                rows += len(window)
            writer.add_key_value_metadata({_FACTS: json.dumps({"rows": rows, "cut": self.encoder.cut})})
        return rows


def stored_width(dimension: int, output_dtype: str) -> int:
    """Numbers of a stored embedding: its dimensions, or a byte for eight of them."""
    return -(-dimension // 8) if output_dtype == "ubinary" else dimension


def schema(settings: Settings, id_type: str, dimension: int) -> pa.Schema:
    """Columns of a shard: ``id``, ``text`` where wanted, and ``embedding``, a list of fixed size."""
    width = stored_width(dimension, settings.output_dtype)
    fields = [("id", pa.string() if id_type == "string" else pa.int64()), ("text", pa.string())]
    embedding = ("embedding", pa.list_(_ARROW[settings.output_dtype], width))
    return pa.schema([*(fields if settings.text else fields[:1]), embedding])


def read_facts(folder: Folder, number: int) -> ShardFacts:
    """What a finished shard says of itself.

    Raises:
        LusiferError: If it is damaged.
    """
    name = shard_name(number)
    try:
        with folder.fs.open(folder.path(name), "rb") as file:
            found = json.loads(parquet.ParquetFile(file).metadata.metadata[_FACTS])
        return ShardFacts(number, int(found["rows"]), int(found["cut"]))
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise LusiferError(
            f"{folder.url}/{name} is damaged ({type(error).__name__}); remove it to have it again"
        ) from error
