"""The quickstart's steps: the index of the teacher, queries in other languages, and what an interruption leaves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lusifer import LusiferError
from lusifer.data.everyday_set import load_everyday
from lusifer.quickstart import adapted
from lusifer.quickstart import run as quickstart
from support.teachers import save_teacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def index(teacher, tmp_path, monkeypatch):
    pytest.importorskip("lancedb")
    monkeypatch.setattr(adapted, "TEACHER", teacher)
    return tmp_path / "index"


def test_the_index_holds_the_teachers_vectors(index, teacher):
    from sentence_transformers import SentenceTransformer

    assert adapted.fill_index(index, progress=False) == {"texts": 64, "model": teacher}
    expected = SentenceTransformer(teacher, device="cpu").encode(load_everyday().sentences["en"])
    np.testing.assert_allclose(adapted.english_vectors(index).numpy(), expected, atol=1e-5)


def test_an_index_that_was_interrupted_is_completed(index, monkeypatch):
    complete = adapted.add
    monkeypatch.setattr(adapted, "add", lambda store, encoder, entries, **more: complete(store, encoder, entries[:10]))
    assert adapted.fill_index(index, progress=False)["texts"] == 10
    with pytest.raises(LusiferError, match="no longer has the text"):
        adapted.english_vectors(index)
    monkeypatch.setattr(adapted, "add", complete)
    assert adapted.fill_index(index, progress=False)["texts"] == 64
    assert adapted.english_vectors(index).shape == (64, 32)


def test_an_index_of_another_model_is_refused(index, tmp_path, monkeypatch):
    adapted.fill_index(index, progress=False)
    torch.manual_seed(1)
    monkeypatch.setattr(adapted, "TEACHER", save_teacher(tmp_path / "other", width=16))
    with pytest.raises(LusiferError, match="cannot be compared"):
        adapted.fill_index(index, progress=False)


def test_queries_are_asked_in_every_language_and_know_their_translation(index, teacher, monkeypatch):
    data = load_everyday()
    adapted.fill_index(index, progress=False)
    answers = adapted.ask(index, teacher)
    assert [(a["language"], a["wanted"]) for a in answers] == [
        (language, data.sentences["en"][data.names.index(name)])
        for name in adapted.ASKED
        for language in adapted.ASKED_IN
    ]
    for answer in answers:
        place = data.sentences["en"].index(answer["wanted"])
        assert answer["query"] == data.sentences[answer["language"]][place]
        assert answer["found"] in data.sentences["en"]
    # Whoever reads English finds every English text itself.
    monkeypatch.setattr(adapted, "ASKED_IN", ("en",))
    answers = adapted.ask(index, teacher)
    assert [answer["found"] for answer in answers] == [answer["wanted"] for answer in answers]


def test_an_interrupted_step_keeps_what_was_done_before_and_the_time(tmp_path, caplog):
    caplog.set_level("INFO")
    run = quickstart._Run(tmp_path, "hash")
    assert run.step("encoder", lambda: {"score": 1}) == {"score": 1}
    assert caplog.messages == ["6/8: scoring the encoder alone"]

    def killed():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.step("lusifer", killed)
    again = quickstart._Run(tmp_path, "hash")
    assert again.state == run.state and set(again.state["seconds"]) == {"encoder", "lusifer"}
    assert again.step("encoder", killed) == {"score": 1}
    assert caplog.messages[-1] == "6/8: scoring the encoder alone: already done"
    again.state["seconds"]["lusifer"] = 5.0
    assert again.step("lusifer", lambda: 2) == 2 and again.state["seconds"]["lusifer"] >= 5
    assert [path.name for path in tmp_path.iterdir()] == ["progress.json"]
    with pytest.raises(LusiferError, match="another recipe"):
        quickstart._Run(tmp_path, "other hash")


def test_a_damaged_progress_file_only_costs_time(tmp_path):
    (tmp_path / "progress.json").write_text('{"done": ')
    assert quickstart._Run(tmp_path, "hash").state["done"] == {}


def test_the_result_does_not_depend_on_a_clock():
    counts = adapted.COUNTS
    assert counts.minutes is None and counts.encoder_steps == 0 and counts.most_pieces
    assert {"de", "hi", "te", "sw"} <= set(adapted.ASKED_IN) and set(adapted.ASKED) <= set(load_everyday().names)
