"""The freshness probe: publishes an event of its own now and then, and waits until an answer shows it.

Its card is nobody's: no number leads to its id. The job takes its
events as it takes others, but keeps them out of Postgres, and shows them in Redis last of their
batch, when all else of it is applied: what the probe measures is the slowest event of its batch.
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
"""A probe that is not seen for so long is lost: the online store was emptied meanwhile."""
LOOK_INTERVAL_S = 0.002
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
            lost: told of a probe that was not seen within GIVE_UP_S.
        """
        while not stopping.wait(self._settings.probe_interval_ms / 1000):
            try:
                seconds = self._measure(stopping)
            except (StoreError, tally.TallyError) as error:
                log.warning("freshness cannot be probed", error=str(error))
                stopping.wait(RETRY_S)
                continue
            if seconds is not None:
                seen(seconds)
            elif not stopping.is_set():
                lost()

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
        began_s = time.perf_counter()
        self._publisher.send(self._settings.transactions_topic, self._card_id, value)
        row = tally.Row(card_id=self._card_id, at=event_ms + 1)
        while not stopping.wait(LOOK_INTERVAL_S):
            answer = self._client.online([row], [FEATURE])
            seconds = time.perf_counter() - began_s
            if answer.values[0, 0] == 0.001:
                return seconds
            if seconds > GIVE_UP_S:
                break
        return None
