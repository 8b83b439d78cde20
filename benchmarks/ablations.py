"""What each part of the starter's training is worth: one short run per variant, scored on the everyday set.

Usage: python benchmarks/ablations.py [--recipe recipes/starter.yaml] [--out runs/ablations] [NAME ...] [-- OVERRIDES]

Overrides after ``--`` go to every variant, for example ``--align.steps 20 --contrast.steps 60``. A finished variant is
not run again. Writes results.json, a Markdown table and a plot.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import lusifer.model.modeling
from lusifer.data.everyday_set import load_everyday
from lusifer.evaluation.everyday import embedder, mean_score, score
from lusifer.loading import load_checkpoint
from lusifer.model.backbone_alone import encoder_alone
from lusifer.recipes.files import load_recipe
from lusifer.training.llm_baseline import train_llm_alone
from lusifer.training.run import train

# Name -> what changes against the recipe.
VARIANTS: dict[str, list[str]] = {
    "all stages": [],
    "no stage 0": ["--warm_start.enabled", "false"],
    "no stage 1": ["--align.enabled", "false"],
    "neither stage 0 nor 1": ["--warm_start.enabled", "false", "--align.enabled", "false"],
    "stage 0 alone": ["--align.enabled", "false", "--contrast.enabled", "false", "--model.llm_layers", "4"],
    "bidirectional alignment": [],
    "no added token": ["--model.num_added_tokens", "0"],
    "mask 0": ["--align.mask_probability", "0"],
    "mask 0.9": ["--align.mask_probability", "0.9"],
    "no distillation": ["--contrast.guide", "null", "--contrast.distill", "0"],
    "LLM frozen in stage 2": ["--model.llm_lora", "null"],
    "English LLM alone": [],
    "encoder alone": [],
}


def embed(name: str, recipe_file: str, folder: Path, overrides: list[str]) -> Any:
    """Trains a variant and gives what it embeds with."""
    recipe = load_recipe(recipe_file, [*overrides, *VARIANTS[name], "--output", str(folder)])
    if name == "encoder alone":
        return encoder_alone(recipe.model.encoder).embed
    if name == "English LLM alone":
        from sentence_transformers import SentenceTransformer

        return embedder(SentenceTransformer(str(train_llm_alone(recipe))))
    if name != "bidirectional alignment":
        return embedder(load_checkpoint(str(train(recipe))))
    real = lusifer.model.modeling.run_llm

    def both_ways(llm: Any, embeds: Any, mask: Any, *, is_causal: bool) -> Any:
        return real(llm, embeds, mask, is_causal=False)

    with mock.patch(
        "lusifer.model.modeling.run_llm", both_ways
    ):  # The published code's defect; ours has no switch for it.
        return embedder(load_checkpoint(str(train(recipe))))


def measure(name: str, recipe_file: str, out: Path, overrides: list[str]) -> dict[str, Any]:
    """Scores of one variant, per cent."""
    started = time.monotonic()
    folder = out / name.replace(" ", "-")
    scores = score(embed(name, recipe_file, folder, overrides), progress=False)
    languages = list(load_everyday().sentences)
    row: dict[str, Any] = {
        "translation retrieval": 100 * mean_score(scores["translation_retrieval"], languages),
        "topic retrieval": 100 * mean_score(scores["topic_retrieval"], languages),
        "minutes": (time.monotonic() - started) / 60,
    }
    stage = folder / "align" / "stage.json"
    if stage.is_file():
        held = json.loads(stage.read_text())["held_out"]
        row |= {
            f"stage 1 accuracy, {kind}": 100 * held[f"visible_{kind}_accuracy"] for kind in ("own", "other", "none")
        }
    return row


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Two bars per variant."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(results)[::-1]
    figure, axis = plt.subplots(figsize=(8, 0.5 * len(names) + 1.2), layout="constrained")
    for shift, task, colour in ((0.2, "translation retrieval", "#0072b2"), (-0.2, "topic retrieval", "#e69f00")):
        values = [results[name][task] for name in names]
        bars = axis.barh([y + shift for y in range(len(names))], values, 0.38, label=task, color=colour)
        axis.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
    axis.set_yticks(range(len(names)), names)
    axis.set_xlim(0, 100)
    axis.set_xlabel("accuracy, %, mean over the languages of the set, English aside")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    figure.savefig(path, dpi=130)


def main() -> None:
    """Runs what is left and writes results, table and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(VARIANTS)}; all when left out")
    parser.add_argument("--recipe", default="recipes/starter.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, overrides = parser.parse_args(sys.argv[1:at]), sys.argv[at + 1 :]
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.json"
    results: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}
    for name in options.names or VARIANTS:
        if name not in results:
            results[name] = measure(name, options.recipe, options.out, overrides)
            staging = path.with_name(".results.json")
            staging.write_text(json.dumps(results, indent=1))
            os.replace(staging, path)
            print(name, json.dumps({key: round(value, 1) for key, value in results[name].items()}), flush=True)
    results = {name: results[name] for name in VARIANTS if name in results}
    columns = ["translation retrieval", "topic retrieval"] + [
        f"stage 1 accuracy, {k}" for k in ("own", "other", "none")
    ]
    lines = ["| variant | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in results.items():
        cells = [f"{row[column]:.1f}" if column in row else "" for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    (options.out / "table.md").write_text("\n".join(lines) + "\n")
    plot(results, options.out / "ablations.png")


if __name__ == "__main__":
    main()
