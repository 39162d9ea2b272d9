# SPDX-License-Identifier: Apache-2.0
"""The server's metrics in Prometheus' format."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..engine.engine import Engine

#: Paths with a label of their own; all other paths share the label "other".
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics", "/", "/live/events")


class EngineCollector(Collector):
    """Prometheus collector for `Engine.metrics()`."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        """Yield the metric families."""
        now = self.engine.metrics()
        ended = CounterMetricFamily("dlmkernels_requests", "Answers that have ended, by outcome", labels=["outcome"])
        for outcome in ("finished", "failed", "cancelled"):
            ended.add_metric([outcome], getattr(now, outcome))
        yield ended
        yield CounterMetricFamily("dlmkernels_tokens", "Decoded tokens", value=now.tokens)
        yield CounterMetricFamily("dlmkernels_forwards", "Forward passes of the model", value=now.forwards)
        yield CounterMetricFamily("dlmkernels_busy_seconds", "Time during which there was work", value=now.seconds)
        gauges = {
            "requests_waiting": ("Answers waiting for a slot", now.waiting),
            "requests_running": ("Answers being decoded", now.running),
            "slots": ("Maximum number of answers decoded at once", self.engine.slots),
            "tokens_per_forward": ("Mean number of tokens per forward pass of an answer", now.tokens_per_forward),
            "slot_occupancy_ratio": ("Mean fraction of slots in use during a forward pass", now.occupancy),
            "idle_row_ratio": ("Fraction of forwarded batch rows without a block to decode", now.idle_row_share),
            "queue_seconds_mean": ("Mean time from a request's arrival until it gets a slot", now.queue_seconds),
            "first_block_seconds_mean": ("Mean time from arrival to the first block's end", now.time_to_first_block),
            "host_step_seconds": ("Median host time per step", now.host_microseconds * 1e-6),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"dlmkernels_{name}", text, value=value)


class ServerMetrics:
    """Metrics of HTTP requests, together with those of the engine."""

    def __init__(self, engine: Engine):
        self._registry = CollectorRegistry()
        self._registry.register(EngineCollector(engine))
        self._answered = Counter(
            "dlmkernels_http_requests", "Answered HTTP requests", ["path", "status"], registry=self._registry
        )  # fmt: skip
        self._seconds = Histogram(
            "dlmkernels_http_request_seconds", "Time from a request's headers to the end of its response", ["path"],
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300), registry=self._registry,
        )  # fmt: skip

    def observe(self, path: str, status: int, seconds: float) -> None:
        """Count an answered request. Status 0 means that the client left before a response; it counts as 499."""
        known = path if path in PATHS or path.startswith("/v1/models/") else "other"
        known = "/v1/models" if known.startswith("/v1/models/") else known
        self._answered.labels(known, str(status or 499)).inc()
        self._seconds.labels(known).observe(seconds)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)
