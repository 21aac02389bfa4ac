"""Prometheus metrics, under the names that gRPC dashboards know."""

from __future__ import annotations

from collections import Counter as CountOf
from collections.abc import Sequence
from typing import Any

import grpc
import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

LATENCY_BUCKETS_S = (
    0.00025, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0,
)  # fmt: skip

LABELS = ("grpc_type", "grpc_service", "grpc_method")


FLUSH_INTERVAL_S = 0.25
"""How long what was counted may take to be seen by a scrape."""


class _BulkHistogram(Histogram):
    """A histogram that takes many observations at once."""

    def observe_all(self, amounts: Sequence[float]) -> None:
        """Observes each of amounts."""
        of: Any = self  # the sum and the buckets, each a value that processes share
        counts = np.bincount(np.searchsorted(of._upper_bounds, amounts))
        of._sum.inc(sum(amounts))
        for bucket, count in zip(of._buckets, counts.tolist(), strict=False):
            if count:
                bucket.inc(count)


class Metrics:
    """The metrics of one worker process.

    What every call counts is counted here in plain numbers, and handed on by `flush`: a value that
    processes share lies in a mapped file, and raising one costs as much as parsing a request.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self.started = Counter(
            "grpc_server_started_total", "Calls begun.", LABELS, registry=self.registry
        )
        self.handled = Counter(
            "grpc_server_handled_total",
            "Calls ended, by code.",
            (*LABELS, "grpc_code"),
            registry=self.registry,
        )
        self.handling_seconds = _BulkHistogram(
            "grpc_server_handling_seconds",
            "Time from the call's arrival at the handler to its answer.",
            LABELS,
            buckets=LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self.rows = Counter(
            "tally_online_rows_total", "Rows answered online.", registry=self.registry
        )
        self.complete_through = Gauge(
            "tally_online_complete_through_seconds",
            "Instant through which the online store is complete, Unix time; -0.001 if unknown.",
            multiprocess_mode="livemax",
            registry=self.registry,
        )
        self.merchants_through = Gauge(
            "tally_online_merchants_through_seconds",
            "Last instant whose features of merchants are computed, Unix time; -0.001 if none.",
            multiprocess_mode="livemax",
            registry=self.registry,
        )
        self.online_store_up = Gauge(
            "tally_online_store_up",
            "Whether Redis is connected.",
            multiprocess_mode="livemin",
            registry=self.registry,
        )
        self._calls: list[CallMetrics] = []
        self._rows = 0

    def calls_of(self, kind: str, service: str, method: str) -> CallMetrics:
        """What counts the calls of one method."""
        calls = CallMetrics(self, (kind, service, method))
        self._calls.append(calls)
        return calls

    def count_rows(self, rows: int) -> None:
        """So many rows were answered."""
        self._rows += rows

    def flush(self) -> None:
        """Hands on what was counted since the last time."""
        for calls in self._calls:
            calls.flush()
        rows, self._rows = self._rows, 0
        self.rows.inc(rows)


class CallMetrics:
    """Counts one method's calls."""

    def __init__(self, metrics: Metrics, labels: tuple[str, str, str]) -> None:
        self._started = metrics.started.labels(*labels)
        self._seconds = metrics.handling_seconds.labels(*labels)
        self._handled = {
            code.value[0]: metrics.handled.labels(*labels, code.name) for code in grpc.StatusCode
        }
        self._begun = 0
        self._ended: list[tuple[int, float]] = []

    def begin(self) -> None:
        """A call has come."""
        self._begun += 1

    def end(self, code: int, seconds: float) -> None:
        """A call has ended, with the number of a gRPC code."""
        self._ended.append((code, seconds))

    def flush(self) -> None:
        """Hands on what was counted since the last time."""
        begun, self._begun = self._begun, 0
        if begun:
            self._started.inc(begun)
        ended, self._ended = self._ended, []
        if ended:
            self._seconds.observe_all([seconds for _, seconds in ended])
            for code, count in CountOf(code for code, _ in ended).items():
                self._handled[code].inc(count)
