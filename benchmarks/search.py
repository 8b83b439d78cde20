"""A folder index at size: adding, building, and exact against approximate search, without a model's time.

Usage: python benchmarks/search.py [--queries 50] [--scale 1.0]

Two sets of synthetic unit vectors, every second one in English so that a filter keeps half of them:

clustered     50,000 of 576 dimensions around 500 centres, as texts of a few hundred topics lie
unstructured  200,000 of 64 dimensions, each drawn by itself

Queries are stored vectors with noise. Recall is the share of the ten nearest texts, as exact search gives them, that
approximate search finds. Prints a table and writes runs/bench/search.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from lusifer.search import Entry, IndexInfo, create_store
from lusifer.search.store import Store

OUT = Path("runs/bench")
ENGLISH = "lang = 'en'"
ROWS = 10_000  # Added at once.
NOISE = 0.5  # Of a query, and of a vector around its centre, against a unit vector.


def unit(vectors: np.ndarray) -> np.ndarray:
    """Float32 rows of length 1."""
    rows = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return rows.astype(np.float32)


def noisy(rng: np.random.Generator, vectors: np.ndarray) -> np.ndarray:
    """Unit vectors near others."""
    noise = rng.standard_normal(vectors.shape) / np.sqrt(vectors.shape[1])
    return unit(vectors + NOISE * noise)


def make(rng: np.random.Generator, count: int, dimension: int, centres: int | None) -> np.ndarray:
    """(count, dimension) unit vectors, around centres if there are any."""
    if centres is None:
        return unit(rng.standard_normal((count, dimension)))
    middle = unit(rng.standard_normal((centres, dimension)))
    return noisy(rng, middle[rng.integers(centres, size=count)])


def timed(store: Store, queries: np.ndarray, **options: Any) -> tuple[list[set[str]], float]:
    """Ids found by query, and the median time of a query in milliseconds."""
    found, times = [], []
    for query in queries:
        begin = time.perf_counter()
        hits = store.search(query, **options)
        times.append(1000 * (time.perf_counter() - begin))
        found.append({hit.entry.id for hit in hits})
    return found, median(times)


def recall(found: list[set[str]], wanted: list[set[str]]) -> float:
    """Share of the texts wanted that were found."""
    return sum(len(one & two) for one, two in zip(found, wanted, strict=True)) / sum(map(len, wanted))


def measure(folder: Path, count: int, dimension: int, centres: int | None, queries: int) -> dict[str, float]:
    """Figures of one set."""
    rng = np.random.default_rng(0)
    vectors = make(rng, count, dimension, centres)
    store = create_store(str(folder / "index"), IndexInfo("synthetic", "0", dimension))
    begin = time.perf_counter()
    for start in range(0, count, ROWS):
        rows = range(start, min(start + ROWS, count))
        entries = [Entry(f"t{row}", f"text {row}", ("en", "de")[row % 2]) for row in rows]
        store.upsert(entries, vectors[rows.start : rows.stop])
    row = {"upsert_per_s": count / (time.perf_counter() - begin)}
    begin = time.perf_counter()
    store.build()
    row["build_s"] = time.perf_counter() - begin
    asked = noisy(rng, vectors[rng.choice(count, queries, replace=False)])
    for name, where in (("", None), ("filter_", ENGLISH)):
        for _ in range(2):  # The first round reads the index from disk.
            exact, row[f"{name}exact_ms"] = timed(store, asked, where=where, exact=True)
            near, row[f"{name}approximate_ms"] = timed(store, asked, where=where)
        row[f"{name}recall"] = recall(near, exact)
    return row


def main() -> None:
    """Measures both sets, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the vectors")
    options = parser.parse_args()
    sets = {"clustered": (50_000, 576, 500), "unstructured": (200_000, 64, None)}
    rows = {}
    timings = ("exact, ms", "approximate, ms", "recall@10", "with a filter, ms", "recall@10")
    columns = ("upsert, texts/s", "build, s", *timings)
    print(f"| vectors | {' | '.join(columns)} |\n|---{'|---:' * len(columns)}|")
    for name, (count, dimension, centres) in sets.items():
        count = round(options.scale * count)
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = one = measure(Path(folder), count, dimension, centres, options.queries)
        print(
            f"| {count:,} of {dimension} dimensions, {name} | {one['upsert_per_s']:,.0f} | {one['build_s']:.1f} "
            f"| {one['exact_ms']:.1f} | {one['approximate_ms']:.1f} | {one['recall']:.3f} "
            f"| {one['filter_approximate_ms']:.1f} | {one['filter_recall']:.3f} |"
        )
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "search.json").write_text(json.dumps({"queries": options.queries, "sets": rows}, indent=1))


if __name__ == "__main__":
    main()
