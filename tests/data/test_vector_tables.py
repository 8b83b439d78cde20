"""Tables of texts and vectors, whoever made them: read whole, and what is wrong with them told in one line."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from lusifer import LusiferError
from lusifer.data.vector_tables import is_vectors, open_vectors
from lusifer.data.vectors.rows import Rows, nearest_of
from support.vector_tables import DIM, KINDS, arrow, chroma, fixed, lance, qdrant, texts, vectors, write


def whole(table, size=7):
    batches = list(table.batches(size))
    assert all(len(given) == len(matrix) <= size and matrix.dtype == np.float32 for given, matrix in batches)
    return [text for given, _ in batches for text in given], np.concatenate([matrix for _, matrix in batches])


def unit(matrix):
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


def refused(location, match, **columns):
    """One line that says what is wrong, when the table is opened or read."""
    with pytest.raises(LusiferError, match=match) as caught, open_vectors(str(location), **columns) as table:
        list(table.batches())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_its_texts_and_vectors(kind, tmp_path):
    given, matrix = texts(50), vectors(50)
    location = write(kind, tmp_path / "table", given, matrix)
    assert is_vectors(location)
    with open_vectors(location) as table:
        assert (table.rows, table.dimension) == (50, DIM) and str(DIM) in table.describe
        read, found = whole(table)
        assert table.left_out == 0 and table.origin is None
        order = [read.index(text) for text in given]  # Qdrant and Chroma promise no order.
        assert len(read) == 50
        np.testing.assert_allclose(found[order], matrix, atol=1e-6)
        drawn, their = table.sample(20)
        assert len(set(drawn)) == 20 and set(drawn) <= set(given)
        assert not set(drawn) <= set(given[:20]), "the sample is the beginning"
        np.testing.assert_allclose(their, matrix[[given.index(text) for text in drawn]], atol=1e-6)
        assert table.sample(20)[0] == drawn and table.sample(500)[1].shape == (50, DIM)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_nearest_are_those_of_brute_force(kind, exact, tmp_path):
    matrix = vectors(60) * np.linspace(0.1, 9, 60, dtype=np.float32)[:, None]
    with open_vectors(write(kind, tmp_path / "table", texts(60), matrix)) as table:
        for query in vectors(4, seed=1):
            cosines = unit(matrix) @ query / np.linalg.norm(query)
            best = np.argsort(-cosines)[:5]
            if kind == "chroma" and not exact:  # By the squared distance of its collection.
                best = np.argsort(((matrix - query) ** 2).sum(axis=1))[:5]
                best = best[np.argsort(-cosines[best])]
            matches = table.nearest(query, 5, exact=exact)
            assert [match.text for match in matches] == [f"text number {row}" for row in best]
            np.testing.assert_allclose([match.score for match in matches], cosines[best], atol=1e-5)


def test_the_nearest_of_several_blocks():
    matrix = vectors(300)
    blocks = [Rows([str(i)], [f"t{i}"], matrix[i : i + 1]) for i in range(100)]
    blocks.append(Rows([str(i) for i in range(100, 300)], [f"t{i}" for i in range(100, 300)], matrix[100:]))
    query = vectors(1, seed=5)[0]
    found = [match.id for match in nearest_of(iter(blocks), query, 9)]
    assert found == [str(i) for i in np.argsort(-(unit(matrix) @ query))[:9]]


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is told in other units")
@pytest.mark.parametrize("kind", ["parquet", "lance"])
def test_memory_does_not_grow_with_rows(kind, tmp_path):
    """A table of 360 MB, in one row group, takes little more than one of 120 MB, which fills what is read ahead."""
    for rows in (60_000, 180_000):
        table = arrow(texts(rows), vectors(rows, 512))
        (tmp_path / str(rows)).mkdir()
        if kind == "parquet":
            parquet.write_table(table, tmp_path / str(rows) / "a.parquet")
        else:
            pytest.importorskip("lancedb").connect(str(tmp_path / str(rows))).create_table("docs", table)
    code = (
        "import resource, sys; from lusifer.data.vector_tables import open_vectors\n"
        "for folder in sys.argv[1:]:\n"
        "    rows = sum(len(given) for given, _ in open_vectors(folder).batches(1000))\n"
        "    print(rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)"
    )
    # A new process begins with the peak of the one that starts it, unless another stands between the two.
    command = ["sh", "-c", '"$0" -c "$1" "$2" "$3"; exit $?', sys.executable, code]
    folders = [str(tmp_path / "60000"), str(tmp_path / "180000")]
    done = subprocess.run([*command, *folders], capture_output=True, text=True, check=True)
    (few, small), (many, large) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert (few, many) == (60_000, 180_000) and large - small < 80, done.stdout


# Which column


def test_the_text_column_is_found_by_its_name(tmp_path):
    more = {"id": [f"r{i}" for i in range(6)], "title": ["same"] * 6, "url": ["u"] * 6}
    parquet.write_table(arrow(texts(6), vectors(6), text="page_content", **more), tmp_path / "a.parquet")
    table = open_vectors(str(tmp_path / "a.parquet"))
    assert whole(table)[0] == texts(6)
    assert [one for rows in table.blocks() for one in rows.ids] == more["id"]
    assert whole(open_vectors(str(tmp_path), text="title"))[0] == ["same"] * 6


def test_columns_that_could_be_meant_are_named(tmp_path):
    parquet.write_table(arrow(texts(6), vectors(6), text="left", right=texts(6)), tmp_path / "a.parquet")
    refused(tmp_path, "left, right.*--text-column")
    assert open_vectors(str(tmp_path), text="right").rows == 6
    refused(tmp_path, "'middle' is not there", text="middle")
    refused(tmp_path, "'vector' is of another type", text="vector")
    parquet.write_table(arrow(texts(6), vectors(6), second=fixed(vectors(6, 4))), tmp_path / "a.parquet")
    refused(tmp_path, "second.*--vector-column")
    assert open_vectors(str(tmp_path), vector="second").dimension == 4


def test_lists_of_any_length_are_vectors_if_they_are_of_one(tmp_path):
    rows = {"text": texts(4), "embedding": pa.array(vectors(4).tolist(), pa.list_(pa.float64()))}
    parquet.write_table(pa.table(rows), tmp_path / "a.parquet")
    np.testing.assert_allclose(whole(open_vectors(str(tmp_path)))[1], vectors(4), atol=1e-6)
    rows["embedding"] = pa.array([[1.0, 2.0], [1.0], [1.0, 2.0], [1.0, 2.0]], pa.list_(pa.float64()))
    parquet.write_table(pa.table(rows), tmp_path / "a.parquet")
    refused(tmp_path, "1 dimensions, another 2")


def test_lists_in_lance_may_be_of_any_length(tmp_path):
    connected = pytest.importorskip("lancedb").connect(str(tmp_path))
    # Under another name LanceDB would make lists of one length of them.
    rows = {"id": texts(4), "body": texts(4), "emb": pa.array(vectors(4).tolist(), pa.list_(pa.float32()))}
    connected.create_table("a", pa.table(rows))
    table = open_vectors(str(tmp_path))
    np.testing.assert_allclose(whole(table)[1], vectors(4), atol=1e-6)
    assert table.nearest(vectors(4)[2], 1)[0].text == "text number 2"


def test_half_precision_and_null_rows(tmp_path):
    matrix = vectors(4).astype(np.float16)
    lists = pa.FixedSizeListArray.from_arrays(
        pa.array(matrix.reshape(-1)), DIM, mask=pa.array([False, True, False, False])
    )
    parquet.write_table(pa.table({"text": ["a", "b", None, " "], "v": lists}), tmp_path / "a.parquet")
    table = open_vectors(str(tmp_path))
    given, found = whole(table)
    assert given == ["a"] and table.left_out == 3 and table.rows == 4
    np.testing.assert_array_equal(found, matrix[:1].astype(np.float32))
    parquet.write_table(
        pa.table(
            {"text": [None, " "], "v": fixed(vectors(2))},
            pa.schema([("text", pa.string()), ("v", pa.list_(pa.float32(), DIM))]),
        ),
        tmp_path / "a.parquet",
    )
    refused(tmp_path, "2 rows, but none with both a text and a vector")


# What is wrong


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["parquet", "npy"])
def test_a_vector_that_is_not_finite_is_told(kind, value, tmp_path):
    matrix = vectors(30)
    matrix[20, 3] = value
    refused(write(kind, tmp_path / "t", texts(30), matrix), "row 21: the vector contains NaN or infinite values")


def test_vectors_without_texts_are_told(tmp_path):
    rows = pa.table({"id": texts(3), "embedding": fixed(vectors(3))})  # As `lusifer encode` writes it without texts.
    parquet.write_table(rows, tmp_path / "a.parquet")
    refused(tmp_path, "vectors but no texts.*--text-column")
    np.save(tmp_path / "v.npy", vectors(3))
    refused(tmp_path / "v.npy", "vectors but no texts; give both")
    refused(qdrant(tmp_path / "q", texts(3), vectors(3), payload=lambda text: {"n": 1}), "vectors but no texts")


def test_texts_without_vectors_are_told(tmp_path):
    parquet.write_table(pa.table({"text": texts(3)}), tmp_path / "a.parquet")
    refused(tmp_path, "no vectors: no column is a list of floating-point numbers")
    quantised = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(24, np.int8)), DIM)
    parquet.write_table(pa.table({"text": texts(3), "embedding": quantised}), tmp_path / "a.parquet")
    refused(tmp_path, "no vectors.*int8")


def test_arrays_and_texts_must_have_the_same_rows(tmp_path):
    location = write("npy", tmp_path, texts(9), vectors(9))
    np.save(tmp_path / "vectors.npy", vectors(10))
    refused(location, "10 vectors, but .* has 9 rows")
    np.save(tmp_path / "vectors.npy", vectors(9)[:, 0])
    refused(location, r"not a matrix of vectors .* shape \(9,\)")
    np.save(tmp_path / "vectors.npy", vectors(9).astype(np.int8))
    refused(location, "not a matrix of vectors .* int8")
    (tmp_path / "vectors.npy").write_bytes(b"nothing")
    refused(location, "cannot be read")
    refused(f"{tmp_path / 'none.npy'}+{tmp_path / 'texts.jsonl'}", "no such file: .*none.npy")
    np.save(tmp_path / "vectors.npy", vectors(9))
    refused(f"{tmp_path / 'vectors.npy'}+{tmp_path / 'none.jsonl'}", "no such file: .*none.jsonl")
    with (tmp_path / "texts.jsonl").open("a") as file:
        file.write("{broken\n")
    refused(location, "line 10: not valid JSON")


def test_lines_of_text_beside_an_array(tmp_path):
    np.save(tmp_path / "v.npy", vectors(3).astype(np.float16))
    (tmp_path / "t.txt").write_text("one\ntwo\nthree\n")
    given, found = whole(open_vectors(f"{tmp_path / 'v.npy'}+{tmp_path / 't.txt'}"))
    assert given == ["one", "two", "three"]
    np.testing.assert_allclose(found, vectors(3), atol=2e-3)


def test_files_of_one_table_have_the_same_columns(tmp_path):
    parquet.write_table(arrow(texts(3), vectors(3)), tmp_path / "a.parquet")
    parquet.write_table(arrow(texts(3), vectors(3), text="other"), tmp_path / "b.parquet")
    refused(tmp_path, "no column 'content', which other files have")
    parquet.write_table(arrow(texts(3), vectors(3, 4)), tmp_path / "b.parquet")
    refused(tmp_path, "4 dimensions, another 8")


def test_an_empty_table_is_told(tmp_path):
    parquet.write_table(arrow(texts(3), vectors(3))[:0], tmp_path / "a.parquet")
    refused(tmp_path, "is empty")
    lance(tmp_path / "l", texts(3), vectors(3))
    pytest.importorskip("lancedb").connect(str(tmp_path / "l")).open_table("docs").delete("true")
    refused(tmp_path / "l", "is empty")
    refused(qdrant(tmp_path / "q", [], vectors(0)), "is empty")


def test_an_empty_collection_of_chroma_is_told(tmp_path):
    refused(chroma(tmp_path / "c", [], vectors(0)), "is empty")


def test_what_is_no_table_is_told_with_what_was_looked_for(tmp_path):
    refused(tmp_path / "nowhere", "there is nothing at")
    (tmp_path / "notes.txt").write_text("a")
    refused(tmp_path, r"no texts with vectors; looked for .*LanceDB.*Qdrant.*Chroma.*Parquet.*npy")
    refused(tmp_path / "notes.txt", "looked for")
    assert not is_vectors(str(tmp_path)) and not is_vectors(str(tmp_path / "nowhere"))
    (tmp_path / "raft_state.json").write_text("{}")
    refused(tmp_path, r"belongs to a Qdrant server; give its address")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 broken")
    refused(tmp_path / "a.parquet", "cannot be read")


# Databases


def test_one_of_several_tables_is_asked_for(tmp_path):
    lance(tmp_path, texts(3), vectors(3), name="one")
    lance(tmp_path, texts(4), vectors(4), name="two")
    refused(tmp_path, "several: one, two; choose one, as in '.*#one'")
    assert open_vectors(f"{tmp_path}#two").rows == open_vectors(str(tmp_path / "two.lance")).rows == 4
    refused(f"{tmp_path}#three", "no table 'three'; it has one, two")


def test_a_damaged_lance_table_is_told(tmp_path):
    lance(tmp_path, texts(3), vectors(3))
    for file in (tmp_path / "docs.lance" / "_versions").iterdir():
        file.write_bytes(b"x")
    refused(tmp_path, "cannot be read")


def test_an_index_of_ours_says_which_model_made_it(tmp_path):
    pytest.importorskip("lancedb")
    from lusifer.search import Entry, IndexInfo
    from lusifer.search.lance import LanceStore

    store = LanceStore.create(tmp_path / "ours", IndexInfo("some/model", "0123", DIM, {"topic": "string"}, "passage: "))
    store.upsert([Entry(f"id{i}", text, "en", {"topic": "x"}) for i, text in enumerate(texts(9))], unit(vectors(9)))
    table = open_vectors(str(tmp_path / "ours"))
    assert (table.origin.model, table.origin.model_hash, table.origin.prompt) == ("some/model", "0123", "passage: ")
    given, found = whole(table)
    assert sorted(given) == texts(9) and found.shape == (9, DIM)
    assert table.nearest(vectors(9)[4], 1)[0][1:] == ("id4", "text number 4")


PAYLOADS = {
    "text": lambda text: {"text": text, "title": "same"},
    "langchain": lambda text: {"page_content": text, "metadata": {"text": "", "source": "a"}},
    "metadata": lambda text: {"metadata": {"content": text}},
    "llamaindex": lambda text: {"_node_content": json.dumps({"text": text, "id_": "n"}), "_node_type": "TextNode"},
    "other": lambda text: {"passage_en": text, "doc_id": "d1", "url": "u", "n": 3},
}


@pytest.mark.parametrize("framework", list(PAYLOADS))
def test_the_text_is_found_in_the_payloads_of_frameworks(framework, tmp_path):
    with open_vectors(qdrant(tmp_path / "q", texts(9), vectors(9), PAYLOADS[framework])) as table:
        assert sorted(whole(table)[0]) == texts(9)


def test_a_key_that_few_points_have_is_not_the_text(tmp_path):
    def payload(text):
        return {"content": text, **({"text": "rare"} if text.endswith("3") else {})}

    with open_vectors(qdrant(tmp_path / "q", texts(9), vectors(9), payload)) as table:
        assert sorted(whole(table)[0]) == texts(9)
    with open_vectors(str(tmp_path / "q"), text="text") as table:
        assert whole(table)[0] == ["rare"] and table.left_out == 8
    refused(tmp_path / "q", "no text at the key 'body'; there are content, text", text="body")


def test_named_vectors_of_qdrant(tmp_path):
    library = pytest.importorskip("qdrant_client")
    models, client = library.models, library.QdrantClient(path=str(tmp_path / "q"))
    sizes = {"dense": 8, "short": 4}
    many = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
    config = {name: models.VectorParams(size=size, distance=models.Distance.DOT) for name, size in sizes.items()}
    config["colbert"] = models.VectorParams(size=4, distance=models.Distance.DOT, multivector_config=many)
    client.create_collection("a", vectors_config=config)
    points = [
        models.PointStruct(id=i, payload={"text": f"t{i}"}, vector={"dense": vectors(5)[i].tolist()} if i else {})
        for i in range(5)
    ]
    client.upsert("a", points)
    client.close()
    refused(tmp_path / "q", "dense, short.*--vector-column")
    refused(tmp_path / "q", "'colbert' is of another type", vector="colbert")
    with open_vectors(str(tmp_path / "q"), vector="dense") as table:
        given, found = whole(table)
        assert given == ["t1", "t2", "t3", "t4"] and table.left_out == 1
        np.testing.assert_allclose(found, vectors(5)[1:], atol=1e-6)
        assert table.nearest(vectors(5)[2], 1)[0].text == "t2"
        refused(tmp_path / "q", "other process that has it open")


def test_a_server_draws_and_finds_by_itself(monkeypatch):
    library = pytest.importorskip("qdrant_client")
    client, models = library.QdrantClient(":memory:"), library.models
    client.create_collection("docs", models.VectorParams(size=DIM, distance=models.Distance.EUCLID))
    points = [models.PointStruct(id=i, vector=vectors(50)[i].tolist(), payload={"text": f"t{i}"}) for i in range(50)]
    client.upsert("docs", points)
    monkeypatch.setattr("lusifer.data.vector_tables.connect", lambda location: (client, "docs"))
    table = open_vectors("qdrant+http://server:6333/docs")
    drawn, found = table.sample(20)
    assert len(set(drawn)) == 20
    np.testing.assert_allclose(found, vectors(50)[[int(text[1:]) for text in drawn]], atol=1e-6)
    for exact in (False, True):
        assert table.nearest(vectors(50)[7], 3, exact=exact)[0] == (pytest.approx(1), "7", "t7")
    monkeypatch.setattr("lusifer.data.vector_tables.connect", lambda location: (client, "other"))
    refused("qdrant+http://server:6333/other", "there is no collection 'other'")


def test_an_unreachable_server_is_told():
    pytest.importorskip("qdrant_client")
    refused("qdrant+http://127.0.0.1:1/docs", "cannot be read: .*refused")
    refused("qdrant+http://127.0.0.1:1", "write it like qdrant")


def test_texts_in_the_metadata_of_chroma(tmp_path):
    with open_vectors(chroma(tmp_path / "c", texts(5), vectors(5), how="page_content")) as table:
        assert sorted(whole(table)[0]) == texts(5)
    refused(tmp_path / "c", "no text at the key 'summary'", text="summary")
    refused(tmp_path / "c", "leave --vector-column out", vector="a")


def test_a_folder_of_an_older_chroma_is_left_as_it_is(tmp_path):
    folder = chroma(tmp_path / "c", texts(5), vectors(5))
    file = tmp_path / "c" / "chroma.sqlite3"
    with sqlite3.connect(file) as database:
        database.execute("DELETE FROM migrations WHERE dir = 'metadb' AND version >= 4")
    database.close()
    refused(folder, "another version of Chroma")
    with sqlite3.connect(file) as database:
        assert database.execute("SELECT max(version) FROM migrations WHERE dir = 'metadb'").fetchone() == (3,)
    database.close()


def test_chroma_without_its_package_is_told(tmp_path, monkeypatch):
    (tmp_path / "chroma.sqlite3").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "chromadb", None)
    refused(tmp_path, r"needs Chroma: pip install 'lusifer\[chroma\]'")
