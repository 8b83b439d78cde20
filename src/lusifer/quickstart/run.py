"""The quickstart: an English embedder gets more languages, a small LUSIFER is trained, five systems are scored.

1. The English embedder (the teacher) embeds English sentences into an index; a multilingual encoder is adapted to it,
   and queries in six languages search the index.
2. LUSIFER is trained by the paper's stages, and the English LLM alone beside it.
3. A report with the scores of all.

Every step leaves its result in the output folder, so an interrupted run resumes where it stopped and a finished one
does nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer

from lusifer.adapt import Options, adapt
from lusifer.errors import LusiferError
from lusifer.evaluation.everyday import embedder, score
from lusifer.loading import load_checkpoint, load_for_inference
from lusifer.locks import alone_at
from lusifer.model.backbone_alone import encoder_alone
from lusifer.publishing import make_folder, write_json
from lusifer.quickstart import adapted
from lusifer.quickstart.report import NAMES, write_report
from lusifer.recipes.files import load_recipe
from lusifer.recipes.schema import Recipe
from lusifer.starter.fetch import fetch
from lusifer.training.llm_baseline import train_llm_alone
from lusifer.training.run import STAGES, fingerprint, train
from lusifer.training.trainer import peak_memory_mb

logger = logging.getLogger(__name__)

# What each step is called while it runs.
STEPS = {
    "index": "the English teacher fills an index",
    "adapt": "a multilingual encoder learns the teacher's vectors",
    "queries": "queries in other languages search the index",
    "teacher": "scoring the English teacher alone",
    "adapted": "scoring the adapted model",
    "encoder": "scoring the encoder alone",
    "lusifer": "training and scoring LUSIFER",
    "llm": "training and scoring the English LLM alone",
}
Answers = Sequence[dict[str, str]]


def quickstart_recipe(output: Path, overrides: list[str] | None = None) -> Recipe:
    """The bundled recipe, writing to ``output``."""
    bundled = files("lusifer") / "resources" / "quickstart.yaml"
    return load_recipe(str(bundled), [*(overrides or []), "--output", str(output)])


class _Run:
    """Results so far, their cost, and the file they are kept in; refuses a folder of another recipe."""

    def __init__(self, folder: Path, recipe: str) -> None:
        self.path = folder / "progress.json"
        try:
            self.state: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            self.state = {"recipe": recipe, "done": {}, "seconds": {}, "peak_rss_mb": 0.0}
        if self.state.get("recipe") != recipe:
            raise LusiferError(
                f"{str(folder)!r} contains a run of another recipe; choose another --output, or remove it"
            )

    def step(self, name: str, compute: Callable[[], Any]) -> Any:
        """What a step gives, computed unless an earlier call did; its seconds add up over interrupted calls."""
        place = f"{list(STEPS).index(name) + 1}/{len(STEPS)}: {STEPS[name]}"
        if name in self.state["done"]:
            logger.info("%s: already done", place)
            return self.state["done"][name]
        logger.info("%s", place)
        began = time.monotonic()
        try:
            self.state["done"][name] = compute()
        finally:
            spent = self.state["seconds"].get(name, 0.0) + time.monotonic() - began
            self.state["seconds"][name] = round(spent, 1)
            self.state["peak_rss_mb"] = round(max(self.state["peak_rss_mb"], peak_memory_mb()), 1)
            write_json(self.path, self.state)
        return self.state["done"][name]


def quickstart(
    output: Path,
    *,
    overrides: list[str] | None = None,
    progress: bool = True,
    answered: Callable[[Answers], object] | None = None,
) -> dict[str, Any]:
    """Runs the quickstart, or what is left of it.

    Args:
        output: Folder to write to.
        overrides: Recipe overrides, ``--section.field value``.
        progress: Whether to show progress bars.
        answered: Called, long before the end, with what `lusifer.quickstart.adapted.ask` found.

    Returns:
        What ``results.json`` holds.

    Raises:
        LusiferError: If something cannot be fetched, read or written, or the folder contains a run of another recipe.
    """
    recipe = quickstart_recipe(output, overrides)
    options = replace(adapted.COUNTS, encoder=recipe.model.encoder, seed=recipe.seed)
    with alone_at(output):
        return _run(recipe, options, output, progress, answered)


def _run(
    recipe: Recipe, options: Options, output: Path, progress: bool, answered: Callable[[Answers], object] | None
) -> dict[str, Any]:
    make_folder(output)
    whole = [fingerprint(recipe, STAGES[-1]), adapted.TEACHER, repr(options)]
    run = _Run(output, hashlib.sha256(json.dumps(whole).encode()).hexdigest())
    fetch()
    index = output / "index"
    facts = run.step("index", lambda: adapted.fill_index(index, progress=progress))
    fit = run.step("adapt", lambda: adapt(adapted.TEACHER, output / "adapted", options, progress=progress))
    answers = run.step("queries", lambda: adapted.ask(index, output / "adapted" / "model"))
    if answered is not None:
        answered(answers)
    systems = {name: run.step(name, how) for name, how in _systems(recipe, output, progress).items()}
    results = {
        "systems": {name: systems[name] for name in NAMES},
        "queries": answers,
        "index": facts,
        "adapted": fit,
        "seconds": run.state["seconds"],
        "peak_rss_mb": run.state["peak_rss_mb"],
        "stages": _stages(output),
    }
    write_json(output / "results.json", results)
    write_report(results, output)
    return results


def _systems(recipe: Recipe, output: Path, progress: bool) -> dict[str, Callable[[], Any]]:
    """What scores each system, in the order of work: what takes seconds first."""
    model = str(output / "adapted" / "model")
    scored = partial(score, progress=progress)
    return {
        "teacher": lambda: scored(embedder(load_for_inference(adapted.TEACHER))),
        # Its own vectors of other languages, and the English ones as they lie in the teacher's index.
        "adapted": lambda: scored(
            embedder(load_for_inference(model)), english=adapted.english_vectors(output / "index")
        ),
        "encoder": lambda: scored(encoder_alone(recipe.model.encoder).embed),
        "lusifer": lambda: scored(embedder(load_checkpoint(str(train(recipe, progress=progress))))),
        "llm": lambda: scored(embedder(SentenceTransformer(str(train_llm_alone(recipe, progress=progress))))),
    }


def _stages(output: Path) -> dict[str, Any]:
    """What the stages of LUSIFER's training say of themselves."""
    stages = {}
    for name in STAGES:
        path = output / name / "stage.json"
        if path.is_file():
            facts = json.loads(path.read_text(encoding="utf-8"))
            stages[name] = {key: value for key, value in facts.items() if key != "history"}
    return stages
