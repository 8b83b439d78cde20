"""Files of texts in, embeddings out: inputs, order, truncation, and outputs that are whole or not there."""

from __future__ import annotations

import errno
import json
import os

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

import lusifer
from lusifer import LusiferError
from lusifer.encoding import (
    check_output,
    describe,
    encode_texts,
    load_checkpoint,
    lusifer_model,
    read_inputs,
    save_atomically,
    write_embeddings,
)

LONG = "the cat sat on the mat and looked at the dog " * 30


def refused(function, *args, **kwargs):
    with pytest.raises(LusiferError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_three_formats(tmp_path):
    texts = ["Grüße", "你好 世界", " two  spaces "]
    assert read_inputs(write(tmp_path / "a.txt", "\n".join(texts))) == texts
    assert read_inputs(write(tmp_path / "b.txt", "\r\n".join(texts) + "\r\n")) == texts
    lines = "".join(json.dumps({"body": text, "n": 1}) + "\n" for text in texts)
    assert read_inputs(write(tmp_path / "a.jsonl", lines), "body") == texts
    parquet.write_table(pa.table({"n": [1, 2, 3], "body": texts}), tmp_path / "a.parquet")
    assert read_inputs(tmp_path / "a.parquet", "body") == texts


def test_other_line_separators_do_not_split_a_text(tmp_path):
    assert read_inputs(write(tmp_path / "a.txt", "one\u2028still one\x0cand on\ntwo\n")) == [
        "one\u2028still one\x0cand on",
        "two",
    ]


def test_a_byte_order_mark_is_not_text(tmp_path):
    assert read_inputs(write(tmp_path / "a.txt", b"\xef\xbb\xbfone\ntwo\n")) == ["one", "two"]
    assert read_inputs(write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "one"}\n')) == ["one"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", "", "holds no texts"),
        ("a.txt", "one\n\nthree\n", "row 2: the text is empty"),
        ("a.txt", "one\n \t\u3000\n", "row 2: the text is empty"),
        ("a.txt", b"one\ncaf\xe9\n", "row 2: not valid UTF-8"),
        ("a.txt", b"one\n\xed\xa0\x80\n", "row 2: not valid UTF-8"),
        ("a.jsonl", "", "holds no texts"),
        ("a.jsonl", '{"text": "a"}\n{"text": ""}\n', "row 2: the text is empty"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b"\n', "row 2: not valid JSON"),
        ("a.jsonl", '{"text": "a"}\n\n', "row 2: not valid JSON"),
        ("a.jsonl", '{"text": "a"}\n{"other": "b"}\n', "row 2: no 'text'"),
        ("a.jsonl", '["text"]\n', "row 1: no 'text'"),
        ("a.jsonl", '{"text": null}\n', "row 1: 'text' must be text, not NoneType"),
        ("a.jsonl", '{"text": 5}\n', "row 1: 'text' must be text, not int"),
        ("a.jsonl", '{"text": "ab\\ud83d"}\n', "row 1: lone surrogate U+D83D at character 3"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "row 1: not valid UTF-8"),
        ("a.parquet", b"not parquet", "cannot read"),
        ("a.parquet", b"", "cannot read"),
        ("a.csv", "text\na\n", "name it .txt, .jsonl, .parquet"),
        ("a", "a\n", "name it .txt, .jsonl, .parquet"),
    ],
)
def test_bad_inputs(tmp_path, name, content, words):
    message = refused(read_inputs, write(tmp_path / name, content))
    assert words in message and str(tmp_path / name) in message


def test_bad_parquet_columns(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"body": ["a"], "n": [1]}), path)
    assert "no column 'text'; it has body, n" in refused(read_inputs, path)
    assert "row 1: 'n' must be text" in refused(read_inputs, path, "n")
    parquet.write_table(pa.table({"text": ["a", None]}), path)
    assert "row 2: 'text' must be text, not NoneType" in refused(read_inputs, path)
    broken = pa.array([b"a", b"caf\xe9"], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"text": broken}), path)
    assert "UTF-8" in refused(read_inputs, path)
    path.write_bytes(path.read_bytes()[:60])
    assert "cannot read" in refused(read_inputs, path)


def test_a_file_that_is_not_there(tmp_path):
    assert "no such file" in refused(read_inputs, tmp_path / "none.txt")
    (tmp_path / "folder.txt").mkdir()
    assert "no such file" in refused(read_inputs, tmp_path / "folder.txt")


def test_order_is_restored_and_vectors_are_those_of_encode(tiny_st):
    texts = ["cat", "the cat sat on the mat", "a dog", LONG[:150], "rain fell", "she reads a long book", "milk"]
    expected = tiny_st.encode(texts)
    for batch_size, window in ((2, 3), (3, 100), (32, 4096), (1, 1)):
        found, cut = encode_texts(tiny_st, texts, batch_size=batch_size, window=window, progress=False)
        assert found.dtype == np.float32 and cut == 0
        # Unit vectors in float32, summed in another order.
        np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1.0, atol=1e-5)
    assert np.abs(expected[0] - expected[1]).max() > 1e-2


def test_long_texts_are_counted_and_keep_their_end_token(tiny_st):
    limit = tiny_st.max_seq_length
    ids = tiny_st.preprocess([LONG])["input_ids"]
    assert ids.shape == (1, limit) and ids[0, -1] == tiny_st.tokenizer.eos_token_id
    words, exact = [], None
    for word in LONG.split():
        words.append(word)
        length = len(tiny_st.tokenizer(" ".join(words), truncation=False)["input_ids"])
        exact = " ".join(words) if length <= limit else exact
    found, cut = encode_texts(tiny_st, ["cat", LONG, exact, LONG + "and more"], progress=False)
    assert cut == 2
    np.testing.assert_allclose(found[1], found[3], atol=1e-5)


def test_round_trips(tmp_path):
    vectors = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    texts = ["a", "Grüße", "你好"]
    write_embeddings(tmp_path / "v.npy", texts, vectors)
    assert np.array_equal(np.load(tmp_path / "v.npy"), vectors)
    write_embeddings(tmp_path / "v.parquet", texts, vectors)
    table = parquet.read_table(tmp_path / "v.parquet")
    assert table.column_names == ["id", "text", "embedding"]
    assert table["id"].to_pylist() == [0, 1, 2] and table["text"].to_pylist() == texts
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 4)
    assert np.array_equal(np.array(table["embedding"].to_pylist(), dtype=np.float32), vectors)
    assert sorted(os.listdir(tmp_path)) == ["v.npy", "v.parquet"]


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("v.npy", "numpy.save"),
        ("v.parquet", "pyarrow.parquet.write_table"),
        ("v.npy", "os.replace"),
        ("v.parquet", "os.replace"),
        ("v.npy", "tempfile.mkdtemp"),
    ],
)
def test_a_full_disk_leaves_nothing_and_spares_the_old_file(tmp_path, monkeypatch, name, broken):
    vectors = np.ones((2, 3), dtype=np.float32)
    monkeypatch.setattr(broken, full_disk)
    message = refused(write_embeddings, tmp_path / name, ["a", "b"], vectors)
    assert "No space left on device" in message and name in message
    assert os.listdir(tmp_path) == []
    write(tmp_path / name, "old")
    refused(write_embeddings, tmp_path / name, ["a", "b"], vectors)
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == "old"


def test_outputs_that_cannot_be_written_are_refused_at_once(tmp_path):
    assert "name it .parquet or .npy" in refused(check_output, tmp_path / "v.csv")
    assert "no such folder" in refused(check_output, tmp_path / "none" / "v.npy")
    check_output(tmp_path / "v.npy")
    assert os.listdir(tmp_path) == []


def test_a_saved_model_loads_to_the_same_vectors(tiny_st, tmp_path):
    save_atomically(tiny_st, tmp_path / "model")
    loaded = lusifer.load(str(tmp_path / "model"))
    texts = ["the cat sat", "rain"]
    assert np.array_equal(loaded.encode(texts), tiny_st.encode(texts))
    modules = json.loads((tmp_path / "model" / "modules.json").read_text())
    assert all(module["type"].startswith("sentence_transformers.") for module in modules)
    assert lusifer_model(loaded).connector is not None
    facts = describe(str(tmp_path / "model"))
    assert facts["dimension"] == 48 and facts["max_seq_length"] == 64 and not facts["standalone"]
    assert facts["parameters"]["connector"]["trainable"] == facts["parameters"]["connector"]["total"] > 0
    assert facts["parameters"]["llm"]["trainable"] == 0


@pytest.mark.parametrize("when", ["saving", "renaming"])
def test_a_failed_save_leaves_the_older_checkpoint(tiny_st, tmp_path, monkeypatch, when):
    save_atomically(tiny_st, tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir() if path.is_file()}
    if when == "saving":
        monkeypatch.setattr(tiny_st, "save_pretrained", full_disk)
    else:
        real = os.replace

        def replace(source, target):
            return full_disk() if str(source).endswith("new") else real(source, target)

        monkeypatch.setattr(os, "replace", replace)
    assert "No space left" in refused(save_atomically, tiny_st, tmp_path / "model")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["model"]
    after = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir() if path.is_file()}
    assert after == before


def test_a_disk_that_fills_while_weights_are_written(tiny_st, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(tiny_st, "save_pretrained", full)
    assert "No space left" in refused(save_atomically, tiny_st, tmp_path / "model")
    assert os.listdir(tmp_path) == []


def test_paths_that_hold_no_checkpoint(tiny_encoder, tiny_st, tmp_path):
    assert "no checkpoint at" in refused(load_checkpoint, str(tmp_path / "none"))
    assert "no checkpoint at" in refused(load_checkpoint, tiny_encoder)
    save_atomically(tiny_st, tmp_path / "model")
    weights = next((tmp_path / "model").rglob("model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    assert "cannot read" in refused(load_checkpoint, str(tmp_path / "model"))
    weights.unlink()
    assert str(tmp_path / "model") in refused(load_checkpoint, str(tmp_path / "model"))


def test_other_models_are_told_apart(tiny_encoder):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    module = Transformer(tiny_encoder)
    other = SentenceTransformer(modules=[module, Pooling(module.get_embedding_dimension())], device="cpu")
    assert "not a LUSIFER checkpoint" in refused(lusifer_model, other)
    assert torch.is_tensor(other.encode(["a"], convert_to_tensor=True))
