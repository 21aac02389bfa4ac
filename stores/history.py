"""Whole histories of cards, from Postgres: what `as_of` needs for any instant of the past.

A ledger in Redis ends 31 days behind its newest record; a history has everything that was ever
accepted, so that no window begins before it. All that one History reads is of one snapshot: rows that
arrive meanwhile do not appear. A snapshot that was noted earlier can be taken up again, by any
connection at any later time, since rows carry the transaction that wrote them and never change.

Card ids are HMACs and thus uniform. So all cards are read span by span, a span being all ids from one
to before another, which no index or list of cards is needed for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features import RECORD, Ledgers, Profiles
from features.ledger import NEVER_DROPPED, Records
from stores.arrow import LABELS, PROFILES, TRANSACTIONS, by_card, records_of, to_ms
from stores.closing import Closing
from stores.conditions import IDS_END, Range, during, instant, of_cards, seen_by, with_ids
from stores.connections import bulk_connection, bulk_cursor, reported
from stores.merchants import MerchantReader
from stores.redis_store import profile_key
from stores.values import encoded_profiles

RECORDS_TOGETHER = 160_000
"""Records that are read together, about: 6 MB of them, and as much again while they are put in order."""
CARDS_AT_FIRST = 500
"""Cards that are read together while nobody knows how many records they have."""
ROWS_PER_PAGE = 45
"""Of transactions, rather more than there are: what is read at first goes by how large the table is."""
GROWTH_MAX = 8
"""How much more is read together than the last time, at the most."""

_SNAPSHOT = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"
_PAGES = """
SELECT coalesce(sum(pg_relation_size(inhrelid)) / current_setting('block_size')::int, 0)::bigint
FROM pg_inherits WHERE inhparent = 'transactions'::regclass
"""
_RECORDS = "SELECT card_id, record FROM transactions WHERE {where}"
_TRANSACTIONS = (
    f"SELECT {', '.join(TRANSACTIONS.names)}, record FROM transactions WHERE {{where}} "
    "ORDER BY card_id, event_time, transaction_id"
)
_IDENTITIES = (
    "SELECT card_id, event_time, transaction_id, record FROM transactions WHERE {where} "
    "ORDER BY card_id, event_time, transaction_id"
)
_LABELS_OF = (
    "SELECT transaction_id, is_fraud, label_time FROM labels JOIN (SELECT card_id, event_time, "
    "transaction_id FROM transactions WHERE {where}{seen}) t USING (transaction_id) "
    "WHERE true{seen} ORDER BY card_id, event_time, transaction_id"
)
_PROFILES = f"SELECT {', '.join(PROFILES.names)} FROM profiles WHERE {{where}}"
_DROPPED = "SELECT card_id, event_time FROM dropped WHERE {where}"
_ASKED = 'CREATE TEMP TABLE asked (transaction_id text COLLATE "C", number int)'
_LABELS_ASKED = (
    "SELECT number, is_fraud, label_time FROM asked JOIN labels USING (transaction_id) "
    "WHERE {where}"
)


@dataclass(frozen=True, slots=True)
class Span:
    """All cards whose ids, as numbers, are from `begin` to before `end`."""

    begin: int
    end: int
    card_ids: list[bytes]
    """In order."""
    ledgers: Ledgers
    """Their histories, in that order."""

    @property
    def where(self) -> str:
        """The span as a condition in SQL."""
        return with_ids(self.begin, self.end)


class History(Closing):
    """Reads histories from one snapshot. One thread at a time; closed at the end of a `with`."""

    def __init__(self, url: str, snapshot: str | None = None) -> None:
        """Connects, and takes a snapshot.

        Args:
            url: postgresql://user@host:port/database.
            snapshot: pg_current_snapshot() of an earlier moment, to see what was seen then.

        Raises:
            StoreUnavailableError: Postgres cannot be reached.
        """
        self._snapshot = snapshot
        self._seen = "" if snapshot is None else f" AND {seen_by(snapshot)}"
        with reported():
            self._connection: Any = bulk_connection(url)
            with self._connection.cursor() as cursor:
                cursor.execute(_ASKED)
                self._connection.commit()
        self.merchants = MerchantReader(self._cursor, self._seen)
        if snapshot is None:
            self.renew()
        self.mean_records = RECORDS_TOGETHER / CARDS_AT_FIRST
        """Of a card, as far as one knows."""

    def close(self) -> None:
        """Gives the snapshot and the connection back."""
        self._connection.close()

    def renew(self) -> None:
        """Gives the snapshot back, and takes one of now."""
        self.merchants.forget()
        with reported(), self._connection.cursor() as cursor:
            self._connection.rollback()
            cursor.execute(_SNAPSHOT)
            cursor.execute("SELECT 1 FROM installation")  # from here on it is taken
            cursor.fetchall()

    @contextmanager
    def _cursor(self) -> Iterator[Any]:
        """A cursor in the snapshot. One that was taken up again needs no transaction to be kept open,
        which would keep Postgres from tidying up."""
        with reported(), bulk_cursor(self._connection) as cursor:
            yield cursor
            if self._snapshot is not None:
                self._connection.commit()

    # --- some cards -------------------------------------------------------------------------

    def read(
        self, card_ids: Sequence[bytes], *, before_ms: int | None = None
    ) -> Iterator[tuple[int, int, Ledgers, Profiles]]:
        """The histories of cards, RECORDS_TOGETHER at a time.

        Args:
            card_ids: each once.
            before_ms: leave records at or after this instant out.

        Yields:
            (begin, end, ledgers, profiles) of card_ids[begin:end], in that order; the ledger of a
            card that is not known is empty.

        Raises:
            StoreError: Postgres does not answer, or has records of another version.
        """
        begin = 0
        while begin < len(card_ids):
            n = max(1, int(RECORDS_TOGETHER / self.mean_records))
            end = min(begin + n, len(card_ids))
            some = card_ids[begin:end]
            where = of_cards(some)
            at = {card_id: position for position, card_id in enumerate(some)}
            numbers, records = self._records(where + during((None, before_ms)), at)
            ledgers = Ledgers.from_columns(numbers, records, len(some), self._dropped(where, at))
            # A few cards say little of others: what is read together grows by steps, as of spans.
            mean = len(records) / len(some)
            self.mean_records = max(mean, self.mean_records / GROWTH_MAX, 1.0)
            yield begin, end, ledgers, self._profiles(where, some)
            begin = end

    # --- all cards --------------------------------------------------------------------------

    def spans(
        self, begin: int = 0, end: int = IDS_END, *, before_ms: int | None = None
    ) -> Iterator[Span]:
        """The histories of all cards, RECORDS_TOGETHER at a time, in order of their ids.

        Args:
            begin: the first id, as a number, such as where another call's span ended.
            end: behind the last id.
            before_ms: leave records at or after this instant out.

        Raises:
            StoreError: as `read`.
        """
        width = self._first_width()
        while begin < end:
            behind = min(begin + width, end)
            where = with_ids(begin, behind)
            where += during((None, before_ms))
            at: dict[bytes, int] = {}
            numbers, records = self._records(where, at)
            dropped_ms = self._dropped(with_ids(begin, behind), at)
            cards = sorted(at)
            rank = np.empty(len(cards), dtype=np.int64)
            rank[[at[card_id] for card_id in cards]] = np.arange(len(cards))
            in_order = np.empty(len(cards), dtype=np.int64)
            in_order[rank] = dropped_ms
            ledgers = Ledgers.from_columns(rank[numbers], records, len(cards), in_order)
            yield Span(begin, behind, cards, ledgers)
            factor = min(RECORDS_TOGETHER / max(len(records), 1), GROWTH_MAX)
            width = max(int(width * factor), 1)
            begin = behind

    def profiles_of(self, span: Span) -> Profiles:
        """The profiles of a span's cards, in their order."""
        return self._profiles(span.where, span.card_ids)

    def transactions_of(self, where: str, within: Range = (None, None)) -> pa.Table:
        """The transactions of some cards within a range of event times.

        Args:
            where: which cards, such as `Span.where` or `of_cards`.
            within: the range.

        Returns:
            TRANSACTIONS with RECORD_COLUMN, by card, time and id.
        """
        with self._cursor() as cursor:
            cursor.execute(_TRANSACTIONS.format(where=where + during(within) + self._seen))
            return cursor.fetch_arrow_table()

    def identities_of(self, where: str, within: Range = (None, None)) -> pa.Table:
        """The same without what records say too: card_id, event_time, transaction_id and record."""
        with self._cursor() as cursor:
            cursor.execute(_IDENTITIES.format(where=where + during(within) + self._seen))
            return cursor.fetch_arrow_table()

    def profile_rows(self, where: str) -> pa.Table:
        """The profiles, of PROFILES, of such cards."""
        with self._cursor() as cursor:
            cursor.execute(_PROFILES.format(where=where + self._seen))
            return cursor.fetch_arrow_table()

    def labels_of(self, where: str, within: Range = (None, None)) -> pa.Table:
        """The labels of such transactions: transaction_id and LABELS, in the same order."""
        with self._cursor() as cursor:
            cursor.execute(_LABELS_OF.format(where=where + during(within), seen=self._seen))
            return cursor.fetch_arrow_table()

    def cards_with_transactions(self, where: str, within: Range) -> list[bytes]:
        """Those of some cards that have a transaction within a range of event times."""
        with self._cursor() as cursor:
            query = f"SELECT DISTINCT card_id FROM transactions WHERE {where}{during(within)}"
            cursor.execute(query + self._seen)
            cards: list[bytes] = cursor.fetch_arrow_table()["card_id"].to_pylist()
        return cards

    def _first_width(self) -> int:
        """How many ids a first span takes, by how large the table is now."""
        with self._cursor() as cursor:
            cursor.execute(_PAGES)
            pages = int(cursor.fetchone()[0])
        return min(IDS_END, IDS_END * RECORDS_TOGETHER // (ROWS_PER_PAGE * max(pages, 1)))

    # --- labels -----------------------------------------------------------------------------

    def labels(self, transaction_ids: pa.ChunkedArray, known_by_us: int) -> pa.Table:
        """The labels (n,) of LABELS of transactions, as they were known at an instant: null where
        none was known, or there is no such transaction.

        Args:
            transaction_ids: (n,) text; null has no label.
            known_by_us: microseconds since 1970-01-01 UTC; a label counts from its label_time on.
        """
        asked = pa.table(
            {
                "transaction_id": transaction_ids,
                "number": pa.array(np.arange(len(transaction_ids), dtype=np.int32)),
            }
        )
        where = f"label_time <= {instant(known_by_us)}{self._seen}"
        with self._cursor() as cursor:
            cursor.adbc_ingest("asked", asked, mode="append", temporary=True)
            cursor.execute(_LABELS_ASKED.format(where=where))
            found = cursor.fetch_arrow_table()
            cursor.execute("TRUNCATE asked")
        at = np.full(len(asked), -1, dtype=np.int64)
        at[found["number"].to_numpy()] = np.arange(len(found))
        places = pa.array(at, mask=at < 0)
        return found.select(LABELS.names).take(places).cast(LABELS)

    # --- reading ----------------------------------------------------------------------------

    def _records(self, where: str, at: dict[bytes, int]) -> tuple[npt.NDArray[np.int64], Records]:
        """Records (n,) and the position of each one's card, by `at`, which new cards are added to."""
        numbers, records = bytearray(), bytearray()  # what grows without being there twice
        for batch in self._batches(_RECORDS.format(where=where + self._seen)):
            codes, cards = by_card(pa.chunked_array([batch["card_id"]]))
            places = np.array([at.setdefault(card, len(at)) for card in cards], dtype=np.int64)
            numbers += places[codes].data
            records += records_of(batch["record"]).data.cast("B")
        return np.frombuffer(numbers, np.int64), np.frombuffer(records, RECORD)

    def _dropped(self, where: str, at: dict[bytes, int]) -> npt.NDArray[np.int64]:
        """What retention has dropped (n_cards,) of cards, by `at`, which cards are added to of which
        nothing else is left."""
        with self._cursor() as cursor:
            cursor.execute(_DROPPED.format(where=where))
            found = cursor.fetch_arrow_table()
        places = [at.setdefault(card, len(at)) for card in found["card_id"].to_pylist()]
        dropped_ms = np.full(len(at), NEVER_DROPPED, dtype=np.int64)
        dropped_ms[places] = to_ms(found["event_time"])
        return dropped_ms

    def _batches(self, query: str) -> Iterator[pa.RecordBatch]:
        with self._cursor() as cursor:
            cursor.execute(query)
            yield from (batch for batch in cursor.fetch_record_batch() if len(batch))

    def _profiles(self, where: str, card_ids: Sequence[bytes]) -> Profiles:
        known = dict(encoded_profiles(self.profile_rows(where)))
        return Profiles.from_bytes([known.get(profile_key(card_id)) for card_id in card_ids])
