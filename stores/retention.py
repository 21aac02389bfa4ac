"""Retention: months of transactions and features that are older than what is kept are dropped.

Of each card the newest transaction that went is remembered. A history then says of every window whether
it is whole, as a ledger does: one that begins behind that transaction is exact, any other is flagged
BEFORE_HISTORY. So nothing that is still answered becomes wrong, and Redis can be rebuilt to the same
bytes as before.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import psycopg

from stores.connections import reported
from stores.errors import LockedError
from stores.exports import end_exports
from stores.postgres import OfflineStore

READERS_TIMEOUT_S = 10
"""How long is waited for those who read, such as a call that builds a training set."""

_MONTHS = """
SELECT relname FROM pg_class JOIN pg_inherits ON inhrelid = oid
WHERE inhparent IN ('transactions'::regclass, 'features'::regclass)
"""
_REMEMBER = """
INSERT INTO dropped AS d SELECT card_id, max(event_time) FROM {table} GROUP BY card_id
ON CONFLICT (card_id) DO UPDATE SET event_time = greatest(d.event_time, excluded.event_time)
"""


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was taken away."""

    months: int
    transactions: int
    cards: tuple[bytes, ...]
    """Of these transactions: their ledgers are to be looked at."""


def prune(offline: OfflineStore, before: datetime) -> Pruned:
    """Drops the months that were over before an instant. To be called while nobody else writes.

    Raises:
        LockedError: somebody reads for longer than READERS_TIMEOUT_S; nothing was dropped.
        StoreError: Postgres does not answer; nothing was dropped.
    """
    with reported():
        try:
            with offline.sql.transaction():
                return _prune(offline.sql, before)
        except psycopg.errors.LockNotAvailable:
            raise LockedError("months that are to be dropped", READERS_TIMEOUT_S) from None


def _prune(sql: psycopg.Connection, before: datetime) -> Pruned:
    # Whoever begins to read waits behind us: not for as long as a training set takes.
    sql.execute(f"SET LOCAL lock_timeout = '{READERS_TIMEOUT_S} s'".encode())
    names = [name for (name,) in sql.execute(_MONTHS).fetchall()]
    old = sorted(name for name in names if _end_of(name) <= before)
    cards: set[bytes] = set()
    transactions = 0
    for name in old:
        if name.startswith("transactions_"):
            rows = sql.execute(f"SELECT card_id, count(*) FROM {name} GROUP BY 1".encode())
            for card_id, count in rows.fetchall():
                cards.add(card_id)
                transactions += count
            sql.execute(_REMEMBER.format(table=name).encode())
        sql.execute(f"DROP TABLE {name}".encode())
    if old:
        end = max(map(_end_of, old))
        sql.execute("UPDATE installation SET history_from = greatest(history_from, %s)", (end,))
        sql.execute("DELETE FROM merchant_facts WHERE month < %s", (end.date(),))
        end_exports(sql)
    return Pruned(len({name[-7:] for name in old}), transactions, tuple(sorted(cards)))


def _end_of(name: str) -> datetime:
    """The first instant behind the month that a table's name ends with, such as 2024_02."""
    year, month = map(int, name[-7:].split("_"))
    return datetime(year + month // 12, month % 12 + 1, 1, tzinfo=UTC)
