"""What a bulk encoding is made of, as plain values: input, settings, plan, and the form of the output."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import parquet

from lusifer.data.rows import Position, Slice
from lusifer.data.sources import InputFile
from lusifer.data.vectors.encoded import FACTS
from lusifer.errors import LusiferError
from lusifer.storage import Folder

ARROW = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8(), "ubinary": pa.uint8()}
OUTPUT_DTYPES = tuple(ARROW)
_COLUMNS = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64(), "string": pa.string()}


@dataclass(frozen=True)
class Plan:
    """An input's rows (``bad`` ones included), the Arrow type of its ids, and where each shard of them begins.

    ``columns`` are those kept beside text and id, and their types as in `lusifer.data.rows.ColumnTypes`.
    """

    rows: int
    bad: int
    id_type: str
    starts: Sequence[Sequence[int]]
    shard_rows: int
    columns: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def slices(self) -> list[Slice]:
        """The shards."""
        firsts = range(0, self.rows, self.shard_rows)
        shards = enumerate(zip(firsts, self.starts, strict=True))
        return [Slice(k, first, min(self.shard_rows, self.rows - first), Position(*at)) for k, (first, at) in shards]


@dataclass(frozen=True)
class Settings:
    """What decides the content of the output.

    Attributes:
        column: Column of the texts.
        id_column: Column of the ids; rows are numbered when None.
        instruction: Task instruction in front of every text, in place of a prompt.
        text: Whether the output holds the texts.
        dim: First so many dimensions, normalised again; all when None.
        output_dtype: ``float32``, ``float16``, ``int8`` or ``ubinary`` (one bit a dimension).
        precision: Data type of the computation; see `lusifer.model.text_encoder.PRECISIONS`.
        shard_rows: Rows of a shard.
        batch_tokens: Padded tokens of a forward pass; by the device when None.
        skip_bad: Whether bad rows are left out and counted instead of refused.
        prompt: What stands in front of every text; the model's document prompt when None.
        prompt_name: Name of the model's prompt to use instead.
        metadata: Other columns of the input to keep in the output; all when None.
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
    prompt: str | None = None
    prompt_name: str | None = None
    metadata: list[str] | None = None


@dataclass(frozen=True)
class Job:
    """All a process needs to make shards of ``output``, a folder or a file; can be pickled.

    ``threads`` are Torch's in a process: sums of other thread counts differ in the last digits. ``name`` is the model
    as it was asked for, ``model`` where it is.
    """

    model: str
    files: list[InputFile]
    plan: Plan
    settings: Settings
    threads: int
    output: str
    single: bool = False
    name: str = ""


@dataclass(frozen=True)
class Prepared:
    """What is found once, by measuring, and holds for every shard of a run.

    Attributes:
        precision: Data type of the computation.
        device: ``cpu``, ``cuda``, ...
        dimension: Of the embeddings in the output.
        ranges: int8 only: smallest and largest value of each dimension, (2, dimension).
        prompt: What stands in front of every text; None in runs that an older version began, which go on as they were.
        made_by: What the shards say of the model; None in such runs.
    """

    precision: str
    device: str
    dimension: int
    ranges: list[list[float]] | None = None
    prompt: str | None = None
    made_by: dict[str, Any] | None = None


class ShardFacts(NamedTuple):
    """A finished shard: its number, rows written, texts that were truncated to the model's window."""

    number: int
    rows: int
    cut: int


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"part-{number:05}.parquet"


def stored_width(dimension: int, output_dtype: str) -> int:
    """Numbers of a stored embedding: its ``dimension``, or a byte for eight of them where ``output_dtype`` is bits."""
    return -(-dimension // 8) if output_dtype == "ubinary" else dimension


def output_names(columns: Iterable[str]) -> dict[str, str]:
    """What the kept columns of an input are called in the output, where ``id``, ``text`` and ``embedding`` are ours."""
    names: dict[str, str] = {}
    taken = {"id", "text", "embedding", *(columns := list(columns))}
    for column in columns:
        names[column] = column
        while column in ("id", "text", "embedding") and names[column] in taken:
            names[column] = f"input_{names[column]}"
        taken.add(names[column])
    return names


def schema(settings: Settings, plan: Plan, dimension: int) -> pa.Schema:
    """Columns of a shard: ``id``, ``text`` where wanted, those of the input, ``embedding``, a list of fixed size."""
    width = stored_width(dimension, settings.output_dtype)
    embedding = ("embedding", pa.list_(ARROW[settings.output_dtype], width))
    text = [("text", pa.string())] if settings.text else []
    names = output_names(plan.columns)
    kept = [(names[column], _COLUMNS[kind]) for column, kind in plan.columns.items()]
    return pa.schema([("id", pa.type_for_alias(plan.id_type)), *text, *kept, embedding])


def read_facts(folder: Folder, number: int) -> ShardFacts:
    """What a finished shard in ``folder`` says of itself.

    Raises:
        LusiferError: If it is damaged.
    """
    name = shard_name(number)
    try:
        with folder.fs.open(folder.path(name), "rb") as file:
            facts = json.loads(parquet.ParquetFile(file).metadata.metadata[FACTS])
        return ShardFacts(number, int(facts["rows"]), int(facts["cut"]))
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        problem = f"is damaged ({type(error).__name__}); remove it to have it again"
        raise LusiferError(f"{folder.url}/{name} {problem}") from error
