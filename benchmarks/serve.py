"""What serving costs: throughput and latency by concurrency, a bulk request beside short ones, and four times too much.

Usage: python benchmarks/serve.py [--model starter] [--seconds 10] [--overload-seconds 60]

Starts ``lusifer serve MODEL`` in a process of its own and talks to it over HTTP from this one, on the same machine. A
request is one sentence of the bundled everyday set, in any of its languages.

closed loop  1, 4, 16 and 64 clients, each with its next request as soon as it has an answer
beside bulk  one client as above, while another embeds 512 texts in one request
overload     requests at random times (Poisson), four times as many a second as 64 clients got, whatever comes back

Writes runs/bench/serve.json, serve.md and serve.png.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lusifer.data.everyday_set import load_everyday

OUT = Path("runs/bench")
CONCURRENCIES = (1, 4, 16, 64)
FACTOR = 4
BULK = 512


@dataclass
class Sample:
    """One answer: when it was asked for, how long it took, what it was."""

    start: float
    seconds: float
    status: int
    tokens: int = 0
    retry_after: int = 0


class Client:
    """Sends sentences and keeps what came back; HTTP by hand, as the server needs the cores more than its client."""

    def __init__(self, url: str) -> None:
        sentences = [text for texts in load_everyday().sentences.values() for text in texts]
        random.Random(0).shuffle(sentences)
        self.sentences = itertools.cycle(sentences)
        self.host, _, port = url.removeprefix("http://").rpartition(":")
        self.port, self.samples = int(port), list[Sample]()
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def request(self, method: str, path: str, body: bytes = b"") -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of an answer, on a connection that is kept."""
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection(self.host, self.port)
        writer.write(b"%s %s HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % (
            method.encode(), path.encode(), len(body)) + body)  # fmt: skip
        status, *rest = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in rest if line)
        answer = await reader.readexactly(int(headers["content-length"]))
        if headers.get("connection") == "close":
            writer.close()
        else:
            self._idle.append((reader, writer))
        return int(status.split()[1]), headers, answer

    async def one(self, count: int = 1) -> Sample:
        """One request of so many texts; status 0 if the connection failed."""
        texts = list(itertools.islice(self.sentences, count))
        start = time.monotonic()
        try:
            body = json.dumps({"input": texts, "encoding_format": "base64"}).encode()
            status, headers, answer = await self.request("POST", "/v1/embeddings", body)
        except (OSError, asyncio.IncompleteReadError):
            sample = Sample(start, time.monotonic() - start, 0)
        else:
            sample = Sample(start, time.monotonic() - start, status)
            if status == 200:
                sample.tokens = json.loads(answer[answer.rindex(b'"usage": ') + 9 : -1])["total_tokens"]
            sample.retry_after = int(headers.get("retry-after", 0))
        self.samples.append(sample)
        return sample

    def take(self) -> list[Sample]:
        """The samples since the last call."""
        found, self.samples = self.samples, []
        return found


def percentiles(samples: list[Sample]) -> dict[str, float]:
    """Milliseconds of the answers with vectors in them."""
    seconds = [sample.seconds for sample in samples if sample.status == 200]
    return {f"p{q}_ms": round(1000 * float(np.percentile(seconds, q)), 1) for q in (50, 95, 99)} if seconds else {}


async def closed_loop(client: Client, clients: int, seconds: float, process: int) -> dict[str, Any]:
    """Throughput and latency with so many clients."""

    async def loop(end: float) -> None:
        while time.monotonic() < end:
            await client.one()

    await asyncio.gather(*[loop(time.monotonic() + min(2.0, seconds)) for _ in range(clients)])
    client.take()  # Connections are open and the speed is measured.
    begin, busy = time.monotonic(), cpu_seconds(process)
    await asyncio.gather(*[loop(begin + seconds) for _ in range(clients)])
    took, samples = time.monotonic() - begin, client.take()
    busy, tokens = cpu_seconds(process) - busy, sum(sample.tokens for sample in samples)
    return {
        "clients": clients,
        "requests_per_s": round(len(samples) / took, 1),
        "tokens_per_s": round(tokens / took),
        "tokens_per_cpu_s": round(tokens / busy),
        **percentiles(samples),
        "statuses": dict(Counter(sample.status for sample in samples)),
    }


async def beside_bulk(client: Client) -> dict[str, Any]:
    """Latency of short requests while a long one is in the queue."""
    other = Client(f"http://{client.host}:{client.port}")
    bulk = asyncio.create_task(other.one(BULK))
    while not bulk.done():
        await client.one()
    sample = await bulk
    found = client.take()
    return {
        "bulk_texts": BULK,
        "bulk_seconds": round(sample.seconds, 2),
        "bulk_status": sample.status,
        "short_requests": len(found),
        **percentiles(found),
    }


def cpu_seconds(process: int) -> float:
    """Time that a process has computed."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mb(process: int) -> float:
    """Resident memory."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


async def overload(client: Client, rate: float, seconds: float, process: int) -> dict[str, Any]:
    """Open loop: arrivals do not wait for answers."""
    before, begin = memory_mb(process), time.monotonic()
    clock: list[dict[str, float]] = []

    async def watch() -> None:
        while True:
            text = (await client.request("GET", "/metrics"))[2].decode()
            queue = float(re.search(r"^lusifer_queue_tokens (\S+)", text, re.M)[1])  # type: ignore[index]
            clock.append({"t": time.monotonic() - begin, "rss_mb": memory_mb(process), "queue_tokens": queue})
            await asyncio.sleep(1)

    watcher, chance, tasks, when = asyncio.create_task(watch()), random.Random(1), set(), begin
    while when < begin + seconds:
        when += chance.expovariate(rate)
        await asyncio.sleep(max(0.0, when - time.monotonic()))
        task = asyncio.create_task(client.one())
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    sent = time.monotonic() - begin
    await asyncio.gather(*tasks)
    watcher.cancel()
    samples = client.take()
    refused = [sample for sample in samples if sample.status == 429]
    return {
        "target_per_s": round(rate, 1),
        "offered_per_s": round(len(samples) / sent, 1),
        "seconds": round(sent, 1),
        "statuses": dict(Counter(sample.status for sample in samples)),
        "answered_per_s": round(sum(sample.status == 200 for sample in samples) / (time.monotonic() - begin), 1),
        "tokens_per_s": round(sum(sample.tokens for sample in samples) / (time.monotonic() - begin)),
        **percentiles(samples),
        "refusal_p99_ms": round(1000 * float(np.percentile([s.seconds for s in refused], 99)), 1) if refused else None,
        "retry_after_s": dict(Counter(sample.retry_after for sample in refused)),
        "most_queue_tokens": max(row["queue_tokens"] for row in clock),
        "rss_mb_before": round(before, 1),
        "rss_mb_after": round(memory_mb(process), 1),
        "clock": clock,
        "answers": [[round(s.start - begin, 2), round(s.seconds, 3)] for s in samples if s.status == 200],
    }


async def measure(url: str, process: int, seconds: float, overload_seconds: float) -> dict[str, Any]:
    """Everything, against a server that is being started."""
    client = Client(url)
    while (await client.request("GET", "/ready"))[0] != 200:
        await asyncio.sleep(0.2)
    rows = [await closed_loop(client, clients, seconds, process) for clients in CONCURRENCIES]
    bulk = await beside_bulk(client)
    much = await overload(client, FACTOR * rows[-1]["requests_per_s"], overload_seconds, process)
    return {"closed_loop": rows, "beside_bulk": bulk, "overload": much}


def plot(results: dict[str, Any], path: Path) -> None:
    """Latency by concurrency; latency, queue and memory under overload."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows, much = results["closed_loop"], results["overload"]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    clients = [row["clients"] for row in rows]
    for q in (50, 95, 99):
        left.plot(clients, [row[f"p{q}_ms"] for row in rows], marker="o", label=f"p{q}")
    for row in rows:
        left.annotate(f"{row['requests_per_s']:.0f}/s", (row["clients"], row["p50_ms"]), (0, -14),
                      textcoords="offset points", ha="center", fontsize=8)  # fmt: skip
    left.set(
        xscale="log", yscale="log", xticks=clients, xlabel="clients", ylabel="ms", title="Latency, requests a second"
    )
    left.set_xticks(clients, [str(count) for count in clients])
    left.margins(y=0.2)
    left.legend()
    starts, seconds = zip(*much["answers"], strict=True)
    middle.scatter(starts, seconds, s=3, alpha=0.4)
    middle.set(xlabel="time of request, s", ylabel="s", ylim=(0, None), title=f"Accepted at {FACTOR} x capacity")
    time_, memory = ([row[key] for row in much["clock"]] for key in ("t", "rss_mb"))
    right.plot(time_, memory, color="tab:red")
    right.set(xlabel="s", ylim=(0, 1.25 * max(memory)), title="Memory and queue")
    right.set_ylabel("MB", color="tab:red")
    other = right.twinx()
    other.plot(time_, [row["queue_tokens"] for row in much["clock"]], color="tab:blue")
    other.set_ylabel("tokens waiting", color="tab:blue")
    other.set_ylim(0, 1.25 * max(much["most_queue_tokens"], 1))
    figure.savefig(path, dpi=110)


def markdown(results: dict[str, Any]) -> str:
    """The figures as tables."""
    columns = ("clients", "requests_per_s", "tokens_per_s", "tokens_per_cpu_s", "p50_ms", "p95_ms", "p99_ms")
    lines = ["| clients | requests/s | tokens/s | tokens/CPU-s | p50 ms | p95 ms | p99 ms |", "|" + 7 * "---|"]
    for row in results["closed_loop"]:
        lines.append("| " + " | ".join(str(row[column]) for column in columns) + " |")
    bulk, much = results["beside_bulk"], results["overload"]
    lines += [
        "",
        f"One client beside a request of {bulk['bulk_texts']} texts ({bulk['bulk_seconds']} s): p50 {bulk['p50_ms']}, "
        f"p99 {bulk['p99_ms']} ms.",
        "",
        f"{much['offered_per_s']} requests/s offered for {much['seconds']} s: statuses {much['statuses']}, "
        f"{much['answered_per_s']} answered/s; accepted p50 {much['p50_ms']}, p95 {much['p95_ms']}, p99 "
        f"{much['p99_ms']} ms; refusals p99 {much['refusal_p99_ms']} ms; at most {much['most_queue_tokens']:.0f} "
        f"tokens waiting; memory {much['rss_mb_before']:.0f} -> {much['rss_mb_after']:.0f} MB.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Starts the server, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--seconds", type=float, default=10.0, help="per number of clients")
    parser.add_argument("--overload-seconds", type=float, default=60.0)
    options = parser.parse_args()
    command = [sys.executable, "-m", "lusifer", "serve", options.model, "--port", "0", "--precision", options.precision]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        found = re.match(r"(http://\S+)/v1", first := server.stderr.readline())
        if not found:
            sys.exit(first + server.stderr.read())
        results = asyncio.run(measure(found[1], server.pid, options.seconds, options.overload_seconds))
    finally:
        server.terminate()
        code = server.wait(60)
    results = {"model": options.model, "precision": options.precision, "exit_code": code, **results}
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "serve.json").write_text(json.dumps(results, indent=1))
    (OUT / "serve.md").write_text(markdown(results))
    plot(results, OUT / "serve.png")
    print(markdown(results))


if __name__ == "__main__":
    main()
