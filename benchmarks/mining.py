"""Memory and time of hard-negative mining with a stub teacher: `python benchmarks/mining.py --passages 1000000`.

The stub gives random vectors, so the figures are those of everything but the model. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from lusifer.data.mining import Settings, mine
from lusifer.recipes.schema import DataRecipe


def stub(dimension: int):  # noqa: ANN201
    """A teacher whose vectors depend on the texts' numbers alone."""

    def embed(texts: list[str]) -> np.ndarray:
        generator = np.random.default_rng(int(texts[0].split()[1]))
        return generator.standard_normal((len(texts), dimension), dtype=np.float32)

    return embed


def main() -> None:
    """Writes the data, mines, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=2_048)
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--words", type=int, default=60, help="words of a passage")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["LUSIFER_CACHE"] = str(folder / "cache")
        filler = " ".join(["word"] * options.words)
        with (folder / "pairs.jsonl").open("w") as file:
            for i in range(options.queries):
                file.write(json.dumps({"query": f"query {i}", "positive": f"passage {i} {filler}"}) + "\n")
        with (folder / "corpus.jsonl").open("w") as file:
            for i in range(options.queries, options.passages):
                file.write(json.dumps({"text": f"passage {i} {filler}"}) + "\n")
        started = time.monotonic()
        # Random vectors have random positives: only a margin of 0 finds negatives for about half of the rows.
        facts = mine(
            DataRecipe(source=str(folder / "pairs.jsonl")),
            folder / "mined.jsonl",
            stub(options.dimension),
            teacher="stub",
            teacher_hash="0",
            settings=Settings(relative_margin=0.0),
            corpus=DataRecipe(source=str(folder / "corpus.jsonl")),
            progress=True,
        )
        seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps({**vars(options), "passages": facts["passages"], "seconds": round(seconds, 1), "peak_gb": peak}))


if __name__ == "__main__":
    main()
