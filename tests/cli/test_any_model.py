"""Encode, index and serve take any Sentence Transformers model: a plain encoder, or token vectors alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer

from lusifer.loading import load_checkpoint
from lusifer.model.text_encoder import TextEncoder
from support.bert import save_bert
from support.serving import serving
from support.tiny import CORPUS, save_encoder_tokenizer

TEXTS = [*CORPUS, "cat"]


@pytest.fixture(scope="module", params=["encoder", "static"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any") / "model"
    if request.param == "encoder":
        return str(save_bert(folder, prompts={"query": "she reads ", "document": "the "}))
    save_encoder_tokenizer(folder.with_name("tokenizer"))
    tokens = StaticEmbedding(
        Tokenizer.from_file(str(folder.with_name("tokenizer") / "tokenizer.json")), embedding_dim=16
    )
    SentenceTransformer(modules=[tokens]).save(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def plain(model):
    return SentenceTransformer(model, device="cpu")


@pytest.fixture
def source(tmp_path):
    (tmp_path / "in.txt").write_text("\n".join(TEXTS) + "\n")
    return tmp_path / "in.txt"


def test_encode(model, plain, source, tmp_path, call):
    code, _, err = call("encode", model, source, tmp_path / "v.npy", "--precision", "float32", "-q")
    assert code == 0, err
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), plain.encode_document(TEXTS), atol=1e-5)


def test_index_and_search(model, plain, source, tmp_path, call):
    pytest.importorskip("lancedb")
    code, _, err = call("index", "add", tmp_path / "index", source, "--model", model, "-q")
    assert code == 0, err
    hits = json.loads(call("search", tmp_path / "index", "milk and rain", "--json")[1])["hits"]
    options = {"normalize_embeddings": True}
    cosines = plain.encode_document(TEXTS, **options) @ plain.encode_query(["milk and rain"], **options)[0]
    assert [hit["text"] for hit in hits] == [TEXTS[row] for row in np.argsort(-cosines)[:10]]
    assert [hit["score"] for hit in hits] == pytest.approx(sorted(cosines, reverse=True), abs=1e-3)


def test_serve(model, plain):
    with serving(TextEncoder(load_checkpoint(model, device="cpu"))) as client:
        for role, encode in (("query", plain.encode_query), ("document", plain.encode_document)):
            answer = client.post("/v1/embeddings", json={"model": "tiny", "input": TEXTS, "input_type": role})
            assert answer.status_code == 200, answer.text
            found = [row["embedding"] for row in answer.json()["data"]]
            np.testing.assert_allclose(found, encode(TEXTS), atol=1e-5)
