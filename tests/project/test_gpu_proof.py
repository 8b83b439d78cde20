"""The proof for the day there is a GPU: its rows that need none pass here, and a row that fails is said to."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[2] / "tools" / "gpu_proof.py"


@pytest.fixture
def tool(monkeypatch, tmp_path):
    monkeypatch.setenv("LUSIFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(PATH.parent))
    spec = importlib.util.spec_from_file_location("gpu_proof", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_proof", module)
    spec.loader.exec_module(module)
    return module


def outcomes(tool, monkeypatch, folder):
    monkeypatch.setattr(sys, "argv", ["gpu_proof.py", "--tiny", "--out", str(folder)])
    code = tool.main()
    rows = json.loads((folder / "gpu_proof.json").read_text())
    assert all(f"| {row['name']} | {row['outcome']} |" in (folder / "gpu_proof.md").read_text() for row in rows)
    return code, {row["name"]: row["outcome"] for row in rows}


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a GPU makes of it is not known beforehand")
def test_every_row_passes_or_says_what_it_needs(tool, monkeypatch, tmp_path):
    code, said = outcomes(tool, monkeypatch, tmp_path)
    assert code == 0 and said.keys() == tool.ROWS.keys()
    assert set(said.values()) == {"pass", "not possible here"}
    assert sum(outcome == "pass" for outcome in said.values()) >= 6


def test_a_row_that_fails_fails_the_proof(tool, monkeypatch, tmp_path):
    def wrong(bench):
        raise AssertionError("they differ")

    monkeypatch.setattr(tool, "ROWS", {"one": wrong, "other": lambda bench: {"apart": 0.0}})
    assert outcomes(tool, monkeypatch, tmp_path) == (1, {"one": "fail", "other": "pass"})
