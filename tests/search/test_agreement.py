"""May a model query an index that another made? Measured, said by the model, and refused in one line."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lusifer import LusiferError
from lusifer.data.vectors.agreement import compare
from lusifer.loading import load_checkpoint
from lusifer.model.fingerprint import weights_hash
from lusifer.model.text_encoder import TextEncoder
from lusifer.search import open_any
from lusifer.search.agreement import adapted_to, admit, measure
from support.bert import save_bert
from support.command import mistake
from support.texts import TEXTS
from support.vector_tables import lance

pytest.importorskip("lancedb")


def unit(matrix):
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


def some(rows, dim=64, seed=0):
    return unit(np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32))


def near(matrix, cosine):
    """Vectors at about a cosine to given ones."""
    return unit(cosine * matrix + np.sqrt(1 - cosine**2) * some(*matrix.shape, seed=9))


# The measure


def test_the_figures_are_those_of_brute_force():
    stored = some(80)
    made = near(stored, 0.3)
    agreement = compare(made, stored)
    own = (made * stored).sum(axis=1)
    ranks = [1 + sum(made[i] @ stored[j] > own[i] for j in range(80) if j != i) for i in range(80)]
    assert agreement.texts == 80 and 1 < np.mean(ranks) < 40, "the case is neither trivial nor hopeless"
    assert agreement.mean_cosine == pytest.approx(own.mean(), abs=1e-5)
    assert agreement.low_cosine == pytest.approx(np.percentile(own, 5), abs=1e-5)
    assert agreement.found == pytest.approx(np.mean([rank == 1 for rank in ranks]))
    assert (agreement.mean_rank, agreement.median_rank) == (pytest.approx(np.mean(ranks)), np.median(ranks))


@pytest.mark.parametrize(
    ("made", "verdict"),
    [
        (lambda stored: 5 * stored, "same"),
        (lambda stored: near(stored, 0.9999), "same"),
        (lambda stored: near(stored, 0.9), "agrees"),
        (lambda stored: near(stored, 0.6), "agrees"),
        (lambda stored: near(stored, 0.2), "differs"),
        (lambda stored: some(*stored.shape, seed=5), "differs"),
        # A narrow cone: every cosine is high, and says nothing.
        (lambda stored: unit(some(*stored.shape, seed=5) + 9 * stored.mean(axis=0)), "differs"),
    ],
)
def test_the_share_that_finds_its_own_vector_decides(made, verdict):
    stored = some(256)
    agreement = compare(made(stored), stored)
    assert agreement.verdict == verdict and agreement.may_query == (verdict != "differs")
    sentence = agreement.sentence("m", "i")
    assert ("may not query" in sentence) == (verdict == "differs") and "\n" not in sentence


def test_high_cosines_alone_are_not_agreement():
    shift = 3 * some(1)
    agreement = compare(some(256, seed=1) + shift, some(256, seed=2) + shift)
    assert agreement.mean_cosine > 0.8 and not agreement.may_query


def test_few_texts_tell_only_the_same_model():
    stored = some(7)
    assert compare(near(stored, 0.8), stored).found == 1
    assert compare(near(stored, 0.8), stored).verdict == "differs"
    assert "too few" in compare(near(stored, 0.8), stored).sentence("m", "i")
    assert compare(stored, stored).verdict == "same"
    assert compare(near(some(8), 0.8), some(8)).verdict == "agrees"


def test_vectors_that_stand_twice_share_a_rank():
    stored = np.repeat(some(10), 2, axis=0)
    assert compare(stored, stored).found == 1


# A model and an index


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "made": save_bert(folder / "made"),
        "near": save_bert(folder / "near", noise=0.01),
        "other": save_bert(folder / "other", seed=8),
        "wide": save_bert(folder / "wide", size=48),
    }


@pytest.fixture
def index(models, tmp_path, call):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    code, _, err = call("index", "add", tmp_path / "index", tmp_path / "texts.txt", "--model", models["made"], "-q")
    assert code == 0, err
    return tmp_path / "index"


def encoder(folder):
    return TextEncoder(load_checkpoint(str(folder)))


@pytest.mark.parametrize(
    ("name", "code", "verdict"), [("made", 0, "same"), ("near", 0, "agrees"), ("other", 1, "differs")]
)
def test_the_command_says_who_may(index, models, call, name, code, verdict):
    ended, out, err = call("index", "verify", index, "--model", models[name], "--json")
    facts = json.loads(out)
    assert ended == code and facts["verdict"] == verdict and facts["may_query"] == (code == 0), (facts, err)
    assert facts["texts"] == len(set(TEXTS)) and facts["model"] == str(models[name])
    ended, out, _ = call("index", "verify", index, "--model", models[name], "--sample", "12")
    assert ended == code and "of 12 texts" in out and ("may not query" in out) == (code == 1)
    assert len(out.splitlines()) == 3


def test_another_dimension_is_one_line(index, models, call):
    for command in (("index", "verify", index), ("search", index, "cat")):
        assert "32 dimensions, which cannot be compared with the 48" in mistake(
            *call(*command, "--model", models["wide"])
        )


def test_verify_uses_the_prompt_of_the_index_for_its_own_model(models, tmp_path, call):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    add = ("index", "add", tmp_path / "index", tmp_path / "texts.txt", "--model", models["made"], "-q")
    assert call(*add, "--prompt", "she reads a long book about ")[0] == 0
    store = open_any(str(tmp_path / "index"))
    assert measure(store, encoder(models["made"])).verdict == "same"
    assert measure(store, encoder(models["made"]), prompt="").verdict != "same"
    code, out, err = call("index", "verify", tmp_path / "index", "--model", models["made"], "--json")
    assert code == 0, err
    assert json.loads(out)["verdict"] == "same"


# Search with another model


def test_a_model_that_agrees_may_search_and_another_may_not(index, models, call):
    code, out, err = call("search", index, "bread and milk", "--model", models["near"], "-k", "1")
    assert code == 0 and "bread and milk" in out and "may query" in err
    code, out, err = call("search", index, "bread and milk", "--model", models["made"], "-k", "1")
    assert code == 0 and err == ""
    err = mistake(*call("search", index, "bread and milk", "--model", models["other"]))
    assert "cannot be compared" in err and "find their own stored vector" in err


def test_a_model_that_says_it_was_adapted_is_not_asked(index, models, tmp_path, call):
    """Also where the measure would refuse it: an adapted model may be far away in one language and right in another."""
    folder = save_bert(tmp_path / "adapted", seed=8)
    facts = {"teacher": "made", "teacher_hash": weights_hash(load_checkpoint(str(models["made"]))), "dimension": 32}
    (folder / "adapted.json").write_text(json.dumps(facts))
    code, out, err = call("search", index, "bread and milk", "--model", folder)
    assert code == 0 and out and err == ""
    for wrong in ({**facts, "teacher_hash": "f" * 16}, {**facts, "dimension": 31}, {"teacher": "made"}, []):
        (folder / "adapted.json").write_text(json.dumps(wrong))
        assert "cannot be compared" in mistake(*call("search", index, "bread and milk", "--model", folder))
    (folder / "adapted.json").write_text("{broken")
    assert adapted_to(str(folder), 32) is None
    assert "cannot be compared" in mistake(*call("search", index, "bread and milk", "--model", folder))


def test_what_was_adapted_may_search_but_not_add(index, models, tmp_path, call):
    (tmp_path / "more.txt").write_text("one more text")
    err = mistake(*call("index", "add", index, tmp_path / "more.txt", "--model", models["near"], "-q"))
    assert "cannot be compared" in err


def test_an_index_that_does_not_say_its_model_is_always_measured(models, tmp_path):
    made = encoder(models["made"]).encode(TEXTS)
    store = open_any(lance(tmp_path / "l", TEXTS, made))
    assert "may query" in admit(store, encoder(models["made"]), str(models["made"]))
    with pytest.raises(LusiferError, match="of an unknown model.*cannot be compared") as caught:
        admit(store, encoder(models["other"]), str(models["other"]))
    assert "\n" not in str(caught.value)


def test_a_model_without_unit_vectors_makes_and_searches_an_index(tmp_path, call):
    folder = save_bert(tmp_path / "long", normalize=False)
    assert np.linalg.norm(encoder(folder).encode(["a cat"])[0]) > 1.1
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    code, _, err = call("index", "add", tmp_path / "i", tmp_path / "texts.txt", "--model", folder, "-q")
    assert code == 0, err
    hits = json.loads(call("search", tmp_path / "i", "bread and milk", "--json", "-k", "2")[1])["hits"]
    assert hits[0]["text"] == "bread and milk" and hits[0]["score"] == pytest.approx(1, abs=1e-4)
    assert hits[1]["score"] < 1
