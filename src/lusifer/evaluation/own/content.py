"""What a task of the user's own data holds, checked, and what it is known by: its content."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lusifer.data.validation import repeated_id
from lusifer.errors import LusiferError
from lusifer.evaluation.own.columns import Place, Table, read_table
from lusifer.evaluation.own.schema import KINDS, Files, TaskFile, Type, codes_of, load_task_file

logger = logging.getLogger(__name__)

_ROWS = 10_000  # Hashed at once.
_LAYOUT = 1  # Part of a task's identity: another way to read the same files gives another task.
Columns = dict[str, list[Any]]
Instruction = str | dict[Any, str] | None


@dataclass(frozen=True)
class Search:
    """A corpus, queries and what is relevant.

    Attributes:
        queries: ``id``, ``text``.
        corpus: ``id``, ``text`` and, perhaps, ``title``.
        relevant: Query to document to grade.
        candidates: Query to the documents that are ranked; all of the corpus when None.
    """

    queries: Columns
    corpus: Columns
    relevant: dict[str, dict[str, int]]
    candidates: dict[str, list[str]] | None = None


Subset = dict[str, Columns] | Search  # Split to columns, or what is searched.


@dataclass(frozen=True)
class OwnTask:
    """A task of the user's own data, read and checked.

    Attributes:
        name: What results call it.
        type: Its type, one of `lusifer.evaluation.own.schema.KINDS`.
        metric: Main score.
        subsets: Subset to its content.
        keys: Subset to its languages, scripts included: one, or two.
        instruction: Put in front of texts where instructions are asked for.
        description: What it is about.
        source: Where it was read from.
        ignore_identical_ids: Whether a query does not find the document of its own id.
    """

    name: str
    type: Type
    metric: str
    subsets: dict[str, Subset]
    keys: dict[str, tuple[str, ...]]
    instruction: Instruction = None
    description: str = ""
    source: str = ""
    ignore_identical_ids: bool = False
    revision: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "revision", _revision(self))

    def size(self, subsets: Iterable[str]) -> int:
        """Texts of some of the subsets, about as many as are embedded."""
        return sum(_size(self.subsets[name]) for name in subsets)


def _size(subset: Subset) -> int:
    parts = [subset.queries, subset.corpus] if isinstance(subset, Search) else list(subset.values())
    return sum(len(part[name]) for part in parts for name in ("text", "sentence1", "sentence2") if name in part)


def _revision(task: OwnTask) -> str:
    """Hash of everything that a score depends on, 16 hexadecimal digits; file names and formats are not among it."""
    digest = hashlib.sha256(
        json.dumps([_LAYOUT, task.type, task.metric, task.instruction, task.ignore_identical_ids]).encode()
    )
    for name, subset in sorted(task.subsets.items()):
        parts = vars(subset) if isinstance(subset, Search) else subset
        for part, values in sorted(parts.items()):
            for column, rows in sorted(values.items()) if values is not None else ():
                digest.update(f"\0{name}\0{part}\0{column}\0".encode())
                rows = sorted(rows.items()) if isinstance(rows, dict) else rows
                for begin in range(0, len(rows), _ROWS):
                    digest.update(json.dumps(rows[begin : begin + _ROWS]).encode())
    return digest.hexdigest()[:16]


def read_task(path: Path) -> OwnTask:
    """Reads a task's file and all files that it names.

    Args:
        path: The YAML file.

    Raises:
        LusiferError: If something in them is not usable: which file, row and column, and what to do.
    """
    file = load_task_file(path)
    read = _READERS[file.type]
    subsets: dict[str, Subset] = {}
    for key, files in file.languages.items():
        tables = _tables(file, files, Place(path.parent, file.columns, key))
        subsets[key] = read(tables, f"task {str(path)!r}, {key}")
    if file.type == "classification" or file.type == "clustering":
        _number_labels(subsets)
    return OwnTask(
        name=str(file.name), type=file.type, metric=file.metric or file.kind.metric, subsets=subsets,
        keys={key: codes_of(key) for key in file.languages}, instruction=file.instruction,
        description=file.description or "", source=str(path),
    )  # fmt: skip


def _tables(file: TaskFile, files: Files, place: Place) -> dict[str, Table]:
    kind, tables = file.kind, dict[str, Table]()
    extra = {"data": {"negative"}, "corpus": {"title"}, "qrels": {"score"}}
    for part, source in files.given().items():
        wanted = kind.data if part == "data" else kind.parts[part]
        optional = sorted(extra.get(part, set()).intersection(kind.optional))
        tables[part] = read_table(source, part, place, wanted, optional)
    return tables


def _at_least_two(table: Table, what: str = "rows") -> None:
    if len(table) < 2:
        raise table.error(0, f"the only row; a task needs at least 2 {what}")


def _classified(tables: Mapping[str, Table], where: str) -> Subset:
    if "data" in tables:
        _at_least_two(tables["data"])
        train, test = _halves(tables["data"])
    else:
        train, test = (
            _columns(tables[part], range(len(tables[part])), ("text", "label")) for part in ("train", "test")
        )
        for part in ("train", "test"):
            _at_least_two(tables[part])
        known = set(train["label"])
        for row, label in enumerate(test["label"]):
            if label not in known:
                problem = f"the label {label!r} does not occur in {tables['train'].name}; no classifier can learn it"
                raise tables["test"].error(row, f"{problem}; add training texts with it or remove the row")
        shared = set(train["text"]).intersection(test["text"])
        if shared:
            logger.warning("%s: %d test texts are training texts too; the score will be too high", where, len(shared))
    for columns, what in ((train, "training"), (test, "test")):
        if len(set(columns["label"])) < 2:
            found = next(iter(columns["label"]), "none")
            name = tables["data" if "data" in tables else "train" if what == "training" else "test"].name
            raise LusiferError(
                f"{name}: the {what} texts have one class only ({found!r}); classification needs two or more"
            )
    return {"train": train, "test": test}


def _columns(table: Table, rows: Iterable[int], names: Iterable[str]) -> Columns:
    rows = list(rows)
    return {name: [table[name][row] for row in rows] for name in names}


def _halves(table: Table) -> tuple[Columns, Columns]:
    """Half of the texts of every label to learn from and half to score, chosen by their content, not by their order."""
    by_label: dict[str, dict[str, list[int]]] = {}
    for row, (text, label) in enumerate(zip(table["text"], table["label"], strict=True)):
        by_label.setdefault(label, {}).setdefault(text, []).append(row)
    train = set[int]()
    for texts in by_label.values():
        order = sorted(texts, key=lambda text: hashlib.blake2b(text.encode(), digest_size=8).digest())
        train.update(row for text in order[: (len(order) + 1) // 2] for row in texts[text])
    learnt = {table["text"][row] for row in train}  # Also under another label: it must not be in both.
    test = [row for row in range(len(table)) if row not in train and table["text"][row] not in learnt]
    return _columns(table, sorted(train), ("text", "label")), _columns(table, test, ("text", "label"))


def _number_labels(subsets: Mapping[str, Subset]) -> None:
    """Labels as numbers, the same in all languages; mteb's metrics want them so."""
    parts = [columns for subset in subsets.values() if isinstance(subset, dict) for columns in subset.values()]
    numbers = {
        label: number for number, label in enumerate(sorted({label for part in parts for label in part["label"]}))
    }
    for part in parts:
        part["label"] = [numbers[label] for label in part["label"]]


def _clustered(tables: Mapping[str, Table], where: str) -> Subset:
    table = tables["data"]
    _at_least_two(table)
    if len(set(table["label"])) < 2:
        raise LusiferError(f"{table.name}: all rows have the label {table['label'][0]!r}; clustering needs two or more")
    return {"test": table.columns}


def _similar(tables: Mapping[str, Table], where: str) -> Subset:
    table = tables["data"]
    _at_least_two(table, "pairs")
    if len(set(table["score"])) < 2:
        problem = f"all pairs have the score {table['score'][0]:g}; nothing correlates with that"
        raise LusiferError(f"{table.name}: {problem}; give them different scores")
    return {"test": table.columns}


_TRUTH = {"0": 0, "1": 1, "false": 0, "true": 1}


def _paired(tables: Mapping[str, Table], where: str) -> Subset:
    table = tables["data"]
    _at_least_two(table, "pairs")
    for row, label in enumerate(table["label"]):
        if label.lower() not in _TRUTH:
            raise table.error(row, f"'label' must be 1 (a pair) or 0 (none), not {label!r}")
    labels = [_TRUTH[label.lower()] for label in table["label"]]
    if len(set(labels)) < 2:
        raise LusiferError(
            f"{table.name}: all pairs have the label {labels[0]}; pair classification needs both 0 and 1"
        )
    return {"test": {**table.columns, "label": labels}}


def _translated(tables: Mapping[str, Table], where: str) -> Subset:
    if "data" in tables:
        _at_least_two(tables["data"], "pairs")
        return {"test": tables["data"].columns}
    one, other = tables["sentence1"], tables["sentence2"]
    if len(one) != len(other):
        problem = f"{one.name} has {len(one)} sentences, {other.name} has {len(other)}"
        raise LusiferError(f"{where}: {problem}; row i of one must translate row i of the other")
    _at_least_two(one, "pairs")
    return {"test": {"sentence1": one["text"], "sentence2": other["text"]}}


def _retrieved(tables: Mapping[str, Table], where: str) -> Subset:
    search = _from_pairs(tables["data"]) if "data" in tables else _from_judgements(tables, where)
    if len(search.corpus["id"]) < 2:
        raise LusiferError(f"{where}: the corpus has one document; retrieval needs at least 2")
    return search


def _reranked(tables: Mapping[str, Table], where: str) -> Subset:
    """As retrieval, where a query ranks what it has a judgement of alone."""
    search = _from_pairs(tables["data"]) if "data" in tables else _from_judgements(tables, where)
    candidates = {query: list(grades) for query, grades in search.relevant.items()}
    if not any(grade == 0 for grades in search.relevant.values() for grade in grades.values()):
        remedy = "give 'negative' texts" if "data" in tables else "give rows with score 0"
        raise LusiferError(f"{where}: no query has an irrelevant candidate, so every order is right; {remedy}")
    return Search(search.queries, search.corpus, search.relevant, candidates)


def _from_pairs(table: Table) -> Search:
    """Records of a query with its positives and negatives; equal texts are one query or one document."""
    queries, documents = dict[str, str](), dict[str, str]()
    grades: dict[str, dict[str, int]] = {}
    negatives = table.columns.get("negative") or [[]] * len(table)
    for row, (query, positive, negative) in enumerate(zip(table["query"], table["positive"], negatives, strict=True)):
        known = grades.setdefault(queries.setdefault(query, f"q{len(queries)}"), {})
        for texts, grade in ((positive, 1), (negative, 0)):
            for text in texts:
                document = documents.setdefault(text, f"d{len(documents)}")
                if known.setdefault(document, grade) != grade:
                    raise table.error(
                        row, f"{text[:60]!r} is both positive and negative of its query; remove one of them"
                    )
    return Search(
        {"id": list(queries.values()), "text": list(queries)},
        {"id": list(documents.values()), "text": list(documents)},
        grades,
    )


def _from_judgements(tables: Mapping[str, Table], where: str) -> Search:
    queries, corpus, qrels = (tables[part] for part in ("queries", "corpus", "qrels"))
    known = {"query-id": _ids(queries), "corpus-id": _ids(corpus)}
    grades: dict[str, dict[str, int]] = {}
    scores = qrels.columns.get("score") or [1.0] * len(qrels)
    for row, (query, document, score) in enumerate(zip(qrels["query-id"], qrels["corpus-id"], scores, strict=True)):
        for name, value, table in (("query-id", query, queries), ("corpus-id", document, corpus)):
            if value not in known[name]:
                raise qrels.error(row, f"{name!r} is {value!r}, which is not an id in {table.name}; fix or remove it")
        if score < 0 or not float(score).is_integer():
            raise qrels.error(row, f"'score' must be a whole number from 0 on, not {score:g}")
        if document in grades.setdefault(query, {}):
            raise qrels.error(row, f"{query!r} and {document!r} are judged already; remove one of the rows")
        grades[query][document] = int(score)
    asked = {query: found for query, found in grades.items() if any(found.values())}
    if not asked:
        raise LusiferError(f"{qrels.name}: no document is relevant to any query; give rows with score 1")
    if without := len(known["query-id"]) - len(asked):
        logger.warning("%s: %d of %d queries have no relevant document and are left out", where, without, len(queries))
    rows = [row for row, query in enumerate(queries["id"]) if query in asked]
    return Search(_columns(queries, rows, ("id", "text")), corpus.columns, asked)


def _ids(table: Table) -> dict[str, int]:
    rows: dict[str, int] = {}
    for row, value in enumerate(table["id"]):
        if (first := rows.setdefault(value, row)) != row:
            raise repeated_id(value, table.where(row), table.where(first))
    return rows


_READERS: dict[Type, Callable[[Mapping[str, Table], str], Subset]] = {
    "classification": _classified,
    "pair-classification": _paired,
    "sts": _similar,
    "retrieval": _retrieved,
    "reranking": _reranked,
    "clustering": _clustered,
    "bitext": _translated,
}
assert set(_READERS) == set(KINDS)
