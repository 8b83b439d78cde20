"""Standard errors of main scores by bootstrap over items: queries, pairs or texts.

mteb says what a model predicts and, in retrieval, what every query scores (`lusifer.hooks.mteb.listen`). From these
`Recorder` keeps, per split and subset, a function from item numbers to the main score. One that does not give mteb's
own main score on all items (a metric we do not know) is left out, so no interval is ever about another number.

Clustering has no standard error: what mteb repeats there are draws from one set of documents, so their spread shrinks
with their number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score

from lusifer.hooks.mteb import listen

ROUNDS = 300  # The standard error of a standard error is then 4 %.
_TOLERANCE = 1e-5  # mteb rounds retrieval scores to five places.
_RETRIEVAL = {"ndcg": "ndcg_cut", "map": "map_cut", "recall": "recall", "precision": "P", "hit_rate": "success"}
_PAIR_SCORES = {
    "similarity": ("similarity_scores", 1),
    "cosine": ("cosine_scores", 1),
    "manhattan": ("manhattan_distances", -1),
    "euclidean": ("euclidean_distances", -1),
    "dot": ("dot_scores", 1),
}
Statistic = tuple[Callable[[np.ndarray], float], int]


class Recorder:
    """Listens to one mteb task while it is evaluated.

    Args:
        task: An mteb task object; what it predicts is not written.
    """

    def __init__(self, task: Any) -> None:
        self.task = task
        self.statistics: dict[tuple[str, str], Statistic] = {}
        self.known: dict[tuple[str, str, float], float | None] = {}
        self.kind, self.metric = str(task.metadata.type), str(task.metadata.main_score)
        listen(task, self._predictions, self._queries)

    def _queries(self, scores: Mapping[str, Mapping[str, float]], split: str, subset: str) -> None:
        name, _, depth = self.metric.rpartition("_at_")
        key = f"{_RETRIEVAL.get(name, name)}_{depth}"
        values = np.array([row[key] for row in scores.values() if key in row])
        if len(values) == len(scores):
            self.statistics[split, subset] = _mean(values)

    def _predictions(self, predictions: Any, model: Any, folder: Path, *, hf_split: str, hf_subset: str) -> None:
        if self.kind == "BitextMining":
            for pair, neighbours in predictions.items():
                subset = pair if hf_subset == "parallel" else hf_subset
                self.statistics[hf_split, subset] = _mean(_bitext_scores(neighbours, self.metric))
            return
        data = self.task.dataset.get(hf_subset, self.task.dataset)[hf_split]
        if self.kind == "STS" and self.metric == "cosine_spearman":
            gold, ours = np.asarray(data["score"], dtype=float), np.asarray(predictions["cosine_scores"], dtype=float)
            self.statistics[hf_split, hf_subset] = (lambda rows: float(spearmanr(gold[rows], ours[rows])[0]), len(gold))
        elif self.kind == "PairClassification" and self.metric.endswith("_ap"):
            self.statistics[hf_split, hf_subset] = _pairs(predictions, data[self.task.label_column_name], self.metric)
        elif self.kind == "Classification" and self.metric in ("accuracy", "f1"):
            labels = data[self.task.label_column_name]
            if all(len(run) == len(labels) for run in predictions):
                self.statistics[hf_split, hf_subset] = _classified(predictions, labels, self.metric)

    def errors(self, scores: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
        """Split to subset to standard error, of those whose statistic we know.

        Args:
            scores: mteb's rows of the same evaluation, so far: split to metrics by subset.
        """
        errors: dict[str, dict[str, float]] = {}
        for split, rows in scores.items():
            for row in rows:
                key = (split, str(row["hf_subset"]), float(row["main_score"]))
                if key not in self.known:  # Asked after every subset, computed once.
                    statistic = self.statistics.get(key[:2])
                    self.known[key] = statistic and standard_error(*statistic, main=key[2])
                if (error := self.known[key]) is not None:
                    errors.setdefault(split, {})[key[1]] = error
        return errors


def standard_error(score: Callable[[np.ndarray], float], count: int, *, main: float) -> float | None:
    """Bootstrap standard error of a score (Efron 1979), seeded.

    Args:
        score: From item numbers, repeats allowed, to the score of those items.
        count: Items there are.
        main: What the score of all items must be.

    Returns:
        The standard error; None where ``score`` is not that score, or there are fewer than two items.
    """
    if count < 2 or not abs(score(np.arange(count)) - main) < _TOLERANCE:
        return None
    random = np.random.default_rng(0)
    drawn = np.array([score(random.integers(count, size=count)) for _ in range(ROUNDS)])
    # A resample with one class only, or no variance, has no score.
    drawn = drawn[np.isfinite(drawn)]
    return float(drawn.std(ddof=1)) if len(drawn) > ROUNDS / 2 else None


def _mean(values: np.ndarray) -> Statistic:
    return lambda rows: float(values[rows].mean()), len(values)


def _bitext_scores(neighbours: list[dict[str, Any]], metric: str) -> np.ndarray:
    """What each sentence adds: every target is right once, so the weighted F1 is a mean over sentences."""
    chosen = np.array([int(row["corpus_id"]) for row in neighbours])
    hit = chosen == np.arange(len(chosen))
    if metric == "accuracy":
        return hit.astype(float)
    return hit * 2.0 / (1 + np.bincount(chosen, minlength=len(chosen))[np.arange(len(chosen))])


def _pairs(predictions: Mapping[str, Any], labels: Any, metric: str) -> Statistic:
    truth = np.asarray(labels)
    names = _PAIR_SCORES if metric == "max_ap" else {metric.removesuffix("_ap")}
    columns = [
        sign * np.asarray(predictions[key], dtype=float) for key, sign in (_PAIR_SCORES[name] for name in sorted(names))
    ]
    return lambda rows: max(float(average_precision_score(truth[rows], c[rows])) for c in columns), len(truth)


def _classified(runs: Any, labels: Any, metric: str) -> Statistic:
    """Accuracy or macro F1, averaged over runs; F1 from counts, which is a hundred times faster than sklearn's."""
    every = sorted({*labels, *(label for run in runs for label in run)})
    number = {label: i for i, label in enumerate(every)}
    truth = np.array([number[label] for label in labels])
    guesses = [np.array([number[label] for label in run]) for run in runs]
    if metric == "accuracy":
        return _mean(np.mean([guess == truth for guess in guesses], axis=0))

    def macro_f1(rows: np.ndarray) -> float:
        scores = []
        for guess in guesses:
            right = np.bincount(truth[rows][guess[rows] == truth[rows]], minlength=len(every))
            both = np.bincount(truth[rows], minlength=len(every)) + np.bincount(guess[rows], minlength=len(every))
            present = both > 0
            scores.append(float((2 * right[present] / both[present]).mean()))
        return float(np.mean(scores))

    return macro_f1, len(truth)
