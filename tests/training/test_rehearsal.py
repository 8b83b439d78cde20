"""The paper's recipe from the first check to a merged model: every one of its sets, tiny, with tiny backbones.

Sets have the published columns, three positives, 32 negatives and clusters of about 20 rows.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

import lusifer
from support.launch import run
from support.texts import TEXTS

PAPER = Path(__file__).parents[2] / "recipes" / "paper-xlmr-mistral.yaml"


def write_set(folder, source, number, *, rows=40):
    """One set as the authors publish theirs: some texts of its own in every row."""
    generator, name = np.random.default_rng(number), source.rpartition("/")[2]

    def text(kind, row, place=0):
        return f"{name} {kind} {row} {place}: {TEXTS[generator.integers(len(TEXTS))]}"

    lines = []
    for row in range(rows):
        record = {"query": text("asks", row), "positive": [text("answers", row, k) for k in range(3)]}
        record |= {"negative": [text("denies", row, k) for k in range(32)], "cluster": row // 20}
        lines.append(json.dumps(record) + "\n")
    path = folder / f"{number:02}-{name}.jsonl"
    path.write_text("".join(lines))
    return str(path)


@pytest.fixture(scope="module")
def recipe(tiny_encoder, tiny_llm, tmp_path_factory):
    """The shipped recipe with other backbones, sources, sizes of a step and numbers of steps; nothing else."""
    folder = tmp_path_factory.mktemp("rehearsal")
    tree = yaml.safe_load(PAPER.read_text(encoding="utf-8"))
    tree["model"] |= {
        "encoder": tiny_encoder,
        "llm": tiny_llm,
        "max_seq_length": 48,
        "connector_dim": 32,
        "head_dim": 48,
    }
    for part in ("encoder_lora", "llm_lora"):
        tree["model"][part]["dropout"] = 0.0
    small = {"steps": 6, "save_steps": 2, "eval_steps": 6, "logging_steps": 1, "max_tokens": 4096}
    tree["align"] |= {**small, "batch_size": 16, "target_max_seq_length": 24}
    tree["contrast"] |= {**small, "batch_size": 48, "graph_tokens": 16384}
    number = 0
    for stage in ("align", "contrast"):
        for item in tree[stage]["data"]:
            item["source"], number = write_set(folder, item["source"], number), number + 1
    path = folder / "paper.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def history(output, stage):
    rows = json.loads((output / stage / "stage.json").read_text())["history"]
    return [row["loss"] for row in rows if "loss" in row]


def test_the_whole_recipe_from_check_to_merged_model(recipe, tmp_path, call, monkeypatch):
    monkeypatch.setenv("LUSIFER_CACHE", str(recipe.parent / "cache"))
    code, out, err = call("data", "check", recipe, "--json")
    report = json.loads(out)
    assert code == 0 and report["ok"], (report["errors"], err)
    assert len(report["sets"]) == 69 and {
        row["clusters"] for row in report["sets"] if row["task"] != "reconstruct"
    } == {2}

    output = tmp_path / "run"
    done = run(recipe, output, ranks=2)  # Sharded, as shipped.
    assert done.returncode == 0, done.stderr[-3000:]
    for stage in ("align", "contrast"):
        assert len(history(output, stage)) == 6 and np.isfinite(history(output, stage)).all()

    code, out, err = call("merge", output / "model", tmp_path / "merged", "-q")
    assert code == 0, err
    texts = [*TEXTS[:4], "Instruct: Find it\nQuery: " + TEXTS[4]]
    one, other = (lusifer.load(str(path)).encode(texts) for path in (output / "model", tmp_path / "merged"))
    assert one.shape == (5, 48) and np.isfinite(one).all()
    np.testing.assert_allclose(one, other, atol=2e-2)  # Adapters are rounded to the bfloat16 of the backbones.
