"""mteb's task objects of the user's own data: mteb computes every score, here only its data sets are filled in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import mteb
from datasets import Dataset, DatasetDict
from mteb.abstasks import (
    AbsTask,
    AbsTaskBitextMining,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.task_metadata import TaskMetadata

from lusifer.errors import LusiferError
from lusifer.evaluation.benchmarks import Task
from lusifer.evaluation.own.content import OwnTask, Search, Subset, read_task
from lusifer.evaluation.own.everyday import NAME as EVERYDAY
from lusifer.evaluation.own.everyday import everyday_tasks
from lusifer.evaluation.own.schema import KINDS
from lusifer.hooks.mteb import DrawsAlone, language_script, restrict

_ENDINGS = (".yaml", ".yml")


def open_tasks(places: Sequence[str]) -> list[Task]:
    """Reads tasks of the user's own data, everything checked.

    Args:
        places: YAML files, folders of such files, or ``everyday``.

    Raises:
        LusiferError: If one cannot be read, something in its data is not usable, or two have one name.
    """
    found: dict[str, OwnTask] = {}
    for place in places:
        for task in everyday_tasks() if place == EVERYDAY else map(read_task, _files(Path(place))):
            if task.name in found:
                both = f"{found[task.name].source} and {task.source}"
                raise LusiferError(f"two tasks are called {task.name!r} ({both}); give one of them another name")
            found[task.name] = task
    for name, task in found.items():
        try:
            mteb.get_task(name)
        except KeyError:
            continue
        raise LusiferError(f"task {task.source!r}: mteb already has a task {name!r}; give yours another name")
    return [_described(task) for task in found.values()]


def _files(place: Path) -> list[Path]:
    if place.suffix in _ENDINGS or not place.exists():
        return [place]
    if not place.is_dir():
        raise LusiferError(f"--task {str(place)!r} is no YAML file; see examples/tasks for what one looks like")
    if files := sorted(path for path in place.iterdir() if path.suffix in _ENDINGS):
        return files
    raise LusiferError(f"no task in {str(place)!r}: no file there ends in .yaml or .yml")


def _described(own: OwnTask) -> Task:
    """The task as runs and reports know it."""
    kind = KINDS[own.type].mteb
    plain = {key: tuple(_plain(code) for code in codes) for key, codes in own.keys.items()}
    subsets = {key: codes[:1] if len(set(codes)) == 1 else codes for key, codes in plain.items()}
    return Task(own.name, own.name, kind, kind, own.revision, ("test",), subsets, own=own)


def _plain(code: str) -> str:
    """A language's code as benchmarks and reports write it: two letters where there are, without the script."""
    return language_script(code)[0]


def build(own: OwnTask, subsets: Iterable[str] | None = None) -> AbsTask:
    """A task object that ``mteb.evaluate`` runs.

    Args:
        own: The task.
        subsets: Some of its subsets; all when None.
    """
    kind = KINDS[own.type]
    names = list(own.subsets if subsets is None else subsets)
    languages = {key: [language_script(code)[1] for code in codes] for key, codes in own.keys.items()}
    metadata = TaskMetadata(
        name=own.name, type=kind.mteb, description=own.description or f"Own data: {own.source}",
        dataset={"path": own.source, "revision": own.revision}, main_score=own.metric,
        category="t2c" if own.type in ("classification", "clustering") else "t2t",
        eval_splits=["test"], eval_langs=languages, prompt=own.instruction,
    )  # fmt: skip
    made = type(own.name, (_CLASSES[own.type],), {"metadata": metadata, "own": own})()
    restrict(made, splits=["test"], subsets=names)
    return made


class _Own:
    """What all of them share: data from memory, as often as mteb asks for it."""

    own: OwnTask
    dataset: Any
    hf_subsets: list[str]
    data_loaded: bool

    def load_data(self, *args: Any, **kwargs: Any) -> None:
        """Fills in the data sets."""
        self.dataset = {name: _dataset(self.own.subsets[name]) for name in self.hf_subsets}
        self.data_loaded = True


def _dataset(subset: Subset) -> Any:
    if not isinstance(subset, Search):
        return DatasetDict({split: Dataset.from_dict(columns) for split, columns in subset.items()})
    split = {
        "queries": Dataset.from_dict(subset.queries),
        "corpus": Dataset.from_dict(subset.corpus),
        "relevant_docs": deepcopy(subset.relevant),  # mteb changes it.
        "top_ranked": deepcopy(subset.candidates),
    }
    return {"test": split}


class _Classification(_Own, AbsTaskClassification):
    """Classification."""


class _Clustering(_Own, DrawsAlone, AbsTaskClustering):
    """Clustering of up to 16,384 texts, where mteb's default would take 4 % of a small set."""

    max_fraction_of_documents_to_embed = None
    max_document_to_embed = 16_384
    input_column_name = "text"
    label_column_name = "label"


class _Bitext(_Own, AbsTaskBitextMining):
    """Bitext mining."""


class _PairClassification(_Own, AbsTaskPairClassification):
    """Pair classification."""

    label_column_name = "label"


class _STS(_Own, AbsTaskSTS):
    """Semantic textual similarity; the range of scores is the data's own."""

    def load_data(self, *args: Any, **kwargs: Any) -> None:
        """Fills in the data sets, and the range."""
        super().load_data(*args, **kwargs)
        scores = [score for subset in self.dataset.values() for score in subset["test"]["score"]]
        self.min_score, self.max_score = min(scores), max(scores)


class _Retrieval(_Own, AbsTaskRetrieval):
    """Retrieval, and reranking of a query's own candidates."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ignore_identical_ids = self.own.ignore_identical_ids


_CLASSES: dict[str, type] = {
    "classification": _Classification,
    "pair-classification": _PairClassification,
    "sts": _STS,
    "retrieval": _Retrieval,
    "reranking": _Retrieval,
    "clustering": _Clustering,
    "bitext": _Bitext,
}
