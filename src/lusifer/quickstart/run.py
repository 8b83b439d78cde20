"""The quickstart: train on English text, score three systems zero-shot, write a report.

Every step leaves its result in the output folder, so an interrupted run resumes where it stopped and a
finished one does nothing.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer

from lusifer.data.everyday_set import load_everyday
from lusifer.errors import LusiferError
from lusifer.evaluation.everyday import embedder, score
from lusifer.loading import load_checkpoint
from lusifer.model.backbone_alone import encoder_alone
from lusifer.model.backbones import load_config
from lusifer.publishing import write_json
from lusifer.quickstart.report import write_report
from lusifer.recipes.files import load_recipe
from lusifer.recipes.schema import Recipe
from lusifer.starter.fetch import fetch
from lusifer.training.llm_baseline import train_llm_alone
from lusifer.training.run import STAGES, fingerprint, train

logger = logging.getLogger(__name__)


def quickstart_recipe(output: Path, overrides: list[str] | None = None) -> Recipe:
    """The bundled recipe, writing to ``output``."""
    bundled = files("lusifer") / "resources" / "quickstart.yaml"
    return load_recipe(str(bundled), [*(overrides or []), "--output", str(output)])


def seen_languages(encoder: str) -> list[str]:
    """Languages of the everyday set that an encoder was trained on, by its configuration's ``languages``; all if it
    names none.

    Raises:
        LusiferError: If the configuration cannot be read.
    """
    every = list(load_everyday().sentences)
    listed = getattr(load_config("encoder", encoder), "languages", None) or every
    return [code for code in every if code in listed]


def peak_rss_mb() -> float:
    """Peak resident memory of this process in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3


class _Run:
    """Results so far, their cost, and the file they are kept in; refuses a folder of another recipe."""

    def __init__(self, folder: Path, recipe: str) -> None:
        self.path = folder / "progress.json"
        try:
            self.state: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            self.state = {"recipe": recipe, "systems": {}, "seconds": 0.0, "peak_rss_mb": 0.0}
        if self.state.get("recipe") != recipe:
            raise LusiferError(f"{str(folder)!r} holds a run of another recipe; choose another --output, or remove it")
        self.since = time.monotonic()

    def save(self) -> None:
        now = time.monotonic()
        self.state["seconds"] = round(self.state["seconds"] + now - self.since, 1)
        self.state["peak_rss_mb"] = round(max(self.state["peak_rss_mb"], peak_rss_mb()), 1)
        self.since = now
        write_json(self.path, self.state)

    def score(self, name: str, load: Callable[[], Any], progress: bool) -> None:
        """Scores a system, unless it is scored already; ``load`` trains what is left to train first."""
        if name in self.state["systems"]:
            logger.info("%s is scored already", name)
            return
        try:
            self.state["systems"][name] = score(load(), progress=progress)
        finally:
            self.save()


def quickstart(output: Path, *, overrides: list[str] | None = None, progress: bool = True) -> dict[str, Any]:
    """Runs the quickstart, or what is left of it.

    Args:
        output: Folder to write to.
        overrides: Recipe overrides, ``--section.field value``.
        progress: Whether to show progress bars.

    Returns:
        What ``results.json`` holds.

    Raises:
        LusiferError: If something cannot be fetched, read or written, or the folder holds a run of another recipe.
    """
    recipe = quickstart_recipe(output, overrides)
    output.mkdir(parents=True, exist_ok=True)
    run = _Run(output, fingerprint(recipe, STAGES[-1]))
    fetch()
    run.score("encoder", lambda: encoder_alone(recipe.model.encoder).embed, progress)
    run.score("lusifer", lambda: embedder(load_checkpoint(str(train(recipe, progress=progress)))), progress)
    run.score("llm", lambda: embedder(SentenceTransformer(str(train_llm_alone(recipe, progress=progress)))), progress)
    stages = {}
    for name in STAGES:
        path = output / name / "stage.json"
        if path.is_file():
            facts = json.loads(path.read_text(encoding="utf-8"))
            stages[name] = {key: value for key, value in facts.items() if key != "history"}
    results = {
        "systems": {name: run.state["systems"][name] for name in ("encoder", "llm", "lusifer")},
        "seen_languages": seen_languages(recipe.model.encoder),
        "seconds": run.state["seconds"],
        "peak_rss_mb": run.state["peak_rss_mb"],
        "stages": stages,
    }
    write_json(output / "results.json", results)
    write_report(results, output)
    return results
