"""The shape of the source: packages in an order, imports that point down, short files, cheap imports."""

from __future__ import annotations

import ast
import graphlib
import statistics
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import lusifer

SOURCE = Path(lusifer.__file__).parent
TESTS = Path(__file__).parents[1]
# Packages and modules beside them, bottom to top: each imports only what stands before it.
ORDER = [
    "terminal",
    "progress",
    "errors",
    "lazy",
    "publishing",
    "locks",
    "quiet",
    "registration",
    "storage",
    "hooks",
    "trust",
    "recipes",
    "starter",
    "model",
    "data",
    "interop",
    "loading",
    "export",
    "teacher",
    "adapt",
    "training",
    "evaluation",
    "bulk",
    "search",
    "serving",
    "quickstart",
    "cli",
    "__main__",
]
# Parts that know nothing of one another: the command line joins them.
STRANGERS = [
    ("training", "adapt"),
    ("evaluation", "adapt"),
    ("bulk", "adapt"),
    ("training", "evaluation"),
    ("training", "bulk"),
    ("evaluation", "training"),
    ("evaluation", "bulk"),
    ("bulk", "training"),
    ("bulk", "evaluation"),
    ("serving", "search"),
    ("training", "export"),
    ("adapt", "export"),
]


def is_type_checking(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imported(node, names):
    """Own modules imported anywhere below a node, also inside functions; imports for types alone do not count."""
    if is_type_checking(node):
        return
    if isinstance(node, ast.Import):
        yield from (alias.name.removeprefix("lusifer.") for alias in node.names if alias.name.startswith("lusifer."))
    elif isinstance(node, ast.ImportFrom) and node.module is not None:
        assert node.level == 0, "imports are absolute"
        if node.module.split(".")[0] == "lusifer":
            base = node.module.removeprefix("lusifer").lstrip(".")
            for alias in node.names:
                full = f"{base}.{alias.name}".lstrip(".")
                if full in names or base:
                    yield full if full in names else base
    for child in ast.iter_child_nodes(node):
        yield from imported(child, names)


@cache
def sources():
    """Dotted name below `lusifer` to path; a package's ``__init__`` carries the package's name."""
    paths = {".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in SOURCE.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in paths.items() if name != "__init__"}


@cache
def graph():
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in sources().items()}
    return {name: set(imported(tree, trees)) - {name} for name, tree in trees.items()}


def part(name):
    return name.split(".")[0]


def test_every_part_has_its_place():
    assert sorted(ORDER) == sorted({part(name) for name in sources()})


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_downwards(name):
    for module, others in graph().items():
        if part(module) == name:
            for other in others:
                assert ORDER.index(part(other)) <= ORDER.index(name), f"{module} imports {other}"


@pytest.mark.parametrize(("one", "other"), STRANGERS)
def test_parts_that_must_not_know_each_other_do_not(one, other):
    assert [(m, o) for m, others in graph().items() if part(m) == one for o in others if part(o) == other] == []


def test_no_module_imports_itself_through_others():
    # A package's table of contents names its modules, which is no dependency between these.
    modules = {name: others for name, others in graph().items() if sources()[name].name != "__init__.py"}
    list(graphlib.TopologicalSorter(modules).static_order())


def test_the_checks_above_see_an_upward_import():
    code = "def f():\n    from lusifer.cli import app\nfrom lusifer import training\nimport lusifer.data.records"
    assert sorted(imported(ast.parse(code), sources())) == ["cli.app", "data.records", "training"]
    hidden = ast.parse("if TYPE_CHECKING:\n    from lusifer.cli import app")
    assert list(imported(hidden, sources())) == []


@pytest.mark.parametrize("name", sorted(name for name, path in sources().items() if path.name == "__init__.py"))
def test_every_package_explains_itself(name):
    path = sources()[name]
    assert len(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "") > 80
    assert len(list(path.parent.glob("*.py"))) <= 17, "at most 16 modules and the table of contents"


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_file_is_long(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_functions_are_short():
    lengths = [
        node.end_lineno - node.lineno + 1
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert statistics.median(lengths) <= 10


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_tests_import_no_other_test(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert not [name for name in names if name.startswith(("test_", "tests.")) or name == "conftest"]


def test_tests_have_a_name_each():
    # Without packages, pytest refuses a second file of the same name.
    names = [path.name for path in TESTS.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_tests_stand_where_the_source_does():
    rooms = {path.name for path in TESTS.iterdir() if path.is_dir() and not path.name.startswith(("_", "."))}
    packages = {part(name) for name, path in sources().items() if path.name == "__init__.py"}
    assert rooms - {"support", "project"} == packages


@pytest.mark.parametrize("code", ["import lusifer", "from lusifer import LusiferModel"])
def test_importing_loads_only_what_a_model_needs(code):
    heavy = ("mteb", "matplotlib", "datasets", "pyarrow", "sentence_transformers", "pandas", "gguf", "pythonbible")
    heavy += ("fastapi", "uvicorn", "prometheus_client")
    code += f"\nimport sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
