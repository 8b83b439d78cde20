"""The files of a task as columns of checked values, each of which knows its file and its line."""

from __future__ import annotations

import glob
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lusifer.data.reading import Block, hub_blocks, read_blocks
from lusifer.data.sources import files_of_recipe, format_of
from lusifer.data.validation import id_problems, text_problems
from lusifer.errors import LusiferError
from lusifer.evaluation.own.schema import Part, Source
from lusifer.recipes.schema import DataRecipe

_TEXTS = ("text", "sentence1", "sentence2", "query")
_IDS = ("id", "query-id", "corpus-id")
_LISTS = ("positive", "negative")
# Other names that benchmarks have for a column, taken where ours is not there.
_OTHERS = {"id": "_id", "query-id": "query_id", "corpus-id": "corpus_id", "label": "labels"}


class Place(NamedTuple):
    """What a task's file says of all its parts.

    Attributes:
        folder: Where relative paths start.
        names: Our column name -> theirs, where they differ; with a ``language`` among them, only rows of it are read.
        language: Key of the language that is read.
    """

    folder: Path
    names: Mapping[str, str]
    language: str


@dataclass
class Table:
    """Columns of one part of a task.

    Attributes:
        name: What to call all of it.
        columns: Our column name to values; an optional column that is not there is left out.
    """

    name: str
    columns: dict[str, list[Any]]
    _starts: list[int] = field(default_factory=list)
    _blocks: list[Block] = field(default_factory=list)

    def __getitem__(self, name: str) -> list[Any]:
        return self.columns[name]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def add(self, block: Block, values: dict[str, list[Any]], kept: Sequence[int]) -> None:
        """Adds rows of a block, and keeps where they come from.

        Args:
            block: The block.
            values: Its values, by our column names.
            kept: Indices of the rows to keep.
        """
        self._starts.append(len(self) if self._blocks else 0)
        self._blocks.append(Block(block.file, block.file_number, [block.numbers[index] for index in kept], []))
        for name, column in values.items():
            self.columns[name] += [column[index] for index in kept]

    def where(self, row: int) -> str:
        """File and line (or row) of a row."""
        number = bisect_right(self._starts, row) - 1
        return self._blocks[number].where(row - self._starts[number])

    def error(self, row: int, problem: str) -> LusiferError:
        """The error for what is wrong with a row."""
        return LusiferError(f"{self.where(row)}: {problem}")


def read_table(source: Source, part: Part, place: Place, wanted: Sequence[str], optional: Sequence[str] = ()) -> Table:
    """Reads one part of a task, every value checked.

    Args:
        source: Where it lies.
        part: Which part it is.
        place: What the task's file says of all its parts.
        wanted: Our names of the columns that it must have.
        optional: Our names of those it may have.

    Raises:
        LusiferError: If it cannot be read, lacks a column, or holds a value that is not usable.
    """
    table = Table(source.source, {name: [] for name in (*wanted, *optional)})
    spoken = "language" in place.names
    every = (*wanted, *optional, *["language"] * spoken)
    languages, sizes = set[str](), dict.fromkeys(optional, 0)
    for block in _blocks(source, part, place, every):
        block.refuse_problems()
        block.names_of = {**_named_otherwise(block, place.names, every), **place.names}
        _refuse_missing(block, [*wanted, *["language"] * spoken])
        there = [name for name in optional if block.column(name) is not None]
        values = {name: _values(block, name) for name in (*wanted, *there)}
        kept: Sequence[int] = range(len(block))
        if spoken:
            languages.update(codes := _values(block, "language"))
            kept = [index for index, code in enumerate(codes) if code == place.language]
        table.add(block, values, kept)
        for name in there:
            sizes[name] += len(kept)
    if not len(table):
        if languages:
            found = f"no row has the language {place.language!r}; there are {', '.join(sorted(languages)[:12])}"
            raise LusiferError(f"{source.source}: {found}")
        raise LusiferError(f"{source.source!r} is empty; a task needs at least 2 rows")
    for name, size in sizes.items():
        if size == 0:
            del table.columns[name]
        elif size != len(table):
            raise LusiferError(
                f"{source.source}: only some of its files have a column {name!r}; give it to all of them"
            )
    return table


def _blocks(source: Source, part: Part, place: Place, columns: Sequence[str]) -> Iterator[Block]:
    """The rows of a file beside the task, of one that is named in full, or of a data set of the hub."""
    # A split that nobody asked for must not make a folder of files one in the hub's layout.
    split: dict[str, Any] = {"split": source.split} if source.split else {}
    where = _from(place.folder, source.source)
    asked = DataRecipe(source=where, subset=source.subset, revision=source.revision, **split)
    files = files_of_recipe(asked)
    if files is None:
        usual = "train" if part == "train" else "test"
        return hub_blocks(asked.model_copy(update={"split": source.split or usual}))
    theirs = [place.names.get(name, name) for name in columns]
    return read_blocks(files, [*theirs, *_OTHERS.values()], text=place.names.get("text", "text"))


def _from(folder: Path, source: str) -> str:
    """A path as seen from the folder of the task; what is neither there nor a path stays what it is."""
    if "://" in source or Path(source).expanduser().is_absolute():
        return source
    beside = folder / source
    is_path = beside.exists() or source.startswith(".") or format_of(source) is not None or glob.has_magic(source)
    return str(beside) if is_path else source


def _named_otherwise(block: Block, names: Mapping[str, str], columns: Sequence[str]) -> dict[str, str]:
    there = set(block.names())
    return {
        name: _OTHERS[name]
        for name in columns
        if name in _OTHERS and name not in names and name not in there and _OTHERS[name] in there
    }


def _refuse_missing(block: Block, names: Sequence[str]) -> None:
    """Refuses a file without a column before it looks at values: they may be those of another column."""
    for name in names:
        if block.column(name) is None:
            found = f"no column {block.names_of.get(name, name)!r}; it has {', '.join(block.names())}"
            raise LusiferError(f"{block.where(0)}: {found} (map it: `columns: {{{name}: ...}}`)")


def _values(block: Block, name: str) -> list[Any]:
    theirs = block.names_of.get(name, name)
    values = block.values(name)
    block.refuse_problems()  # Parquet says only now what is not valid UTF-8.
    if name == "title":
        values = ["" if value is None else value for value in values]
        problems = {i: f"{theirs!r} must be text" for i, value in enumerate(values) if not isinstance(value, str)}
    elif name in _TEXTS:
        problems = text_problems(values, theirs)
    elif name in _IDS:
        problems = id_problems(values, theirs)
        values = [str(value) for value in values]
    elif name in _LISTS:
        values, problems = _lists(values, theirs, required=name == "positive")
    else:
        values, problems = _converted(values, theirs, _number if name == "score" else _label)
    for index in sorted(problems):
        absent = not block.has(name, index)
        raise block.error(index, f"no {theirs!r}; give it one or remove the row" if absent else problems[index])
    return values


def _lists(values: list[Any], name: str, *, required: bool) -> tuple[list[list[str]], dict[int, str]]:
    """Texts or lists of texts as lists, and what is wrong, by index."""
    rows = [[] if value is None else value if isinstance(value, list) else [value] for value in values]
    problems = {}
    for index, row in enumerate(rows):
        if broken := text_problems(row, name):
            problems[index] = next(iter(broken.values()))
        elif required and not row:
            problems[index] = f"{name!r} is empty; give it a text or remove the row"
    return rows, problems


def _converted(values: list[Any], name: str, convert: Callable[[Any, str], Any]) -> tuple[list[Any], dict[int, str]]:
    converted, problems = [], {}
    for index, value in enumerate(values):
        try:
            converted.append(convert(value, name))
        except ValueError as error:
            problems[index] = str(error)
    return converted, problems


def _number(value: Any, name: str) -> float:
    """A score; the cells of CSV are text."""
    try:
        number = math.nan if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name!r} must be a number, not {value!r:.60}")
    return number


def _label(value: Any, name: str) -> str:
    """A label as text, so that 1, "1" and 1.0 of three formats are the same."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int) or not str(value).strip():
        raise ValueError(f"{name!r} must be text or a whole number, not {value!r:.60}; give it one or remove the row")
    return str(value)
