"""What is installed: every import declared, every requirement bounded, every locked package of one version and hash."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


# Modules that are not called as the package they come with.
PACKAGES = {"sklearn": "scikit-learn", "yaml": "pyyaml", "umap": "umap-learn", "pydantic_core": "pydantic"}


def blocks(name):
    """Each requirement of a lock file with its hashes."""
    lines = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", "").splitlines()
    return [(Requirement(line.split("--hash")[0]), re.findall(r"--hash=sha256:[0-9a-f]{64}", line)) for line in lines]


def wanted():
    """Requirements of the project and of the extras that `make test` installs, torch aside."""
    extras, found = ["all", "dev"], [Requirement(text) for text in PROJECT["dependencies"]]
    while extras:
        for one in map(Requirement, PROJECT["optional-dependencies"][extras.pop()]):
            extras += one.extras if one.name == PROJECT["name"] else []
            found += [] if one.name == PROJECT["name"] else [one]
    return [one for one in found if one.name != "torch"]


@pytest.mark.parametrize("name", ["requirements.lock", "tools/uv.lock"])
def test_every_locked_package_has_one_version_and_hashes(name):
    for one, hashes in blocks(name):
        (pinned,) = one.specifier
        assert pinned.operator == "==" and hashes, str(one)


def test_the_lock_is_of_these_requirements():
    # After a change of pyproject.toml: sh tools/lock.sh
    locked = {}
    for one, _ in blocks("requirements.lock"):
        locked.setdefault(one.name.lower(), []).append(next(iter(one.specifier)).version)
    for one in wanted():
        versions = locked.get(one.name.lower(), [])
        assert versions and all(one.specifier.contains(version) for version in versions), f"{one}: locked {versions}"
    (torch,) = [one for one in map(Requirement, PROJECT["dependencies"]) if one.name == "torch"]
    (line,) = (ROOT / "tools" / "torch.txt").read_text().split()
    assert torch.specifier.contains(line.removeprefix("torch==")) and "torch" not in locked


def test_every_requirement_has_an_upper_bound():
    for text in [*PROJECT["dependencies"], *sum(PROJECT["optional-dependencies"].values(), [])]:
        one = Requirement(text)
        assert one.name == PROJECT["name"] or any(part.operator in ("<", "==") for part in one.specifier), text


def test_every_import_is_declared():
    named = [*PROJECT["dependencies"], *sum(PROJECT["optional-dependencies"].values(), [])]
    declared = {Requirement(text).name.lower().replace("-", "_") for text in named}
    imported = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            imported |= {name.name for name in node.names} if isinstance(node, ast.Import) else set()
            imported |= {node.module} if isinstance(node, ast.ImportFrom) and not node.level else set()
    tops = {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names) - {"lusifer"}
    assert {PACKAGES.get(top, top).replace("-", "_") for top in tops} <= declared
