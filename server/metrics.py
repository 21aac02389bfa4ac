"""Prometheus metrics, under the names that gRPC dashboards know."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

LATENCY_BUCKETS_S = (
    0.00025, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0,
)  # fmt: skip

LABELS = ("grpc_type", "grpc_service", "grpc_method")


class Metrics:
    """The metrics of one worker process."""

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
        self.handling_seconds = Histogram(
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
        self.online_store_up = Gauge(
            "tally_online_store_up",
            "Whether Redis is connected.",
            multiprocess_mode="livemin",
            registry=self.registry,
        )
