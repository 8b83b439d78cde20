"""Clients that ask and do not read: what they hold is bounded, and others are served."""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import ExitStack

from lusifer.serving import unread as waiting
from lusifer.serving.limits import Limits
from support.serving import embed, metric, serving, wait_for
from support.toy_model import Toy

MOST = 8 << 20
BODY = json.dumps({"input": [[1]] * 130}).encode()  # Of 4096 numbers each: an answer of 6 MB, more than sockets hold.
REQUEST = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY


class Wide(Toy):
    def __init__(self):
        super().__init__(dimension=4096)
        self.number = 1 / 3
        self.token_budget = 100_000


def deaf(client, times=1):
    """A connection that asks and never reads."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", client.port))
    connection.sendall(REQUEST * times)
    return connection


def read(connection, answers):
    """Whole answers of one connection."""
    data, word = bytearray(), b'"total_tokens"'
    while answers or not data.endswith(b"}}"):
        chunk = connection.recv(1 << 20)
        answers -= (data[1 - len(word) :] + chunk).count(word)
        data += chunk
    return data


def test_answers_that_nobody_reads_are_bounded(monkeypatch):
    monkeypatch.setattr(waiting, "_SLOW", 0.5)
    highest, done = 0.0, threading.Event()
    with serving(Wide, limits=Limits(max_unread=MOST)) as client, ExitStack() as stack:

        def look():
            nonlocal highest
            while not done.wait(0.01):
                highest = max(highest, metric(client, "lusifer_unread_bytes"))

        looking = threading.Thread(target=look)
        looking.start()
        try:
            for _ in range(12):
                stack.enter_context(deaf(client, times=2))
            wait_for(lambda: highest > 1 << 20)
            wait_for(lambda: metric(client, "lusifer_requests_in_flight") == 0)
            end = time.monotonic() + 10
            # Others are served, at the latest when the slow are cut.
            while (answer := embed(client, [[1]])).status_code != 200:
                assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
                assert "responses are unread" in answer.text and time.monotonic() < end
                time.sleep(0.1)
        finally:
            done.set()
            looking.join()
        assert highest <= MOST + (1 << 16), highest
    print(f"{highest / 1e6:.1f} MB at most")


def test_requests_sent_ahead_are_answered_one_after_another():
    with serving(Wide, limits=Limits(max_unread=MOST)) as client, deaf(client, times=3) as connection:
        answered = {"path": "/v1/embeddings", "status": "200"}
        wait_for(lambda: metric(client, "lusifer_requests_total", **answered) == 1)
        time.sleep(0.3)
        assert metric(client, "lusifer_requests_total", **answered) == 1, "the next one waits"
        connection.settimeout(20)
        assert read(connection, answers=3).count(b"HTTP/1.1 200") == 3
        wait_for(lambda: metric(client, "lusifer_unread_bytes") == 0)
        connection.sendall(REQUEST.replace(b"\r\nContent", b"\r\nConnection: close\r\nContent"))
        assert read(connection, answers=1).count(b"HTTP/1.1 200") == 1
        assert connection.recv(1) == b""


def test_a_client_that_takes_too_long_is_cut(monkeypatch):
    monkeypatch.setattr("lusifer.serving.server.Protocol.write_timeout", 0.3)
    with serving(Wide) as client, deaf(client):
        wait_for(lambda: metric(client, "lusifer_unread_bytes") > 0)
        wait_for(lambda: metric(client, "lusifer_unread_bytes") == 0, 3)
