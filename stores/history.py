"""Whole histories of cards, from Postgres: what `as_of` needs for any instant of the past.

A ledger in Redis ends 31 days behind its newest record; a history has everything that was ever
accepted, so that no window begins before it. All that one History reads is of one snapshot: rows that
arrive meanwhile do not appear.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features import Ledgers, Profiles
from stores.arrow import PROFILES, by_card, records_of
from stores.postgres import bulk_connection, reported
from stores.rebuild import encoded_profiles
from stores.redis_store import profile_key

CARDS_AT_FIRST = 500
"""Cards that are read together while nobody knows how many records they have."""
RECORDS_TOGETHER = 1_000_000
"""Records that are read together, about: 40 MB of them, and as much again while they are put in order."""

_SNAPSHOT = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY"
_RECORDS = "SELECT card_id, record FROM transactions WHERE card_id IN ({cards})"
_PROFILES = f"SELECT {', '.join(PROFILES.names)} FROM profiles WHERE card_id IN ({{cards}})"


class History:
    """Reads histories from one snapshot. One thread at a time; closed at the end of a `with`."""

    def __init__(self, url: str) -> None:
        """Connects, and takes the snapshot.

        Args:
            url: postgresql://user@host:port/database.

        Raises:
            StoreUnavailableError: Postgres cannot be reached.
        """
        with reported():
            self._connection: Any = bulk_connection(url)
            with self._connection.cursor() as cursor:
                cursor.execute(_SNAPSHOT)
                cursor.execute("SELECT record_format FROM installation")  # from here on it is taken
                cursor.fetchall()
        self._mean_records = RECORDS_TOGETHER / CARDS_AT_FIRST

    def __enter__(self) -> History:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Gives the snapshot and the connection back."""
        self._connection.close()

    def read(self, card_ids: Sequence[bytes]) -> Iterator[tuple[int, int, Ledgers, Profiles]]:
        """The histories of cards, RECORDS_TOGETHER at a time.

        Args:
            card_ids: each once.

        Yields:
            (begin, end, ledgers, profiles) of card_ids[begin:end], in that order; the ledger of a
            card that is not known is empty.

        Raises:
            StoreError: Postgres does not answer, or has records of another version.
        """
        begin = 0
        while begin < len(card_ids):
            n = max(1, int(RECORDS_TOGETHER / self._mean_records))
            end = min(begin + n, len(card_ids))
            some = card_ids[begin:end]
            ledgers = self._ledgers(some)
            self._mean_records = max(len(ledgers.records) / len(some), 1.0)
            yield begin, end, ledgers, self._profiles(some)
            begin = end

    def _ledgers(self, card_ids: Sequence[bytes]) -> Ledgers:
        rows = self._query(_RECORDS, card_ids)
        return Ledgers.from_columns(
            _positions(rows["card_id"], card_ids), records_of(rows["record"]), len(card_ids)
        )

    def _profiles(self, card_ids: Sequence[bytes]) -> Profiles:
        known = dict(encoded_profiles(self._query(_PROFILES, card_ids)))
        return Profiles.from_bytes([known.get(profile_key(card_id)) for card_id in card_ids])

    def _query(self, query: str, card_ids: Sequence[bytes]) -> pa.Table:
        ids = ", ".join(f"'\\x{card_id.hex()}'" for card_id in card_ids)
        with reported(), self._connection.cursor() as cursor:
            cursor.execute(query.format(cards=ids))
            return cursor.fetch_arrow_table()


def _positions(column: pa.ChunkedArray, card_ids: Sequence[bytes]) -> npt.NDArray[np.int64]:
    """Where in card_ids each row's card is, (n,) int64."""
    numbers, found = by_card(column)
    at = {card_id: position for position, card_id in enumerate(card_ids)}
    places = np.array([at[card_id] for card_id in found], dtype=np.int64)
    result: npt.NDArray[np.int64] = places[numbers]
    return result
