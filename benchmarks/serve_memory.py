"""Whether a server's memory comes back: after thousands of requests, and after clients that left in the middle of one.

Usage: python benchmarks/serve_memory.py [--model starter] [--precision bfloat16] [--requests 6000] [--cancels 1000]

Runs ``lusifer serve MODEL`` and ``lusifer search INDEX --ui``, one after the other, each in a process of its own, and
talks to it over HTTP with 16 clients. The index holds the sentences of the bundled everyday set.

requests  of 1 to 64 of these sentences, as numbers or base64; searches, one in two with BM25
cancels   a third leaves within its own request, a third before the answer, a third within it

Prints a table, writes runs/bench/serve_memory.json, and ends with 1 where more than ``--limit`` MB above idle are held.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil

from lusifer.data.everyday_set import load_everyday

OUT = Path("runs/bench")
CLIENTS = 16
READY_SECONDS = 300
Ask = Callable[[random.Random, list[str], bool], bytes]


def embeddings(chance: random.Random, sentences: list[str], long: bool) -> bytes:
    """A request for vectors, of 256 texts if it is to last."""
    texts = chance.choices(sentences, k=256 if long else chance.choice((1, 4, 16, 64)))
    body = json.dumps({"input": texts, "encoding_format": chance.choice(("float", "base64"))}).encode()
    return b"POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body) + body


def searches(chance: random.Random, sentences: list[str], long: bool) -> bytes:
    """A search for a sentence."""
    hybrid = chance.choice(("true", "false"))
    query = f"/search?q={quote(chance.choice(sentences))}&k={100 if long else 10}&hybrid={hybrid}"
    return f"GET {query} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode()


class Server:
    """A command that serves, in a process of its own."""

    def __init__(self, *command: str) -> None:
        program = [sys.executable, "-m", "lusifer", *command, "--port", "0"]
        self.process = subprocess.Popen(program, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)", line := self.process.stderr.readline())):
            if not line:
                raise SystemExit(f"{command[0]} ended with {self.process.wait()}")
        self.port = int(found[1])

    def memory(self) -> float:
        """Resident memory in MB, of the process and those it started."""
        mine = psutil.Process(self.process.pid)
        return sum(one.memory_info().rss for one in (mine, *mine.children(recursive=True))) / 1e6

    async def get(self, path: str) -> tuple[int, bytes]:
        """Status and body of an answer."""
        return await self.ask(f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Status and body of an answer, on a connection of its own."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = re.search(r"content-length: (\d+)", head)
            return int(head.split()[1]), await reader.readexactly(int(length[1]) if length else 0)
        finally:
            writer.close()

    async def leave(self, request: bytes, kind: int, chance: random.Random) -> None:
        """Goes within the request (0), before the answer (1) or within it (2)."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(request[: chance.randrange(1, len(request))] if kind == 0 else request)
        if kind == 1:
            await writer.drain()
            await asyncio.sleep(chance.uniform(0, 0.1))
        if kind == 2:
            await reader.read(1)
        writer.transport.abort()  # With a reset where something was not read, as of a process that ends.

    async def settle(self) -> float:
        """Memory once nothing is in hand any more."""
        while re.search(rb"^lusifer_requests_in_flight [^0]", (await self.get("/metrics"))[1], re.M):
            await asyncio.sleep(0.1)
        await asyncio.sleep(4)  # An idle server returns what it freed.
        return self.memory()


async def measure(server: Server, ask: Ask, requests: int, cancels: int) -> dict[str, Any]:
    """Megabytes held by a server that is being started: idle, half-way through and after each part."""
    sentences = [text for texts in load_everyday().sentences.values() for text in texts]
    chance, statuses = random.Random(0), Counter[int]()

    async def request(_: int) -> None:
        while (status := (await server.ask(ask(chance, sentences, False)))[0]) == 429:
            statuses[429] += 1
            await asyncio.sleep(0.2)
        statuses[status] += 1

    async def cancel(number: int) -> None:
        await server.leave(ask(chance, sentences, True), number % 3, chance)

    async def many(count: int, one: Callable[[int], Any]) -> None:
        numbers = iter(range(count))

        async def client() -> None:
            for number in numbers:
                await one(number)

        await asyncio.gather(*[client() for _ in range(CLIENTS)])

    end = time.monotonic() + READY_SECONDS
    while (await server.get("/ready"))[0] != 200:
        if time.monotonic() > end:
            raise SystemExit("the server does not get ready")
        await asyncio.sleep(0.2)
    row: dict[str, Any] = {"idle": await server.settle()}
    for name, count, one in (("requests", requests, request), ("cancels", cancels, cancel)):
        for half in (count // 2, count):
            begin = time.monotonic()
            await many(half if half < count else count - count // 2, one)
            row[f"{name}_{half}"] = await server.settle()
            row["seconds"] = row.get("seconds", 0.0) + time.monotonic() - begin
    return {**row, "statuses": dict(statuses), "requests": requests, "cancels": cancels}


def run(model: str, precision: str, requests: int, cancels: int) -> dict[str, dict[str, Any]]:
    """Both servers, one after the other."""
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        texts, index = Path(folder, "texts.txt"), Path(folder, "index")
        every = dict.fromkeys(text for texts in load_everyday().sentences.values() for text in texts)
        texts.write_text("\n".join(every), encoding="utf-8")
        add = [sys.executable, "-m", "lusifer", "index", "add", str(index), str(texts), "--model", model, "-q"]
        subprocess.run(add, check=True, stdout=subprocess.DEVNULL)
        for name, command, ask in (
            ("lusifer serve", ["serve", model, "--precision", precision], embeddings),
            ("lusifer search --ui", ["search", str(index), "--ui"], searches),
        ):
            server = Server(*command)
            try:
                rows[name] = asyncio.run(measure(server, ask, requests, cancels))
            finally:
                server.process.terminate()
                code = server.process.wait(60)
            rows[name]["exit_code"] = code
    return rows


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """The figures as a table."""
    first = next(iter(rows.values()))
    columns = [key for key in first if key == "idle" or re.fullmatch(r"(requests|cancels)_\d+", key)]
    titles = [re.sub(r"(\w+)_(\d+)", r"after \2 \1", column) for column in columns]
    lines = [f"| MB | {' | '.join(titles)} | statuses | s |", "|" + "---|" * (len(columns) + 3)]
    for name, row in rows.items():
        cells = [f"{row[column]:.0f}" for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} | {row['statuses']} | {row['seconds']:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Starts the servers, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--precision", default="auto", help="of `lusifer serve`; `auto` may differ from run to run")
    parser.add_argument("--requests", type=int, default=6000)
    parser.add_argument("--cancels", type=int, default=1000)
    parser.add_argument("--limit", type=float, default=100.0, help="MB above idle")
    options = parser.parse_args()
    rows = run(options.model, options.precision, options.requests, options.cancels)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "serve_memory.json").write_text(json.dumps({"model": options.model, "servers": rows}, indent=1))
    print(markdown(rows), end="")
    most = max(row[key] - row["idle"] for row in rows.values() for key in row if re.match(r"(requests|cancels)_", key))
    print(f"\nat most {most:.0f} MB above idle")
    sys.exit(most > options.limit)


if __name__ == "__main__":
    main()
