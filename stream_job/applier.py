"""Applies batches of events to both stores: the stream job's logic, without Flink.

    values ──▶ facts ──▶ Postgres accepts ──▶ Redis appends ──▶ features ──▶ Postgres
                  └── refused, or known with another content: dead letters

Every step may be done again, for the same events, in any order and any company, and leaves the same
stores: Postgres takes an id once, Redis a record once, and a feature row stays as it was. So a batch
that fails anywhere is simply applied again, and Flink may deliver what it delivered before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import structlog

from features import CATALOG, Ledgers, Profiles, as_of, encode_ledger
from ingest.accept import accept_once_each
from ingest.events import Refusal, decode_labels, decode_transactions
from ingest.kaggle import Facts
from ingest.kept_out import KeptOut
from ingest.profiles import profiles_of
from stores.arrow import (
    by_card,
    bytes_by_card,
    points_at,
    records_of,
    to_profile_records,
)
from stores.errors import DataRefusedError, StoreError
from stores.feature_rows import FeatureRows
from stores.postgres import ONLINE_STORE_LOCK, OfflineStore
from stores.redis_store import OnlineStore, ledger_key
from stream_job.dead_letters import Sealer
from stream_job.settings import StreamSettings

RETRY_S_MIN, RETRY_S_MAX = 0.05, 2.0
GIVE_UP_S = 60.0
"""How long a batch is tried again before Flink is told, which begins again at a checkpoint."""
CARDS_REMEMBERED_MAX = 100_000
"""Card numbers whose ids are remembered, in memory only."""

log = structlog.get_logger()

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Batch:
    """Some events, by columns (n,)."""

    topic: Sequence[str]
    partition: Sequence[int]
    offset: Sequence[int]
    append_ms: Sequence[int]
    """When each was appended to its topic."""
    value: Sequence[bytes | None]

    def part(self, begin: int, end: int) -> Batch:
        """The events from one position to before another."""
        columns = (self.topic, self.partition, self.offset, self.append_ms, self.value)
        return Batch(*(column[begin:end] for column in columns))  # type: ignore[arg-type]

    def take(self, rows: Sequence[int]) -> list[bytes | None]:
        """The values at positions."""
        return [self.value[row] for row in rows]


class Applier:
    """Applies batches, one after the other."""

    def __init__(
        self,
        settings: StreamSettings,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Takes the settings; connects when the first batch comes.

        Args:
            settings: where the stores are.
            now: the clock.
            sleep: waits between tries.
        """
        self._settings = settings
        self._card_key = settings.load_card_key()
        self._card_id = lru_cache(maxsize=CARDS_REMEMBERED_MAX)(self._card_key.card_id)
        self._sealer = Sealer(self._card_key)
        self._probe = self._card_key.probe_id
        self._now = now
        self._sleep = sleep
        self._stores: tuple[OfflineStore, OnlineStore] | None = None

    def apply(self, batch: Batch) -> list[str | None]:
        """Applies a batch; returns, for each event, its dead letter or None.

        An event that cannot be applied for a reason that nobody thought of is found by halving the
        batch, and becomes a dead letter: it must not keep the others of its partition waiting.

        Raises:
            StoreError: a store did not do its part for GIVE_UP_S; nothing is lost.
        """
        try:
            return self._patiently(lambda: self._apply(batch))
        except DataRefusedError as error:
            cause: Exception = error
            reason = "REFUSED"
        except StoreError:
            raise
        except Exception as error:
            log.exception("a batch cannot be applied")
            cause = error
            reason = "UNEXPECTED"
        self.close()
        n = len(batch.value)
        if n > 1:
            return self.apply(batch.part(0, n // 2)) + self.apply(batch.part(n // 2, n))
        # Of the cause its kind alone: the text may quote what the event has.
        refusal = Refusal(0, reason, f"it cannot be applied: {type(cause).__name__}; see the log")
        self._patiently(lambda: self._open()[0].advance_stream(_progress(batch)))
        return [self._letter(batch, refusal)]

    def _patiently(self, step: Callable[[], Result]) -> Result:
        """Does a step again and again while a store is away, for GIVE_UP_S at the most."""
        began = time.monotonic()
        pause_s = RETRY_S_MIN
        while True:
            try:
                return step()
            except DataRefusedError:
                raise
            except StoreError as error:
                self.close()
                if time.monotonic() - began > GIVE_UP_S:
                    raise
                log.warning("a store does not take a batch; trying again", error=str(error))
                self._sleep(pause_s)
                pause_s = min(pause_s * 2, RETRY_S_MAX)

    def close(self) -> None:
        """Gives the connections back; the next batch makes new ones."""
        if self._stores is not None:
            stores, self._stores = self._stores, None
            for store in stores:
                store.close()

    def _open(self) -> tuple[OfflineStore, OnlineStore]:
        if self._stores is None:
            redis_url, postgres_url = self._settings.store_urls()
            offline, online = OfflineStore(postgres_url), OnlineStore(redis_url)
            self._stores = offline, online
            offline.check_card_key(self._card_key.fingerprint)
            online.check_card_key(self._card_key.fingerprint)
        return self._stores

    def _apply(self, batch: Batch) -> list[str | None]:
        offline, online = self._open()
        is_label = [topic == self._settings.labels_topic for topic in batch.topic]
        with offline.locked(ONLINE_STORE_LOCK, shared=True):
            # Nobody rebuilds the online store meanwhile, which would set whole ledgers; nor erases.
            kept_out = KeptOut(offline, self._card_key)
            rows = [row for row, label in enumerate(is_label) if not label]
            refusals, probe = self._apply_transactions(batch, rows, offline, online, kept_out)
            rows = [row for row, label in enumerate(is_label) if label]
            refusals += self._apply_labels(batch, rows, offline, kept_out)
            offline.advance_stream(_progress(batch))
            if probe is not None:
                online.put_whole(
                    [(ledger_key(self._probe), encode_ledger(records_of(probe["record"])))]
                )
        letters: list[str | None] = [None] * len(batch.value)
        for refusal in refusals:
            letters[refusal.row] = self._letter(batch, refusal)
        return letters

    def _letter(self, batch: Batch, refusal: Refusal) -> str:
        """The dead letter of an event of a batch."""
        row = refusal.row
        where = batch.topic[row], int(batch.partition[row]), int(batch.offset[row])
        return self._sealer.letter(
            where, batch.value[row], refusal.reason, refusal.detail, self._now()
        )

    # --- transactions -----------------------------------------------------------------------

    def _apply_transactions(
        self,
        batch: Batch,
        rows: list[int],
        offline: OfflineStore,
        online: OnlineStore,
        kept_out: KeptOut,
    ) -> tuple[list[Refusal], pa.Table | None]:
        """Applies the transactions at these positions; returns those that it refuses, and the
        newest probe among them, which it does not apply."""
        if not rows:
            return [], None
        facts, refused = decode_transactions(
            batch.take(rows), self._settings.stream_format, self._card_id, self._now()
        )
        refusals = [Refusal(rows[r.row], r.reason, r.detail) for r in refused]
        is_probe = pc.equal(facts.transactions["card_id"], self._probe).to_numpy()
        probe = None
        if is_probe.any():
            probes = facts.transactions.filter(pa.array(is_probe)).sort_by("event_time")
            probe = probes.slice(len(probes) - 1)
            facts = facts.take(~is_probe)
        stays_out = kept_out.transactions(facts.transactions)
        if stays_out is not None:
            facts = facts.take(~stays_out)  # nothing of it is kept, not even a dead letter
        if not len(facts.transactions):
            return refusals, probe
        accepted = accept_once_each(offline, facts.transactions)
        for position in accepted.conflicts.tolist():
            detail = "this id is known with another content; the first content stays"
            refusals.append(Refusal(rows[int(facts.rows[position])], "CONFLICT", detail))
        self._put_profiles(facts, accepted.conflicts, offline, online)
        kept = np.delete(np.arange(len(facts.transactions)), accepted.conflicts)
        if len(kept):
            true = facts.transactions
            if len(kept) < len(true):
                true = true.take(pa.array(kept))
            features = append_and_compute(true, online)
            offline.features.put_if_missing(features, likely_new=accepted.written == len(true))
        return refusals, probe

    def _put_profiles(
        self, facts: Facts, without: np.ndarray, offline: OfflineStore, online: OnlineStore
    ) -> None:
        """Writes what the events say of card holders, where they say anything."""
        profiles = profiles_of(facts, without)
        if not len(profiles):
            return
        offline.put_profiles(profiles)
        records = to_profile_records(profiles)
        online.put_profiles(
            (card_id, records[row].tobytes())
            for row, card_id in enumerate(profiles["card_id"].to_pylist())
        )

    # --- labels -----------------------------------------------------------------------------

    def _apply_labels(
        self, batch: Batch, rows: list[int], offline: OfflineStore, kept_out: KeptOut
    ) -> list[Refusal]:
        """Writes the labels at these positions; returns those that it refuses."""
        if not rows:
            return []
        labels, found, refused = decode_labels(batch.take(rows), self._settings.stream_format)
        refusals = [Refusal(rows[r.row], r.reason, r.detail) for r in refused]
        stays_out = kept_out.labels(labels["transaction_id"].to_pylist())
        if stays_out is not None:
            labels = labels.filter(pa.array(~stays_out))
            found = [row for row, is_out in zip(found, stays_out, strict=True) if not is_out]
        if len(labels):
            for position in offline.accept_labels(labels).tolist():
                detail = "this transaction has another label; the first one stays"
                refusals.append(Refusal(rows[found[position]], "CONFLICT", detail))
        return refusals


def append_and_compute(transactions: pa.Table, online: OnlineStore) -> FeatureRows:
    """Appends true transactions to ledgers; returns their features, as they are on arrival."""
    records = records_of(transactions["record"])
    numbers, ids = by_card(transactions["card_id"])
    ledgers, profiles = online.append_and_read(bytes_by_card(numbers, records, ids))
    merchants, places = online.merchants(np.ascontiguousarray(records["merchant"]))
    answers = as_of(
        Ledgers.from_bytes(ledgers),
        points_at(records, numbers, places),
        CATALOG,
        Profiles.from_bytes(profiles),
        merchants,
    )
    return FeatureRows(transactions, answers.values, np.arange(len(transactions)))


def _progress(batch: Batch) -> dict[tuple[str, int], tuple[int, int]]:
    """(topic, partition) -> (offset behind the last event, when that event was appended)."""
    reached: dict[tuple[str, int], tuple[int, int]] = {}
    for topic, partition, offset, append_ms in zip(
        batch.topic, batch.partition, batch.offset, batch.append_ms, strict=True
    ):
        where = (topic, int(partition))
        if where not in reached or reached[where][0] <= offset:
            reached[where] = int(offset) + 1, int(append_ms)
    return reached
