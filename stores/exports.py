"""Exports: everything of a kind, as one snapshot saw it, from any point on.

An export is a row in Postgres: what is asked for, the snapshot, and in which parts it is read. So any
server goes on with any export, after whatever was killed. Rows carry the transaction that wrote them
and never change, which is what makes an old snapshot readable (see 0004_snapshots.sql); where some are
taken away, by an erasure or by retention, so are the exports that had them.

How rows are read, and what makes their order the same every time:

    transactions, labels       some blocks of a table at a time, in the order of their pages
    features, ledgers          span by span of card ids, by card, time and id
    any kind, of some cards    some cards at a time, by card, time and id

A Position is where such a piece begins, and how many of its rows are done.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, TypeAlias

import psycopg
import pyarrow as pa

from features import CATALOG, CATALOG_FINGERPRINT, Ledgers, Profiles
from features.ledger import RECORD_FORMAT
from stores.arrow import (
    CARD_ID,
    LABELS,
    TIME,
    TRANSACTIONS,
    answer_columns,
    answer_fields,
    with_points,
)
from stores.conditions import Range, during, of_cards, seen_by
from stores.connections import Connected, bulk_connection, bulk_cursor, reported
from stores.errors import StoreError
from stores.history import History
from stores.values import ledgers_of_histories

KEPT = timedelta(hours=24)
"""How long an export can be gone on with after the last call that did."""
BLOCKS_TOGETHER = 4_096
"""Pages that are read by one query, 32 MB: what is read again, at the most, when an export goes on."""
CARDS_TOGETHER = 500
"""Cards that are read by one query, where some are asked for."""

_IN_ORDER = (
    # Pages in their order, and from the first on.
    "SET synchronize_seqscans = off",
    "SET max_parallel_workers_per_gather = 0",
)
_BY_NO_INDEX = tuple(
    f"SET enable_{way} = off" for way in ("indexscan", "indexonlyscan", "bitmapscan")
)
"""Of transactions, whose index might be thought of use for a range; labels have none that might be, and
look up their transactions by one."""
_PARTS = """
SELECT c.relname, pg_relation_filenode(c.oid)::bigint,
       pg_relation_size(c.oid) / current_setting('block_size')::bigint
FROM pg_class c WHERE c.relkind = 'r' AND (c.oid = to_regclass(%(table)s)
    OR c.oid IN (SELECT inhrelid FROM pg_inherits WHERE inhparent = to_regclass(%(table)s)))
ORDER BY c.relname
"""


def end_exports(sql: psycopg.Connection[Any]) -> int:
    """Ends all exports, in the transaction that takes rows away: what they had seen is no more what they
    will see. Returns how many there were."""
    return sql.execute("DELETE FROM exports").rowcount


class ExportExpiredError(StoreError):
    """An export cannot be gone on with."""

    def __init__(self, export_id: str, why: str) -> None:
        super().__init__(f"export {export_id} cannot be gone on with: {why}")
        self.export_id = export_id


class Kind(StrEnum):
    """What is exported."""

    TRANSACTIONS = "transactions"
    LABELS = "labels"
    FEATURES = "features"
    LEDGERS = "ledgers"


_IDENTITY = (
    pa.field("card_id", CARD_ID, nullable=False),
    pa.field("event_time", TIME, nullable=False),
    pa.field("transaction_id", pa.string(), nullable=False),
)
SCHEMAS = {
    Kind.TRANSACTIONS: pa.schema([_IDENTITY[0], *list(TRANSACTIONS)[1:]]),
    Kind.LABELS: pa.schema(
        [_IDENTITY[2], *(field.with_nullable(False) for field in LABELS)],
    ),
    Kind.FEATURES: pa.schema([*_IDENTITY, *answer_fields(CATALOG)]),
    Kind.LEDGERS: pa.schema([_IDENTITY[0], pa.field("ledger", pa.binary(), nullable=False)]),
}


@dataclass(frozen=True, slots=True)
class Part:
    """A table, as it was when the export began."""

    table: str
    filenode: int
    """Changes when the table is written anew, and its pages with it."""
    blocks: int


@dataclass(frozen=True, slots=True)
class Position:
    """How far an export has come."""

    part: int = 0
    """Which of the parts, where there are some."""
    at: int = 0
    """Where in it a piece begins: a block, a card id as a number, or a position among cards."""
    skip: int = 0
    """Rows of the piece that are done."""
    rows: int = 0
    """Rows of the export that are done."""


@dataclass(frozen=True, slots=True)
class Export:
    """One export."""

    export_id: str
    kind: Kind
    within: Range
    card_ids: tuple[bytes, ...]
    """In order; none for all."""
    spec: bytes
    """What was asked for, as the asker wrote it."""
    snapshot: str
    parts: tuple[Part, ...]
    complete_through_ms: int
    expires_at: datetime

    @property
    def schema(self) -> pa.Schema:
        """Of its rows."""
        return SCHEMAS[self.kind]


Piece: TypeAlias = tuple[Position, Iterator[pa.RecordBatch]]


class Exports(Connected):
    """Begins exports and reads them. One thread at a time; closed at the end of a `with`."""

    def begin(
        self,
        kind: Kind,
        within: Range,
        card_ids: tuple[bytes, ...],
        spec: bytes,
        complete_through_ms: int,
    ) -> Export:
        """Begins an export of all that is there now; forgets those that have expired."""
        table = {Kind.TRANSACTIONS: "transactions", Kind.LABELS: "labels"}.get(kind)
        with reported(), self.sql.transaction():
            self.sql.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            self.sql.execute("DELETE FROM exports WHERE expires_at < now()")
            parts = () if table is None or card_ids else self._parts(table)
            row = self.sql.execute(
                "INSERT INTO exports (export_id, spec, snapshot, plan, catalog_fingerprint, "
                "complete_through_ms, expires_at) VALUES (%s, %s, pg_current_snapshot(), %s, %s, %s, "
                "now() + %s) RETURNING export_id, snapshot::text, expires_at",
                (
                    secrets.token_hex(8),
                    spec,
                    json.dumps([asdict(part) for part in parts]),
                    _meaning(kind),
                    complete_through_ms,
                    KEPT,
                ),
            ).fetchone()
        assert row is not None
        export_id, snapshot, expires_at = row
        return Export(
            *(export_id, kind, within, tuple(sorted(set(card_ids))), spec, snapshot, parts),
            *(complete_through_ms, expires_at.astimezone(UTC)),
        )

    def spec_of(self, export_id: str) -> bytes:
        """What an export was asked for.

        Raises:
            ExportExpiredError: it is gone.
        """
        with reported():
            row = self.sql.execute(
                "SELECT spec FROM exports WHERE export_id = %s AND expires_at >= now()",
                (export_id,),
            ).fetchone()
        if row is None:
            raise ExportExpiredError(
                export_id, "its snapshot is gone, or rows of it were erased: begin a new export"
            )
        return bytes(row[0])

    def resume(
        self, export_id: str, kind: Kind, within: Range, card_ids: tuple[bytes, ...]
    ) -> Export:
        """An export that began earlier, to be gone on with; it is kept for as long again.

        Args:
            export_id: its id.
            kind, within, card_ids: as it was begun with; see `spec_of`.

        Raises:
            ExportExpiredError: it is gone, or what it read has been written anew since.
        """
        spec = self.spec_of(export_id)
        with reported():
            row = self.sql.execute(
                "UPDATE exports SET expires_at = greatest(expires_at, now() + %s) "
                "WHERE export_id = %s RETURNING snapshot::text, plan, complete_through_ms, "
                "expires_at, catalog_fingerprint",
                (KEPT, export_id),
            ).fetchone()
        if row is None:
            raise ExportExpiredError(export_id, "it has just expired: begin a new export")
        snapshot, plan, complete_through_ms, expires_at, meaning = row
        if meaning != _meaning(kind):
            raise ExportExpiredError(
                export_id, "this server is of another version: begin a new one"
            )
        parts = tuple(Part(**part) for part in plan)
        for part in parts:
            if [known.filenode for known in self._parts(part.table)] != [part.filenode]:
                raise ExportExpiredError(
                    export_id, f"{part.table} was written anew: begin a new one"
                )
        return Export(
            *(export_id, kind, within, tuple(sorted(set(card_ids))), spec, snapshot, parts),
            *(complete_through_ms, expires_at.astimezone(UTC)),
        )

    def _parts(self, table: str) -> tuple[Part, ...]:
        rows = self.sql.execute(_PARTS, {"table": table}).fetchall()
        return tuple(Part(name, filenode, blocks) for name, filenode, blocks in rows)

    def _check(self, export: Export) -> None:
        """Raises ExportExpiredError where rows of an export may have been taken away."""
        self.spec_of(export.export_id)

    # --- reading ----------------------------------------------------------------------------

    def read(
        self, export: Export, position: Position, batch_rows: int
    ) -> Generator[tuple[pa.RecordBatch, Position], None, None]:
        """The rows of an export behind a position.

        Yields:
            (rows, position behind them): at most batch_rows of `export.schema`.

        Raises:
            ExportExpiredError: some of its rows may have been taken away meanwhile.
            StoreError: Postgres does not answer.
        """
        rows = position.rows
        skip = position.skip
        try:
            for begin, batches in self._pieces(export, position):
                done = 0
                for batch in batches:
                    at = max(skip - done, 0)
                    while at < len(batch):
                        part = batch.slice(at, batch_rows)
                        at += len(part)
                        rows += len(part)
                        yield part, replace(begin, skip=done + at, rows=rows)
                    done += len(batch)
                # A span may be narrower than it was: what is left to skip is in the next.
                skip = max(skip - done, 0)
                self._check(export)
        except StoreError:
            self._check(export)  # a table that was dropped, say
            raise

    def _pieces(self, export: Export, position: Position) -> Iterator[Piece]:
        if export.card_ids:
            return self._cards(export, position)
        if export.parts or export.kind in (Kind.TRANSACTIONS, Kind.LABELS):
            return self._blocks(export, position)
        return self._spans(export, position)

    def _blocks(self, export: Export, position: Position) -> Iterator[Piece]:
        """Piece by piece of the tables, as they lie there."""
        query = _QUERIES[export.kind](export)
        with (
            reported(),
            bulk_connection(self.url) as connection,
            bulk_cursor(connection) as cursor,
        ):
            by_no_index = _BY_NO_INDEX if export.kind is Kind.TRANSACTIONS else ()
            for setting in (*_IN_ORDER, *by_no_index):
                cursor.execute(setting)
            for number, part in enumerate(export.parts[position.part :], position.part):
                first = position.at if number == position.part else 0
                for block in range(first, part.blocks, BLOCKS_TOGETHER):
                    end = min(block + BLOCKS_TOGETHER, part.blocks)
                    cursor.execute(query.format(table=part.table, begin=block, end=end))
                    rows = (
                        batch.cast(export.schema)
                        for batch in cursor.fetch_record_batch()
                        if len(batch)
                    )
                    yield Position(number, block), rows
                    connection.commit()

    def _spans(self, export: Export, position: Position) -> Iterator[Piece]:
        """Span by span of all card ids."""
        with History(self.url, export.snapshot) as history:
            for span in history.spans(position.at, before_ms=self._bound(export)):
                rows = self._of_histories(
                    *(export, history, span.where, span.card_ids, span.ledgers),
                    lambda span=span: history.profiles_of(span),  # type: ignore[misc]
                )
                yield Position(at=span.begin), rows

    def _cards(self, export: Export, position: Position) -> Iterator[Piece]:
        """Some of the cards that are asked for at a time."""
        cards = export.card_ids
        with History(self.url, export.snapshot) as history:
            for begin in range(position.at, len(cards), CARDS_TOGETHER):
                some = cards[begin : begin + CARDS_TOGETHER]
                yield Position(at=begin), self._of_cards(export, history, some)

    def _of_cards(
        self, export: Export, history: History, cards: tuple[bytes, ...]
    ) -> Iterator[pa.RecordBatch]:
        match export.kind:
            case Kind.TRANSACTIONS:
                found = history.transactions_of(of_cards(cards), export.within)
                yield from found.select(export.schema.names).cast(export.schema).to_batches()
            case Kind.LABELS:
                found = history.labels_of(of_cards(cards), export.within)
                yield from found.cast(export.schema).to_batches()
            case _:
                for begin, end, ledgers, profiles in history.read(
                    cards, before_ms=self._bound(export)
                ):
                    some = list(cards[begin:end])
                    yield from self._of_histories(
                        *(export, history, of_cards(some), some, ledgers),
                        lambda profiles=profiles: profiles,  # type: ignore[misc]
                    )

    @staticmethod
    def _bound(export: Export) -> int | None:
        """The instant behind which records do not matter. They do to a ledger, whose range chooses
        cards."""
        return export.within[1] if export.kind is Kind.FEATURES else None

    def _of_histories(
        self,
        export: Export,
        history: History,
        where: str,
        card_ids: list[bytes],
        ledgers: Ledgers,
        profiles: Callable[[], Profiles],
    ) -> Iterator[pa.RecordBatch]:
        """What is made from histories: ledgers, or each transaction's features."""
        if export.kind is Kind.LEDGERS:
            if export.within == (None, None):
                chosen = set(card_ids)
            else:
                chosen = set(history.cards_with_transactions(where, export.within))
            yield _encoded(card_ids, ledgers, chosen)
            return
        found = history.identities_of(where, export.within)
        known = profiles() if len(found) else None
        find = history.merchants.of
        for rows, points, merchants in with_points(found, card_ids, _FEATURE_ROWS, find):
            identity = [rows[field.name].combine_chunks().cast(field.type) for field in _IDENTITY]
            from features import as_of  # loads machine code: who only ends exports does without

            answers = as_of(ledgers, points, CATALOG, known, merchants)
            yield pa.RecordBatch.from_arrays(
                [*identity, *answer_columns(answers)], schema=export.schema
            )


_FEATURE_ROWS = 8_192
"""Transactions whose features are computed together."""


def _encoded(card_ids: list[bytes], ledgers: Ledgers, chosen: set[bytes]) -> pa.RecordBatch:
    """The ledgers of chosen cards that have one."""
    made = [of for of in ledgers_of_histories(card_ids, ledgers) if of[0] in chosen]
    columns = [[card_id for card_id, _ in made], [ledger for _, ledger in made]]
    schema = SCHEMAS[Kind.LEDGERS]
    return pa.RecordBatch.from_arrays(
        [pa.array(c, kind) for c, kind in zip(columns, schema.types, strict=True)], schema=schema
    )


def _meaning(kind: Kind) -> str:
    """What rows of a kind depend on besides facts."""
    return {
        Kind.FEATURES: f"{CATALOG_FINGERPRINT} {RECORD_FORMAT}",
        Kind.LEDGERS: RECORD_FORMAT,
    }.get(kind, "")


_PIECE = "FROM ONLY {table} t WHERE ctid >= '({begin},0)'::tid AND ctid < '({end},0)'::tid"


def _transactions_query(export: Export) -> str:
    columns = ", ".join(TRANSACTIONS.names)
    return f"SELECT {columns} {_PIECE} AND {seen_by(export.snapshot)}{during(export.within)}"


def _labels_query(export: Export) -> str:
    columns = ", ".join(SCHEMAS[Kind.LABELS].names)
    query = f"SELECT {columns} {_PIECE} AND {seen_by(export.snapshot)}"
    if export.within != (None, None):
        # Row by row, in the order of the pages; a join might have another.
        query += (
            " AND (SELECT true" + during(export.within) + " FROM transaction_ids i "
            "WHERE i.transaction_id = t.transaction_id)"
        )
    return query


_QUERIES = {Kind.TRANSACTIONS: _transactions_query, Kind.LABELS: _labels_query}
