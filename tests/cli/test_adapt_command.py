"""From an English embedder and its index to searching it with another model, by commands alone."""

from __future__ import annotations

import json

import pytest

from support.teachers import save_teacher, sentences


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "english.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(400)))
    return path


def adapt(call, teacher, out, tiny_encoder, *more):
    return call("adapt", teacher, out, "--encoder", tiny_encoder, "--no-general", "--minutes", 0.2, *more)


def test_an_index_is_searched_by_the_adapted_model(call, teacher, texts, tiny_encoder, tmp_path):
    index, out = tmp_path / "index", tmp_path / "out"
    code, _, err = call("index", "add", index, texts, "--model", teacher, "-q")
    assert code == 0, err
    code, text, err = adapt(call, teacher, out, tiny_encoder, "--texts", texts, "--encoder-steps", 4)
    assert code == 0, err
    assert "held-out English: cosine" in text
    assert f"model: {out / 'model'}" in text
    code, text, err = call("search", index, "the cat sat on the mat", "--model", out / "model", "--json")
    assert code == 0, err
    assert len(json.loads(text)["hits"]) == 10
    facts = json.loads(call("info", out / "model", "--json")[1])
    assert facts["adapted"]["teacher"] == teacher
    assert facts["dimension"] == 32


def test_the_index_teaches_in_the_place_of_its_model(call, teacher, texts, tiny_encoder, tmp_path):
    index = tmp_path / "index"
    assert call("index", "add", index, texts, "--model", teacher, "-q")[0] == 0
    code, text, err = adapt(call, index, tmp_path / "out", tiny_encoder, "--json", "-q")
    assert code == 0, err
    report = json.loads(text)
    assert (report["texts"], report["teacher"]) == (360, teacher)
    code, _, err = call("search", index, "the dog", "--model", tmp_path / "out" / "model")
    assert code == 0, err


def test_mistakes_are_one_line(call, teacher, texts, tiny_encoder, tmp_path):
    for arguments in (
        ("nowhere/teacher", tmp_path / "a", "--texts", texts),
        (teacher, tmp_path / "b", "--texts", tmp_path / "nothing.txt"),
        (teacher, tmp_path / "c", "--texts", texts, "--encoder", "nowhere/encoder"),
    ):
        code, _, err = call("adapt", *arguments, "--no-general")
        assert code == 2
        assert len(err.strip().splitlines()) == 1, err
        assert "Traceback" not in err


def test_init_names_adapt_for_embedders_that_are_no_llm(call, teacher, tmp_path):
    code, _, err = call("init", "--llm", teacher, tmp_path / "mine.yaml")
    assert code == 2
    assert f"lusifer adapt {teacher} OUT" in err
