"""Counts small enough for seconds."""

from __future__ import annotations

import json

import pytest

from lusifer.adapt import Options
from support.teachers import save_teacher, sentences


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "english.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(700)))
    return str(path)


@pytest.fixture(scope="session")
def options(tiny_encoder, texts):
    common = {"encoder": tiny_encoder, "texts": (texts,), "general": False, "device": "cpu", "precision": "float32"}
    return Options(**common, minutes=None, head_epochs=4, encoder_steps=6)
