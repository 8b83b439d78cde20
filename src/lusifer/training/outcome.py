"""What training did, stage by stage: losses, held-out figures, and how far the embeddings moved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from lusifer.data.everyday_set import load_everyday
from lusifer.training.stages import STAGES

_SENTENCES = 32  # In English, and as many in the other languages.
# What is shown of the held-out rows, the first that a stage measured: name and form.
_HELD_OUT = {
    "teacher_cosine": ("cosine with the teacher", "{:.3f}"),
    "loss": ("loss", "{:.3f}"),
    "hidden_own_accuracy": ("masked tokens predicted", "{:.1%}"),
}


class Moved(NamedTuple):
    """Mean cosine of everyday sentences' embeddings with those before a stage: 1 where nothing moved."""

    english: float
    other_languages: float


def everyday_embeddings(model: SentenceTransformer) -> Tensor:
    """(64, dim) float32 unit vectors on the CPU: everyday sentences, half English, half in all other languages in turn.

    Args:
        model: The model; left in evaluation mode.
    """
    sentences = load_everyday().sentences
    others = [code for code in sentences if code != "en"]
    texts = sentences["en"][:_SENTENCES]
    texts = texts + [sentences[others[row % len(others)]][row] for row in range(_SENTENCES)]
    options: dict[str, Any] = {"batch_size": 16, "convert_to_tensor": True, "show_progress_bar": False}
    vectors: Any = model.encode(texts, **options)
    return torch.nn.functional.normalize(vectors.float().cpu(), dim=1)


def moved(before: Tensor, after: Tensor) -> Moved:
    """How far embeddings moved.

    Args:
        before: What `everyday_embeddings` gave.
        after: The same, later.
    """
    cosines = (before * after).sum(dim=1)
    return Moved(*(round(float(half.mean()), 4) for half in cosines.split(_SENTENCES)))


def outcome(output: Path) -> list[dict[str, str]]:
    """A row for each stage whose result lies in a run's folder: stage, time, loss, held out, cosines with before.

    Args:
        output: The run's folder.
    """
    rows = []
    for number, name in enumerate(STAGES):
        path = output / name / "stage.json"
        if path.is_file():
            facts = json.loads(path.read_text(encoding="utf-8"))
            rows.append({"stage": f"{number}, {name}", **_row(facts)})
    return rows


def _row(facts: dict[str, Any]) -> dict[str, str]:
    losses = [row["loss"] for row in facts.get("history", ()) if "loss" in row]
    minutes, seconds = divmod(round(facts["seconds"]), 60)
    change = facts.get("moved") or {}
    held_out = _held_out(facts.get("held_out_before") or {}, facts.get("held_out") or {})
    if "explained" in facts:
        held_out = f"variance explained: {facts['explained']:.1%}"
    return {
        "time": f"{minutes}:{seconds:02}",
        "loss": f"{losses[0]:.3f} -> {losses[-1]:.3f}" if losses else "",
        "held-out rows": held_out,
        "English": f"{change['english']:.3f}" if change else "",
        "other languages": f"{change['other_languages']:.3f}" if change else "",
    }


def _held_out(before: dict[str, float], after: dict[str, float]) -> str:
    for key, (name, form) in _HELD_OUT.items():
        if key in after:
            values = [form.format(figures[key]) for figures in (before, after) if key in figures]
            return f"{name}: {' -> '.join(values)}"
    return ""
