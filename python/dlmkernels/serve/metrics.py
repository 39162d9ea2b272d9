# SPDX-License-Identifier: Apache-2.0
"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..engine.engine import Engine

#: paths that are counted by name; all others are one
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics", "/", "/live/events")


class EngineCollector(Collector):
    """`Engine.metrics()` as Prometheus has it."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        """One family after the other."""
        now = self.engine.metrics()
        ended = CounterMetricFamily("dlmkernels_requests", "Answers that were delivered", labels=["outcome"])
        for outcome in ("finished", "failed", "cancelled"):
            ended.add_metric([outcome], getattr(now, outcome))
        yield ended
        yield CounterMetricFamily("dlmkernels_tokens", "Tokens that were decoded", value=now.tokens)
        yield CounterMetricFamily("dlmkernels_forwards", "Forwards of the model", value=now.forwards)
        yield CounterMetricFamily("dlmkernels_busy_seconds", "Time in which there was work", value=now.seconds)
        gauges = {
            "requests_waiting": ("Answers that wait for a slot", now.waiting),
            "requests_running": ("Answers that are being decoded", now.running),
            "slots": ("Answers that can be decoded at once", self.engine.slots),
            "tokens_per_forward": ("Tokens of an answer over the forwards it took part in", now.tokens_per_forward),
            "slot_occupancy_ratio": ("Share of the slots with a request when a forward ran", now.occupancy),
            "idle_row_ratio": ("Share of forwarded rows that were in no block", now.idle_row_share),
            "queue_seconds_mean": ("Time from a request's coming to a slot", now.queue_seconds),
            "first_block_seconds_mean": ("Time from its coming to the end of its first block", now.time_to_first_block),
            "host_step_seconds": ("Median time of the host for a step", now.host_microseconds * 1e-6),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"dlmkernels_{name}", text, value=value)


class ServerMetrics:
    """Counters of HTTP requests, beside the engine's."""

    def __init__(self, engine: Engine):
        self._registry = CollectorRegistry()
        self._registry.register(EngineCollector(engine))
        self._answered = Counter(
            "dlmkernels_http_requests", "HTTP requests that were answered", ["path", "status"], registry=self._registry
        )  # fmt: skip
        self._seconds = Histogram(
            "dlmkernels_http_request_seconds", "Time from a request's head to the end of its answer", ["path"],
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300), registry=self._registry,
        )  # fmt: skip

    def observe(self, path: str, status: int, seconds: float) -> None:
        """A request was answered; status 0: the client had gone before."""
        known = path if path in PATHS or path.startswith("/v1/models/") else "other"
        known = "/v1/models" if known.startswith("/v1/models/") else known
        self._answered.labels(known, str(status or 499)).inc()
        self._seconds.labels(known).observe(seconds)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)
