"""A shard that is interrupted: what was said to be kept is kept, and the files are those of an undisturbed run."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from lusifer.bulk import encode, journal
from lusifer.bulk.job import Settings
from lusifer.bulk.shard import ShardEncoder
from lusifer.model.text_encoder import TextEncoder
from support.bert import save_bert
from support.texts import content, kept_rows, refused, some_texts

ROWS = 600
# Default settings: all rows are one shard.
PLAIN = Settings(precision="float32")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return str(save_bert(tmp_path_factory.mktemp("journal") / "bert"))


@pytest.fixture
def source(tmp_path):
    (tmp_path / "in.txt").write_text("\n".join(some_texts(ROWS)) + "\n")
    return str(tmp_path / "in.txt")


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(TextEncoder.__init__, "__kwdefaults__", {"token_budget": None, "window": 64})


@pytest.fixture
def interrupted(monkeypatch):
    """Interrupts the work once so many texts are embedded; gives how many batches' texts were embedded in all."""
    embedded = []
    real = TextEncoder._forward

    def stop_at(rows):
        def forward(self, ids):
            if rows is not None and sum(embedded) >= rows:
                raise KeyboardInterrupt
            vectors = real(self, ids)
            embedded.append(len(ids))
            return vectors

        embedded.clear()
        monkeypatch.setattr(TextEncoder, "_forward", forward)
        return embedded

    return stop_at


def test_what_is_kept_is_not_embedded_again(bert, source, tmp_path, small_windows, interrupted):
    out = tmp_path / "out"
    embedded = interrupted(None)
    encode(bert, source, str(tmp_path / "undisturbed"), PLAIN, threads=1)
    assert sum(embedded) == ROWS
    for least in (150, 130):
        embedded = interrupted(least)
        before = kept_rows(out)
        with pytest.raises(KeyboardInterrupt) as stop:
            encode(bert, source, str(out), PLAIN, threads=1)
        rows = before + sum(embedded)
        assert str(stop.value) == f"{rows} of {ROWS} rows are kept; the same command resumes there"
        assert kept_rows(out) == rows and not list(out.glob("part-*"))
    embedded = interrupted(None)
    assert encode(bert, source, str(out), PLAIN, threads=1)["texts"] == ROWS
    assert sum(embedded) == ROWS - rows, "nothing twice"
    assert content(out) == content(tmp_path / "undisturbed")


@pytest.mark.parametrize("every", [0.0, 1e9])
def test_a_kill_costs_what_is_not_on_the_disk_yet(bert, source, tmp_path, interrupted, monkeypatch, every):
    monkeypatch.setattr(ShardEncoder, "_journal_saved", lambda self: nullcontext())
    monkeypatch.setattr(journal, "_EVERY", every)
    interrupted(150)
    with pytest.raises(KeyboardInterrupt) as stop:
        encode(bert, source, str(tmp_path / "out"), PLAIN)
    rows = kept_rows(tmp_path / "out")
    assert rows >= 150 if every == 0 else (rows == 0 and "no row is encoded yet" in str(stop.value))


def test_pieces_count_as_far_as_they_follow_one_another():
    name = "_partial-{:05}-{:09}-{:09}.npy".format
    names = [name(0, 0, 10), name(0, 10, 5), name(0, 16, 4), name(1, 3, 9), name(2, 0, 7), "part-00002.parquet"]
    assert journal.kept_rows(names, {2}) == 15
    assert journal.kept_rows(names, set()) == 22


def test_another_run_does_not_take_what_was_kept(bert, source, tmp_path, interrupted):
    interrupted(100)
    with pytest.raises(KeyboardInterrupt):
        encode(bert, source, str(tmp_path / "out"), PLAIN)
    message = refused(bert, source, str(tmp_path / "out"), Settings(precision="float32", prompt="x"))
    assert "holds another run: prompt was None and is 'x'" in message
    (tmp_path / "out" / "_manifest.json").unlink()
    assert "without a _manifest.json" in refused(bert, source, str(tmp_path / "out"), PLAIN)


def test_what_was_made_of_another_input_is_not_kept(bert, source, tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "_EVERY", 0.0)
    monkeypatch.setattr("lusifer.bulk.shard.is_unchanged", lambda file: False)
    assert "has changed while it was encoded" in refused(bert, source, str(tmp_path / "out"), PLAIN)
    assert kept_rows(tmp_path / "out") == 0


def test_one_file_says_that_nothing_is_kept(bert, source, tmp_path, interrupted):
    interrupted(100)
    with pytest.raises(KeyboardInterrupt, match="nothing is kept, because the output is one file"):
        encode(bert, source, str(tmp_path / "out.npy"), PLAIN)
    assert not list(tmp_path.glob("out*")) and not list(tmp_path.glob("_partial*"))
