"""The search page: its answers over HTTP, and the page itself in a browser where there is one."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from types import SimpleNamespace
from urllib.parse import urlencode
from zlib import crc32

import numpy as np
import pytest

from lusifer import LusiferError
from lusifer.search import corpus_map as corpusmap
from lusifer.search.corpus_map import CorpusMap, plane
from lusifer.search.lexical import words
from lusifer.search.page import find, make_router
from lusifer.search.store import Entry, IndexInfo

pytest.importorskip("lancedb")
fastapi = pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")

from lusifer.search.lance import LanceStore  # noqa: E402

DIM = 24
ATTACK = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'> of the attacker"
TEXTS = [
    ("en", "where is the railway station"),
    ("en", "the station is near the river"),
    ("en", "grandmother bakes bread"),
    ("de", "der bahnhof station liegt am fluss"),
    ("ar", "أين محطة القطار station"),
    ("en", ATTACK),
    ("fr", "x" * 400),
]


class Bags:
    """An encoder of bags of words: texts that share words are near."""

    dimension = DIM
    model = SimpleNamespace(prompts={"query": "my query: "}, default_prompt_name=None)

    def __init__(self):
        self.seen = []

    def encode(self, texts):
        self.seen += texts
        texts = [text.removeprefix("my query: ") for text in texts]
        sums = [sum((self._word(word) for word in words(text)), np.full(DIM, 1e-3)) for text in texts]
        found = np.array(sums, dtype=np.float32)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    def _word(self, word):
        return np.random.default_rng(crc32(word.encode())).normal(size=DIM)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    made = LanceStore.create(
        tmp_path_factory.mktemp("page") / "index", IndexInfo("tiny", "0" * 16, DIM, {"topic": "string"})
    )
    entries = [Entry(f"t{i}", text, lang, {"topic": "travel"}) for i, (lang, text) in enumerate(TEXTS)]
    made.upsert(entries, Bags().encode([entry.text for entry in entries]))
    made.tidy()
    return made


def serving(store):
    """An address under which the page of an index is served, and the server."""
    app = fastapi.FastAPI()
    app.include_router(make_router(store, Bags()))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.02)
    return f"http://127.0.0.1:{port}", server


@pytest.fixture(scope="module")
def address(store):
    told, server = serving(store)
    yield told
    server.should_exit = True


def get(address, path, **parameters):
    """Status, body and headers of an answer."""
    url = f"{address}{path}?{urlencode(parameters, doseq=True)}"
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.status, answer.read().decode(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), error.headers


def finished(made):
    for _ in range(600):
        found = made.get()
        if found["status"] != "computing":
            return found
        time.sleep(0.05)
    raise AssertionError("the map is never finished")


def test_search_answers_with_ranked_texts(address, store):
    status, body, _ = get(address, "/search", q="railway station", k=3)
    told = json.loads(body)
    assert status == 200 and told["query"] == "railway station" and told["milliseconds"] > 0
    wanted = store.search(Bags().encode(["railway station"])[0], k=3)
    assert told["hits"] == [hit.to_dict() for hit in wanted]
    assert told["hits"][0]["text"] == "where is the railway station" and told["hits"][0]["lang"] == "en"


def test_search_filters_by_language(address):
    for langs in (["de"], ["de", "ar"]):
        hits = json.loads(get(address, "/search", q="station", lang=langs)[1])["hits"]
        assert sorted(hit["lang"] for hit in hits) == sorted(langs)
    assert json.loads(get(address, "/search", q="station", lang="x' OR 1=1 --")[1])["hits"] == []


def test_search_filters_as_where_does(address):
    def asked(**more):
        status, body, _ = get(address, "/search", q="station", **more)
        return status, [hit["id"] for hit in json.loads(body)["hits"]] if status == 200 else json.loads(body)["detail"]

    assert asked(where="topic = 'travel' AND NOT id IN ('t0', 't1', 't3')", k=1) == (200, ["t4"])
    assert sorted(asked(where="topic = 'travel'", lang=["de", "ar"])[1]) == ["t3", "t4"]
    assert asked(where="topic = 'food' OR lang = 'de'", lang="de") == (200, ["t3"]), (
        "the language binds the whole filter"
    )
    assert len(asked(where="  ")[1]) == len(TEXTS)
    for where, message in (("year > 3", "there is no column 'year'"), ("topic = ", "it ends where a value")):
        status, detail = asked(where=where)
        assert status == 400 and message in detail and "\n" not in detail
    assert json.loads(get(address, "/map")[1])["columns"] == {"topic": "string"}


def test_hybrid_tells_ranks(address):
    hits = json.loads(get(address, "/search", q="grandmother", hybrid="true")[1])["hits"]
    assert hits[0]["id"] == "t2" and hits[0]["ranks"] == {"vector": 1, "bm25": 1}
    assert "ranks" not in json.loads(get(address, "/search", q="grandmother")[1])["hits"][0]


@pytest.mark.parametrize(
    ("parameters", "status"),
    [({"q": " "}, 400), ({}, 422), ({"q": "a", "k": 0}, 422), ({"q": "a", "k": 101}, 422), ({"q": "a" * 2001}, 422)],
)
def test_bad_questions_are_refused(address, parameters, status):
    code, body, _ = get(address, "/search", **parameters)
    assert code == status and json.loads(body)["detail"]


def test_the_prompt_reaches_the_model_but_not_bm25(store):
    encoder = Bags()
    hits = find(store, encoder, "grandmother", hybrid=True, prompt="station: ")
    find(store, encoder, "grandmother")
    assert encoder.seen == ["station: grandmother", "my query: grandmother"]
    assert [hit.entry.id for hit in hits if "bm25" in hit.ranks] == ["t2"]


def test_an_encoder_of_another_length_is_refused(store):
    encoder = Bags()
    encoder.dimension = 7
    with pytest.raises(LusiferError, match="24 dimensions, the model makes 7; use 'tiny'"):
        make_router(store, encoder)


def test_the_page_asks_nothing_of_other_servers(address):
    status, body, headers = get(address, "/")
    assert status == 200 and body.startswith("<!doctype html>")
    outside = body.replace("http://www.w3.org/2000/svg", "")
    assert "http://" not in outside and "https://" not in outside and "//cdn" not in outside
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe-inline" not in policy.split("style-src")[0]


def test_the_map_is_computed_once_and_kept(address, store, monkeypatch):
    for _ in range(600):
        told = json.loads(get(address, "/map")[1])
        if told["status"] != "computing":
            break
        time.sleep(0.05)
    assert told["status"] == "ready" and told["count"] == len(TEXTS) and told["model"] == "tiny"
    assert told["languages"] == {"en": 4, "de": 1, "ar": 1, "fr": 1}
    assert {point["id"]: point["lang"] for point in told["points"]} == {f"t{i}": t[0] for i, t in enumerate(TEXTS)}
    assert all(0 <= point[axis] <= 1 for point in told["points"] for axis in "xy")
    assert max(len(point["text"]) for point in told["points"]) == 300
    monkeypatch.setattr(corpusmap, "plane", lambda vectors: pytest.fail("it is kept already"))
    while not (store.folder / "map.json").exists():
        time.sleep(0.02)
    assert CorpusMap(store).get()["points"] == told["points"]


def test_the_map_follows_the_texts_and_survives_damage(tmp_path):
    made = LanceStore.create(tmp_path / "index", IndexInfo("tiny", "0" * 16, DIM))
    assert finished(CorpusMap(made))["points"] == []
    drawn = CorpusMap(made)
    vectors = Bags().encode(["one", "two", "three"])
    made.upsert([Entry(str(i), "text", "en") for i in range(3)], vectors)
    assert len(finished(drawn)["points"]) == 3
    (made.folder / "map.json").write_text("{")
    assert len(finished(CorpusMap(made))["points"]) == 3


def test_a_map_that_fails_is_told_and_not_tried_again(store, tmp_path, monkeypatch):
    made = LanceStore.create(tmp_path / "index", IndexInfo("tiny", "0" * 16, DIM))
    calls = []

    def fail(vectors):
        calls.append(1)
        raise RuntimeError("no")

    monkeypatch.setattr(corpusmap, "plane", fail)
    drawn = CorpusMap(made)
    assert finished(drawn) == {"status": "failed"} and finished(drawn) == {"status": "failed"}
    assert calls == [1]


def test_principal_components_keep_the_widest_directions(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    some = np.random.default_rng(0).normal(size=(40, 8))
    wide = np.linalg.qr(some - some.mean(axis=0))[0] * [1, 9, 2, 1, 5, 1, 2, 1]
    points, method = plane(wide.astype(np.float32))
    assert method == "PCA" and points.min() == 0 and points.max() == 1
    for axis, widest in enumerate((1, 4)):
        assert abs(np.corrcoef(points[:, axis], wide[:, widest])[0, 1]) > 0.999


# In a browser


@pytest.fixture(params=[("light", 1280, 800), ("dark", 390, 844)], ids=["desktop", "phone"])
def page(request, browser, address):
    scheme, width, height = request.param
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": height})
    context.set_default_timeout(20_000)
    made = context.new_page()
    made.problems = []
    made.on("pageerror", lambda error: made.problems.append(str(error)))
    made.on("console", lambda line: made.problems.append(line.text) if line.type == "error" else None)
    made.goto(address)
    yield made
    context.close()
    assert made.problems == []


def expect(page, selector):
    """Waits without evaluating strings, which the page's policy forbids."""
    return pytest.importorskip("playwright.sync_api").expect(page.locator(selector))


def shown(page):
    return page.locator("#hits .text").all_inner_texts()


def search(page, query):
    page.fill("#q", query)
    with page.expect_response(lambda answer: "/search?" in answer.url):
        page.press("#q", "Enter")
    page.wait_for_selector("#hits li")


def test_typing_shows_ranked_texts(page):
    expect(page, "#state").to_contain_text("Type a question")
    assert "7 texts, 4 languages" in page.inner_text("#facts")
    page.type("#q", "railway station")  # No Enter: results come while typing.
    page.wait_for_selector("#hits li")
    assert shown(page)[0] == "where is the railway station"
    assert "English" in page.locator("#hits li").first.inner_text()
    assert "q=railway+station" in page.url
    page.select_option("#lang", "de")
    expect(page, "#hits li").to_have_count(1)
    assert shown(page) == ["der bahnhof station liegt am fluss"]
    page.fill("#q", "")
    expect(page, "#hits li").to_have_count(0)


def test_a_filter_can_be_typed(page):
    expect(page, "#columns").to_contain_text("topic (text)")
    search(page, "station")
    page.click("#columns button")
    assert page.input_value("#where") == "topic "
    page.type("#where", "= 'travel' AND lang = 'de'")
    page.press("#where", "Enter")
    expect(page, "#hits li").to_have_count(1)
    assert "where=topic" in page.url
    page.reload()
    expect(page, "#hits li").to_have_count(1)
    assert page.input_value("#where") == "topic = 'travel' AND lang = 'de'"
    page.fill("#where", "topic = 'food'")
    page.press("#where", "Enter")
    expect(page, "#state").to_contain_text("no filter")
    page.fill("#where", "subject = 'food'")
    page.press("#where", "Enter")
    expect(page, "#state.bad").to_contain_text("there is no column 'subject'")
    page.problems.clear()  # The browser itself reports the refusal.
    page.fill("#where", "")
    page.press("#where", "Enter")
    expect(page, "#hits li").to_have_count(7)


def test_nothing_runs_out_of_the_page(page):
    page.wait_for_selector("#wait", state="hidden")
    search(page, "attacker railway " + "x" * 400)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert "x" * 400 in shown(page)


def test_scripts_in_texts_and_queries_are_inert(page):
    search(page, ATTACK)
    assert shown(page)[0] == ATTACK
    page.wait_for_selector("#wait", state="hidden")
    assert page.evaluate("window.hacked") is None
    assert page.locator("#hits script, #hits img").count() == 0


def test_right_to_left_texts_run_so(page):
    search(page, "محطة القطار")
    assert shown(page)[0].startswith("أين")
    assert page.evaluate("getComputedStyle(document.querySelector('#hits .text')).direction") == "rtl"
    assert page.evaluate("getComputedStyle(document.querySelector('#q')).direction") == "rtl"


COLOURED = """() => {
  const canvas = document.querySelector("#map");
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  const seen = new Set();
  for (let i = 0; i < data.length; i += 4) if (data[i + 3] > 200) seen.add(data.slice(i, i + 3).join());
  return seen.size;
}"""


def test_the_map_is_drawn_and_can_be_read(page):
    page.wait_for_selector("#wait", state="hidden")
    assert page.evaluate(COLOURED) >= 4, "one colour for each language"
    before = page.evaluate("document.querySelector('#map').toDataURL()")
    search(page, "grandmother")
    assert page.evaluate("document.querySelector('#map').toDataURL()") != before, "results stand out"
    place = page.evaluate("(() => place(state.points.find(point => point.id === 't2')))()")
    page.locator("#map").click(position={"x": place[0], "y": place[1]})
    assert page.inner_text("#tiptext") == "grandmother bakes bread"
    apart = "(() => Math.hypot(...[0, 1].map(i => place(state.points[0])[i] - place(state.points[1])[i])))()"
    far = page.evaluate(apart)
    page.locator("#map").dblclick(position={"x": place[0], "y": place[1]})
    assert page.evaluate(apart) == pytest.approx(2.5 * far, rel=1e-3)
    page.click("#whole")
    assert page.evaluate(apart) == pytest.approx(far, rel=1e-3)
    page.click("#legend button:has-text('German')")
    assert page.get_attribute("#legend button:has-text('German')", "aria-pressed") == "true"


def test_errors_and_no_results_are_told(page):
    page.wait_for_selector("#wait", state="hidden")
    page.route("**/search?*", lambda route: route.fulfill(status=400, json={"detail": "the index is <b>damaged</b>"}))
    page.fill("#q", "one")
    page.press("#q", "Enter")
    page.wait_for_selector("#state.bad")
    assert page.inner_text("#state") == "the index is <b>damaged</b>"
    page.unroute("**/search?*")
    page.route("**/search?*", lambda route: route.fulfill(json={"hits": [], "milliseconds": 1}))
    page.press("#q", "Enter")
    page.wait_for_selector("#state:not(.bad)")
    assert "Nothing found" in page.inner_text("#state")
    page.unroute("**/search?*")
    page.route("**/search?*", lambda route: route.abort())
    page.press("#q", "Enter")
    page.wait_for_selector("#state.bad")
    assert "does not answer" in page.inner_text("#state")
    page.unroute("**/search?*")
    loading = {"status": 503, "json": {"error": {"message": "the model is still being loaded"}}}
    page.route("**/search?*", lambda route: route.fulfill(**loading), times=1)
    page.fill("#q", "grandmother")
    page.press("#q", "Enter")
    expect(page, "#state.bad").to_contain_text("still being loaded")
    expect(page, "#hits li").to_have_count(7)  # Asked again by itself.
    # The browser itself reports the answers made up here.
    page.problems.clear()


def test_an_empty_index_says_so(browser, tmp_path):
    told, server = serving(LanceStore.create(tmp_path / "index", IndexInfo("tiny", "0" * 16, DIM)))
    page = browser.new_page()
    page.goto(told)
    expect(page, "#state").to_contain_text("The index is empty")
    expect(page, "#wait").to_have_text("No texts yet.")
    page.close()
    server.should_exit = True
