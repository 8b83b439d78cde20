"""A mixture of data sets as a fixed sequence of examples: what a run trains on, decided before it starts.

Every global batch holds rows of one set, and of one cluster of it where it has clusters: texts of other sets are
negatives too easy to learn from, and not every set has in-batch negatives. Clusters smaller than a batch fill it
together, one whole cluster after the other. The example at a position is a pure
function of recipe, seed and position: the same for any number of ranks and workers, and after a resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from lusifer.data.prompts import with_instruction
from lusifer.data.records import Records, Rows, open_set
from lusifer.errors import LusiferError
from lusifer.recipes.schema import DataRecipe

# One stream of random numbers for each purpose, so that none shifts another.
_PLAN, _ORDER, _CHOICE, _HELD_OUT = 1, 2, 3, 4


@dataclass
class Stratum:
    """What batches are drawn from: a set, one cluster of a set, or its clusters that are smaller than a batch.

    Attributes:
        number: Index among the strata; part of the seed of its order.
        item: The set's recipe.
        records: The opened set.
        rows: The stratum's rows (int64), or None for all of a streamed set, in its order.
        size: How many rows.
        cluster: Name of the cluster, if it is one.
        clusters: (size,) int64, the small cluster that each row belongs to; None if the stratum is no set of those.
    """

    number: int
    item: DataRecipe
    records: Rows
    rows: np.ndarray | None
    size: int
    cluster: str | None = None
    clusters: np.ndarray | None = None
    _epoch: int = field(default=-1, repr=False)
    _order: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64), repr=False)

    @property
    def cluster_count(self) -> int:
        """How many clusters it holds; 0 where its set has none."""
        return int(self.cluster is not None) if self.clusters is None else int(self.clusters.max()) + 1

    def row(self, occurrence: int, batch_size: int, seed: int) -> int:
        """The row of the stratum's ``occurrence``-th example: every row once an epoch, in a new order each epoch."""
        epoch, place = divmod(occurrence, self.size)
        if self.rows is None:
            return place
        if epoch < self._epoch:
            self._epoch = -1
        while self._epoch < epoch:
            self._next_epoch(batch_size, seed)
        return int(self.rows[self._order[place]])

    def _next_epoch(self, batch_size: int, seed: int) -> None:
        self._epoch += 1
        generator = np.random.default_rng([seed, _ORDER, self.number, self._epoch])
        order = generator.permutation(self.size)
        if self.clusters is not None:
            places = generator.permutation(self.clusters.max() + 1)
            order = order[np.argsort(places[self.clusters[order]], kind="stable")]
        tail = self._epoch * self.size % batch_size
        # A batch across two epochs must not hold a row twice: it would be its own false negative.
        if tail and self.size >= batch_size:
            repeated = np.isin(order, self._order[-tail:])
            head = batch_size - tail
            bad = np.flatnonzero(repeated[:head])
            good = head + np.flatnonzero(~repeated[head:])[: len(bad)]
            order[bad], order[good] = order[good], order[bad]
        self._order = order


class Mixture(Dataset):
    """The examples of one stage, in the order they are trained on.

    ``strata`` are its sets and clusters; ``plan``, (steps,) int32, is the stratum of every step.

    Args:
        sets: The sets.
        steps: Steps of the stage.
        batch_size: Rows of a global batch.
        seed: Seed of every choice.
        held_out: Rows to keep out of training for evaluation, at most a tenth of each set; see `held_out_examples`.

    Raises:
        LusiferError: If a set cannot be used, or is smaller than a global batch that takes its negatives from itself.
    """

    def __init__(
        self, sets: Sequence[DataRecipe], *, steps: int, batch_size: int, seed: int, held_out: int = 0
    ) -> None:
        self.steps, self.batch_size, self.seed = steps, batch_size, seed
        self.strata = open_strata(sets, batch_size=batch_size, seed=seed)
        self._held_out = _hold_out(self.strata, held_out, batch_size, seed) if held_out else []
        self.plan = plan(self.strata, steps=steps, seed=seed)
        self._before = _occurrences(self.plan)

    def __len__(self) -> int:
        return self.steps * self.batch_size

    @property
    def held_out_rows(self) -> int:
        """How many rows are kept out of training, over all sets."""
        return sum(len(rows) for _, rows in self._held_out)

    def held_out_examples(self) -> list[list[dict[str, Any]]]:
        """Examples of rows that are never trained on, one list per set or cluster that has any."""
        lists: list[list[dict[str, Any]]] = []
        for stratum, rows in self._held_out:
            lists.append([])
            for number, row in enumerate(rows.tolist()):
                generator = np.random.default_rng([self.seed, _HELD_OUT, stratum.number, number])
                lists[-1].append(_example(stratum.item, stratum.records[row], number, generator))
        return lists

    def __getitem__(self, position: int) -> dict[str, Any]:
        """The example at ``position``, of step ``position // batch_size``.

        Returns:
            ``task``, ``dataset``, ``position`` and, for contrast, ``in_batch_negatives``, ``query``, ``plain_query``
            (without instruction), ``positive``, ``negatives`` and the ``document_instruction`` to put in front of both;
            for reconstruct and complete ``source``, the same ``plain`` (without instruction), its ``role`` (query or
            document) and ``target``.
        """
        if not 0 <= position < len(self):
            raise IndexError(position)
        step, place = divmod(position, self.batch_size)
        stratum = self.strata[self.plan[step]]
        several = stratum.item.positives
        drawn, copy = divmod(place, several)
        records = -(-self.batch_size // several)
        record = stratum.records[stratum.row(int(self._before[step]) * records + drawn, records, self.seed)]
        generator = np.random.default_rng([self.seed, _CHOICE, position])
        if several > 1:  # A record's rows share out its positives.
            order = np.random.default_rng([self.seed, _CHOICE, position - copy]).permutation(len(record["positive"]))
            record = {**record, "positive": [record["positive"][order[copy % len(order)]]]}
        return _example(stratum.item, record, position, generator)


def open_strata(sets: Sequence[DataRecipe], *, batch_size: int, seed: int) -> list[Stratum]:
    """Opens every set and splits those with clusters.

    Args:
        sets: The sets.
        batch_size: Rows of a global batch.
        seed: Seed of the rows that ``cap`` keeps.

    Raises:
        LusiferError: See `Mixture`.
    """
    strata: list[Stratum] = []
    for item in sets:
        records = open_set(item, seed=seed)
        parts: dict[Any, Any] = {None: None}
        if isinstance(records, Records):
            parts = records.clusters() or {None: np.arange(len(records))}  # type: ignore[dict-item]
        first, least = len(strata), -(-batch_size // item.positives)
        small = {name: rows for name, rows in parts.items() if name is not None and len(rows) < least}
        if sum(map(len, small.values())) < least:
            small = {}
        for name, rows in parts.items():
            if name not in small:
                size = len(records if rows is None else rows)
                strata.append(Stratum(len(strata), item, records, rows, size, name))
        if small:
            rows = np.concatenate([*small.values()])
            codes = np.repeat(np.arange(len(small)), [*map(len, small.values())])
            strata.append(Stratum(len(strata), item, records, rows, len(rows), clusters=codes))
        _check_size(strata[first:], least)
    return strata


def _hold_out(strata: Sequence[Stratum], count: int, batch_size: int, seed: int) -> list[tuple[Stratum, np.ndarray]]:
    """Takes about ``count`` rows away from strata that are not streamed, at most a tenth of each, leaving a batch.

    A batch of one row has nothing to be compared with. Where there are so many strata that no share is two rows, each
    gives two.
    """
    taken = []
    total = sum(stratum.size for stratum in strata if stratum.rows is not None)
    spare = {s.number: min(s.size // 10, s.size - -(-batch_size // s.item.positives)) for s in strata}
    shares = {s.number: min(spare[s.number], -(-count * s.size // max(total, 1))) for s in strata if s.rows is not None}
    if max(shares.values(), default=0) < 2:
        shares = {number: min(spare[number], 2) for number in shares}
    for stratum in strata:
        share = shares.get(stratum.number, 0)
        if stratum.rows is None or share < 2:
            continue
        order = np.random.default_rng([seed, _HELD_OUT, stratum.number]).permutation(stratum.size)
        taken.append((stratum, stratum.rows[order[:share]]))
        kept = np.sort(order[share:])
        stratum.rows, stratum.size = stratum.rows[kept], len(kept)
        if stratum.clusters is not None:
            stratum.clusters = np.unique(stratum.clusters[kept], return_inverse=True)[1]
    return taken


def _check_size(strata: list[Stratum], batch_size: int) -> None:
    item = strata[0].item
    small = [stratum for stratum in strata if stratum.size < batch_size]
    if item.task in ("reconstruct", "complete") or not item.in_batch_negatives or not small:
        return
    which = f"{item.source!r}"
    if small[0].cluster is not None:
        which = f"{len(small)} of {len(strata)} clusters of {which}, e.g. {small[0].cluster!r},"
    have = f"{small[0].size} rows, fewer than the batch of {batch_size}: rows would be their own negatives"
    remedy = "lower batch_size, merge datasets or clusters, or set in_batch_negatives: false"
    raise LusiferError(f"{which} has {have}; {remedy}")


def plan(strata: Sequence[Stratum], *, steps: int, seed: int) -> np.ndarray:
    """The stratum of every step: (steps,) int32; -1 where no set is drawn, which no recipe leaves so.

    Between the steps where sets come or go, a stratum gets its share of the steps in proportion to weight * rows,
    rounded up or down (systematic sampling), in a shuffled order.
    """
    bounds = np.round([[stratum.item.start * steps, stratum.item.end * steps] for stratum in strata]).astype(np.int64)
    shares = np.array([stratum.item.weight * stratum.size for stratum in strata])
    drawn = np.full(steps, -1, dtype=np.int32)
    edges = np.unique(np.clip([0, steps, *bounds.ravel()], 0, steps))
    for first, last in zip(edges[:-1], edges[1:], strict=True):
        generator = np.random.default_rng([seed, _PLAN, int(first)])
        active = generator.permutation(np.flatnonzero((bounds[:, 0] <= first) & (first < bounds[:, 1])))
        if not len(active):
            continue
        ends = np.cumsum(shares[active])
        points = (np.arange(last - first) + generator.random()) * (ends[-1] / (last - first))
        chosen = np.minimum(np.searchsorted(ends, points, side="right"), len(active) - 1)
        drawn[first:last] = generator.permutation(active[chosen])
    return drawn


def steps_of_sets(sets: Sequence[Sequence[Stratum]], *, steps: int, seed: int) -> list[int]:
    """How many of a stage's steps draw from each set, by the plan that training follows.

    Args:
        sets: The strata of each set.
        steps: Steps of the stage.
        seed: Its seed.
    """
    drawn = plan([stratum for strata in sets for stratum in strata], steps=steps, seed=seed)
    owner = np.repeat(np.arange(len(sets)), [len(strata) for strata in sets])
    counts: list[int] = np.bincount(owner[drawn[drawn >= 0]], minlength=len(sets)).tolist()
    return counts


def _occurrences(drawn: np.ndarray) -> np.ndarray:
    """How many earlier steps drew the same stratum: (steps,) int32."""
    counts = np.bincount(drawn)
    before = np.empty(len(drawn), dtype=np.int32)
    before[np.argsort(drawn, kind="stable")] = np.arange(len(drawn)) - np.repeat(np.cumsum(counts) - counts, counts)
    return before


def _example(item: DataRecipe, record: dict[str, Any], position: int, generator: np.random.Generator) -> dict[str, Any]:
    """A record as the task needs it; ``generator`` chooses among positives, negatives and directions."""
    head: dict[str, Any] = {"task": item.task or "contrast", "dataset": item.source, "position": position}
    if item.task == "reconstruct":
        source = with_instruction(item.instruction, record["text"])
        return {**head, "source": source, "plain": record["text"], "role": "document", "target": record["text"]}
    query, positives, negatives = record["query"], record["positive"], record["negative"]
    positive = positives[generator.integers(len(positives))]
    if item.task == "complete":
        role, source, target = "query", query, positive
        if generator.random() < item.reverse:
            role, source, target = "document", positive, query
        asked = with_instruction(item.instruction, source)
        return {**head, "source": asked, "plain": source, "role": role, "target": target}
    order = generator.permutation(len(negatives))[: item.hard_negatives].tolist()
    return {
        **head,
        "in_batch_negatives": item.in_batch_negatives,
        "query": with_instruction(item.instruction, query),
        "plain_query": query,
        "document_instruction": item.document_instruction,
        "positive": positive,
        "negatives": [negatives[order[k % len(order)]] for k in range(item.hard_negatives)],
    }
