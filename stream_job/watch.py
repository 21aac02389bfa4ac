"""Watches the stream: through which instant the online store is complete, how far behind the job is,
whether it is stuck, and how fresh answers are. `python -m stream_job.watch`.

Completeness. What is applied is read, and then, the clock having been looked at, the topics' ends. A
partition of which everything up to its end is applied is complete through that instant of the clock,
even if no event ever comes. One that is behind is complete through the last instant at which it was
not, or through that at which the last applied event was appended, less a millisecond, which others may
share, whichever is later. The least of all partitions is what the online store may say.

Clocks jump. An instant that is ahead of the clock by more than CLOCK_SKEW_MS came from one that was
ahead and was corrected: nothing is concluded from it, and the store takes it back.
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
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from tally.cli.connection import connect

from stores.errors import StoreError
from stores.postgres import OfflineStore
from stores.redis_store import OnlineStore
from stores.settings import SettingsError
from stores.unfailing import unfailing
from stream_job.probe import GIVE_UP_S, Probe
from stream_job.settings import StreamSettings
from stream_job.topics import TopicEnds
from telemetry.metrics_port import MetricsPort

WATCH_INTERVAL_S = 0.1
STUCK_AFTER_S = 3.0
"""Behind, and not moving for so long: stuck."""
MARKS_AFTER_S = 0.5
"""So long after the last event was applied it is looked whether there are any behind it."""
CLOCK_SKEW_MS = 2_000
"""How far clocks of this machine, of Kafka's and of an earlier look may differ."""
RETRY_S = 0.5
PROBE_RETRY_S = 5.0
FRESHNESS_BUCKETS_S = (
    *(0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0),
)

Where = tuple[str, int]
"""Topic and partition."""
Ends = Mapping[Where, tuple[int, int]]
"""Of each partition the first offset that is kept, and the offset behind the last event."""
Progress = Mapping[Where, tuple[int, int]]
"""Of partitions the offset behind the last applied event, and when that one was appended in ms."""

log = structlog.get_logger()


class Completeness:
    """Tells through which instant all that was published is applied; what holds once holds for as long
    as topics and progress are the same."""

    def __init__(self) -> None:
        self._known: dict[Where, tuple[int, int]] = {}
        """Of each partition how far it was applied, and the instant in ms."""

    def through_ms(self, ends: Ends, progress: Progress, probed_ms: int) -> int:
        """The instant, in ms; -1 if none can be said.

        Args:
            ends: of all partitions, read at probed_ms or later.
            progress: read before that.
            probed_ms: the clock.
        """
        if not ends or is_ahead(ends, progress):
            self._known.clear()
            return -1
        latest_ms = probed_ms + CLOCK_SKEW_MS
        for where, (first, end) in ends.items():
            reached, append_ms = progress.get(where, (0, 0))
            appended_ms = append_ms - 1 if append_ms <= latest_ms else -1
            through_ms = probed_ms if max(reached, first) >= end else appended_ms
            before, known_ms = self._known.get(where, (0, -1))
            # Else Postgres is another than it was, or the clock is.
            if reached >= before and known_ms <= latest_ms:
                through_ms = max(through_ms, known_ms)
            self._known[where] = reached, through_ms
        return min(probed_ms, *(self._known[where][1] for where in ends))


def is_ahead(ends: Ends, progress: Progress) -> bool:
    """Whether more was applied than there ever was: these are not the topics it came from."""
    return any(reached > ends.get(where, (0, 0))[1] for where, (reached, _) in progress.items())


def lag(ends: Ends, progress: Progress) -> int:
    """Events that are published and not applied."""
    return sum(
        max(0, end - max(first, progress.get(where, (0, 0))[0]))
        for where, (first, end) in ends.items()
    )


def expired(ends: Ends, progress: Progress) -> int:
    """Events that the topics' retention removed before they were applied."""
    return sum(max(0, first - progress.get(where, (0, 0))[0]) for where, (first, _) in ends.items())


@dataclass(frozen=True, slots=True)
class StreamState:
    """What is known of the stream."""

    state: str
    """running, behind, stuck, or ahead: more was applied than the topics ever had."""
    lag_events: int
    unmoved_s: float
    """How long no event of some partition was applied, while some were there to be."""
    complete_through_ms: int
    fresh_after_ms: float | None
    """How long the last freshness probe took from Kafka to an answer, or how long the one under way
    has been waiting, if that is longer; None before the first."""


class Movement:
    """Tells a job that is behind from one that is stuck."""

    def __init__(self) -> None:
        self._seen: dict[Where, tuple[int, float]] = {}
        """Of each partition how far it was applied, and since when that is so."""

    def waiting(self, now_s: float) -> dict[Where, float]:
        """For how long each partition has had events waiting, and none of them applied."""
        return {where: now_s - since_s for where, (_, since_s) in self._seen.items()}

    def unmoved_s(self, ends: Ends, progress: Progress, now_s: float) -> float:
        """The longest that a partition has had events waiting, and none of them applied."""
        longest_s = 0.0
        for where, (first, end) in ends.items():
            reached = max(first, progress.get(where, (0, 0))[0])
            known, since_s = self._seen.get(where, (-1, now_s))
            if reached != known or reached >= end:
                since_s = now_s
            self._seen[where] = reached, since_s
            longest_s = max(longest_s, now_s - since_s)
        return longest_s


def name_state(ends: Ends, progress: Progress, unmoved_s: float) -> str:
    """StreamState.state."""
    if is_ahead(ends, progress):
        return "ahead"
    if unmoved_s >= STUCK_AFTER_S:
        return "stuck"
    return "behind" if lag(ends, progress) else "running"


class Watch:
    """Looks at the stream again and again."""

    def __init__(self, settings: StreamSettings) -> None:
        self._settings = settings
        self._topics = (settings.transactions_topic, settings.labels_topic)
        self._completeness = Completeness()
        self._movement = Movement()
        self._marks: dict[Where, tuple[int, int]] = {}
        """Of partitions (offset, end) between which there is no event."""
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
        self._expired = Gauge(
            "tally_stream_expired_events",
            "Events that the topics' retention removed before they were applied.",
            registry=registry,
        )
        self._watched = Gauge(
            "tally_stream_watched",
            "1 while Kafka and both stores answer: otherwise the other figures are old.",
            registry=registry,
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
            "tally_stream_probes_lost_total",
            f"Probes not seen within {GIVE_UP_S:.0f} s; in the histogram they took that long.",
            registry=registry,
        )
        self._probe: Probe | None = None
        if settings.stream_metrics_listen:
            try:
                MetricsPort(settings.stream_metrics_listen, registry)
            except OSError as error:
                name = f"TALLY_STREAM_METRICS_LISTEN={settings.stream_metrics_listen}"
                raise SettingsError(f"{name} cannot be listened on: {error.strerror}") from error

    def run(self, stopping: threading.Event) -> None:
        """Looks and probes until it is to stop; whatever is away is waited for."""
        with ThreadPoolExecutor(1, "probe") as pool:
            try:
                if self._settings.probe_interval_ms:
                    pool.submit(self._probe_freshness, stopping)
                self._watch(stopping)
            finally:
                stopping.set()  # the probe must not outlive it

    def _probe_freshness(self, stopping: threading.Event) -> None:
        while not stopping.is_set():
            try:
                with connect(self._settings.data, None) as client:
                    self._probe = Probe(self._settings, client)
                    self._probe.run(stopping, self._freshness.observe, self._lost.inc)
            except Exception as error:  # noqa: BLE001 (whatever it is, the watch goes on, and it is said)
                log.warning("freshness is not probed", error=str(error) or type(error).__name__)
                stopping.wait(PROBE_RETRY_S)

    def _watch(self, stopping: threading.Event) -> None:
        while not stopping.is_set():
            ends = offline = online = None
            try:
                redis_url, postgres_url = self._settings.store_urls()
                ends = TopicEnds(self._settings)
                offline, online = OfflineStore(postgres_url), OnlineStore(redis_url)
                while not stopping.wait(WATCH_INTERVAL_S):
                    self._look(ends, offline, online)
            except StoreError as error:
                self._failures.inc()
                self._watched.set(0)
                log.warning("the stream cannot be watched", error=str(error))
                stopping.wait(RETRY_S)
            finally:
                for part in (ends, offline, online):
                    if part is not None:
                        part.close()

    def _without_marks(self, kafka: TopicEnds, ends: Ends, progress: Progress) -> Ends:
        """The ends, where nothing was applied for a while, without what is no event behind it."""
        found = dict(ends)
        for where, since_s in self._movement.waiting(time.monotonic()).items():
            first, end = ends.get(where, (0, 0))
            reached = max(first, progress.get(where, (0, 0))[0])
            if since_s < MARKS_AFTER_S or reached >= end:
                continue
            if self._marks.get(where) != (reached, end):
                if not kafka.is_nothing_behind(*where, reached):
                    continue
                self._marks[where] = reached, end
            found[where] = first, reached
        return found

    def _look(self, kafka: TopicEnds, offline: OfflineStore, online: OnlineStore) -> None:
        progress = offline.stream_progress()
        probed_ms = time.time_ns() // 1_000_000
        ends = self._without_marks(kafka, kafka.of(self._topics), progress)
        through = self._completeness.through_ms(ends, progress, probed_ms)
        unmoved_s = self._movement.unmoved_s(ends, progress, time.monotonic())
        state = StreamState(
            state=name_state(ends, progress, unmoved_s),
            lag_events=lag(ends, progress),
            unmoved_s=round(unmoved_s, 1),
            complete_through_ms=through,
            fresh_after_ms=self._probe.fresh_after_ms if self._probe else None,
        )
        self._lag.set(state.lag_events)
        self._stuck.set(state.state == "stuck")
        self._through.set(through / 1000)
        self._expired.set(expired(ends, progress))
        self._watched.set(1)
        # Said to the store even where it cannot take the instant in: then it is not complete.
        online.put_stream_state(json.dumps(asdict(state)))
        online.advance_stream(through, probed_ms + CLOCK_SKEW_MS)


def main() -> int:
    """Watches until it is asked to stop."""
    structlog.configure(logger_factory=structlog.WriteLoggerFactory(file=unfailing(sys.stdout)))
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
