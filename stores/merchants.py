"""Facts of merchants in Postgres: computed from transactions and labels, read for `as_of`.

    transactions, labels ──refresh──▶ merchant_facts, fact_runs ──MerchantReader──▶ Merchants
                                                └──publish──▶ Redis

A refresh computes the months anew that something came in of since the last one, and writes what has
changed. Rows stay as they are and newer ones are added, so that a snapshot goes on seeing what it saw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from features import MERCHANT_DAY, RECORD, Merchants, Population
from features.catalog import LABEL_DELAY_DAYS
from features.keys import MERCHANT_KEY_BYTES, merchant_key_bytes
from features.merchants import (
    NEVER,
    MerchantDays,
    day_valid_from_ms,
    encode_merchant,
    kept_online,
)
from stores.conditions import seen_by, with_merchants
from stores.connections import reported
from stores.postgres import OfflineStore

RECORDS_HELD_MAX = 4_000_000
"""Records of merchants that a reader holds for the next question (64 MB)."""
MERCHANTS_TOGETHER = 5_000
"""Merchants that are read, or written, together."""
FACTS_LOCK, FACTS_TIMEOUT_S = "merchants", 3_600.0
"""Held while facts are computed or handed to Redis, and how long whoever needs it waits: it always ends."""
EPOCH = date(1970, 1, 1)
ALL_MERCHANTS = b""

_STORED_DAY = np.dtype(
    [("day", ">i4"), ("known_day", ">i4"), ("count", ">i4"), ("amount_minor", ">i8")]
)
_KEY = f"substring(record FROM {RECORD.fields['merchant'][1] + 1} FOR {MERCHANT_KEY_BYTES})"  # type: ignore[index]
_DAY = "((event_time AT TIME ZONE 'UTC')::date - DATE '1970-01-01')"
_KNOWN = (
    "greatest((label_time AT TIME ZONE 'UTC')::date - DATE '1970-01-01' + 1, "
    f"{_DAY} + {LABEL_DELAY_DAYS + 1})"
)

_LAST_SEEN = """
SELECT snapshot::text FROM fact_runs WHERE snapshot IS NOT NULL ORDER BY fact_run_id DESC LIMIT 1
"""
# Null for the snapshot where somebody has asked since then for all to be computed anew.
_LAST_RUN = f"""
WITH seen AS ({_LAST_SEEN})
SELECT through_day, (SELECT snapshot FROM seen WHERE NOT EXISTS (
    SELECT FROM fact_runs f
    WHERE f.snapshot IS NULL AND NOT pg_visible_in_snapshot(f.ingested_xid, seen.snapshot::pg_snapshot)))
FROM fact_runs ORDER BY fact_run_id DESC LIMIT 1
"""
_ALL_MONTHS = """
SELECT date_trunc('month', event_time, 'UTC') AS month, min(event_time), NULL::int
FROM transactions GROUP BY 1
UNION ALL SELECT DISTINCT month::timestamp AT TIME ZONE 'UTC', NULL::timestamptz, NULL::int
FROM merchant_facts
"""
# Months that something came in of, its first instant, and the first day that a label changes.
_CHANGED_MONTHS = f"""
SELECT date_trunc('month', event_time, 'UTC'), min(event_time), NULL::int
FROM transactions WHERE NOT {{seen}} GROUP BY 1
UNION ALL
SELECT date_trunc('month', event_time, 'UTC'), NULL, min({_KNOWN})
FROM (SELECT transaction_id, label_time FROM labels WHERE is_fraud AND NOT {{seen}}) l
JOIN transaction_ids USING (transaction_id) GROUP BY 1
"""
_COMPUTE_MONTH = f"""
WITH paid AS MATERIALIZED (
    SELECT {_KEY} AS merchant_key, {_DAY} AS day, count(*) AS n, sum(amount_minor) AS amount
    FROM transactions WHERE event_time >= %(begin)s AND event_time < %(end)s GROUP BY 1, 2
), frauds AS MATERIALIZED (
    SELECT {_KEY} AS merchant_key, {_DAY} AS day, {_KNOWN} AS known_day, count(*) AS n
    FROM labels JOIN transactions USING (transaction_id)
    WHERE is_fraud AND event_time >= %(begin)s AND event_time < %(end)s GROUP BY 1, 2, 3
), days AS (
    SELECT merchant_key, day, day AS known_day, n, amount FROM paid
    UNION ALL SELECT merchant_key, day, known_day, n, 0 FROM frauds
    UNION ALL SELECT '\\x', day, day, sum(n), sum(amount) FROM paid GROUP BY day
    UNION ALL SELECT '\\x', day, known_day, sum(n), 0 FROM frauds GROUP BY day, known_day
), computed AS (
    SELECT merchant_key, string_agg(
        int4send(day) || int4send(known_day) || int4send(n::int) || int8send(amount::bigint),
        '\\x'::bytea ORDER BY day, known_day) AS days
    FROM days GROUP BY merchant_key
), held AS (
    SELECT DISTINCT ON (merchant_key) merchant_key, days FROM merchant_facts
    WHERE month = (%(begin)s AT TIME ZONE 'UTC')::date ORDER BY merchant_key, ingested_xid DESC
)
INSERT INTO merchant_facts (merchant_key, month, days)
SELECT merchant_key, (%(begin)s AT TIME ZONE 'UTC')::date, coalesce(c.days, '\\x') FROM computed c
FULL JOIN held h USING (merchant_key) WHERE coalesce(c.days, '\\x') <> coalesce(h.days, '\\x')
ORDER BY merchant_key
"""
_WITHDRAW = """
INSERT INTO fact_runs (through_day, snapshot)
SELECT %s, snapshot FROM (SELECT * FROM fact_runs ORDER BY fact_run_id DESC LIMIT 1) last
WHERE through_day > %s
"""
_NOTE = """
INSERT INTO fact_runs (through_day, snapshot, affected_from)
VALUES (%s, pg_current_snapshot(), %s)
"""
# Whoever goes on with an export that does not see what superseded a row may need it. Done before the next
# refresh: an export that does not see what the last one wrote had begun by then, and is known.
_TIDY = """
DELETE FROM merchant_facts old USING merchant_facts new
WHERE NOT EXISTS (SELECT FROM exports WHERE expires_at > now()
        AND NOT pg_visible_in_snapshot(new.ingested_xid, snapshot))
    AND (new.merchant_key, new.month) = (old.merchant_key, old.month)
    AND new.ingested_xid > old.ingested_xid
"""
_FORGET = """
INSERT INTO fact_runs (through_day, snapshot, affected_from) VALUES (
    (SELECT through_day FROM fact_runs ORDER BY fact_run_id DESC LIMIT 1), NULL,
    (SELECT min(event_time) FROM transactions WHERE card_id = %s))
"""

_FACTS = """
SELECT DISTINCT ON (merchant_key, month) merchant_key, days FROM merchant_facts
WHERE {where}{seen} ORDER BY merchant_key, month, ingested_xid DESC
"""
_THROUGH = """
SELECT (through_day - DATE '1970-01-01')::bigint FROM fact_runs WHERE true{seen}
ORDER BY fact_run_id DESC LIMIT 1
"""
_KEPT_FROM = """
SELECT ((history_from AT TIME ZONE 'UTC')::date - DATE '1970-01-01')::bigint FROM installation
"""


# --- computing ------------------------------------------------------------------------------


def refresh(
    offline: OfflineStore,
    today: date | None,
    report: Callable[[int, int], None] = lambda done, months: None,
) -> int:
    """Brings the facts up to date: features are then valid through the day `today`. To be called under
    FACTS_LOCK.

    Args:
        offline: Postgres.
        today: the day; all of the days before has come in, as far as one knows. None where one does
            not know: then no day becomes valid that was not before.
        report: told (months done, months to do).

    Returns:
        How many months were computed.

    Raises:
        StoreError: Postgres does not do its part; nothing has changed.
    """
    sql = offline.sql
    with reported():
        sql.execute(_TIDY)
    with reported(), sql.transaction():
        sql.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        last = sql.execute(_LAST_RUN).fetchone()
        snapshot = None if last is None else last[1]
        query = _ALL_MONTHS if snapshot is None else _CHANGED_MONTHS.format(seen=seen_by(snapshot))
        found = sql.execute(query.encode()).fetchall()
        months = sorted({month.astimezone(UTC) for month, _, _ in found})
        for done, month in enumerate(months):
            report(done, len(months))
            end = (month + timedelta(days=31)).replace(day=1)
            sql.execute(_COMPUTE_MONTH.encode(), {"begin": month, "end": end})
        through = None if last is None else last[0]
        sql.execute(_NOTE, (today or through, _affected(found, snapshot, through)))
    return len(months)


Found = Sequence[tuple[datetime, datetime | None, int | None]]
"""Months, the first instant of each that something came in of, and the first day that a label changes."""


def _affected(found: Found, snapshot: str | None, through: date | None) -> datetime | None:
    """From which instant on features of transactions may have changed; None where none have."""
    if snapshot is None:
        return min((first for _, first, _ in found if first is not None), default=None)
    was_not_computed = [] if through is None else [(through - EPOCH).days + 1]
    day = min([*_changed_days(found), *was_not_computed], default=None)
    return None if day is None else datetime.fromtimestamp(day_valid_from_ms(day) / 1000, UTC)


def _changed_days(found: Found) -> list[int]:
    """Days that features are others from, the first of them among them."""
    firsts = [first.astimezone(UTC).date() for _, first, _ in found if first is not None]
    return [(first - EPOCH).days + 1 for first in firsts] + [
        day for _, _, day in found if day is not None
    ]


def withdraw(sql: Any) -> bool:
    """After much has come in: from the first day on that facts lack something of, features are
    NOT_COMPUTED until the next refresh.

    Returns:
        Whether they lack anything.
    """
    with reported():
        last = sql.execute(_LAST_SEEN).fetchone()
        if last is None:
            return False
        found = sql.execute(_CHANGED_MONTHS.format(seen=seen_by(last[0])).encode()).fetchall()
        days = _changed_days(found)
        if days:
            through = EPOCH + timedelta(days=min(days) - 1)
            sql.execute(_WITHDRAW, (through, through))
        return bool(days)


def forget_facts(sql: Any, card_id: bytes | None = None) -> None:
    """Has the next refresh compute all facts anew: in the transaction that takes a card away, before it
    does so, or that changes what records are."""
    sql.execute(_FORGET, (card_id,))


# --- reading --------------------------------------------------------------------------------

_NOTHING = np.empty(0, MERCHANT_DAY)
Cursor = Callable[[], AbstractContextManager[Any]]


class MerchantReader:
    """Reads facts, of one snapshot, and holds what it has read."""

    def __init__(self, cursor: Cursor, seen: str) -> None:
        """Takes what it reads with.

        Args:
            cursor: a bulk cursor in the snapshot.
            seen: the condition that a row belongs to it, as it follows others.
        """
        self._cursor, self._seen = cursor, seen
        self.forget()

    def forget(self) -> None:
        """Forgets what was read: the snapshot is another one."""
        self._population: Population | None = None
        self.of_all: MerchantDays = _NOTHING
        """The records of all merchants together, once `population` was asked for."""
        self._numbers: dict[int, int] = {}
        self._held: Merchants | None = None

    def population(self) -> Population:
        """What is known of all merchants together.

        Raises:
            StoreError: Postgres does not answer.
        """
        if self._population is None:
            with self._cursor() as cursor:
                cursor.execute(_THROUGH.format(seen=self._seen))
                through = cursor.fetchone()
                cursor.execute(_KEPT_FROM)
                kept_from = cursor.fetchone()
            self.of_all = self._read([ALL_MERCHANTS]).get(ALL_MERCHANTS, _NOTHING)
            self._population = Population.of(
                self.of_all,
                NEVER if kept_from is None or kept_from[0] is None else int(kept_from[0]),
                NEVER if through is None or through[0] is None else int(through[0]),
            )
        return self._population

    def of(self, keys: npt.NDArray[np.uint64]) -> tuple[Merchants, npt.NDArray[np.int64]]:
        """The facts of merchants.

        Args:
            keys: (n,) as records have them.

        Returns:
            Facts, and where in them the merchant of each key is, (n,).

        Raises:
            StoreError: Postgres does not answer.
        """
        encoded = pc.dictionary_encode(pa.array(keys))
        distinct: list[int] = encoded.dictionary.to_pylist()
        new = [key for key in distinct if key not in self._numbers]
        if self._held is None or new:
            self._hold(distinct, new)
        assert self._held is not None
        places = np.array([self._numbers[key] for key in distinct], dtype=np.int64)
        return self._held, places[encoded.indices.to_numpy()]

    def _hold(self, asked: list[int], new: list[int]) -> None:
        """Adds merchants to those that are held; where these become too many, these are given up."""
        population = self.population()
        if self._held is not None and len(self._held.records) > RECORDS_HELD_MAX:
            self._numbers, self._held, new = {}, None, asked
        names = list(map(merchant_key_bytes, new))
        found = self._read(names)
        parts = [found.get(name, _NOTHING) for name in names]
        added = Merchants.from_records(parts, population.kept_from_day, population)
        self._numbers.update((key, len(self._numbers)) for key in new)
        self._held = added if self._held is None else _joined(self._held, added)

    def _read(self, names: Sequence[bytes]) -> dict[bytes, MerchantDays]:
        """The records of merchants that have any."""
        found: dict[bytes, MerchantDays] = {}
        for begin in range(0, len(names), MERCHANTS_TOGETHER):
            where = with_merchants(names[begin : begin + MERCHANTS_TOGETHER])
            with self._cursor() as cursor:
                cursor.execute(_FACTS.format(where=where, seen=self._seen))
                found.update(_decoded(cursor.fetch_arrow_table()))
        return found

    def all(self) -> Iterator[tuple[bytes, MerchantDays]]:
        """(merchant key, records) of every merchant, in order, MERCHANTS_TOGETHER at a time."""
        behind = ALL_MERCHANTS
        while True:
            with self._cursor() as cursor:
                cursor.execute(
                    f"SELECT DISTINCT merchant_key FROM merchant_facts WHERE merchant_key > "
                    f"'\\x{behind.hex()}'{self._seen} ORDER BY 1 LIMIT {MERCHANTS_TOGETHER}"
                )
                names = cursor.fetch_arrow_table()["merchant_key"].to_pylist()
            if not names:
                return
            found = self._read(names)
            yield from ((name, found[name]) for name in names)
            behind = names[-1]


def _decoded(facts: pa.Table) -> Iterator[tuple[bytes, MerchantDays]]:
    """The records of each merchant in a table that is in order of merchant and month."""
    if not len(facts):
        return
    stored = np.frombuffer(b"".join(facts["days"].to_pylist()), _STORED_DAY)
    records = np.empty(len(stored), MERCHANT_DAY)
    for column in MERCHANT_DAY.names or ():
        records[column] = stored[column]
    sizes = pc.binary_length(facts["days"]).to_numpy() // _STORED_DAY.itemsize
    ends = np.cumsum(sizes)
    names: list[bytes] = facts["merchant_key"].to_pylist()
    begin = 0
    for row, name in enumerate(names):
        if row + 1 == len(names) or names[row + 1] != name:
            yield name, records[begin : ends[row]]
            begin = ends[row]


def _joined(some: Merchants, more: Merchants) -> Merchants:
    return Merchants(
        np.concatenate([some.records, more.records]),
        np.concatenate([some.offsets, some.offsets[-1] + more.offsets[1:]]),
        np.concatenate([some.kept_from_day, more.kept_from_day]),
        some.population,
    )


# --- Redis ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OnlineFacts:
    """What Redis holds of merchants, made from what Postgres has, to the same bytes."""

    population: Population
    merchants: Iterator[tuple[bytes, bytes]]
    """(merchant key, value) of each."""


def online_value(records: MerchantDays, whole: Population) -> bytes:
    """What Redis should hold of a merchant."""
    return encode_merchant(*kept_online(records, whole.kept_from_day, whole.through_day))


def online_facts(reader: MerchantReader) -> OnlineFacts:
    """What Redis should hold.

    Raises:
        StoreError: Postgres does not answer.
    """
    whole = reader.population()
    kept = kept_online(reader.of_all, whole.kept_from_day, whole.through_day)
    merchants = ((name, online_value(records, whole)) for name, records in reader.all())
    return OnlineFacts(Population.of(*kept, whole.through_day), merchants)
