"""The YAML file of a task: its keys, and what a task of each type reads and reports."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import pydantic
from pydantic import Field, ValidationError

from lusifer.errors import LusiferError
from lusifer.recipes.files import explain, load_mapping
from lusifer.recipes.schema import Strict

_LANGUAGE = "[a-z]{2,3}(?:-[A-Z][a-z]{3})?"
_KEY = re.compile(f"({_LANGUAGE})(?:-({_LANGUAGE}))?")
_DEPTHS = (1, 3, 5, 10, 20, 100, 1000)
_RANKED = tuple(f"{name}_at_{k}" for name in ("ndcg", "map", "mrr", "recall", "precision", "hit_rate") for k in _DEPTHS)
_CLASSIFIED = ("accuracy", "f1", "f1_weighted", "precision", "precision_weighted", "recall", "recall_weighted")
_SIMILARITIES = ("cosine", "dot", "manhattan", "euclidean", "similarity", "max")
_PAIRED = tuple(f"{name}_{s}" for name in _SIMILARITIES for s in ("ap", "accuracy", "f1", "precision", "recall"))
_CORRELATIONS = tuple(
    f"{name}{s}" for name in ("", "cosine_", "manhattan_", "euclidean_") for s in ("spearman", "pearson")
)
Part = Literal["data", "train", "test", "queries", "corpus", "qrels", "sentence1", "sentence2"]


class Kind(NamedTuple):
    """A type of task.

    Attributes:
        mteb: Its name in mteb.
        data: Columns of ``data``.
        parts: Files that stand in place of ``data``, with their columns.
        optional: Columns that may be absent.
        metric: The main score where the file names none.
        metrics: The scores that mteb gives.
        pairs: Whether a language may be a pair of two; None where it must be.
    """

    mteb: str
    data: tuple[str, ...]
    parts: dict[Part, tuple[str, ...]]
    optional: tuple[str, ...]
    metric: str
    metrics: tuple[str, ...]
    pairs: bool | None

    def columns(self) -> set[str]:
        """All of our column names."""
        return {"language", *(name for names in (self.data, self.optional, *self.parts.values()) for name in names)}


_LABELLED, _PAIR = ("text", "label"), ("sentence1", "sentence2")
_SEARCH: dict[Part, tuple[str, ...]] = {
    "queries": ("id", "text"),
    "corpus": ("id", "text"),
    "qrels": ("query-id", "corpus-id"),
}
_GRADED, _OPTIONAL = ("query", "positive"), ("negative", "title", "score")
KINDS = {
    "classification": Kind(
        "Classification", _LABELLED, {"train": _LABELLED, "test": _LABELLED}, (), "accuracy", _CLASSIFIED, False
    ),
    "pair-classification": Kind("PairClassification", (*_PAIR, "label"), {}, (), "max_ap", _PAIRED, True),
    "sts": Kind("STS", (*_PAIR, "score"), {}, (), "cosine_spearman", _CORRELATIONS, True),
    "retrieval": Kind("Retrieval", _GRADED, _SEARCH, _OPTIONAL, "ndcg_at_10", _RANKED, True),
    "reranking": Kind("Reranking", (*_GRADED, "negative"), _SEARCH, _OPTIONAL[1:], "map_at_1000", _RANKED, True),
    "clustering": Kind("Clustering", _LABELLED, {}, (), "v_measure", ("v_measure", "ami"), False),
    "bitext": Kind(
        "BitextMining", _PAIR, {"sentence1": ("text",), "sentence2": ("text",)}, (), "f1",
        ("f1", "accuracy", "precision", "recall"), None,
    ),
}  # fmt: skip
Type = Literal["classification", "pair-classification", "sts", "retrieval", "reranking", "clustering", "bitext"]


class Source(Strict):
    """Where rows lie."""

    # A file, folder, glob or URL of any format that lusifer reads, or a data set of the hub. Paths start at the file.
    source: str = Field(min_length=1)
    subset: str | None = None  # Which part of a data set of the hub.
    # Which split of a data set of the hub; `train` for training texts of classification and `test` otherwise.
    split: str | None = None
    revision: str | None = None  # Which commit of a data set of the hub.

    @pydantic.model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value


class Files(Strict):
    """The files of one language; `data` alone, or the parts of its type."""

    data: Source | None = None  # All rows in one file, with the columns of the type.
    train: Source | None = None  # Classification: texts that the classifier learns from.
    test: Source | None = None  # Classification: texts that are scored.
    queries: Source | None = None  # Retrieval, reranking: `id`, `text`.
    corpus: Source | None = None  # Retrieval, reranking: `id`, `text` and, optionally, `title`.
    qrels: Source | None = None  # Retrieval, reranking: `query-id`, `corpus-id` and, optionally, `score`.
    sentence1: Source | None = None  # Bitext: sentences of the first language, `text`.
    sentence2: Source | None = None  # Bitext: their translations, in the same order.

    @pydantic.model_validator(mode="before")
    @classmethod
    def _from_source(cls, value: Any) -> Any:
        return {"data": value} if isinstance(value, str) or (isinstance(value, dict) and "source" in value) else value

    def given(self) -> dict[Part, Source]:
        """The parts that the file names."""
        return {part: source for part in get_args(Part) if (source := getattr(self, part)) is not None}


class TaskFile(Strict):
    """A task of your own data; every language is scored by itself."""

    # What results call it: letters, digits, `.`, `-` and `_`. The file's name when left out.
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][\w.-]{0,99}$")
    type: Type  # What is scored, and which columns are read.
    description: str | None = None  # What it is about, for readers of the results.
    # Language code to its files, e.g. `en` or `zh-Hant`; two of them joined, `de-en`, where texts are in two languages.
    languages: dict[str, Files] = Field(min_length=1)
    # Our column name -> theirs, e.g. `{text: message, label: topic}`. `language` names one that tells rows of the
    # languages apart, where they share a file.
    columns: dict[str, str] = {}
    metric: str | None = None  # Main score, of those that mteb gives for the type.
    # With `--prompts default`: stands in front of queries, and of every text where there are none. To the letter as
    # `{query: ..., document: ...}`.
    instruction: str | dict[Literal["query", "document"], str] | None = None

    @property
    def kind(self) -> Kind:
        """What its type reads and reports."""
        return KINDS[self.type]

    @pydantic.model_validator(mode="before")
    @classmethod
    def _norwegian(cls, values: Any) -> Any:
        languages = values.get("languages") if isinstance(values, dict) else None
        if isinstance(languages, dict) and False in languages:
            raise ValueError("languages: YAML reads no as false; put Norwegian in quotes: 'no'")
        return values

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> TaskFile:
        kind = self.kind
        if self.metric is not None and self.metric not in kind.metrics:
            raise ValueError(f"{self.type} has no metric {self.metric!r}; {_near(self.metric, kind.metrics)}")
        if unknown := sorted(set(self.columns) - kind.columns()):
            problem = f"columns: {self.type} reads no column {unknown[0]!r}"
            raise ValueError(f"{problem}; {_near(unknown[0], sorted(kind.columns()))} (ours: theirs)")
        for key, files in self.languages.items():
            _check_key(key, self.type)
            _check_parts(f"languages.{key}", set(files.given()), self.type)
            if "language" in self.columns and not set(files.given()) <= {"data", "train", "test"}:
                raise ValueError(
                    f"languages.{key}: columns.language is for data, train and test; name files of {key} alone"
                )
        return self


def _near(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    shown = ", ".join(names[:12]) + ", ..." * (len(names) > 12)
    return f"did you mean {close[0]!r}?" if close else f"there are {shown}"


def _check_key(key: str, type_: str) -> None:
    match, pairs = _KEY.fullmatch(key), KINDS[type_].pairs
    if match is None:
        raise ValueError(f"languages: {key!r} is no language code; write en, zh-Hant or, of two languages, de-en")
    if pairs is None and match[2] is None:
        raise ValueError(f"languages: {key!r} is one language; {type_} needs two, e.g. {key}-en")
    if pairs is False and match[2] is not None:
        raise ValueError(f"languages: {key!r} is a pair; {type_} needs one language")


def _check_parts(where: str, given: set[Part], type_: str) -> None:
    parts = KINDS[type_].parts
    choice = f"data ({', '.join(KINDS[type_].data)})" + (f", or {', '.join(parts)}" if parts else "")
    if foreign := sorted(given - {"data", *parts}):
        raise ValueError(f"{where}: {type_} reads no {foreign[0]!r}; give it {choice}")
    if given == {"data"} or (parts and given == set(parts)):
        return
    if "data" in given or not given:
        raise ValueError(f"{where}: give {type_} either {choice}")
    raise ValueError(f"{where}: {', '.join(sorted(set(parts) - given))} is missing; give it {choice}")


def codes_of(key: str) -> tuple[str, ...]:
    """The languages of a key, scripts included: one, or the two of a pair.

    Args:
        key: A key of `TaskFile.languages`.
    """
    match = _KEY.fullmatch(key)
    assert match is not None
    return tuple(code for code in match.groups() if code)


def load_task_file(path: Path) -> TaskFile:
    """Reads the YAML file of a task.

    Args:
        path: The file.

    Raises:
        LusiferError: If it cannot be read, a key is unknown, or a value is not valid.
    """
    tree = load_mapping("task", path, "with type and languages, see examples/tasks")
    try:
        return TaskFile.model_validate({"name": path.stem, **tree})
    except ValidationError as error:
        raise LusiferError(f"task {str(path)!r}: {explain(error, TaskFile)}") from None
