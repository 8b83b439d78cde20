"""The prompts of a model stand in front of the same texts, whatever command embeds them."""

from __future__ import annotations

import json

import numpy as np
import pytest

import lusifer
from lusifer import LusiferError
from lusifer.data.prompts import prompt_for
from lusifer.model.sentence_transformer import save_atomically
from support.command import mistake

TEXTS = ["the cat sat on the mat", "rain fell on the roof all night", "she reads a long book"]
QUERY = "the cat and the rain"
# What a model may come with: its prompts, and the name of its default one.
MODELS = {
    "query and document": ({"query": "she reads: ", "document": "the river: "}, None),
    "query and passage": ({"query": "she reads: ", "passage": "the river: "}, None),
    "query alone": ({"query": "she reads: "}, None),
    "default alone": ({"short": "the valley: "}, "short"),
    "query as default": ({"query": "she reads: ", "document": "the river: "}, "query"),
    "none": ({}, None),
}
OVERRIDES = {"prompt": ("--prompt", "my brother: "), "empty prompt": ("--prompt", ""), "name": ("--prompt-name", "odd")}


@pytest.fixture(params=list(MODELS))
def kind(request):
    return request.param


@pytest.fixture
def checkpoint(tiny_st, tmp_path, kind):
    return saved(tiny_st, tmp_path / "model", *MODELS[kind])


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("".join(f"{text}\n" for text in TEXTS))
    return path


def saved(model, path, prompts, default):
    model.prompts = {**prompts, "odd": "in the morning: "}
    model.default_prompt_name = default
    save_atomically(model, path)
    return path


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def overridden(model, texts, options):
    prompt = model.prompts["odd"] if options[0] == "--prompt-name" else options[1]
    return model.encode([prompt + text for text in texts], prompt="")


def indexed(path):
    from lusifer.search import open_store

    entries, vectors = open_store(str(path)).sample(100)
    return np.stack([dict(zip((e.text for e in entries), vectors, strict=True))[text] for text in TEXTS])


def scores(out):
    by_text = {hit["text"]: hit["score"] for hit in json.loads(out)["hits"]}
    return [by_text[text] for text in TEXTS]


def test_the_rule_is_that_of_sentence_transformers(checkpoint):
    model = lusifer.load(str(checkpoint))
    for role, encode in (("query", model.encode_query), ("document", model.encode_document), (None, model.encode)):
        close(model.encode([prompt_for(model, role) + QUERY], prompt=""), encode([QUERY]))
        assert (
            prompt_for(model, role, prompt="a: ") == prompt_for(model, role, prompt="a: ", prompt_name="odd") == "a: "
        )
        assert prompt_for(model, role, prompt_name="odd") == "in the morning: "
        with pytest.raises(LusiferError, match="no prompt 'clustering'; there are .*odd"):
            prompt_for(model, role, prompt_name="clustering")


@pytest.mark.parametrize(
    ("prompts", "default", "query", "document"),
    [
        ({"query": "q", "passage": "p", "corpus": "c"}, None, "q", "p"),
        ({"corpus": "c"}, "corpus", "c", "c"),
        ({"query": "", "document": ""}, "query", "", ""),
        ({"short": "s"}, "short", "s", "s"),
        ({}, "gone", "", ""),
        (None, None, "", ""),
    ],
)
def test_every_role_has_its_prompt(prompts, default, query, document):
    class Model:
        pass

    model = Model()
    model.prompts, model.default_prompt_name = prompts, default
    assert (prompt_for(model, "query"), prompt_for(model, "document")) == (query, document)


def test_encode_takes_texts_for_documents(call, checkpoint, texts, tmp_path):
    model = lusifer.load(str(checkpoint))
    encode = ("encode", checkpoint, texts, tmp_path / "v.npy", "--precision", "float32", "-q")
    assert call(*encode)[0] == 0
    close(np.load(tmp_path / "v.npy"), model.encode_document(TEXTS))
    assert call(*encode, "--prompt-name", "query")[0] == 0
    close(np.load(tmp_path / "v.npy"), model.encode_query(TEXTS))


def test_index_and_search_agree_with_the_model(call, checkpoint, texts, tmp_path):
    model = lusifer.load(str(checkpoint))
    index = tmp_path / "index"
    for _ in range(2):
        assert call("index", "add", index, texts, "--model", checkpoint, "-q")[0] == 0
    close(indexed(index), model.encode_document(TEXTS))
    wanted = model.encode_document(TEXTS) @ model.encode_query([QUERY])[0]
    for options in ((), ("--exact",)):
        code, out, _ = call("search", index, QUERY, "--json", *options)
        assert code == 0
        np.testing.assert_allclose(scores(out), wanted, atol=1e-4)


def test_the_pages_query_is_a_query(checkpoint, texts, tmp_path, call):
    pytest.importorskip("fastapi")
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    from lusifer.model.text_encoder import TextEncoder
    from lusifer.search import open_store
    from lusifer.search.page import make_router

    model = lusifer.load(str(checkpoint))
    assert call("index", "add", tmp_path / "index", texts, "--model", checkpoint, "-q")[0] == 0
    app = FastAPI()
    app.include_router(make_router(open_store(str(tmp_path / "index")), TextEncoder(model)))
    answer = TestClient(app).get("/search", params={"q": QUERY})
    wanted = model.encode_document(TEXTS) @ model.encode_query([QUERY])[0]
    np.testing.assert_allclose(scores(answer.text), wanted, atol=1e-4)


def test_mining_scores_as_the_teacher_does(call, checkpoint, tmp_path):
    model = lusifer.load(str(checkpoint))
    pairs = [{"query": f"{QUERY} {number}", "positive": text} for number, text in enumerate(TEXTS)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    positives = [pair["positive"] for pair in pairs]
    queries = [pair["query"] for pair in pairs]
    plain = (model.encode_query(queries) * model.encode_document(positives)).sum(1).mean()
    for number, (options, wanted) in enumerate(
        [((), plain)]
        + [
            (one, (overridden(model, queries, one) * overridden(model, positives, one)).sum(1).mean())
            for one in OVERRIDES.values()
        ]
    ):
        arguments = ("data", "mine", tmp_path / "pairs.jsonl", tmp_path / f"mined{number}.jsonl", "--model", checkpoint)
        code, out, err = call(*arguments, *options, "--negatives", "1", "--range-max", "2", "--json", "-q")
        assert code == 0, err
        assert json.loads(out)["mean_positive_score"] == pytest.approx(wanted, abs=2e-3)


@pytest.mark.parametrize("kind", ["query and document"], indirect=True)
@pytest.mark.parametrize("options", OVERRIDES.values(), ids=list(OVERRIDES))
def test_an_option_goes_before_the_models_prompts(call, checkpoint, texts, tmp_path, options):
    model = lusifer.load(str(checkpoint))
    wanted = overridden(model, TEXTS, options)
    assert call("encode", checkpoint, texts, tmp_path / "v.npy", *options, "--precision", "float32", "-q")[0] == 0
    close(np.load(tmp_path / "v.npy"), wanted)
    index = tmp_path / "index"
    assert call("index", "add", index, texts, "--model", checkpoint, *options, "-q")[0] == 0
    close(indexed(index), wanted)
    out = call("search", index, QUERY, "--json", *options)[1]
    np.testing.assert_allclose(scores(out), wanted @ overridden(model, [QUERY], options)[0], atol=1e-4)


@pytest.mark.parametrize("kind", ["query and document"], indirect=True)
def test_an_index_has_one_document_prompt(call, checkpoint, texts, tmp_path):
    index = tmp_path / "index"
    add = ("index", "add", index, texts, "-q", "--model", checkpoint)
    assert call(*add)[0] == 0
    assert json.loads(call("index", "info", index, "--json")[1])["prompt"] == "the river: "
    assert "document prompt: 'the river: '" in call("index", "info", index)[1]
    for options in OVERRIDES.values():
        said = mistake(*call(*add, *options))
        assert "was made with the document prompt 'the river: ', not" in said and "--prompt 'the river: '" in said
    assert call(*add, "--prompt", "the river: ")[0] == 0
    settings = checkpoint / "config_sentence_transformers.json"
    settings.write_text(settings.read_text().replace("the river: ", "the sea: "))
    assert "'the river: ', not 'the sea: '" in mistake(*call(*add))


@pytest.mark.parametrize("kind", ["query and document"], indirect=True)
def test_an_index_of_an_older_version_goes_on_without_a_prompt(call, checkpoint, texts, tmp_path):
    index = tmp_path / "index"
    add = ("index", "add", index, "--model", checkpoint, "-q")
    assert call(*add, texts, "--prompt", "")[0] == 0
    facts = json.loads((index / "facts.json").read_text())
    assert facts.pop("prompt") == ""
    (index / "facts.json").write_text(json.dumps(facts))
    (tmp_path / "more.txt").write_text("a new text\n")
    assert call(*add, tmp_path / "more.txt")[0] == 0
    model = lusifer.load(str(checkpoint))
    close(indexed(index), model.encode(TEXTS, prompt=""))
    assert "document prompt '', not 'a: '" in mistake(*call(*add, texts, "--prompt", "a: "))


@pytest.mark.parametrize("kind", ["query and document"], indirect=True)
def test_shards_of_one_run_have_one_prompt(call, checkpoint, texts, tmp_path):
    encode = ("encode", checkpoint, texts, f"{tmp_path}/out/", "-q", "--shard-rows", "1")
    assert call(*encode)[0] == 0
    assert json.loads((tmp_path / "out" / "_manifest.json").read_text())["prepared"]["prompt"] == "the river: "
    assert call(*encode)[0] == 0
    for options in OVERRIDES.values():
        assert "holds another run: prompt" in mistake(*call(*encode, *options))


@pytest.mark.parametrize("kind", ["query and document"], indirect=True)
def test_a_run_begun_by_an_older_version_goes_on_as_it_was(call, checkpoint, texts, tmp_path):
    out = tmp_path / "out"
    encode = ("encode", checkpoint, texts, f"{out}/", "-q", "--shard-rows", "1")
    assert call(*encode, "--prompt", "")[0] == 0
    wanted = (out / "part-00001.parquet").read_bytes()
    manifest = json.loads((out / "_manifest.json").read_text())
    for name in ("prompt", "prompt_name"):
        del manifest["settings"][name]
    del manifest["prepared"]["prompt"], manifest["shards"]
    manifest["complete"] = False
    (out / "_manifest.json").write_text(json.dumps(manifest))
    (out / "part-00001.parquet").unlink()
    assert call(*encode)[0] == 0
    assert (out / "part-00001.parquet").read_bytes() == wanted


@pytest.mark.parametrize("kind", ["none"], indirect=True)
def test_an_unknown_name_is_one_line(call, checkpoint, texts, tmp_path):
    assert call("index", "add", tmp_path / "index", texts, "--model", checkpoint, "-q")[0] == 0
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"query": "a", "positive": "b"}) + "\n")
    wrong = ("--prompt-name", "clustering")
    for arguments in (
        ("encode", checkpoint, texts, tmp_path / "v.npy", "-q"),
        ("index", "add", tmp_path / "new", texts, "--model", checkpoint, "-q"),
        ("search", tmp_path / "index", "cat"),
        ("search", tmp_path / "index", "--ui"),
        ("data", "mine", tmp_path / "pairs.jsonl", tmp_path / "mined.jsonl", "--model", checkpoint, "-q"),
        ("evaluate", checkpoint, "-q"),
    ):
        assert "no prompt 'clustering'; there are document, odd, query" in mistake(*call(*arguments, *wrong))
    assert not (tmp_path / "new").exists()
    both = ("--prompt", "a: ", "--instruction", "Find it")
    for arguments in (("encode", checkpoint, texts, tmp_path / "v.npy", "-q"), ("search", tmp_path / "index", "cat")):
        assert "either --prompt or --instruction" in mistake(*call(*arguments, *both))
