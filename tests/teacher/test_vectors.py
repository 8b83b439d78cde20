"""A teacher's vectors on the disk: computed once, the same bits ever after, and never another teacher's."""

from __future__ import annotations

import sqlite3
import threading

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from lusifer.errors import LusiferError
from lusifer.teacher.embedder import Teacher
from lusifer.teacher.vectors import TeacherVectors
from support.bert import save_bert
from support.teachers import save_teacher, sentences

TEXTS = sentences(30)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LUSIFER_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher"), prompts={"query": "the ", "document": "a "})


@pytest.fixture
def calls(monkeypatch):
    """The texts that a teacher embedded, call by call."""
    real, seen = Teacher.encode, []

    def encode(self, texts, roles):
        seen.append(list(texts))
        return real(self, texts, roles)

    monkeypatch.setattr(Teacher, "encode", encode)
    return seen


def documents(texts):
    return ["document"] * len(texts)


def test_they_are_the_teachers(teacher):
    found = TeacherVectors(teacher)(TEXTS, documents(TEXTS))
    expected = SentenceTransformer(teacher, device="cpu").encode_document(TEXTS, normalize_embeddings=True)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, atol=3e-4)  # float16 keeps eleven bits.


def test_each_text_is_computed_once_and_keeps_its_bits(teacher, calls):
    vectors = TeacherVectors(teacher)
    first = vectors([*TEXTS, TEXTS[0]], documents([*TEXTS, TEXTS[0]]))
    assert calls == [TEXTS] and torch.equal(first[-1], first[0])
    assert torch.equal(vectors(TEXTS[::-1], documents(TEXTS)), first[:-1].flip(0))
    again = TeacherVectors(teacher)
    again.release()
    more = again([*TEXTS[:3], "a new text"], documents(TEXTS[:4]))
    assert torch.equal(more[:3], first[:3])
    assert calls == [TEXTS, ["a new text"]]


def test_a_query_is_another_text_than_a_document(teacher, calls):
    vectors = TeacherVectors(teacher)
    query, document = vectors(["the sea", "the sea"], ["query", "document"])
    assert not torch.equal(query, document)
    assert torch.equal(vectors(["the sea"], ["document"])[0], document) and len(calls) == 1


def test_another_teacher_has_vectors_of_its_own(tmp_path, calls):
    one = TeacherVectors(str(save_bert(tmp_path / "model")))
    before = one(TEXTS, documents(TEXTS))
    one.release()
    save_bert(tmp_path / "model", seed=8)
    two = TeacherVectors(str(tmp_path / "model"))
    assert two.path != one.path and two.hash != one.hash
    assert (two(TEXTS, documents(TEXTS)) - before).abs().max() > 0.05 and len(calls) == 2
    assert TeacherVectors(str(save_bert(tmp_path / "short", seed=8, window=12))).path != two.path
    with pytest.raises(LusiferError, match="is not the one this stage began with"):
        one(["a text that is not known"], ["document"])


def test_whoever_was_first_counts(teacher, monkeypatch):
    """Two processes compute the same text a little differently: both use what was stored."""
    slow, quick, real = TeacherVectors(teacher), TeacherVectors(teacher), TeacherVectors._compute
    found = []

    def compute(self, texts, roles):
        if self is slow:
            found.append(quick(texts, roles))
            return [np.zeros(32, dtype=np.float16).tobytes() for _ in texts]
        return real(self, texts, roles)

    monkeypatch.setattr(TeacherVectors, "_compute", compute)
    assert torch.equal(slow(TEXTS, documents(TEXTS)), found[0]) and found[0].abs().max() > 0


def test_threads_share_one_file(teacher):
    vectors, found = TeacherVectors(teacher), {}

    def work(number):
        texts = sentences(20 + number, seed=number % 2)
        found[number] = (texts, vectors(texts, documents(texts)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    for texts, known in found.values():
        assert torch.equal(vectors(texts, documents(texts)), known)


def test_a_damaged_file_is_one_clear_line(teacher):
    vectors = TeacherVectors(teacher)
    vectors(TEXTS, documents(TEXTS))
    vectors.path.write_bytes(b"no database, but long enough to be looked at" * 50)
    with pytest.raises(LusiferError, match="remove the file to compute them again") as caught:
        vectors(TEXTS, documents(TEXTS))
    assert "\n" not in str(caught.value)


def test_nothing_half_written_is_kept(teacher, monkeypatch):
    vectors = TeacherVectors(teacher)
    monkeypatch.setattr(TeacherVectors, "_compute", lambda self, texts, roles: [b"\0\0" * 32, object()])
    with pytest.raises(LusiferError, match="cannot read or write"):  # SQLite takes no object.
        vectors(["one", "two"], documents(["one", "two"]))
    with sqlite3.connect(vectors.path) as connection:
        assert connection.execute("SELECT COUNT(*) FROM vectors").fetchone() == (0,)


def test_a_teacher_whose_vectors_are_no_numbers_is_refused(teacher, monkeypatch):
    monkeypatch.setattr(Teacher, "encode", lambda self, texts, roles: np.full((len(texts), 32), np.nan, np.float32))
    with pytest.raises(LusiferError, match="is NaN, infinite or zero"):
        TeacherVectors(teacher)(["one"], ["document"])
