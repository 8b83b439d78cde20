"""Vectors that are there already go into an index as they are, if they are its model's."""

from __future__ import annotations

import json
import re

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from sentence_transformers import SentenceTransformer

from support.bert import save_bert
from support.command import mistake
from support.texts import some_texts
from support.vector_tables import fixed

pytest.importorskip("lancedb")

from lusifer.search import open_store  # noqa: E402

PROMPTS = {"query": "she reads ", "document": "the "}
RECORDS = [
    {"body": text, "key": f"k{row}", "lang": ("en", "de")[row % 2], "year": 1990 + row, "first name": "x"}
    for row, text in enumerate(dict.fromkeys(some_texts(60, seed=3)))
]
FLOAT = ("--precision", "float32", "-q")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    # Without unit vectors: an index makes them so, whoever embedded the texts.
    return {
        "one": save_bert(folder / "one", prompts=PROMPTS, normalize=False),
        "other": save_bert(folder / "other", seed=8, prompts=PROMPTS),
    }


@pytest.fixture
def source(tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return tmp_path / "in.jsonl"


@pytest.fixture
def encoded(models, source, tmp_path, call):
    """Encodes the texts, and says where."""

    def make(*options, model="one", name="vectors"):
        code, _, err = call("encode", models[model], source, tmp_path / name, "--column", "body", *FLOAT, *options)
        assert code == 0, err
        return tmp_path / name

    return make


def direct(model, texts):
    return SentenceTransformer(str(model)).encode_document(texts, normalize_embeddings=True)


def stored(index, ids):
    rows = open_store(str(index)).fetch(ids)
    return [rows[one][0] for one in ids], np.stack([rows[one][1] for one in ids])


def test_files_to_search_with_one_encoding(encoded, models, tmp_path, call, monkeypatch):
    vectors, index = encoded("--id-column", "key"), tmp_path / "index"
    with monkeypatch.context() as patch:
        patch.setattr("lusifer.search.ready.load_for_inference", None)  # No model is loaded.
        code, out, err = call("index", "add", index, vectors, "-q")
        assert code == 0 and out.startswith(f"{len(RECORDS)} added"), err
        assert err.startswith("warning: 'first name' cannot be kept and is left out: names are letters, digits and _")
        assert call("index", "add", index, vectors, "-q")[1].startswith(
            f"0 added, 0 updated, 0 changed, {len(RECORDS)}"
        )
    entries, found = stored(index, [record["key"] for record in RECORDS])
    assert [entry.text for entry in entries] == [record["body"] for record in RECORDS]
    assert [entry.metadata for entry in entries] == [{"year": record["year"]} for record in RECORDS]
    assert entries[1].lang == "de"
    np.testing.assert_allclose(found, direct(models["one"], [record["body"] for record in RECORDS]), atol=1e-5)
    info = open_store(str(index)).info
    assert (info.model, info.prompt) == (str(models["one"]), "the ")

    code, out, err = call("search", index, RECORDS[4]["body"], "--where", "year >= 1994 AND lang = 'en'", "--json")
    hits = json.loads(out)["hits"]
    assert code == 0 and all(hit["metadata"]["year"] >= 1994 and hit["lang"] == "en" for hit in hits)
    # The model itself adds to it, and finds what is there unchanged.
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps(RECORDS[0]) + "\n" + json.dumps({**RECORDS[1], "key": "new", "body": "bread"}) + "\n")
    added = (
        "index",
        "add",
        index,
        more,
        "--column",
        "body",
        "--id-column",
        "key",
        "--metadata",
        "year",
        "-q",
        "--json",
    )
    assert {"added": 1, "unchanged": 1}.items() <= json.loads(call(*added)[1]).items()


def test_the_model_is_known_of_the_folder_too(encoded, call):
    code, out, err = call(
        "search", encoded("--id-column", "key"), RECORDS[7]["body"], "-k", "1", "--prompt", "the ", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["hits"][0]["id"] == "k7"


def test_columns_can_be_named_as_in_the_input(encoded, tmp_path, call):
    vectors, index = encoded("--output-dtype", "float16"), tmp_path / "index"
    options = ("--column", "body", "--id-column", "key", "--metadata", "year,lang", "-q")
    code, _, err = call("index", "add", index, vectors, *options)
    assert code == 0 and err == "", err
    assert stored(index, ["k3"])[0][0].metadata == {"year": 1993}
    code, out, err = call("index", "add", tmp_path / "hashed", vectors, "--metadata", "title", "-q")
    assert "has no column 'title'; it has id, key, lang, year, first name" in mistake(code, out, err)


REFUSED = [
    ((), {"model": "other"}, (), "holds vectors of '.*one' .* cannot be compared with those of '.*other'"),
    ((), {"model": "one"}, ("--model", "other"), "holds vectors of '.*one' .*, not of '.*other'"),
    (("--prompt-name", "query"), {}, (), "made with the document prompt 'the ', not 'she reads '"),
    (("--dim", "16"), {}, (), "keeps 16 of the 32 dimensions of '.*one'.*encode without --dim"),
    (("--output-dtype", "int8"), {}, (), "holds vectors as int8.*--output-dtype float32 or float16"),
    (("--no-text",), {}, (), "has vectors but no texts"),
    ((), {}, ("--prompt", "a "), "was encoded with the prompt 'the ', not as documents with 'a '"),
]


@pytest.mark.parametrize(("options", "made", "added", "message"), REFUSED)
def test_vectors_that_are_not_the_index_s_are_refused(encoded, models, tmp_path, call, options, made, added, message):
    index = tmp_path / "index"
    (tmp_path / "one.txt").write_text("bread and milk\n")
    assert call("index", "add", index, tmp_path / "one.txt", "--model", models["one"], "-q")[0] == 0
    added = [models.get(one, one) for one in added]
    code, out, err = call("index", "add", index, encoded(*options, **made), *added, "-q")
    assert re.search(message, mistake(code, out, err))
    assert open_store(str(index)).count() == 1


def test_vectors_of_queries_make_no_index_unless_meant(encoded, tmp_path, call):
    vectors = encoded("--prompt-name", "query")
    code, out, err = call("index", "add", tmp_path / "index", vectors, "-q")
    assert "was encoded with the prompt 'she reads ', not as documents with 'the '" in mistake(code, out, err)
    assert not (tmp_path / "index").exists()
    assert call("index", "add", tmp_path / "index", vectors, "--prompt", "she reads ", "-q")[0] == 0


def test_an_unfinished_encoding_is_refused(encoded, tmp_path, call):
    vectors = encoded("--shard-rows", "30")
    manifest = vectors / "_manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "complete": False}))
    code, out, err = call("index", "add", tmp_path / "index", vectors, "-q")
    assert "is not finished; run the same `lusifer encode` again" in mistake(code, out, err)
    (vectors / "part-00001.parquet").unlink()
    encoded("--shard-rows", "30")
    other = encoded("--shard-rows", "30", model="other", name="others")
    (vectors / "part-00001.parquet").write_bytes((other / "part-00001.parquet").read_bytes())
    code, out, err = call("index", "add", tmp_path / "index", vectors, "-q")
    assert "is of several runs of `lusifer encode`" in mistake(code, out, err)


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_vectors_of_others_are_measured(models, source, tmp_path, call, kind):
    texts = [record["body"] for record in RECORDS]
    matrix = 3 * direct(models["one"], texts)
    if kind == "npy":
        np.save(tmp_path / "v.npy", matrix)
        given = [f"{tmp_path / 'v.npy'}+{source}"]
    else:
        table = pa.Table.from_pylist(RECORDS).append_column("vec", fixed(matrix))
        parquet.write_table(table, tmp_path / "v.parquet")
        given = [tmp_path / "v.parquet", "--vector-column", "vec"]
    given += ["--column", "body", "--id-column", "key", "--metadata", "year", "-q"]
    index = tmp_path / "index"
    assert "name it with --model" in mistake(*call("index", "add", index, *given))
    message = mistake(*call("index", "add", index, *given, "--model", models["other"]))
    assert "does not hold the vectors that" in message and not index.exists()
    code, _, err = call("index", "add", index, *given, "--model", models["one"])
    assert code == 0, err
    entries, found = stored(index, [record["key"] for record in RECORDS])
    assert [(entry.metadata, entry.lang) for entry in entries[:2]] == [({"year": 1990}, "en"), ({"year": 1991}, "de")]
    np.testing.assert_allclose(found, matrix / 3, atol=1e-5)
    # Now the index says whose they have to be.
    assert json.loads(call("index", "add", index, *given, "--json")[1])["unchanged"] == len(RECORDS)


def test_an_id_that_stands_twice_is_refused(models, tmp_path, call):
    rows = [{"text": f"text {row}", "key": "a"} for row in range(2)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert call("encode", models["one"], tmp_path / "in.jsonl", tmp_path / "v", "--id-column", "key", *FLOAT)[0] == 0
    message = mistake(*call("index", "add", tmp_path / "index", tmp_path / "v", "-q"))
    assert "row 2: the id 'a' is that of row 1 already" in message and not (tmp_path / "index").exists()
