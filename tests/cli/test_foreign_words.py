"""Texts, names and values of strangers in a terminal: shown to the letter, obeyed in nothing."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest

from lusifer.cli.console import emit, print_table, say
from lusifer.quiet import quiet_libraries
from lusifer.terminal import visible
from support.command import mistake

pytest.importorskip("lancedb")

from lusifer.search.lance import LanceStore  # noqa: E402
from lusifer.search.store import Entry, IndexInfo  # noqa: E402

# Clears the screen; the same in one C1 character; a title; an override of direction; a line made up; half a character.
EVIL = "a\x1b[2Jb\x9b2Jc\x1b]0;title\x07d\u202ee\u2066f\ng\rh\x7fi\ud800j\u2028k"
OBEYED = set("\x1b\x9b\x07\u202e\u2066\r\x7f\ud800\u2028")


def harmless(text):
    assert not OBEYED & set(text), ascii(text)
    return text


def test_what_a_terminal_obeys_is_escaped():
    shown = r"a\x1b[2Jb\x9b2Jc\x1b]0;title\x07d\u202ee\u2066f\ng\x0dh\x7fi\ud800j\u2028k"
    assert visible(EVIL, lines=False) == shown
    assert visible(EVIL) == shown.replace("\\n", "\n")


@pytest.mark.parametrize("text", ["naïve 東京 తెలుగు", "می‌خواهم", "👩‍👩‍👧", "שלום‏!", "a\tb\nc"])
def test_the_letters_of_all_languages_stay(text):
    assert visible(text) == text


def test_every_way_to_print_escapes(capsys):
    quiet_libraries(False)
    before = logging.root.handlers[:]
    say(EVIL)
    say(EVIL, err=True)
    print_table(("name", "[b]"), [(EVIL, "[red]a[/red] [/]")])
    emit({"text": EVIL})
    logging.getLogger("lusifer.test").info("%s", EVIL)
    out, err = capsys.readouterr()
    harmless(out)
    harmless(err)
    assert "[red]a[/red] [/]" in out
    assert json.loads(out.splitlines()[-1]) == {"text": EVIL}
    logging.root.handlers[:] = before


def test_an_index_of_a_stranger_is_shown(call, tmp_path, monkeypatch):
    class Encoder:
        dimension = 4
        model = None

        def encode(self, texts):
            return np.eye(4, dtype=np.float32)[:1]

    text = EVIL.replace("\ud800", "")  # No store keeps half a character.
    store = LanceStore.create(tmp_path / "index", IndexInfo("m\x1b[2J", "0" * 16, 4, {}, "p\x1b[2J"))
    store.upsert([Entry("i\x1b[2J", text, "e\x1b[2Jn", {})], np.eye(4, dtype=np.float32)[:1])
    code, out, err = call("index", "info", tmp_path / "index")
    assert code == 0, err
    assert r"model: m\x1b[2J" in harmless(out) and r"languages: e\x1b[2Jn 1" in out
    monkeypatch.setattr("lusifer.cli.search._load", lambda *_: Encoder())
    monkeypatch.setattr("lusifer.search.agreement.admit", lambda *_: "")
    monkeypatch.setattr("lusifer.data.prompts.prompt_for", lambda *_, **__: "")
    code, out, err = call("search", tmp_path / "index", "a")
    assert code == 0, err
    assert out.count("\n") == 1 and r"a\x1b[2Jb\x9b2Jc" in harmless(out)


def test_a_mistake_quotes_a_stranger_in_one_line(call, tmp_path):
    (tmp_path / "r.yaml").write_text('"\\e[2J\\n\\x9b\\u202e": 1\noutput: x\nmodel: {encoder: e, llm: l}\n')
    assert r"\x1b[2J" in harmless(mistake(*call("train", tmp_path / "r.yaml")))
    (tmp_path / "d.jsonl").write_text(json.dumps({"e\x1b[2J\u202e": "a"}) + "\n")
    harmless(mistake(*call("index", "add", tmp_path / "index", tmp_path / "d.jsonl", "--metadata", "year")))
