"""Every code block of README and guides: Python runs, light commands too, all others are parsed by the real commands.

YAML is read by the real types, quoted error messages are looked for in the sources.

A block that cannot run here says so in front of it: ``<!-- not run: reason -->``.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from lusifer.bulk.job import Settings
from lusifer.bulk.run import encode
from lusifer.cli.app import app
from lusifer.evaluation.own.schema import TaskFile
from lusifer.model.sentence_transformer import save_atomically
from lusifer.recipes.schema import Recipe

ROOT = Path(__file__).parents[2]
URLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
MADE = {"reference/cli.md", "reference/recipes.md", "reference/tasks.md", "reference/api.md", "changelog.md", "LOG.md"}
PAGES = [ROOT / "README.md"] + sorted(
    path for path in (ROOT / "docs").rglob("*.md") if str(path.relative_to(ROOT / "docs")) not in MADE
)
BLOCK = re.compile(
    r"(?P<before>^<!-- not run: .+ -->\n+)?^(?P<fence>```+)(?P<language>[^\n]*)\n(?P<body>.*?)^(?P=fence)$", re.M | re.S
)
SHOWN = {"text", "json", "bibtex", "mermaid"}  # Outputs and the like: nothing to run.
MINIMAL = {"output": "x", "model": {"encoder": "a/b", "llm": "c/d"}, "warm_start": {"data": "t.jsonl"}}


def blocks(path):
    for match in BLOCK.finditer(path.read_text(encoding="utf-8")):
        yield match["language"].strip(), match["body"], match["before"]


def name(path):
    return str(path.relative_to(ROOT))


def test_every_block_has_a_language_that_is_checked():
    known = {"python", "sh", "console", "yaml", *SHOWN}
    for path in PAGES:
        for language, body, _ in blocks(path):
            assert language in known, (name(path), language, body[:60])


@pytest.fixture
def place(tiny_st, tmp_path, monkeypatch):
    """A folder in which every model that the guides name is a small one."""
    monkeypatch.chdir(tmp_path)
    for model in ("starter", "runs/quickstart/model", "lusifer-published", "acme/lusifer-small"):
        save_atomically(tiny_st, tmp_path / model)
    (tmp_path / "sentences.txt").write_text("the sea\nthe river\n")
    (tmp_path / "notes.jsonl").write_text('{"text": "the sea", "key": 1}\n{"text": "the river", "key": 2}\n')
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("bread and milk\n")
    return tmp_path


# With the models and files of `place`, in a second or two each.
LIGHT = ("index add", "index info", "search", "info", "benchmark show", "encode", "merge")


def light(words):
    """Whether a command can be run for real here: nothing that serves, trains, or reads what only a reader has."""
    given = " ".join(words[1:])
    there = all(
        Path(word).exists()
        for word in words[2:4]
        if re.search(r"[/.]", word) and word.endswith(("model", ".jsonl", ".txt"))
    )
    return words[0] == "lusifer" and given.startswith(LIGHT) and there and "--ui" not in words and "MODEL" not in words


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_blocks_run_one_after_the_other(path, place):
    if path.name == "encoding.md":  # It reads what a command with a model of the reader's has written.
        encode("starter", "sentences.txt", "vectors/", settings=Settings(output_dtype="int8"))
    space: dict[str, object] = {}
    for language, body, skipped in blocks(path):
        if language == "python" and not skipped:
            for module in re.findall(r"^(?:from|import) (\w+)", body, re.M):
                if importlib.util.find_spec(module) is None:
                    pytest.skip(f"{module} is not installed")
            exec(compile(body, name(path), "exec"), space)
        for words in lines(language, body) if not skipped else ():
            if light(words):
                done = CliRunner().invoke(app, words[1:])
                assert done.exit_code == 0, (words, done.output, done.exception)


def lines(language, body):
    """The commands of a block, in words."""
    if language not in ("sh", "console"):
        return
    for line in body.replace("\\\n", " ").splitlines():
        if language == "console" and not line.startswith("$ "):
            continue
        words = shlex.split(line.removeprefix("$ "), comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words:
            yield words


def commands(path):
    for language, body, skipped in blocks(path):
        if not skipped:
            yield from lines(language, body)


def parse(words):
    """The real command, with its options checked, not run."""
    command = typer.main.get_command(app)
    while hasattr(command, "commands") and words:
        assert words[0] in command.commands, f"no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    with command.make_context("lusifer", list(words)) as context:
        return context


def extras(words):
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        if match := re.fullmatch(r"lusifer\[(.+)\]", word):
            assert set(match[1].split(",")) <= set(known), word


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_commands_exist_with_their_options(path):
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    for words in commands(path):
        program, rest = words[0], words[1:]
        if program == "torchrun":
            program, rest = "lusifer", rest[rest.index("lusifer") + 1 :]
        if program == "lusifer":
            if "train" in rest[:1]:
                rest = [part for part in rest if not re.match(r"--\w+\.|--output", part)]
            try:
                parse(rest)
            except Exception as error:
                raise AssertionError(f"{name(path)}: {' '.join(words)}: {error!r}") from error
        elif program == "make":
            assert all(part in targets or "=" in part for part in rest), words
        elif program == "python" and rest[0] != "-m":
            assert (ROOT / rest[0]).is_file(), words
        elif program == "pip":
            extras(rest)
        elif words == ["git", "clone", "https://github.com/OWNER/lusifer", "&&", "cd", "lusifer"]:
            assert words[2] == URLS["Repository"]
        elif words == ["python", "-m", "venv", "env", "&&", ".", "env/bin/activate"]:
            continue
        else:
            raise AssertionError(f"{name(path)}: {program} is not checked; mark the block <!-- not run: reason -->")


def test_the_check_above_sees_a_wrong_option():
    for wrong in (["encode", "a", "b", "--no-such"], ["no-such"], ["train"]):
        with pytest.raises(Exception, match="(?i)no such option|no command|missing"):
            parse(wrong)


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_recipes_are_valid(path):
    for language, body, skipped in blocks(path):
        if language != "yaml" or skipped:
            continue
        tree = yaml.safe_load(body)
        if "languages" in tree:
            TaskFile.model_validate(tree)
            continue
        assert set(tree) <= set(Recipe.model_fields), (name(path), sorted(tree))
        for stage in ("align", "contrast"):
            if stage in tree:
                tree[stage] = {
                    "data": [{"source": "p.jsonl", "task": "reconstruct"}] * (stage == "align"),
                    **tree[stage],
                }
                tree[stage]["data"] = tree[stage]["data"] or [{"source": "p.jsonl"}]
        Recipe.model_validate({**MINIMAL, **tree, "model": {**MINIMAL["model"], **tree.get("model", {})}})


def test_reference_pages_are_current():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "reference.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_quoted_messages_are_said_somewhere():
    sources = " ".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    sources = re.sub(r'"\s*\n?\s*f?"', "", sources)  # Strings over several lines are one message.
    of_others = ("The checkpoint you are", "CUDA out of memory", "address already", "no file named", "not installed")
    of_others += ("huggingface/tokenizers",)
    for row in re.findall(r"^\| (.+?) \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M):
        for said in re.findall(r"`([^`]+)`", row):
            if not said.startswith(of_others):
                assert said in sources, said


def test_every_guide_is_in_the_navigation():
    told = (ROOT / "mkdocs.yml").read_text()
    for path in (ROOT / "docs").rglob("*.md"):
        assert f": {path.relative_to(ROOT / 'docs')}\n" in told, path
