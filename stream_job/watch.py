"""Watches the stream: through which instant the online store is complete, how far behind the job is,
whether it is stuck, and how fresh answers are. `python -m stream_job.watch`.

Completeness. At an instant p the topics' ends are read. A partition of which everything up to its end
is applied is complete through p, even if no event ever comes. One that is behind is complete through
the instant at which the last applied event was appended, less a millisecond, which others may share.
The least of all partitions is what the online store may say.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import structlog
import typer
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from tally.cli.connection import connect

from stores.errors import StoreError
from stores.postgres import OfflineStore
from stores.redis_store import OnlineStore
from stores.settings import SettingsError
from stream_job.probe import Probe
from stream_job.settings import StreamSettings
from stream_job.topics import Ends

WATCH_INTERVAL_S = 0.1
STUCK_AFTER_S = 3.0
"""Behind, and not moving for so long: stuck."""
RETRY_S = 0.5
FRESHNESS_BUCKETS_S = (
    *(0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0),
)

Where = tuple[str, int]
"""Topic and partition."""

log = structlog.get_logger()


def complete_through(
    ends: Mapping[Where, tuple[int, int]],
    progress: Mapping[Where, tuple[int, int]],
    probed_ms: int,
) -> int:
    """The instant through which all that was published is applied, in ms; -1 if none can be said.

    Args:
        ends: (first offset kept, offset behind the last event), read at probed_ms or later.
        progress: (offset behind the last applied event, when that one was appended in ms).
        probed_ms: the clock before the ends were read.
    """
    through = probed_ms
    for where, (first, end) in ends.items():
        reached, append_ms = progress.get(where, (0, 0))
        if max(reached, first) < end:
            through = min(through, append_ms - 1)
    return through


def lag(ends: Mapping[Where, tuple[int, int]], progress: Mapping[Where, tuple[int, int]]) -> int:
    """Events that are published and not applied."""
    return sum(
        max(0, end - max(first, progress.get(where, (0, 0))[0]))
        for where, (first, end) in ends.items()
    )


@dataclass(frozen=True, slots=True)
class StreamState:
    """What is known of the stream."""

    state: str
    """running, behind or stuck; unknown where Kafka or Postgres do not answer."""
    lag_events: int
    unmoved_s: float
    """How long no event was applied, while some were there to be."""
    complete_through_ms: int
    fresh_after_ms: float | None
    """How long the last freshness probe took from Kafka to an answer; None before the first."""


class Movement:
    """Tells a job that is behind from one that is stuck."""

    def __init__(self) -> None:
        self._reached = -1
        self._moved_s = 0.0

    def judge(self, reached: int, behind: int, now_s: float) -> tuple[str, float]:
        """(state, how long nothing moved) after `reached` events with `behind` to go."""
        if reached != self._reached or behind == 0:
            self._reached, self._moved_s = reached, now_s
        unmoved_s = now_s - self._moved_s
        if behind == 0:
            return "running", 0.0
        return ("stuck" if unmoved_s >= STUCK_AFTER_S else "behind"), unmoved_s


class Watch:
    """Looks at the stream again and again."""

    def __init__(self, settings: StreamSettings) -> None:
        self._settings = settings
        self._topics = (settings.transactions_topic, settings.labels_topic)
        self._movement = Movement()
        registry = CollectorRegistry()
        self._lag = Gauge(
            "tally_stream_lag_events", "Events published and not applied.", registry=registry
        )
        self._through = Gauge(
            "tally_stream_complete_through_seconds",
            "Instant through which all that was published is applied, Unix time.",
            registry=registry,
        )
        self._stuck = Gauge(
            "tally_stream_stuck", "1 while events wait and none is applied.", registry=registry
        )
        self._failures = Counter(
            "tally_stream_watch_failures_total", "Looks that failed.", registry=registry
        )
        self._freshness = Histogram(
            "tally_stream_freshness_seconds",
            "From publishing a probe to its being in an answer of GetOnlineFeatures.",
            buckets=FRESHNESS_BUCKETS_S,
            registry=registry,
        )
        self._lost = Counter(
            "tally_stream_probes_lost_total", "Probes that were never seen.", registry=registry
        )
        self._fresh_after_ms: float | None = None
        if settings.stream_metrics_listen:
            host, _, port = settings.stream_metrics_listen.rpartition(":")
            start_http_server(int(port), addr=host, registry=registry)

    def run(self, stopping: threading.Event) -> None:
        """Looks and probes until it is to stop; whatever is away is waited for."""
        with ThreadPoolExecutor(1, "probe") as pool:
            if self._settings.probe_interval_ms:
                pool.submit(self._probe, stopping)
            self._watch(stopping)

    def _probe(self, stopping: threading.Event) -> None:
        try:
            client = connect(self._settings.data, None)
        except typer.BadParameter as error:
            log.warning("freshness is not probed: there is no server to ask", error=str(error))
            return
        with client:
            Probe(self._settings, client).run(stopping, self._on_seen, self._lost.inc)

    def _on_seen(self, seconds: float) -> None:
        self._freshness.observe(seconds)
        self._fresh_after_ms = round(seconds * 1000, 1)

    def _watch(self, stopping: threading.Event) -> None:
        while not stopping.is_set():
            ends = offline = online = None
            try:
                redis_url, postgres_url = self._settings.store_urls()
                ends = Ends(self._settings.kafka())
                offline, online = OfflineStore(postgres_url), OnlineStore(redis_url)
                while not stopping.wait(WATCH_INTERVAL_S):
                    self._look(ends, offline, online)
            except StoreError as error:
                self._failures.inc()
                log.warning("the stream cannot be watched", error=str(error))
                stopping.wait(RETRY_S)
            finally:
                for part in (ends, offline, online):
                    if part is not None:
                        part.close()

    def _look(self, ends: Ends, offline: OfflineStore, online: OnlineStore) -> None:
        probed_ms = time.time_ns() // 1_000_000
        reach = ends.of(self._topics)
        progress = offline.stream_progress()
        through = complete_through(reach, progress, probed_ms)
        behind = lag(reach, progress)
        reached = sum(offset for offset, _ in progress.values())
        state, unmoved_s = self._movement.judge(reached, behind, time.monotonic())
        self._lag.set(behind)
        self._stuck.set(state == "stuck")
        self._through.set(through / 1000)
        # Said to the store even where it cannot take the instant in: then it is not complete.
        online.put_stream_state(
            json.dumps(
                asdict(
                    StreamState(state, behind, round(unmoved_s, 1), through, self._fresh_after_ms)
                )
            )
        )
        if through >= 0:
            online.advance_stream(through)


def main() -> int:
    """Watches until it is asked to stop."""
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    try:
        Watch(StreamSettings()).run(stopping)
    except SettingsError as error:
        log.error("refusing to start", error=str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
