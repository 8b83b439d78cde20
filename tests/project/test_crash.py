"""Commands killed at random moments, and two of each at once: in the end, what an undisturbed one leaves.

`make crash` kills each command 20 times and has two meet 10 times; ``CRASH=100 make crash`` goes on longer, and
``CRASH_SEED`` repeats the moments of a run, as far as time does.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from functools import cache
from itertools import islice
from pprint import pformat

import pytest
import yaml

from lusifer.model.sentence_transformer import save_atomically
from support.crash import Command, Processes, difference, moments, state, write_wheels
from support.mteb_folder import write_tasks
from support.texts import TEXTS, some_texts

pytest.importorskip("lancedb")

KILLS = int(os.environ.get("CRASH", "1"))
SEED = int(os.environ.get("CRASH_SEED", time.time_ns() % 10**6 if "CRASH" in os.environ else "0"))
NAMES = ["index add", "index add, filled", "evaluate", "data mine", "merge", "fetch"]
if "CRASH" in os.environ:  # The suite has tests of their own that kill these: test_trainer.py, test_bulk_resume.py.
    NAMES = ["train", "encode", *NAMES]
pytestmark = pytest.mark.timeout(300 + 60 * KILLS)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    return Processes(tmp_path_factory.mktemp("crash"))


@pytest.fixture(scope="module")
def commands(processes, tiny_encoder, tiny_llm, tmp_path_factory):
    """What is run, by name."""
    import torch

    from lusifer import LusiferModel
    from lusifer.model.backbones import load_tokenizer
    from lusifer.model.sentence_transformer import to_sentence_transformer

    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    inner = LusiferModel.from_backbones(tiny_encoder, tiny_llm, max_seq_length=32)
    inner.add_adapter("llm", {"r": 2})
    model = folder / "model"
    save_atomically(to_sentence_transformer(inner.eval(), load_tokenizer("encoder", tiny_encoder)), model)
    rows = [{"id": f"id{i}", "text": f"{text} {i}"} for i, text in enumerate(some_texts(700))]
    _write(folder / "first.jsonl", rows[:300])
    _write(folder / "all.jsonl", rows)
    pairs = folder / "pairs.jsonl"
    _write(
        pairs, [{"query": text, "positive": f"{text.upper()} {i}"} for i, text in enumerate(some_texts(200, seed=1))]
    )
    tasks = write_tasks(_made(folder / "tasks"))
    quiet = ["-q"]
    index_add = ["index", "add", "PLACE/out", folder / "all.jsonl", "--id-column", "id", "--model", model, *quiet]
    processes.fresh(Command([]))
    assert (
        processes.run(
            Command([folder / "first.jsonl" if one == folder / "all.jsonl" else one for one in index_add])
        ).code
        == 0
    )
    shutil.move(processes.place / "out", folder / "filled")
    before = _rows(folder / "filled")

    def filled(place):
        shutil.copytree(folder / "filled", place / "out")

    def rows_of(place):
        return {"rows": _rows(place / "out")}

    def none_lost(index):
        now = {row["id"]: row for row in _rows(index)}
        assert all(now[row["id"]] == row for row in before)

    return {
        "train": Command(["train", _recipe(folder, tiny_encoder, tiny_llm, pairs), *quiet]),
        "encode": Command(
            ["encode", model, folder / "all.jsonl", "PLACE/out", "--shard-rows", "50", "--precision", "float32", *quiet]
        ),
        "index add": Command(index_add, read=rows_of),
        "index add, filled": Command(index_add, filled, rows_of, lambda place: none_lost(place / "out")),
        "evaluate": Command(
            ["evaluate", model, "--data", tasks, "--tasks", "KLUE-STS,Tatoeba,XQuADRetrieval", "--out", "PLACE/out"]
            + quiet,
        ),
        "data mine": Command(
            ["data", "mine", pairs, "PLACE/out.jsonl.gz", "--model", model, *quiet], done="already exists"
        ),
        "merge": Command(["merge", model, "PLACE/out", *quiet], done="already exists"),
        "fetch": Command(["fetch", *quiet], wheels=write_wheels(_made(folder / "wheels"))),
    }


def _made(folder):
    folder.mkdir()
    return folder


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _recipe(folder, encoder, llm, pairs):
    stage = {"batch_size": 4, "learning_rate": 1e-2, "save_steps": 1, "logging_steps": 1, "save_total_limit": 2}
    _write(folder / "texts.jsonl", [{"text": text} for text in TEXTS])
    recipe = {
        "output": "out",
        "model": {
            "encoder": encoder,
            "llm": llm,
            "max_seq_length": 16,
            "llm_lora": {"r": 2, "alpha": 4, "dropout": 0.2},
        },
        "warm_start": {"data": str(folder / "texts.jsonl"), "texts": 16},
        "align": {"data": [{"source": str(folder / "texts.jsonl"), "task": "reconstruct"}], "steps": 2, **stage},
        "contrast": {"data": [{"source": str(pairs)}], "steps": 3, **stage},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def _rows(index):
    from lusifer.search import open_store

    store = open_store(str(index))
    store.read_all()
    return sorted(store._table.to_arrow().to_pylist(), key=lambda row: row["id"])


@pytest.fixture(scope="module")
def expected(processes, commands):
    """What a command leaves undisturbed, how often it touches its files, and the seconds it takes; by name."""
    return cache(lambda name: processes.undisturbed(commands[name]))


@pytest.fixture(scope="module")
def table(request):
    """Rows that are shown in the end, of a long run."""
    rows = []
    yield rows
    if "CRASH" in os.environ:
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\nseed {SEED}\n{'command':22}{'disturbed by':14}{'times':>6}{'ends':>6}{'equal':>6}{'refused':>8}")
            for name, what, times, ends, equal, refused in rows:
                print(f"{name:22}{what:14}{times:6}{ends:6}{equal:6}{refused:8}")


def is_refusal(ended, command):
    """Whether a process says in a line, and by its exit code, why it does nothing."""
    line = ended.err.strip()
    known = ("another process is using", "another process is at it", *([command.done] if command.done else []))
    return ended.code in (1, 2) and "\n" not in line and any(one in line for one in known)


def assert_same(command, place, whole, story):
    found = difference(state(command, place), whole)
    assert not found, f"{story}\n{pformat(found)}"


@pytest.mark.parametrize("name", NAMES)
def test_killed_at_any_moment_it_ends_as_if_undisturbed(processes, commands, expected, table, name):
    command, rng = commands[name], random.Random(f"{SEED} kills {name}")
    whole, touched, seconds = expected(name)
    kills = ends = refused = 0
    while kills < KILLS:
        processes.fresh(command)
        story = [f"CRASH_SEED={SEED}"]
        for moment in islice(moments(rng, touched, seconds), min(KILLS - kills, rng.randint(1, 3))):
            story.append(moment)
            ended = processes.run(command, moment)
            if ended.code != -signal.SIGKILL:
                break  # It came to its end before.
            kills += 1
            if command.acknowledged:
                command.acknowledged(processes.place)
        else:
            ended = processes.run(command)
        ends += 1
        refused += is_refusal(ended, command)
        assert ended.code == 0 or (command.done and is_refusal(ended, command)), (story, ended)
        assert "Traceback" not in ended.err, (story, ended)
        assert_same(command, processes.place, whole, story)
    table.append((name, "kills", kills, ends, ends, refused))


@pytest.mark.parametrize("name", NAMES)
def test_two_at_once_leave_what_one_leaves(processes, commands, expected, table, name):
    command, rng = commands[name], random.Random(f"{SEED} two {name}")
    whole, _, seconds = expected(name)
    refused, times = 0, max(1, KILLS // 2)
    for _ in range(times):
        processes.fresh(command)
        later = rng.choice([0.0, rng.uniform(0, seconds)])
        first = processes.start(command)
        time.sleep(later)
        both = [processes.ended(process) for process in (first, processes.start(command))]
        story = (f"CRASH_SEED={SEED}", later, both)
        assert 0 in [ended.code for ended in both], story
        assert all(ended.code == 0 or is_refusal(ended, command) for ended in both), story
        refused += sum(ended.code != 0 for ended in both)
        assert_same(command, processes.place, whole, story)
    table.append((name, "another one", times, times, times, refused))
