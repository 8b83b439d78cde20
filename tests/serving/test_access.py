"""Who is answered: names that point here, keys of programs and of browsers, and errors that look alike."""

from __future__ import annotations

import socket

import pytest
from fastapi import APIRouter, HTTPException

from support.serving import embed, serving
from support.toy_model import Toy

PAGE = APIRouter()


@PAGE.get("/")
async def show():
    return "page"


@PAGE.get("/search")
async def search(k: int):
    raise (HTTPException(429, "too many searches", headers={"Retry-After": "3"}) if k == 429 else ValueError(k))


def ask(client, host, path="/v1/models"):
    """The status for a Host as it is written; None leaves it out."""
    version, line = ("1.0", b"") if host is None else ("1.1", b"Host: %s\r\n" % host.encode())
    with socket.create_connection(("127.0.0.1", client.port), timeout=10) as connection:
        connection.sendall(f"GET {path} HTTP/{version}\r\n".encode() + line + b"Connection: close\r\n\r\n")
        data = b""
        while chunk := connection.recv(65536):
            data += chunk
    return int(data.split()[1]), data


GOOD = ["localhost", "LOCALHOST:8000", "localhost.", "127.0.0.1", "127.0.0.1:1", "[::1]:8000", "192.168.1.7:8000", None]
GOOD += ["models.example.org", "Models.Example.org.:443"]
BAD = ["attacker.example", "attacker.example:8000", "localhost.attacker.example", "127.0.0.1.attacker.example", "::1"]
BAD += ["example.org", "a@localhost", "localhost:8000:80", "[localhost]", "127.0.0.1@attacker.example", "", "*", "1"]


def test_only_names_that_are_known_are_answered():
    with serving(Toy, routers=[PAGE], allowed_hosts=["models.example.org"]) as client:
        for path in ("/v1/models", "/", "/ready", "/metrics", "/openapi.json"):
            assert [ask(client, host, path)[0] for host in GOOD] == [200] * len(GOOD)
        for path in ("/v1/models", "/", "/ready", "/metrics", "/search", "/nowhere"):
            refused = [ask(client, host, path) for host in BAD]
            assert [status for status, _ in refused if status not in (400, 421)] == []
            assert all(b'{"error": {"message"' in data for _, data in refused)
        assert b"'attacker.example'; the operator can allow it with --allowed-host" in ask(client, BAD[0])[1]
    with serving(Toy, allowed_hosts=["*"]) as client:
        assert ask(client, "attacker.example")[0] == 200


@pytest.mark.parametrize("path", ["/", "/search?k=1", "/map", "/docs"])
def test_a_key_is_for_the_page_too_and_a_browser_can_give_it(path):
    with serving(Toy, routers=[PAGE], api_keys=["one", "zwei-ü"]) as client:
        for given in (None, ("any", ""), ("one", "on"), ("one", ""), ("", "onee")):
            answer = client.get(path, auth=given)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
            # So a browser asks for it, and sends it from then on.
            assert answer.headers["www-authenticate"].startswith("Basic realm=")
        for given in (("any", "one"), ("", "zwei-ü".encode())):
            assert client.get(path, auth=given).status_code != 401
        assert client.get(path, headers={"Authorization": "Bearer one"}).status_code != 401
        for wrong in ("Basic", "Basic one", "Basic !!!", "Basic b25l"):
            assert client.get(path, headers={"Authorization": wrong.encode()}).status_code in (400, 401)


def test_what_a_browser_sends_by_itself_computes_nothing():
    with serving(Toy, api_keys=["one"]) as client:
        assert client.get("/v1/models", auth=("any", "one")).status_code == 200
        refused = client.post("/v1/embeddings", json={"input": [[1]]}, auth=("any", "one"))
        assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"


def test_every_error_has_the_same_shape():
    with serving(Toy, routers=[PAGE]) as client:
        answers = {
            404: client.get("/docs"),
            405: client.post("/search"),
            422: client.get("/search?k=x"),
            429: client.get("/search?k=429"),
            500: client.get("/search?k=500"),
            400: embed(client, 5),
        }
        assert client.get("/redoc").status_code == 404, "these pages load scripts from other servers"
        for status, answer in answers.items():
            error = answer.json()["error"]
            assert answer.status_code == status and set(error) == {"message", "type", "param", "code"}
            assert answer.headers["content-type"] == "application/json"
        assert answers[422].json()["error"]["param"] == "k" and answers[422].json()["error"]["message"].startswith(
            "k: "
        )
        assert answers[429].headers["retry-after"] == "3"
        assert answers[429].json()["error"]["type"] == "rate_limit_error"
