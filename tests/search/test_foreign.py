"""Search over an index that something else made, by the command, the page and the store."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lusifer import LusiferError
from lusifer.loading import load_checkpoint
from lusifer.model.text_encoder import TextEncoder
from lusifer.search import open_any
from lusifer.search.foreign import TableStore
from lusifer.search.page import make_router
from support.bert import save_bert
from support.command import mistake
from support.texts import TEXTS
from support.vector_tables import KINDS, lance, write


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_bert(tmp_path_factory.mktemp("model") / "bert")
    encoder = TextEncoder(load_checkpoint(str(folder)))
    return folder, encoder, encoder.encode(TEXTS)


@pytest.mark.parametrize("kind", KINDS)
def test_search_over_everybodys_index(kind, model, tmp_path, call):
    folder, encoder, made = model
    location = write(kind, tmp_path / "table", TEXTS, made)
    cosines = made @ encoder.encode(["milk and bread"])[0]
    best = [TEXTS[row] for row in np.argsort(-cosines)[:4]]
    code, out, err = call("search", location, "milk and bread", "--model", folder, "--json", "-k", "4", "--exact")
    assert code == 0, err
    hits = json.loads(out)["hits"]
    assert [hit["text"] for hit in hits] == best and {hit["lang"] for hit in hits} == {"Latin script"}
    assert [hit["score"] for hit in hits] == pytest.approx(np.sort(-cosines)[:4] * -1, abs=1e-3)
    assert f"{best[0]}  [" in call("search", location, "milk and bread", "--model", folder)[1]
    code, out, _ = call("index", "verify", location, "--model", folder, "--json")
    assert code == 0 and json.loads(out)["verdict"] == "same"


def test_columns_can_be_said(model, tmp_path, call):
    folder, _, made = model
    location = lance(tmp_path / "l", TEXTS, made, summary=["short"] * len(TEXTS))
    out = call("search", location, "cat", "--model", folder, "--text-column", "summary", "-k", "1")
    # Then all texts are one, which is too little to compare with.
    assert "1 texts" in mistake(*out)
    assert call("index", "verify", location, "--model", folder, "--text-column", "content")[0] == 0


def test_mistakes_are_one_line(model, tmp_path, call):
    folder, _, made = model
    location = lance(tmp_path / "l", TEXTS, made)
    assert "does not record the model" in mistake(*call("search", location, "cat"))
    assert "leave --hybrid out" in mistake(*call("search", location, "cat", "--model", folder, "--hybrid"))
    assert "no column 'year'" in mistake(*call("search", location, "cat", "--model", folder, "--where", "year = 3"))
    (tmp_path / "empty").mkdir()
    assert "looked for" in mistake(*call("search", tmp_path / "empty", "cat", "--model", folder))
    assert "no index at" in mistake(*call("search", tmp_path / "nowhere", "cat", "--model", folder))
    (tmp_path / "texts.txt").write_text("a")
    assert call("index", "add", tmp_path / "ours", tmp_path / "texts.txt", "--model", folder, "-q")[0] == 0
    given = call("search", tmp_path / "ours", "cat", "--text-column", "text")
    assert "leave --text-column" in mistake(*given)


@pytest.fixture
def store(model, tmp_path):
    texts = [*TEXTS, "кошка на крыше", "собака у реки"]
    made = np.concatenate([model[2], model[1].encode(texts[-2:])])
    return open_any(lance(tmp_path / "l", texts, made, id=[f"r{i}" for i in range(len(texts))]))


def test_a_foreign_table_is_a_store_that_is_only_read(store, model):
    assert isinstance(store, TableStore) and store.count() == len(TEXTS) + 2
    assert store.languages() == {"Latin script": len(TEXTS), "Cyrillic script": 2}
    assert store.count("lang = 'Cyrillic script'") == 2
    query = model[1].encode(["cat"])[0]
    hits = store.search(query, where="lang = 'Cyrillic script' AND NOT id = 'r1'")
    assert {hit.entry.text for hit in hits} == {"кошка на крыше", "собака у реки"}
    found = store.fetch(["r3", "nowhere"])
    assert list(found) == ["r3"] and found["r3"][0].text == TEXTS[3]
    np.testing.assert_allclose(found["r3"][1], model[2][3], atol=1e-6)
    entries, vectors = store.sample(10)
    assert len({entry.id for entry in entries}) == len(vectors) == 10
    for act in (store.build, store.tidy, lambda: store.delete(ids=["r1"]), lambda: store.upsert(entries, vectors)):
        with pytest.raises(LusiferError, match="only reads it"):
            act()
    assert store.count() == len(TEXTS) + 2


def test_the_page_serves_a_foreign_table(store, model):
    fastapi = pytest.importorskip("fastapi")
    from fastapi.testclient import TestClient

    app = fastapi.FastAPI()
    app.include_router(make_router(store, model[1]))
    client = TestClient(app)
    hits = client.get("/search", params={"q": "bread and milk", "k": 1}).json()["hits"]
    assert hits[0]["text"] == "bread and milk"
    assert (
        client.get("/search", params={"q": "cat", "lang": "Cyrillic script"}).json()["hits"][0]["lang"]
        != "Latin script"
    )
    about = client.get("/map").json()
    assert (about["count"], about["model"]) == (len(TEXTS) + 2, "unknown")
    assert client.get("/search", params={"q": "cat", "hybrid": True}).status_code == 400
