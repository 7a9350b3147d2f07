"""Counters for Prometheus; one registry per server, so that several can live in one process."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """Counters of a server.

    Args:
        unfinished: Items accepted and not yet answered, asked when Prometheus asks.
    """

    def __init__(self, unfinished: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "muco_requests", "Requests answered, by route and status", ("route", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "muco_request_seconds", "Seconds of a request", ("route",), buckets=SECONDS, registry=self.registry
        )
        self.vectors = Counter("muco_vectors", "Vectors computed", registry=self.registry)
        self.tokens = Counter("muco_tokens", "Tokens embedded, by kind", ("kind",), registry=self.registry)
        self.items = Histogram("muco_batch_items", "Items of a forward pass", buckets=SIZES, registry=self.registry)
        self.padded = Counter("muco_padded_tokens", "Tokens passed, padding included", registry=self.registry)
        Gauge("muco_unfinished_items", "Items accepted and not yet answered", registry=self.registry).set_function(
            unfinished
        )

    def batch(self, items: int, padded_tokens: int) -> None:
        self.items.observe(items)
        self.padded.inc(padded_tokens)

    def text(self) -> bytes:
        return generate_latest(self.registry)
