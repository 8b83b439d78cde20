"""The guide to the code names every module once, and the README's tree every package."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import lusifer

ROOT = Path(__file__).parents[2]
SOURCE = Path(lusifer.__file__).parent


def test_the_architecture_page_names_every_module_once():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").replace("`tests/project/test_layout.py`", "")
    named = Counter(re.findall(r"`([\w/]+\.py)`", text))
    modules = {str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py") if path.name != "__init__.py"}
    assert set(named) == modules
    assert [name for name, count in named.items() if count > 1] == []


def test_the_readme_tree_names_every_package():
    tree = (ROOT / "README.md").read_text(encoding="utf-8").partition("src/lusifer/\n")[2].partition("```")[0]
    named = set(re.findall(r"^ {2,4}(\w+)/", tree, re.M))
    packages = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert named == packages | {"resources"}
