"""One shard of a bulk encoding: its rows read, embedded and written by one process.

A shard's bytes depend on its rows, the settings and what `ShardEncoder.prepare` found once for the whole run (data type
of the computation, ranges of int8), never on which process made it or when.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet
from sentence_transformers.util import quantize_embeddings

from lusifer.bulk.job import (
    ARROW,
    Job,
    Prepared,
    ShardFacts,
    output_names,
    schema,
    shard_name,
    stored_width,
)
from lusifer.bulk.journal import Journal
from lusifer.data.prompts import explicit_prompt, prompt_for
from lusifer.data.rows import Columns, RowReader, Slice
from lusifer.data.sources import is_unchanged
from lusifer.data.vectors.encoded import FACTS, MadeBy
from lusifer.errors import LusiferError
from lusifer.loading import load_for_inference
from lusifer.model.fingerprint import weights_hash
from lusifer.model.text_encoder import WINDOW, TextEncoder, set_precision
from lusifer.storage import Folder

Tick = Callable[[int], object]
_Row = tuple[Any, ...]  # Id, text, and the other columns.


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
        model = load_for_inference(job.model, device=device)
        self.encoder = TextEncoder(model, token_budget=job.settings.batch_tokens)
        columns = Columns(job.settings.column, job.settings.id_column)
        self.reader = RowReader(job.files, columns, job.plan.columns)
        parent = job.output.rpartition("/")[0] or "."
        self.folder = Folder(parent, scratch=None) if job.single else Folder(job.output)
        self._precision: str | None = None
        self._journal: Journal | None = None

    def prepare(self) -> Prepared:
        """Measures what a whole run shares.

        int8 takes the ranges of the first 4,096 texts: components of unit vectors lie around 1/sqrt(dimension), so a
        fixed scale would use a few of the 256 levels; and ranges of each shard's own would make shards incomparable.

        Raises:
            LusiferError: If the model has fewer dimensions than asked for.
        """
        settings = self.job.settings
        model_hash = weights_hash(self.encoder.model)  # Before it is rounded.
        precision = self._compute_in(settings.precision)
        size = self.encoder.dimension
        if settings.dim is not None and not 1 <= settings.dim <= size:
            raise LusiferError(f"cannot truncate embeddings to {settings.dim} dimensions: the model has {size}")
        device = self.encoder.model.device.type
        asked = explicit_prompt(settings.prompt, settings.instruction)
        prompt = prompt_for(self.encoder.model, "document", prompt=asked, prompt_name=settings.prompt_name)
        made_by = MadeBy(
            self.job.name, model_hash, size, prompt, prompt_for(self.encoder.model, "document"), settings.output_dtype,
            settings.column, settings.id_column, output_names(self.job.plan.columns),
        )  # fmt: skip
        prepared = Prepared(precision, device, settings.dim or size, prompt=prompt, made_by=made_by.to_dict())
        if settings.output_dtype != "int8":
            return prepared
        rows = islice(chain.from_iterable(map(self.reader.read, self.job.plan.slices)), WINDOW)
        sample = np.concatenate([vectors for _, vectors in self._vectors(rows, prepared, None)])
        return replace(prepared, ranges=[sample.min(axis=0).tolist(), sample.max(axis=0).tolist()])

    def encode(self, part: Slice, prepared: Prepared, tick: Tick | None = None) -> ShardFacts:
        """Makes one shard; it appears in the output complete or not at all.

        Args:
            part: Its rows.
            prepared: What `prepare` found in this run.
            tick: Is told after each batch how many texts it held.

        Raises:
            LusiferError: If rows cannot be read, an embedding is not finite, the output cannot be written, or the run
                was begun on another kind of device.
        """
        if prepared.device != (device := self.encoder.model.device.type):
            raise LusiferError(f"this output was begun on {prepared.device}, not {device}; resume there (--device)")
        self._compute_in(prepared.precision)
        self.encoder.cut = 0
        name = self.job.output.rpartition("/")[2] if self.job.single else shard_name(part.number)
        # One file has no manifest that would say what a journal is of.
        self._journal = None if self.job.single else Journal(self.folder, part.number)
        with self._journal_saved(), self.folder.put(name) as path:
            write = self._write_npy if name.endswith(".npy") else self._write_parquet
            rows = write(path, self._finished(part, prepared, tick), prepared)
            self._refuse_changed(part)
        if self._journal is not None:
            self._journal.remove()
        return ShardFacts(part.number, rows, self.encoder.cut)

    @contextmanager
    def _journal_saved(self) -> Iterator[None]:
        """Keeps what is done of a shard, whatever ends it."""
        try:
            yield
        except BaseException:
            if self._journal is not None:
                with suppress(LusiferError):  # What ended the work says more, be it the same disk.
                    self._journal.save()
            raise

    def _refuse(self, problem: str) -> NoReturn:
        """Ends a shard that these settings cannot finish: nothing of it is kept."""
        if self._journal is not None:
            self._journal.remove()
        raise LusiferError(problem)

    def _refuse_changed(self, part: Slice) -> None:
        """Refuses a shard whose files were rewritten since the plan was made: its rows may be of either content."""
        later = self.job.plan.slices[part.number + 1 : part.number + 2]
        last = later[0].start.file if later else len(self.job.files) - 1
        for file in self.job.files[part.start.file : last + 1]:
            if not is_unchanged(file):
                changed = f"{file.url!r} has changed while it was encoded"
                self._refuse(f"{changed}; choose another output, or remove what is there, and encode it again")

    def _compute_in(self, precision: str) -> str:
        if self._precision is None:
            self._precision = set_precision(self.encoder.model, precision)
        return self._precision

    def _vectors(
        self, rows: Iterable[_Row], prepared: Prepared, tick: Tick | None, keeper: Journal | None = None
    ) -> Iterator[tuple[list[_Row], np.ndarray]]:
        """Windows of rows and their (rows, dimension) float32 embeddings."""
        kept: deque[_Row] = deque()
        settings, prompt = self.job.settings, prepared.prompt
        if prompt is None:
            prompt = explicit_prompt(None, settings.instruction) or ""

        def texts() -> Iterator[str]:
            for row in rows:
                kept.append(row)
                yield prompt + row[1]

        for vectors in self.encoder.stream(texts(), tick, keeper):
            window = [kept.popleft() for _ in vectors]
            wrong = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
            if len(wrong):
                problem = f"the embedding of {window[wrong[0]][0]!r} is not finite in {prepared.precision}"
                self._refuse(f"{problem}; try --precision float32")
            if settings.dim is not None:
                vectors = vectors[:, : settings.dim]
                vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
            yield window, vectors

    def _finished(self, part: Slice, prepared: Prepared, tick: Tick | None) -> Iterator[tuple[list[_Row], np.ndarray]]:
        """Windows of rows and their embeddings as they are stored."""
        kind = self.job.settings.output_dtype
        ranges = None if prepared.ranges is None else np.array(prepared.ranges, dtype=np.float32)
        for window, vectors in self._vectors(self.reader.read(part), prepared, tick, self._journal):
            half = kind == "float16"
            yield window, vectors.astype(np.float16) if half else quantize_embeddings(vectors, kind, ranges=ranges)

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
        rows, settings = 0, self.job.settings
        form = schema(settings, self.job.plan, prepared.dimension)
        names = output_names(self.job.plan.columns)
        # Parquet stores a byte as four; a dictionary of the 256 there are brings it back to one. Values of other
        # columns recur, too.
        dictionary: Any = ["embedding.list.element"] if settings.output_dtype in ("int8", "ubinary") else []
        dictionary = [*dictionary, *names.values()] or False
        options: dict[str, Any] = {"compression": "zstd", "write_statistics": ["id"], "use_dictionary": dictionary}
        with parquet.ParquetWriter(path, form, **options) as writer:
            for window, vectors in pieces:
                flat = pa.array(np.ascontiguousarray(vectors).reshape(-1), type=ARROW[settings.output_dtype])
                given, texts, *rest = zip(*window, strict=True)
                columns = {
                    "id": pa.array(given, type=form.field("id").type),
                    "text": texts if settings.text else None,
                    "embedding": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
                    **dict(zip(names.values(), rest, strict=True)),
                }
                writer.write_table(pa.table({name: columns[name] for name in form.names}, schema=form))
                rows += len(window)
            facts: dict[str, Any] = {"rows": rows, "cut": self.encoder.cut}
            facts |= {"made_by": prepared.made_by} if prepared.made_by else {}
            writer.add_key_value_metadata({FACTS: json.dumps(facts)})
        return rows
