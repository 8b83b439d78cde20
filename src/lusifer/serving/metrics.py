"""metrics."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Metrics:
    """What Prometheus reads; one registry per application."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: Any = {"registry": self.registry}
        self.requests = Counter(
            "lusifer_requests", "Requests answered; 499: the client disconnected.", ["path", "status"], **own
        )
        seconds = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
        self.latency = Histogram("lusifer_request_seconds", "Time to an answer.", ["path"], buckets=seconds, **own)
        self.tokens = Counter("lusifer_tokens", "Tokens the model has read.", **own)
        self.texts = Counter("lusifer_texts", "Texts embedded.", **own)
        self.truncated = Counter("lusifer_truncated_texts", "Texts cut to the model's window.", **own)
        sizes = [2.0**power for power in range(0, 18)]
        self.batch_texts = Histogram("lusifer_batch_texts", "Texts of a batch.", buckets=sizes, **own)
        self.batch_tokens = Histogram("lusifer_batch_tokens", "Tokens of a batch.", buckets=sizes, **own)
        self.model_seconds = Counter("lusifer_model_seconds", "Time the model was busy.", **own)
        self.queue = Gauge("lusifer_queue_tokens", "Tokens that wait for the model.", **own)
        self.in_flight = Gauge("lusifer_requests_in_flight", "Requests in hand.", **own)
        self.batch_age = Gauge("lusifer_batch_age_seconds", "Time the batch in the model has taken so far.", **own)
        self.failing = Gauge("lusifer_model_failing", "1 while the model is stuck or fails.", **own)
        self.unread = Gauge("lusifer_unread_bytes", "Answers that wait for their clients.", **own)
        self.rejected = Counter("lusifer_rejected", "Requests refused with 429.", **own)

    def request(self, path: str, status: int, seconds: float) -> None:
        """Counts an answer; unknown paths share a label, so that nobody can fill the memory with names."""
        known = path if path in ("/v1/embeddings", "/v1/models", "/health", "/ready", "/metrics") else "other"
        self.requests.labels(known, str(status)).inc()
        self.latency.labels(known).observe(seconds)
        if status == 429:
            self.rejected.inc()

    def batch(self, texts: int, tokens: int, seconds: float) -> None:
        """Counts what the model did."""
        self.texts.inc(texts)
        self.tokens.inc(tokens)
        self.batch_texts.observe(texts)
        self.batch_tokens.observe(tokens)
        self.model_seconds.inc(seconds)
