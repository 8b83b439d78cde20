"""Every family of backbone that transformers has: works, or is refused with one clear line; the docs show which."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import transformers

from lusifer import LusiferError
from lusifer.model.direction import families
from lusifer.model.direction.measured import settle_direction

PATH = Path(__file__).parents[2] / "tools" / "families.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("families", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["families"] = module  # Where its data class looks for its own types.
    spec.loader.exec_module(module)
    return module


def test_the_docs_show_what_came_of_every_family(tool):
    """Builds each and measures it; whatever else than a refusal in one line a family raises fails this."""
    page, kept = tool.page(), tool.PAGE.read_text(encoding="utf-8")
    # Another transformers has other families.
    if f"transformers {'.'.join(transformers.__version__.split('.')[:2])}," in kept:
        assert page == kept, "run python tools/families.py"


def test_few_families_are_left_untried(tool):
    assert len(tool.UNTRIED) <= 11, "make a tiny configuration in SPECIAL instead"
    assert all(tool.UNTRIED.values())
    assert tool.UNTRIED.keys() <= {*tool.decoders(), *tool.encoders()}


@pytest.mark.parametrize("family", sorted(set(families.REFUSED) - {"bloom", "mpt"}))
def test_families_refused_by_name_are_those_that_cannot(tool, family, monkeypatch):
    """ALiBi aside, which can be read both ways and should not."""
    monkeypatch.setattr(families, "REFUSED", {})
    torch.manual_seed(0)
    llm = tool._random(tool.build_llm(tool.tiny_config(family)))
    with pytest.raises(LusiferError):
        settle_direction(family, llm)
