"""The shape of the source: imports point one way, files stay short, importing is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import lusifer

SOURCE = Path(lusifer.__file__).parent
# A module imports only modules before it.
ORDER = [
    "errors",
    "console",
    "configuration",
    "scoreboard",
    "modelcard",
    "connector",
    "use_encoder",
    "starter_convert",
    "starter",
    "starter_text",
    "released",
    "adapters",
    "base_adapters",
    "checkpoint",
    "backbones",
    "packing",
    "pooling",
    "microbatches",
    "modeling",
    "varlen",
    "warmstart",
    "prompts",
    "recipes",
    "recipe_files",
    "reading",
    "canonical",
    "data",
    "mixture",
    "collate",
    "distillation",
    "contrastive",
    "alignment",
    "textencoder",
    "sentence",
    "authors_format",
    "authors",
    "encoding",
    "hub",
    "storage",
    "bulk_job",
    "bulk_input",
    "bulk_shard",
    "bulk_local",
    "bulk_ray",
    "bulk",
    "trainer",
    "optimise",
    "training",
    "dryrun",
    "baselines",
    "llm_embedder",
    "init_recipe",
    "suite",
    "records",
    "everyday",
    "diagnosis",
    "embedders",
    "embedcache",
    "evaltasks",
    "intervals",
    "evaluation",
    "evalexport",
    "datacheck",
    "mining",
    "lexical",
    "filters",
    "vectorstore",
    "lancestore",
    "qdrantstore",
    "store",
    "indexing",
    "corpusmap",
    "searchpage",
    "batching",
    "httplimits",
    "embedrequest",
    "embedservice",
    "serving",
    "httpserver",
    "comparison",
    "scoretext",
    "webpage",
    "convert_cli",
    "data_cli",
    "init_cli",
    "hub_cli",
    "eval_cli",
    "search_cli",
    "encode_cli",
    "serve_cli",
    "report",
    "quickstart",
    "cli",
    "__main__",
]


@cache
def modules():
    return {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCE.glob("*.py")}


def is_type_checking(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imported(node, names):
    """Own modules imported anywhere below a node, also inside functions, imports for types alone aside."""
    if is_type_checking(node):
        return
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name.startswith("lusifer."):
                yield alias.name.split(".")[1]
    elif isinstance(node, ast.ImportFrom) and node.module is not None:
        assert node.level == 0, "imports are absolute"
        if node.module == "lusifer":
            yield from (alias.name for alias in node.names if alias.name in names)
        elif node.module.startswith("lusifer."):
            yield node.module.split(".")[1]
    for child in ast.iter_child_nodes(node):
        yield from imported(child, names)


def test_every_module_has_its_place():
    assert sorted(ORDER) == sorted(set(modules()) - {"__init__"})


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_downwards(name):
    trees = modules()
    for other in imported(trees[name], trees):
        assert ORDER.index(other) < ORDER.index(name), f"{name} imports {other}"


def test_the_check_above_sees_an_upward_import():
    tree = ast.parse(
        "def f():\n    from lusifer.cli import app\nfrom lusifer import training\nimport lusifer.data.records"
    )
    assert sorted(imported(tree, modules())) == ["cli", "data", "training"]
    hidden = ast.parse("if TYPE_CHECKING:\n    from lusifer.cli import app")
    assert list(imported(hidden, modules())) == []


@pytest.mark.parametrize("path", sorted(SOURCE.glob("*.py")), ids=lambda path: path.name)
def test_no_file_is_long(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_importing_lusifer_loads_only_what_a_model_needs():
    heavy = ("mteb", "matplotlib", "datasets", "pyarrow", "sentence_transformers", "pandas", "gguf", "pythonbible")
    heavy += ("fastapi", "uvicorn", "prometheus_client")
    code = f"import sys, lusifer; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
