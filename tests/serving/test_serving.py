"""The server as clients see it: over real sockets, with OpenAI's own client, and with clients that mean no good."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import numpy as np
import openai
import pytest
import schemathesis
import torch
from fastapi import APIRouter, Request
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    response_schema_conformance,
    status_code_conformance,
)

from lusifer import LusiferError
from lusifer.loading import load_checkpoint
from lusifer.model.sentence_transformer import save_atomically
from lusifer.model.text_encoder import TextEncoder
from lusifer.serving import server as httpserver
from lusifer.serving import service as embedservice
from lusifer.serving.app import create_app
from lusifer.serving.limits import Limits, Phase
from lusifer.serving.service import truncated_ids
from support.command import mistake
from support.serving import Gated, build, embed, metric, serving, vectors, wait_for
from support.tiny import CORPUS

# Unit vectors in float32 whose sums ran in another order, as their batches differ; JSON and base64 are exact.
TOLERANCE = 1e-5
SMALL = Limits(max_body=20_000, body_timeout=0.7)


@pytest.fixture(scope="module")
def encoder(tiny_encoder, tiny_llm):
    return Gated(build(tiny_encoder, tiny_llm))


@pytest.fixture(scope="module")
def client(encoder):
    with serving(encoder, limits=SMALL) as found:
        yield found


@pytest.fixture(scope="module")
def official(client):
    return openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)


# What is asked for


def test_the_official_client_gets_the_vectors_of_the_library(official, encoder):
    expected = encoder.encode(CORPUS)
    for value in (CORPUS, encoder.tokenize(CORPUS)):
        for options in ({}, {"encoding_format": "float"}):  # The client's own default is base64.
            answer = official.embeddings.create(model="tiny", input=value, user="someone", **options)
            assert [row.index for row in answer.data] == list(range(len(CORPUS)))
            np.testing.assert_allclose([row.embedding for row in answer.data], expected, atol=TOLERANCE)
            tokens = sum(map(len, encoder.tokenize(CORPUS)))
            assert answer.usage.prompt_tokens == answer.usage.total_tokens == tokens
            assert answer.model == "tiny" and answer.object == "list"
    for value in (CORPUS[0], encoder.tokenize(CORPUS[:1])[0]):
        answer = official.embeddings.create(model="tiny", input=value)
        np.testing.assert_allclose(answer.data[0].embedding, expected[0], atol=TOLERANCE)
    assert [model.id for model in official.models.list()] == ["tiny"]
    assert official.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        official.embeddings.create(model="text-embedding-3-small", input="cat")
    with pytest.raises(openai.NotFoundError):
        official.models.retrieve("other/model")


def test_base64_is_little_endian_float32(client):
    answer = embed(client, "cat", encoding_format="base64").json()["data"][0]["embedding"]
    found = np.frombuffer(base64.b64decode(answer), dtype="<f4")
    np.testing.assert_array_equal(found, vectors(embed(client, "cat"))[0])


def test_dimensions_are_cut_and_normalised_again(client, encoder):
    whole = encoder.encode(CORPUS)
    for size in (1, 7, encoder.dimension):
        found = vectors(embed(client, CORPUS, dimensions=size))
        expected = whole[:, :size] / np.linalg.norm(whole[:, :size], axis=1, keepdims=True)
        np.testing.assert_allclose(found, expected, atol=10 * TOLERANCE)  # Divided by a norm below one.


@pytest.mark.parametrize(
    ("options", "prompt"),
    [
        ({}, ""),
        ({"input_type": "query"}, "she reads "),
        ({"input_type": "search_query"}, "she reads "),
        ({"prompt_name": "query"}, "she reads "),
        ({"input_type": "search_document"}, ""),
        ({"input_type": "passage"}, ""),
    ],
)
def test_instructions_are_the_prompts_of_the_model(client, encoder, options, prompt):
    expected = encoder.encode([prompt + text for text in CORPUS])
    answer = embed(client, CORPUS, **options)
    np.testing.assert_allclose(vectors(answer), expected, atol=TOLERANCE)
    assert answer.json()["usage"]["prompt_tokens"] == sum(map(len, encoder.tokenize([prompt + t for t in CORPUS])))


def test_the_models_default_prompt_holds(tiny_encoder, tiny_llm):
    model = build(tiny_encoder, tiny_llm)
    model.default_prompt_name = "query"
    with serving(TextEncoder(model)) as client:
        np.testing.assert_allclose(vectors(embed(client, CORPUS)), model.encode(CORPUS), atol=TOLERANCE)


def test_many_clients_at_a_time_get_what_each_gets_alone(client, encoder):
    groups = [[f"{CORPUS[i % 8]} {CORPUS[j % 8]}"[: 5 + 7 * i] for j in range(1 + i % 5)] for i in range(40)]
    before = metric(client, "lusifer_batch_tokens_count")
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda texts: vectors(embed(client, texts)), groups))
    for texts, own in zip(groups, found, strict=True):
        np.testing.assert_allclose(own, encoder.encode(texts), atol=TOLERANCE)
    assert metric(client, "lusifer_batch_tokens_count") - before < len(groups), "nothing was batched"


def test_long_texts_are_cut_as_in_the_library_or_refused(client, encoder):
    long = "the cat sat on the mat " * 40
    answer = embed(client, ["cat", long])
    np.testing.assert_allclose(vectors(answer), encoder.encode(["cat", long]), atol=TOLERANCE)
    assert answer.headers["x-truncated-texts"] == "1"
    refused = embed(client, ["cat", long], truncate=False)
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "context_length_exceeded"
    assert "input[1]" in refused.json()["error"]["message"]
    assert embed(client, "cat", truncate=False).headers["x-truncated-texts"] == "0"


def test_of_a_very_long_text_only_its_beginning_is_tokenised(encoder, monkeypatch):
    exact = encoder.tokenizer.decode(encoder.tokenize(["the cat sat on the mat " * 50])[0], skip_special_tokens=True)
    texts = ["cat", exact, CORPUS[1] * 400, "x" * 5000, "日本" * 4000, " " * 8000 + "cat", "dog " * 100_000]
    expected = [encoder.tokenize([text])[0] for text in texts]
    read = []
    kind = type(encoder.tokenizer)
    whole = kind._encode_plus

    def counting(self, text, *args, **kwargs):
        read.append(sum(map(len, text)) if isinstance(text, list) else len(text))
        return whole(self, text, *args, **kwargs)

    monkeypatch.setattr(kind, "_encode_plus", counting)
    found, long = truncated_ids(encoder, texts)
    assert found == expected
    lengths = [len(encoder.tokenizer(text, truncation=False, verbose=False)["input_ids"]) for text in texts]
    assert long == [row for row, length in enumerate(lengths) if length > 64]
    read.clear()
    truncated_ids(encoder, [texts[-1]])
    assert 0 < sum(read) < 0.1 * len(texts[-1])
    monkeypatch.setattr(embedservice, "_CHARACTERS", 1)  # As if a token had more characters than expected.
    assert truncated_ids(encoder, texts) == (expected, long)


# Mistakes


WRONG = [
    (b"", "invalid_json", None, "not JSON"),
    (b"{", "invalid_json", None, "not JSON"),
    (b"[]", "invalid_json", None, "JSON object"),
    (b'{"input": NaN}', "invalid_json", None, "NaN"),
    (b"\xff\xfe\x00", "invalid_json", None, "not JSON"),
    (b'{"input": ' + b"[" * 9000, "invalid_json", None, "not JSON"),
    (b'{"input": [' + b"9" * 5000 + b"]}", "invalid_json", None, "not JSON"),
    (b"{}", None, "input", "required"),
    (b'{"input": []}', None, "input", "input: List should have at least 1 item"),
    (b'{"input": ""}', None, "input", "input: String should have at least 1 character"),
    (b'{"input": ["a", ""]}', None, "input", r"input\[1\]: String should have at least 1 character"),
    (b'{"input": [[]]}', None, "input", r"input\[0\]: List should have at least 1 item"),
    (b'{"input": null}', None, "input", "a string, a list of strings, or token ids"),
    (b'{"input": 5}', None, "input", "a string, a list of strings, or token ids"),
    (b'{"input": true}', None, "input", "a string, a list of strings, or token ids"),
    (b'{"input": 1.5}', None, "input", "a string, a list of strings, or token ids"),
    (b'{"input": {"a": 1}}', None, "input", "a string, a list of strings, or token ids"),
    (b'{"input": [{"a": 1}]}', None, "input", r"input\[0\]: Input should be a valid list"),
    (b'{"input": ["a", 1]}', None, "input", r"input\[1\]: Input should be a valid string"),
    (b'{"input": [1, "a"]}', None, "input", r"input\[1\]: Input should be a valid integer"),
    (b'{"input": [1.5]}', None, "input", r"input\[0\]: Input should be a valid list"),
    (b'{"input": [true]}', None, "input", r"input\[0\]: Input should be a valid integer"),
    (b'{"input": [[1], 2]}', None, "input", r"input\[1\]: Input should be a valid list"),
    (b'{"input": [[1], [2, true]]}', None, "input", r"input\[1\]\[1\]: Input should be a valid integer"),
    (b'{"input": [-1]}', None, "input", r"input\[0\]: Input should be greater than or equal to 0"),
    (b'{"input": [1000000]}', None, "input", "no token id of this model: they are 0 to"),
    (b'{"input": [' + b"9" * 4000 + b"]}", None, "input", "no token id"),
    (b'{"input": [' + b"5," * 64 + b"5]}", "context_length_exceeded", "input", "65 tokens"),
    (b'{"input": "\\ud800x"}', None, "input", "input: Input should be a valid string, .* unicode"),
    (b'{"input": ["a", "x\\udfff"]}', None, "input", r"input\[1\]: .* unicode"),
    (json.dumps({"input": ["a"] * 2049}).encode(), None, "input", "at most 2048 items"),
    (json.dumps({"input": [[5]] * 2049}).encode(), None, "input", "at most 2048 items"),
    (b'{"input": "a", "inputs": 1}', None, "inputs", "there are input, model"),
    (b'{"input": "a", "\\ud800": 1}', None, "\ud800", "unknown field"),
    (b'{"input": "a", "dimensions": 0}', None, "dimensions", "greater"),
    (b'{"input": "a", "dimensions": 49}', None, "dimensions", "has 48"),
    (b'{"input": "a", "dimensions": 1.0}', None, "dimensions", "integer"),
    (b'{"input": "a", "encoding_format": "int8"}', None, "encoding_format", "base64"),
    (b'{"input": "a", "truncate": "yes"}', None, "truncate", "boolean"),
    (b'{"input": "a", "model": 3}', None, "model", "string"),
    (b'{"input": "a", "input_type": "clustering"}', None, "input_type", "there are document, query"),
    (b'{"input": "a", "prompt_name": "search_query"}', None, "prompt_name", "there are document, query"),
    (b'{"input": "a", "prompt_name": "query", "input_type": "query"}', None, "prompt_name", "not both"),
    (b'{"input": [5], "input_type": "query"}', None, "input_type", "token ids"),
]


@pytest.mark.parametrize(("body", "code", "param", "message"), WRONG, ids=[str(row[0][:40]) for row in WRONG])
def test_a_wrong_request_is_400_in_one_line(client, body, code, param, message):
    answer = client.post("/v1/embeddings", content=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["code"] == code and error["param"] == param
    assert re.search(message, error["message"]) and "\n" not in error["message"] and len(error["message"]) < 400


def test_other_paths_and_methods_have_the_same_errors(client):
    for method, path, status in (("GET", "/v1/embeddings", 405), ("POST", "/v2/x", 404), ("GET", "/%ff%00", 404)):
        answer = client.request(method, path)
        assert answer.status_code == status and answer.json()["error"]["type"] == "invalid_request_error"


@pytest.fixture(scope="module")
def page(encoder, tmp_path_factory):
    """The routes of a search page."""
    pytest.importorskip("lancedb")
    from lusifer.search.lance import LanceStore
    from lusifer.search.page import make_router
    from lusifer.search.store import Entry, IndexInfo

    store = LanceStore.create(tmp_path_factory.mktemp("page") / "index", IndexInfo("tiny", "0" * 16, encoder.dimension))
    store.upsert([Entry(str(row), text, "en") for row, text in enumerate(CORPUS)], encoder.encode(CORPUS))
    store.tidy()
    return make_router(store, encoder)


def test_no_request_of_the_schema_breaks_the_server(encoder, page):
    with serving(encoder, limits=SMALL, routers=[page]) as client:
        _fuzz(client)


def _fuzz(client):
    schema = schemathesis.openapi.from_url(f"{client.base_url}/openapi.json")
    tried = []
    for operation in schema.get_all_operations():
        operation = operation.ok()

        @settings(
            max_examples=60 if operation.method == "post" else 10,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(operation.as_strategy())
        def fuzz(case):
            answer = case.call(timeout=20)
            tried.append((case.operation.path, answer.status_code))
            checks = [not_a_server_error, status_code_conformance, response_schema_conformance]
            case.validate_response(answer, checks=checks)

        fuzz()
    assert {("/v1/embeddings", 200), ("/v1/embeddings", 400), ("/search", 200)} <= set(tried)


def test_numbers_that_are_not_finite_are_an_error_and_not_json(tiny_encoder, tiny_llm):
    model = build(tiny_encoder, tiny_llm)
    with torch.no_grad():
        model[0].auto_model.encoder.get_input_embeddings().weight[5] = float("nan")
    with serving(TextEncoder(model)) as client:
        answer = embed(client, [[0, 5, 2]])
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "not_finite"
        assert embed(client, [[0, 6, 2]]).status_code == 200


# Clients that mean no good


@pytest.fixture
def raw(client):
    """A bare connection."""
    made = []

    def connect(data=b""):
        made.append(socket.create_connection(("127.0.0.1", client.port), timeout=10))
        made[-1].sendall(data)
        return made[-1]

    yield connect
    for one in made:
        one.close()
    # Whatever happened, nobody else is harmed.
    assert embed(client, "cat").status_code == 200


def answer_of(connection):
    data = b""
    try:
        while chunk := connection.recv(65536):
            data += chunk
    except ConnectionResetError:
        pass
    return data


HEAD = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\n"


def test_a_body_that_is_announced_too_large_is_refused_unread(raw):
    begin = time.monotonic()
    connection = raw(HEAD + b"Content-Length: 9999999999\r\n\r\n")
    assert connection.recv(65536).startswith(b"HTTP/1.1 413")
    assert time.monotonic() - begin < 1


def test_an_endless_body_is_cut_off(raw):
    connection = raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    sent, chunk = 0, b"2000\r\n" + b"a" * 8192 + b"\r\n"
    connection.settimeout(0.01)
    data = b""
    while not data and sent < 100_000_000:
        try:
            connection.send(chunk)
            sent += len(chunk)
        except TimeoutError:
            pass
        with suppress(TimeoutError):
            data = connection.recv(65536)
    assert data.startswith(b"HTTP/1.1 413")  # The body may come later, or be lost to a reset: more is under way.
    assert sent < 1_000_000


def test_a_slow_body_ends_after_its_time(raw, client):
    begin = time.monotonic()
    connection = raw(HEAD + b"Content-Length: 10000\r\n\r\n")
    connection.settimeout(0.05)
    data = b""
    while not data and time.monotonic() - begin < 8:
        connection.sendall(b" ")
        with suppress(TimeoutError):
            data = connection.recv(65536)
    assert data.startswith(b"HTTP/1.1 408")
    assert 0.6 < time.monotonic() - begin < 3


@pytest.mark.parametrize("beginning", [b"", b"POST /v1/emb", HEAD + b"X-A: b"], ids=["silent", "line", "header"])
def test_a_slow_head_ends_after_its_time(raw, monkeypatch, beginning):
    monkeypatch.setattr(httpserver.Protocol, "header_timeout", 0.5)
    begin = time.monotonic()
    assert answer_of(raw(beginning)).startswith(b"HTTP/1.1 408")
    assert 0.4 < time.monotonic() - begin < 3


def test_a_slow_head_after_a_first_request_ends_too(raw, monkeypatch):
    monkeypatch.setattr(httpserver.Protocol, "header_timeout", 0.5)
    connection = raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    first = b""
    while b"}" not in first:  # Head and body may arrive apart.
        first += connection.recv(65536)
    assert first.startswith(b"HTTP/1.1 200")
    connection.sendall(b"GET /hea")
    assert answer_of(connection).startswith(b"HTTP/1.1 408")


def test_what_is_not_http_is_400(raw):
    for data in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20 + b"\r\n\r\n", b"GET / HTTP/9\r\n\r\n"):
        assert b"invalid_http" in answer_of(raw(data))
    assert b" 400 " in answer_of(raw(HEAD + b"X: " + b"a" * 200_000))


def test_too_many_connections_get_503(raw, client, monkeypatch):
    monkeypatch.setattr(httpserver.Protocol, "max_connections", 12)
    many = [raw() for _ in range(20)]
    request = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    answers = []
    for connection in many:
        connection.sendall(request)
        answers.append(answer_of(connection))
    # The client that looks on has a connection too, and may have had another one.
    assert [b"200" in answer[:12] for answer in answers[:10]] == [True] * 10
    assert all(answer.startswith(b"HTTP/1.1 503") for answer in answers[12:])
    assert all(b"retry-after: 1" in answer and b"too_many_connections" in answer for answer in answers[12:])
    assert answer_of(raw(request)).startswith(b"HTTP/1.1 200"), "and when they have left there is room again"


def test_answers_do_not_wait_for_an_acknowledgement():
    with httpserver.listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_work_of_a_client_that_left_never_reaches_the_model(raw, client, encoder):
    body = json.dumps({"input": [[0, 77, 2]] * 20}).encode()
    request = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with encoder.held(), ThreadPoolExecutor(1) as pool:
        first = pool.submit(embed, client, "cat")
        assert encoder.busy.wait(10)
        gone, half = raw(request), raw(request)
        wait_for(lambda: metric(client, "lusifer_queue_tokens") == 120)
        gone.close()
        half.shutdown(socket.SHUT_WR)
        wait_for(lambda: metric(client, "lusifer_queue_tokens") == 0)
        encoder.open.set()
        assert first.result().status_code == 200
    assert embed(client, "dog").status_code == 200
    assert [0, 77, 2] not in encoder.seen
    assert metric(client, "lusifer_requests_total", path="/v1/embeddings", status="499") >= 2


# Load


def test_beyond_its_queue_the_server_answers_429_and_the_queue_does_not_grow(encoder):
    with serving(encoder, batch_tokens=64, queue_tokens=300) as client, ThreadPoolExecutor(60) as pool:
        with encoder.held():
            running = [pool.submit(embed, client, [[0, 5, 6, 2]] * 5) for _ in range(60)]  # 20 tokens each.
            wait_for(lambda: metric(client, "lusifer_rejected_total") >= 40)
            assert 200 < metric(client, "lusifer_queue_tokens") <= 300
        answers = [one.result() for one in running]
        counts = {status: sum(one.status_code == status for one in answers) for status in (200, 429)}
        assert counts[200] + counts[429] == 60 and 11 <= counts[200] <= 20
        for refused in (one for one in answers if one.status_code == 429):
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["type"] == "rate_limit_error"
        assert embed(client, "cat").status_code == 200, "and afterwards there is room again"


def test_the_official_client_comes_back_after_429(encoder):
    with serving(encoder, batch_tokens=64, queue_tokens=64) as client, ThreadPoolExecutor(8) as pool:
        official = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=5)
        with encoder.held():
            ids = [[0, 5, 6, 2]] * 16
            running = [pool.submit(official.embeddings.create, model="tiny", input=ids) for _ in range(4)]
            wait_for(lambda: metric(client, "lusifer_rejected_total") >= 1)
        assert all(len(one.result().data) == 16 for one in running)


def test_too_many_requests_and_bodies_at_a_time_get_429(encoder):
    limits = Limits(max_requests=3, max_body=2000)
    with serving(encoder, limits=limits) as client, ThreadPoolExecutor(8) as pool:
        with encoder.held():
            running = [pool.submit(embed, client, "cat") for _ in range(8)]
            wait_for(lambda: metric(client, "lusifer_rejected_total") == 5)
            assert client.get("/ready").status_code == 200
        assert sorted(one.result().status_code for one in running) == [200] * 3 + [429] * 5
    with serving(encoder, limits=Limits(max_body=2000)) as client:
        head = HEAD + b"Content-Length: 2000\r\n\r\n" + b" " * 1900
        held = [socket.create_connection(("127.0.0.1", client.port), timeout=10) for _ in range(9)]
        for connection in held:
            connection.sendall(head)
        wait_for(lambda: metric(client, "lusifer_rejected_total") == 1)
        for connection in held:
            connection.close()
        wait_for(lambda: metric(client, "lusifer_requests_in_flight") == 0)
        assert embed(client, "a" * 1500).status_code == 200


def test_a_request_that_waits_too_long_is_504(encoder):
    with serving(encoder, limits=Limits(timeout=0.6)) as client, encoder.held():
        begin = time.monotonic()
        answer = embed(client, "cat")
        assert 0.5 < time.monotonic() - begin < 5
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
        assert "within 0.6 s" in answer.json()["error"]["message"]
        encoder.open.set()
        assert embed(client, "cat").status_code == 200


# Operation


def test_keys(encoder):
    page = APIRouter()

    @page.get("/page")
    async def show():
        return "page"

    @page.get("/own")
    async def own(request: Request):
        return (await request.app.state.service.embed(["cat", "dog"], "she reads ")).tolist()

    with serving(encoder, api_keys=["one", "zwei-ü"], routers=[page], public=["/page"]) as client:
        for header in (None, "Bearer", "Bearer on", "Bearer onee", "Basic one", "one", "Bearer zwei"):
            answer = client.post(
                "/v1/embeddings", json={"input": "a"}, headers={"Authorization": header} if header else {}
            )
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["code"] == "invalid_api_key"
        for path in ("/v1/models", "/own", "/openapi.json", "/nowhere"):
            assert client.get(path).status_code == 401
        for path in ("/health", "/ready", "/metrics", "/page"):
            assert client.get(path).status_code == 200
        for key in ("one", "zwei-ü"):
            headers = {b"Authorization": f"Bearer {key}".encode()}
            assert client.post("/v1/embeddings", json={"input": "a"}, headers=headers).status_code == 200
        found = client.get("/own", headers={"Authorization": "bearer one"}).json()
        np.testing.assert_allclose(found, encoder.encode(["she reads cat", "she reads dog"]), atol=TOLERANCE)


def test_metrics_count_what_happened(encoder):
    with serving(encoder) as client:
        answers = [embed(client, CORPUS[:count]) for count in (1, 2, 3)]
        embed(client, [])
        embed(client, "the cat sat on the mat " * 40)
        tokens = sum(answer.json()["usage"]["prompt_tokens"] for answer in answers) + 64
        assert metric(client, "lusifer_tokens_total") == metric(client, "lusifer_batch_tokens_sum") == tokens
        assert metric(client, "lusifer_texts_total") == metric(client, "lusifer_batch_texts_sum") == 7
        assert metric(client, "lusifer_requests_total", path="/v1/embeddings", status="200") == 4
        assert metric(client, "lusifer_requests_total", path="/v1/embeddings", status="400") == 1
        assert metric(client, "lusifer_request_seconds_count", path="/v1/embeddings") == 5
        assert metric(client, "lusifer_truncated_texts_total") == 1
        assert metric(client, "lusifer_model_seconds_total") > 0
        assert metric(client, "lusifer_queue_tokens") == metric(client, "lusifer_requests_in_flight") == 0
        for number in range(5):
            client.get(f"/{number}")
        assert metric(client, "lusifer_requests_total", path="other", status="404") == 5


def test_while_the_model_loads_the_server_lives_and_is_not_ready(encoder):
    loaded = threading.Event()

    def load():
        assert loaded.wait(20)
        return encoder

    phase = Phase()
    listening = httpserver.listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    app = create_app(load, "tiny", phase=phase)
    thread = threading.Thread(target=httpserver.run, args=(app, listening, phase), kwargs={"drain_timeout": 5})
    thread.start()
    with httpx.Client(base_url=url, timeout=20) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/ready").json() == {"status": "loading"}
        for answer in (client.get("/ready"), embed(client, "cat")):
            assert answer.status_code == 503 and answer.headers["retry-after"] == "5"
        loaded.set()
        wait_for(lambda: client.get("/ready").status_code == 200)
        assert embed(client, "cat").status_code == 200
    phase.draining = True
    thread.join(20)
    assert not thread.is_alive()


def test_a_model_that_cannot_be_loaded_ends_the_server():
    def load():
        raise LusiferError("no such thing")

    phase = Phase()
    with pytest.raises(LusiferError, match="no such thing"):
        app = create_app(load, "tiny", phase=phase)
        httpserver.run(app, httpserver.listen("127.0.0.1", 0), phase, drain_timeout=5)


# The command


@pytest.fixture(scope="module")
def checkpoint(tiny_encoder, tiny_llm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "model"
    save_atomically(build(tiny_encoder, tiny_llm), folder)
    return folder


def test_sigterm_finishes_what_is_in_hand_and_exits_with_0(checkpoint):
    command = [sys.executable, "-m", "lusifer", "serve", str(checkpoint), "--port", "0", "--precision", "float32"]
    process = subprocess.Popen([*command, "--name", "tiny", "--batch-tokens", "64"], stderr=subprocess.PIPE, text=True)
    try:
        line = process.stderr.readline()
        url = re.match(r"(http://127.0.0.1:\d+)/v1", line)[1]
        example = process.stderr.readline()
        assert example.startswith(f"curl {url}/v1/embeddings -d ")
        assert "ready: 48 dimensions, float32, cpu" in process.stderr.readline()
        with httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(1) as pool:
            wait_for(lambda: client.get("/ready").status_code == 200)
            shown = subprocess.run(["sh", "-c", f"{example.strip()} -s"], capture_output=True, text=True, check=True)
            assert len(json.loads(shown.stdout)["data"]) == 2
            text = "the cat sat on the mat " * 8
            running = pool.submit(httpx.post, f"{url}/v1/embeddings", json={"input": [text] * 500}, timeout=60)
            wait_for(lambda: metric(client, "lusifer_queue_tokens") > 1000)
            process.send_signal(signal.SIGTERM)
            wait_for(lambda: client.get("/ready").json() == {"status": "draining"})
            time.sleep(0.5)
            refused = httpx.post(f"{url}/v1/embeddings", json={"input": "cat"})  # On a connection of its own.
            assert refused.status_code == 503 and refused.headers["connection"] == "close"
            assert refused.json()["error"]["code"] == "draining"
            assert not running.done()
            assert len(running.result().json()["data"]) == 500
        assert process.wait(60) == 0  # Libraries take seconds to end on a busy machine.
        assert process.stderr.read() == "stopped\n"
    finally:
        process.kill()
        process.wait()


def test_mistakes_of_the_command(call, checkpoint, monkeypatch):  # noqa: F811
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = mistake(*call("serve", checkpoint, "--port", port))
        assert f"127.0.0.1:{port}: address already in use" in error and "--port" in error
    assert "no checkpoint at '/nowhere'" in mistake(*call("serve", "/nowhere", "-q"))
    assert "no precision 'int4'" in mistake(*call("serve", checkpoint, "-q", "--port", "0", "--precision", "int4"))
    assert "key is empty" in mistake(*call("serve", checkpoint, "-q", "--api-key", " "))
    assert "cannot listen on" in mistake(*call("serve", checkpoint, "-q", "--host", "no.such.host.invalid"))
    # Not a folder and not on any hub: found out while loading.
    code, out, err = call("serve", "nobody/nothing", "-q", "--port", "0")
    assert code == 2 and "cannot read the checkpoint 'nobody/nothing'" in err and "Traceback" not in err
    monkeypatch.setattr("lusifer.cli.serve.find_spec", lambda name: None if name == "fastapi" else name)
    assert "serving needs fastapi: pip install 'lusifer[serving]'" in mistake(*call("serve", checkpoint))


def test_a_search_page_shares_the_server(call, checkpoint, tiny_encoder, tiny_llm, tmp_path):  # noqa: F811
    pytest.importorskip("lancedb")
    (tmp_path / "texts.txt").write_text("\n".join(CORPUS), encoding="utf-8")
    index = tmp_path / "index"
    assert call("index", "add", index, tmp_path / "texts.txt", "--model", checkpoint, "-q")[0] == 0
    assert "no index at" in mistake(*call("serve", checkpoint, "-q", "--ui", tmp_path / "nowhere"))
    other = build(tiny_encoder, tiny_llm)
    with torch.no_grad():  # Other directions: a model that only scales another's may query its index.
        for parameter in other[0].auto_model.connector.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    save_atomically(other, tmp_path / "other")
    assert "holds vectors of" in mistake(*call("serve", tmp_path / "other", "-q", "--port", "0", "--ui", index))
    command = [sys.executable, "-m", "lusifer", "serve", str(checkpoint), "--port", "0", "--ui", str(index)]
    environment = {**os.environ, "LUSIFER_API_KEY": "secret"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        url = re.match(r"(http://127.0.0.1:\d+)/v1", process.stderr.readline())[1]
        process.stderr.readline()
        assert process.stderr.readline() == f"search page: {url}/  (any user name, the key as password)\n"
        with httpx.Client(base_url=url, timeout=60, auth=("any", "secret")) as client:
            wait_for(lambda: client.get("/ready").status_code == 200, 60)
            assert httpx.get(url).status_code == 401
            assert httpx.get(url, headers={"Host": "attacker.example"}).status_code == 421
            assert "<html" in client.get("/").text
            hits = client.get("/search", params={"q": CORPUS[3], "k": 2}).json()["hits"]
            model = load_checkpoint(str(checkpoint))
            scores = model.encode_document(CORPUS) @ model.encode_query([CORPUS[3]])[0]
            assert hits[0]["text"] == CORPUS[scores.argmax()]
            # bfloat16 where this machine is faster with it, which the index was not made in.
            assert abs(hits[0]["score"] - scores.max()) < 0.01
            assert metric(client, "lusifer_texts_total") == 1, "the query went around the queue"
    finally:
        process.kill()
        process.wait()
