"""The freshness probe: publishes an event of its own now and then, and waits until an answer shows it.

Its card is nobody's: no number leads to its id. The job takes its events as it takes others, keeps
them out of Postgres, and shows them in Redis last of their batch, when all else of it is applied. So
a probe is as slow as the slowest event of its batch; alone in it, it is faster than a payment by the
few milliseconds that a payment's rows take.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import structlog
import tally

from stores.errors import StoreError
from stream_job.publish import Publisher, write_transaction
from stream_job.settings import StreamSettings

GIVE_UP_S = 30.0
"""A probe that is not seen for so long is given up: the job is far behind, or the online store was
emptied meanwhile."""
LOOK_INTERVAL_S_MIN, LOOK_INTERVAL_S_MAX = 0.002, 0.1
LOOK_SHARE = 0.05
"""It looks again after this share of the time that it has waited."""
RETRY_S = 1.0
FEATURE = "seconds_since_last_txn"

log = structlog.get_logger()


class Probe:
    """Measures how long events take from Kafka to answers."""

    def __init__(self, settings: StreamSettings, client: tally.Client) -> None:
        """Takes where to publish, and who answers."""
        self._settings = settings
        card_key = settings.load_card_key()
        self._card_id = card_key.probe_id
        self._publisher = Publisher(settings, card_key)
        self._client = client
        self._last_ms: float | None = None
        self._since_s: float | None = None
        """When the probe under way was published."""

    @property
    def fresh_after_ms(self) -> float | None:
        """How long the last probe took, or how long the one under way has been waiting, if that is
        longer; None before the first."""
        since_s = self._since_s
        waiting_ms = 0.0 if since_s is None else (time.perf_counter() - since_s) * 1000
        if self._last_ms is None:
            return None
        return round(max(self._last_ms, waiting_ms), 1)

    def run(
        self,
        stopping: threading.Event,
        seen: Callable[[float], None],
        lost: Callable[[], None],
    ) -> None:
        """Probes until it is to stop; whatever is away is waited for.

        Args:
            stopping: says when.
            seen: told the seconds from publishing to the answer.
            lost: told of a probe that was not seen within GIVE_UP_S; `seen` is told of it too.
        """
        while not stopping.wait(self._settings.probe_interval_ms / 1000):
            try:
                seconds = self._measure(stopping)
            except (StoreError, tally.TallyError) as error:
                log.warning("freshness cannot be probed", error=str(error))
                stopping.wait(RETRY_S)
                continue
            if stopping.is_set():
                return
            if seconds is None:
                lost()
            seen(GIVE_UP_S if seconds is None else seconds)
            self._last_ms = 1000 * (GIVE_UP_S if seconds is None else seconds)

    def _measure(self, stopping: threading.Event) -> float | None:
        """Seconds until an event that is published now is in an answer; None if it never is."""
        event_ms = time.time_ns() // 1_000_000
        event = {
            "transaction_id": f"tally probe {event_ms}",
            "card_id": self._card_id,
            "amount_minor": 0,
            "merchant": "tally probe",
            "category": None,
            "merchant_latitude": None,
            "merchant_longitude": None,
        }
        value = write_transaction(self._settings.stream_format, event, event_ms)
        row = tally.Row(card_id=self._card_id, at=event_ms + 1)
        began_s = self._since_s = time.perf_counter()
        try:
            self._publisher.send(self._settings.transactions_topic, self._card_id, value)
            while (seconds := time.perf_counter() - began_s) < GIVE_UP_S:
                pause_s = min(max(LOOK_SHARE * seconds, LOOK_INTERVAL_S_MIN), LOOK_INTERVAL_S_MAX)
                if stopping.wait(pause_s):
                    break
                answer = self._client.online([row], [FEATURE])
                if answer.values[0, 0] == 1 / 1000:
                    return time.perf_counter() - began_s
        finally:
            self._since_s = None
        return None
