"""The index: both stores behave alike, search is right, damage and mistakes are told in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from lusifer import LusiferError
from lusifer.model.fingerprint import weights_hash
from lusifer.model.sentence_transformer import save_atomically
from lusifer.model.text_encoder import TextEncoder
from lusifer.search import Entry, Hit, IndexInfo, create_store, indexing, open_store
from lusifer.search.filters import parse_filter, to_sql
from lusifer.search.indexing import add, check_columns, read_entries
from lusifer.search.lexical import script, words
from lusifer.search.store import reciprocal_rank_fusion

pytest.importorskip("lancedb")
qdrant_client = pytest.importorskip("qdrant_client")

from lusifer.search.lance import LanceStore  # noqa: E402
from lusifer.search.qdrant import QdrantStore  # noqa: E402

DIM = 16
COLUMNS = {"topic": "string", "year": "int", "weight": "float", "draft": "bool"}
INFO = IndexInfo("some/model", "0123456789abcdef", DIM, COLUMNS)


def unit(rows, seed=0):
    found = np.random.default_rng(seed).normal(size=(rows, DIM)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def entries(count):
    topics = ["food", "travel", None]
    return [
        Entry(
            f"id{i}",
            f"text number{i} common",
            ("en", "te")[i % 2],
            {"topic": topics[i % 3], "year": 2000 + i, "weight": i / 4, "draft": i % 5 == 0},
        )
        for i in range(count)
    ]


@pytest.fixture(params=["lance", "qdrant"])
def store(request, tmp_path):
    if request.param == "lance":
        return LanceStore.create(tmp_path / "index", INFO)
    return QdrantStore.create(qdrant_client.QdrantClient(":memory:"), "texts", INFO)


@pytest.fixture
def filled(store):
    store.upsert(entries(60), unit(60))
    return store


def found_ids(hits):
    return [hit.entry.id for hit in hits]


# Both stores


def test_exact_search_is_brute_force(filled):
    vectors = unit(60)
    for query in unit(5, seed=1):
        cosines = vectors @ query
        wanted = np.argsort(-cosines)[:7]
        hits = filled.search(query, k=7, exact=True)
        assert found_ids(hits) == [f"id{i}" for i in wanted]
        # float32 sums in another order.
        np.testing.assert_allclose([hit.score for hit in hits], cosines[wanted], atol=1e-5)
    assert hits[0].entry == entries(60)[wanted[0]]


@pytest.mark.parametrize(
    ("where", "keep"),
    [
        ("lang = 'te'", lambda e: e.lang == "te"),
        ("lang != 'te' and year >= 2030", lambda e: e.lang != "te" and e.metadata["year"] >= 2030),
        ("topic IN ('food', 'travel')", lambda e: e.metadata["topic"] is not None),
        ("topic NOT IN ('food')", lambda e: e.metadata["topic"] != "food"),
        ("topic != 'food'", lambda e: e.metadata["topic"] != "food"),
        ("NOT (topic = 'food' OR draft = true)", lambda e: e.metadata["topic"] != "food" and not e.metadata["draft"]),
        ("weight < 2.5 AND draft = false", lambda e: e.metadata["weight"] < 2.5 and not e.metadata["draft"]),
        ("weight = 2 OR weight IN (0.25, 3)", lambda e: e.metadata["weight"] in (2, 0.25, 3)),
        (
            "lang='en' AND (year <= 2004 OR topic = \"travel\")",
            lambda e: e.lang == "en" and (e.metadata["year"] <= 2004 or e.metadata["topic"] == "travel"),
        ),
        ("id = 'id7'", lambda e: e.id == "id7"),
        ("topic = 'it''s'", lambda e: False),
    ],
)
def test_filters_keep_the_same_texts_everywhere(filled, where, keep):
    kept = {entry.id for entry in entries(60) if keep(entry)}
    assert filled.count(where) == len(kept)
    assert set(found_ids(filled.search(unit(1)[0], k=60, where=where))) == kept
    assert set(found_ids(filled.bm25("common", k=60, where=where))) == kept


def test_a_filter_may_be_as_deep_as_it_is_read(filled):
    # Whatever one filter's reader takes, the stores take too.
    inner = "lang = 'te'"
    for depth in range(15):
        inner = (
            f"year >= {2000 + depth} {('AND', 'OR')[depth % 2]} NOT (NOT ({inner}))"
            if depth < 7
            else f"NOT NOT {inner}"
        )
    assert filled.count(inner) == len(found_ids(filled.search(unit(1)[0], k=60, where=inner))) > 0


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("lang =", "a value"),
        ("lang", "one of ="),
        ("language = 'te'", "no column 'language'"),
        ("lang = te", "a value"),
        ("year = '2000'", "of type int"),
        ("topic = 3", "of type string"),
        ("draft = 1", "of type bool"),
        ("lang = 'te' 'en'", "AND, OR or the end"),
        ("(lang = 'te'", "'\\)'"),
        ("lang = 'te'; DROP TABLE texts", "at character 12"),
        ("topic > 'food'", "numbers only"),
        ("", "the name of a column"),
        ("(" * 5000 + "lang = 'te'" + ")" * 5000, "more than 30 brackets or NOT nested"),
        ("NOT " * 5000 + "lang = 'te'", "more than 30 brackets or NOT nested"),
    ],
)
def test_a_bad_filter_is_told(filled, where, message):
    for act in (
        lambda: filled.search(unit(1)[0], where=where),
        lambda: filled.bm25("common", where=where),
        lambda: filled.delete(where=where),
    ):
        with pytest.raises(LusiferError, match=message):
            act()
    assert filled.count() == 60


SIGNS = {
    "=": lambda value, limit: value == limit,
    "!=": lambda value, limit: value != limit,
    "<": lambda value, limit: value < limit,
    "<=": lambda value, limit: value <= limit,
    ">": lambda value, limit: value > limit,
    ">=": lambda value, limit: value >= limit,
}
EDGE = {
    "year": [-(2**63), -(2**62), -3, 0, 2001, 2002, 2003, 2**63 - 1, None],
    "weight": [-1.5, -0.25, 0.0, 0.1, 2001.5, 1e300, None],
}
NUMBERS = ["2002", "2002.0", "2.002e3", "2002.5", "-2.5", "-0", "0.1", "1e-400", "-1e-400", str(2**63 - 1), str(2**63)]
NUMBERS += [str(-(2**63)), str(-(2**63) - 1), "9" * 23, "-" + "9" * 23, "1e400", "-1e400", "9" * 5000]
NUMBERS += ["1e9999999999999999999", "-1e9999999999999999999", "1e-9999999999999999999", "1e300"]


@pytest.mark.parametrize("column", list(EDGE))
def test_any_number_may_stand_in_a_filter(store, column):
    """Fractions for whole numbers, and numbers that no column holds, compare as numbers do."""
    rows = [Entry(f"id{i}", "common", "en", {**dict.fromkeys(COLUMNS), column: v}) for i, v in enumerate(EDGE[column])]
    store.upsert(rows, unit(len(rows)))
    for number in NUMBERS:
        # A column of float compares as floats do; so do numbers whose exponent alone has nineteen digits.
        limit = (
            float(number) if column == "weight" or "99999" in number.partition("e")[2] else Fraction(Decimal(number))
        )
        if isinstance(store, QdrantStore) and number == str(2**63 - 1):
            continue  # Qdrant's ranges are of float64.
        for sign, holds in SIGNS.items():
            where = f"{column} {sign} {number}"
            kept = {row.id for row in rows if _keeps(holds, sign, row.metadata[column], limit)}
            assert set(found_ids(store.search(unit(1)[0], k=60, where=where))) == kept, where[:60]
            assert store.count(where) == len(kept), where[:60]
            assert store.count(f"NOT {where}") == len(rows) - len(kept), where[:60]
    for where, wanted in ((f"{column} IN (1e400, 2002.25, 0)", 1), (f"{column} NOT IN (1e400)", len(rows))):
        assert store.count(where) == len(found_ids(store.bm25("common", k=60, where=where))) == wanted, where


def _keeps(holds, sign, value, limit):
    """A missing value equals nothing, and has no order."""
    return sign == "!=" if value is None else holds(value if isinstance(limit, float) else Fraction(value), limit)


IDS = ["a/b", "/", "a\\b", "it's", '"', "100%", "é", "e\u0301", "Ⅸ", "IX", "日本", "🙂", " ", "a\nb", "1", "01", "1.0"]
IDS += ["true", "True", "18446744073709551615", "-5", "x" * 500]


def test_any_text_may_be_an_id(store):
    rows = [Entry(id, f"text {number}", "en", dict.fromkeys(COLUMNS)) for number, id in enumerate(IDS)]
    store.upsert(rows, unit(len(rows)))
    store.upsert(rows, unit(len(rows)))
    assert store.count() == len(IDS)
    known = store.fetch([*IDS, "nowhere"])
    assert {id: entry for id, (entry, _) in known.items()} == {row.id: row for row in rows}
    assert store.fetch([]) == {}
    for left, id in enumerate(IDS[1:], start=1):
        assert store.delete(ids=[id]) == 1 and id not in store.fetch(IDS)
        assert store.count() == len(IDS) - left
    assert found_ids(store.search(unit(1)[0])) == [IDS[0]]


def test_upsert_adds_and_replaces(filled):
    new = Entry("id3", "another text", "fr", {**dict.fromkeys(COLUMNS), "year": 1})
    more = Entry("id60", "one more", "fr", dict.fromkeys(COLUMNS))
    vectors = unit(2, seed=2)
    filled.upsert([new, more], vectors)
    assert filled.count() == 61
    known = filled.fetch(["id3", "id60", "id2", "nowhere"])
    assert [known[id][0] for id in ("id3", "id60", "id2")] == [new, more, entries(3)[2]]
    np.testing.assert_allclose(known["id3"][1], vectors[0], atol=1e-6)
    assert found_ids(filled.search(vectors[0], k=1)) == ["id3"]
    assert found_ids(filled.bm25("another")) == ["id3"]
    assert filled.bm25("number3") == []
    assert filled.languages() == {"en": 30, "te": 29, "fr": 2}


def test_delete_by_id_and_by_filter(filled):
    assert filled.delete(ids=["id1", "id2", "nowhere"]) == 2
    assert filled.delete(where="lang = 'te'") == 29
    assert filled.count() == 29 and filled.count("lang = 'te'") == 0
    assert filled.bm25("number1") == [] and filled.bm25("number3") == []
    assert not {"id1", "id2", "id3"} & set(found_ids(filled.search(unit(1)[0], k=60)))
    for both in ({}, {"ids": ["id4"], "where": "lang = 'en'"}):
        with pytest.raises(LusiferError, match="either ids or a filter"):
            filled.delete(**both)
    assert filled.delete(ids=[]) == 0


def test_vectors_that_do_not_fit_are_refused(store):
    for vectors, message in (
        (np.zeros((2, DIM)), "length 1"),
        (np.full((2, DIM), np.nan), "length 1"),
        (unit(2)[:, :8], r"\(2, 8\)"),
        (unit(3), r"\(3, 16\)"),
    ):
        with pytest.raises(LusiferError, match=message):
            store.upsert(entries(2), vectors)
    with pytest.raises(LusiferError, match="twice"):
        store.upsert([entries(1)[0]] * 2, unit(2))
    assert store.count() == 0


def test_hybrid_finds_the_rare_word_that_vectors_miss(filled):
    vectors = unit(60)
    query = vectors[10]
    nearest = found_ids(filled.search(query, k=60))
    far = nearest[-1]
    texts = {entry.id: entry for entry in entries(60)}
    rare = Entry(far, "the common word zyzzyva", texts[far].lang, texts[far].metadata)
    filled.upsert([rare], vectors[[int(far[2:])]])
    assert far not in found_ids(filled.search(query, k=10))
    hits = filled.hybrid(query, "zyzzyva", k=10)
    assert far in found_ids(hits)[:2] and nearest[0] in found_ids(hits)[:2]
    assert next(hit for hit in hits if hit.entry.id == far).ranks == {"bm25": 1}


def test_bm25_reads_languages_without_spaces(store):
    texts = {
        "zh": "我的奶奶住在乡下的村子里",
        "ja": "駅はどこですか。電車で行きます",
        "th": "รถไฟออกจากสถานีตอนเช้า",
        "ko": "할머니는 시골에서 사세요",
        "hi": "रसोई का नल टपक रहा है",
        "en": "My grandmother lives in the country",
    }
    rows = [Entry(lang, text, lang, dict.fromkeys(COLUMNS)) for lang, text in texts.items()]
    store.upsert(rows, unit(len(rows)))
    store.tidy()
    queries = {"zh": "奶奶", "ja": "電車", "th": "สถานี", "ko": "할머니가", "hi": "नल", "en": "GRANDMOTHER"}
    for lang, query in queries.items():
        assert found_ids(store.bm25(query, k=1)) == [lang]
    assert found_ids(store.bm25("駅")) == ["ja"], "one character can be a word"
    assert store.bm25("?!") == []


def test_a_sample_is_part_of_the_texts(filled):
    some, vectors = filled.sample(20)
    assert len({entry.id for entry in some}) == 20 and vectors.shape == (20, DIM)
    known = filled.fetch([entry.id for entry in some])
    for entry, vector in zip(some, vectors, strict=True):
        assert known[entry.id][0] == entry
        np.testing.assert_allclose(vector, known[entry.id][1], atol=1e-6)
    assert len(filled.sample(1000)[0]) == 60


def test_another_model_is_refused(filled):
    filled.check_model("renamed/model", INFO.model_hash, DIM)
    with pytest.raises(LusiferError, match=r"holds vectors of 'some/model'.*'some/model'.*make a new index"):
        filled.check_model("some/model", "f" * 16, DIM)


def test_facts_are_kept(tmp_path):
    client = qdrant_client.QdrantClient(":memory:")
    QdrantStore.create(client, "texts", INFO)
    assert QdrantStore.open(client, "texts").info == INFO
    create_store(str(tmp_path / "index"), INFO)
    assert open_store(str(tmp_path / "index")).info == INFO
    with pytest.raises(LusiferError, match="already"):
        QdrantStore.create(client, "texts", INFO)
    with pytest.raises(LusiferError, match="no collection 'nothing'"):
        QdrantStore.open(client, "nothing")
    client.create_collection("other", vectors_config={})
    with pytest.raises(LusiferError, match="not made by lusifer"):
        QdrantStore.open(client, "other")


@pytest.mark.parametrize("columns", [{"text": "string"}, {"two words": "string"}, {"a`b": "string"}, {"a": "date"}])
def test_columns_that_cannot_be_kept_are_refused(columns):
    with pytest.raises(LusiferError, match="metadata column"):
        IndexInfo("m", "h", DIM, columns)


# The folder


def clustered(rows, dim=32):
    generator = np.random.default_rng(3)
    found = generator.normal(size=(50, dim))[generator.integers(0, 50, rows)] + 0.5 * generator.normal(size=(rows, dim))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def test_approximate_search_recalls_nine_in_ten(tmp_path):
    vectors = clustered(4100)
    store = LanceStore.create(tmp_path / "index", IndexInfo("m", "h", 32))
    store.upsert([Entry(str(i), f"text {i}", "en") for i in range(4000)], vectors[:4000])
    assert not store.approximate()
    store.build()
    assert store.approximate()
    found = right = 0
    for query in vectors[4000:]:
        wanted = {str(i) for i in np.argsort(-(vectors[:4000] @ query))[:10]}
        found += len(wanted & set(found_ids(store.search(query))))
        right += len(wanted & set(found_ids(store.search(query, exact=True))))
    assert right == 1000
    assert 900 <= found <= 1000
    store.upsert([Entry("new", "new", "en")], vectors[4000:4001])
    assert found_ids(store.search(vectors[4000], k=1)) == ["new"], "a text added after building is found at once"


def test_building_is_automatic_above_a_size(tmp_path, monkeypatch):
    monkeypatch.setattr("lusifer.search.lance.APPROXIMATE_FROM", 300)
    store = LanceStore.create(tmp_path / "index", INFO)
    store.upsert(entries(60), unit(60))
    store.tidy()
    assert not store.approximate()
    with pytest.raises(LusiferError, match="256 texts"):
        store.build()
    store.upsert(entries(300), unit(300))
    store.tidy()
    assert store.approximate()


def test_an_open_index_sees_what_another_adds(tmp_path):
    writer = LanceStore.create(tmp_path / "index", INFO)
    reader = open_store(str(tmp_path / "index"))
    before = reader.version()
    writer.upsert(entries(3), unit(3))
    assert reader.count() == 3 and reader.version() != before


def test_damage_is_told_in_one_line(tmp_path):
    path = tmp_path / "index"
    LanceStore.create(path, INFO).upsert(entries(5), unit(5))
    facts = (path / "facts.json").read_text()
    for broken, message in (
        ("{", "not JSON"),
        ("[]", "damaged"),
        ('{"format": 99}', "newer lusifer"),
        (facts.replace('"dimension": 16', '"dimension": 8'), "does not fit"),
    ):
        (path / "facts.json").write_text(broken)
        with pytest.raises(LusiferError, match=message):
            open_store(str(path))
    (path / "facts.json").write_text(facts)
    store = open_store(str(path))
    for file in (path / "lance").rglob("*.lance"):
        if file.is_file():
            file.write_bytes(b"not a table")
    with pytest.raises(LusiferError, match="may be damaged") as told:
        store.search(unit(1)[0], exact=True)
    assert "\n" not in str(told.value)
    for file in (path / "lance").rglob("*"):
        if file.is_file():
            file.unlink()
    with pytest.raises(LusiferError, match="may be damaged"):
        open_store(str(path))
    with pytest.raises(LusiferError, match="no index"):
        open_store(str(tmp_path / "nowhere"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary")
    with pytest.raises(LusiferError, match="not an empty folder"):
        create_store(str(tmp_path / "mine"), INFO)


def test_an_interrupted_creation_is_made_again(tmp_path):
    LanceStore.create(tmp_path / "index", INFO)
    (tmp_path / "index" / "facts.json").unlink()
    LanceStore.create(tmp_path / "index", IndexInfo("m", "h", 8)).upsert(
        [Entry("a", "b", "c")], unit(1)[:, :8] * 0 + 8**-0.5
    )
    assert open_store(str(tmp_path / "index")).count() == 1


@pytest.mark.parametrize("location", ["qdrant+http://localhost:6333", "qdrant+localhost/texts", "qdrant+http://h/a/b"])
def test_a_wrong_address_is_told(location):
    with pytest.raises(LusiferError, match="qdrant\\+http://localhost:6333/texts"):
        open_store(location)


def test_a_server_that_is_not_there_is_told():
    with pytest.raises(LusiferError, match="collection 'texts'"):
        open_store("qdrant+http://127.0.0.1:1/texts")


# Words, scripts, fusion


def test_words():
    assert words("The CAFÉ, re-opened: ﬁve №5!") == ["the", "café", "re", "opened", "five", "no5"]
    assert words("रसोई का नल") == ["रसोई", "का", "नल"]
    assert words("می\u200cخواهم") == words("میخواهم")
    assert words("東京へ") == ["東", "京", "東京", "京へ"]
    assert words("猫") == ["猫"] and words("コーヒー") == ["コー", "ーヒ", "ヒー"]
    assert words("ABC株式") == ["abc", "株", "式", "株式"]


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("Where is it?", "Latin script"),
        ("Где вокзал? (map)", "Cyrillic script"),
        ("駅はどこですか", "Japanese script"),
        ("车站在哪里", "Han script"),
        ("역이 어디예요", "Hangul script"),
        ("స్టేషన్ ఎక్కడ", "Telugu script"),
        ("أين المحطة", "Arabic script"),
        ("12:30 – !", "no letters"),
    ],
)
def test_script(text, label):
    assert script(text) == label


def test_fusion_adds_reciprocal_ranks():
    a, b, c = (Hit(entry, 0.5) for entry in entries(3))
    fused = reciprocal_rank_fusion({"vector": [a, b], "bm25": [b, c]})
    assert [(hit.entry.id, hit.ranks) for hit in fused] == [
        ("id1", {"vector": 2, "bm25": 1}),
        ("id0", {"vector": 1}),
        ("id2", {"bm25": 2}),
    ]
    assert fused[0].score == pytest.approx(1 / 62 + 1 / 61)


def test_quotes_stay_inside_sql():
    told = to_sql(parse_filter("lang = 'x'' OR 1=1 --'", {"lang": "string"}))
    assert told == "`lang` IN ('x'' OR 1=1 --')"


# Files to index

BODIES = ["the cat sat on the mat", "a small house near the river", "bread, milk and apples", "rain fell all night"]
BODIES += ["the train arrives at nine", "a long book about the cat"]
LINES = [{"n": i, "body": BODIES[i], "lang": ("en", None)[i % 2], "year": 1990 + i} for i in range(6)]


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def test_files_are_read_alike(jsonl, tmp_path):
    parquet.write_table(pa.Table.from_pylist(LINES), tmp_path / "texts.parquet")
    for path in (jsonl, tmp_path / "texts.parquet"):
        found, types = read_entries(path, text="body", id="n", metadata=["year"])
        assert types == {"year": "int"}
        assert found[0] == Entry("0", "the cat sat on the mat", "en", {"year": 1990})
        assert found[1].lang == "Latin script"
    (tmp_path / "texts.txt").write_text("one\ntwo\none\n")
    found, types = read_entries(tmp_path / "texts.txt")
    assert [entry.text for entry in found] == ["one", "two"] and types == {}
    assert len({entry.id for entry in found}) == 2


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"n": 0}, {"id": "n"}, "line 6: the id '0' is that of .*line 1 already"),
        ({"n": None}, {"id": "n"}, "line 6: the id in 'n'"),
        ({"year": [1]}, {"metadata": ["year"]}, "line 6: 'year' must be"),
        ({}, {"metadata": ["title"]}, "no column 'title'; it has n, body"),
        ({"body": ""}, {}, "line 6: 'body' is empty"),
    ],
)
def test_bad_rows_are_named(tmp_path, change, options, message):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*LINES[:5], {**LINES[5], **change}]))
    with pytest.raises(LusiferError, match=message):
        read_entries(path, text="body", **options)


def test_column_types_follow_the_values(tmp_path):
    path = tmp_path / "texts.jsonl"
    rows = [
        {"text": "a", "i": 1, "f": 1, "b": True, "m": 1, "e": None},
        {"text": "b", "i": None, "f": 0.5, "b": False, "m": "x"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, types = read_entries(path, metadata=["i", "f", "b", "m", "e"])
    assert types == {"i": "int", "f": "float", "b": "bool", "m": "string", "e": "string"}
    assert found[0].metadata == {"i": 1, "f": 1.0, "b": True, "m": "1", "e": None}


def test_columns_cannot_be_added_later(store):
    check_columns(store, {"weight": "int"})
    for types in ({"title": "string"}, {"year": "string"}):
        with pytest.raises(LusiferError, match="metadata column"):
            check_columns(store, types)


class Counting:
    """An encoder that remembers what it embedded, and may be interrupted."""

    def __init__(self, dimension, stop_after=None):
        self.dimension, self.seen, self.stop_after = dimension, [], stop_after
        self.model = SimpleNamespace(device=SimpleNamespace(type="cpu"), prompts={}, default_prompt_name=None)

    def encode(self, texts):
        if self.stop_after is not None and len(self.seen) + len(texts) > self.stop_after:
            raise KeyboardInterrupt
        self.seen += texts
        return np.stack([unit(1, seed=sum(map(ord, text)))[0] for text in texts]) if texts else np.empty((0, DIM))


def test_adding_goes_on_and_embeds_nothing_twice(store, monkeypatch):
    monkeypatch.setattr(indexing, "_CHUNK", {"cpu": 10})
    texts = entries(45)
    with pytest.raises(KeyboardInterrupt):
        add(store, Counting(DIM, stop_after=25), texts)
    assert store.count() == 20
    encoder = Counting(DIM)
    assert add(store, encoder, texts) == {"added": 25, "updated": 0, "changed": 0, "unchanged": 20}
    assert encoder.seen == [entry.text for entry in texts[20:]]
    texts[3] = Entry("id3", "new words", "en", texts[3].metadata)
    texts[4] = Entry("id4", texts[4].text, "fr", {**texts[4].metadata, "year": 7})
    vector = store.fetch(["id4"])["id4"][1]
    encoder = Counting(DIM)
    assert add(store, encoder, texts) == {"added": 0, "updated": 1, "changed": 1, "unchanged": 43}
    assert encoder.seen == ["new words"]
    entry, kept = store.fetch(["id4"])["id4"]
    assert entry == texts[4] and np.allclose(kept, vector, atol=1e-6)
    assert store.fetch(["id3"])["id3"][0].text == "new words"


# The command line


@pytest.fixture
def checkpoint(tiny_st, tmp_path):
    save_atomically(tiny_st, tmp_path / "model")
    return tmp_path / "model"


def test_the_commands_end_to_end(call, checkpoint, jsonl, tmp_path, tiny_st):
    index = tmp_path / "index"
    options = ("--column", "body", "--id-column", "n", "--metadata", "year")
    code, out, err = call("index", "add", index, jsonl, "--model", checkpoint, *options, "--json", "-q")
    assert code == 0, err
    assert json.loads(out)["added"] == 6
    assert json.loads(call("index", "add", index, jsonl, *options, "--json", "-q")[1])["unchanged"] == 6

    code, out, err = call("search", index, "bread, milk and apples", "--json", "-k", "3")
    assert code == 0, err
    hits = json.loads(out)["hits"]
    encoder = TextEncoder(tiny_st)
    cosines = encoder.encode([line["body"] for line in LINES]) @ encoder.encode(["bread, milk and apples"])[0]
    assert [hit["id"] for hit in hits] == [str(i) for i in np.argsort(-cosines)[:3]]
    assert hits[0]["text"] == "bread, milk and apples" and hits[0]["score"] == pytest.approx(1, abs=1e-3)
    assert hits[0]["metadata"] == {"year": 1992}
    hits = json.loads(call("search", index, "cat book", "--json", "--where", "year > 1993", "--hybrid")[1])["hits"]
    assert {hit["id"]: "bm25" in hit["ranks"] for hit in hits} == {"4": False, "5": True}
    assert "the cat sat on the mat" in call("search", index, "cat")[1]
    for where, years in (("year < 1991.5", [1990, 1991]), ("year = 99999999999999999999999", []), ("year = 1e400", [])):
        hits = json.loads(call("search", index, "cat", "--json", "--where", where)[1])["hits"]
        assert sorted(hit["metadata"]["year"] for hit in hits) == years

    facts = json.loads(call("index", "info", index, "--json")[1])
    assert (
        facts["texts"] == 6 and facts["languages"] == {"en": 3, "Latin script": 3} and facts["model"] == str(checkpoint)
    )
    assert f"model: {checkpoint}" in call("index", "info", index)[1]
    assert json.loads(call("index", "delete", index, "--where", "lang = 'en'", "--json")[1])["deleted"] == 3
    assert call("index", "delete", index, "--ids", "1", "--ids", "3")[1] == "2 deleted, 1 texts left\n"


def test_an_instruction_changes_the_query_only(call, checkpoint, jsonl, tmp_path, tiny_st):
    call("index", "add", tmp_path / "index", jsonl, "--model", checkpoint, "--column", "body", "-q")
    out = call("search", tmp_path / "index", "cat", "--instruction", "Find it", "--json", "-k", "1")[1]
    encoder = TextEncoder(tiny_st)
    cosines = encoder.encode([line["body"] for line in LINES]) @ encoder.encode(["Instruct: Find it\nQuery: cat"])[0]
    assert json.loads(out)["hits"][0]["score"] == pytest.approx(cosines.max(), abs=1e-3)


def test_a_changed_model_is_refused(call, checkpoint, jsonl, tmp_path, tiny_st):
    index = tmp_path / "index"
    call("index", "add", index, jsonl, "--model", checkpoint, "--column", "body", "-q")
    tiny_st[0].auto_model.connector.added_tokens.data += 1
    save_atomically(tiny_st, checkpoint)
    for arguments in (("search", index, "cat"), ("index", "add", index, jsonl, "--column", "body", "-q")):
        code, _, err = call(*arguments)
        assert code == 2 and "cannot be compared" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("search", "nowhere", "cat"), "no index at 'nowhere'"),
        (("search", "nowhere"), "either a query or --ui"),
        (("index", "info", "nowhere"), "no index at 'nowhere'"),
        (("index", "delete", "nowhere"), "either --ids or --where"),
        (("index", "add", "index", "nowhere.txt"), "no such file"),
        (("index", "build", "nowhere"), "no index at 'nowhere'"),
    ],
)
def test_mistakes_are_one_line(call, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(*arguments)
    assert code == 2 and message in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [], "nothing is made before the mistake is told"


def test_a_missing_extra_is_told(call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lancedb", None)
    code, _, err = call("index", "info", tmp_path / "index")
    assert code == 2 and "pip install 'lusifer[search]'" in err


def test_the_hash_is_of_the_weights(tiny_st):
    first = weights_hash(tiny_st)
    assert weights_hash(tiny_st.bfloat16()) == first
    weight = tiny_st[0].auto_model.connector.added_tokens
    weight.data += 1
    assert weights_hash(tiny_st) != first


def test_help_stays_light():
    code = (
        "import sys; sys.argv = ['lusifer']; import lusifer.cli.app; "
        "print([name for name in ('lancedb', 'qdrant_client', 'fastapi', 'torch', 'umap') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
