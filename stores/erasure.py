"""Erasing a card: out of both stores, and kept out when its events are brought again.

While nobody else writes, one transaction of Postgres removes everything of the card, leaves tombstones,
and ends the exports that had seen it; then Redis forgets it. A tombstone says only whether a given id is
the erased one, to whoever has the card key. Events of the card up to the erasure are dropped without a
trace from then on, whether a topic is replayed or a file loaded again; later ones are a new beginning.

A receipt names what was removed, sealed under the card key. Checking it looks through everything there
is for what should be gone.
"""

from __future__ import annotations

import hmac
import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features import RECORD, CardKey
from features.ledger import HEADER, is_ledger, record_times_ms
from stores.arrow import by_card, to_ms
from stores.connections import reported
from stores.errors import StoreError
from stores.exports import end_exports
from stores.merchants import forget_facts
from stores.postgres import ONLINE_STORE_LOCK, OfflineStore
from stores.redis_store import OnlineStore, ledger_key, profile_key

TIMEOUT_S = 60.0
"""How long an erasure waits until nobody writes."""

_OF_CARD = "SELECT transaction_id FROM transactions WHERE card_id = %s"
_REMOVALS = {
    "features": "DELETE FROM features f USING transactions t WHERE t.card_id = %s "
    "AND (f.event_time, f.transaction_id) = (t.event_time, t.transaction_id)",
    "labels": "DELETE FROM labels l USING transactions t WHERE t.card_id = %s "
    "AND l.transaction_id = t.transaction_id",
    "transaction_ids": "DELETE FROM transaction_ids i USING transactions t WHERE t.card_id = %s "
    "AND i.transaction_id = t.transaction_id",
    "transactions": "DELETE FROM transactions WHERE card_id = %s",
    "profiles": "DELETE FROM profiles WHERE card_id = %s",
    "dropped": "DELETE FROM dropped WHERE card_id = %s",
}
_TOMBSTONES = """
SELECT card_blind, max(erased_at) FROM erasures WHERE card_blind = ANY(%s) GROUP BY card_blind
"""


@dataclass(frozen=True, slots=True)
class Receipt:
    """Says what was removed, and not of whom."""

    receipt_id: str
    erased_at: str
    """ISO 8601, UTC."""
    card_blind: str
    """What the card's id is known by now, in hexadecimal digits."""
    removed: dict[str, int]
    """Rows by table, and values of Redis."""
    seal: str = ""

    def sealed(self, card_key: CardKey) -> Receipt:
        """The receipt with its seal."""
        text = json.dumps(asdict(replace(self, seal="")), sort_keys=True).encode()
        seal = hmac.digest(card_key.derive("erasure receipts"), text, "sha256").hex()
        return replace(self, seal=seal)

    @classmethod
    def read(cls, text: str, card_key: CardKey) -> Receipt:
        """A receipt that was printed.

        Raises:
            StoreError: it is none, was changed, or is of another card key.
        """
        try:
            receipt = cls(**json.loads(text))
            is_ours = hmac.compare_digest(receipt.sealed(card_key).seal, receipt.seal)
        except (ValueError, TypeError) as error:
            raise StoreError(f"this is no receipt of an erasure: {error}") from None
        if not is_ours:
            raise StoreError("this receipt was changed, or is of another card key")
        return receipt


class Blinds:
    """Turns ids into what tombstones know them by."""

    def __init__(self, card_key: CardKey) -> None:
        self._key = card_key.derive("tombstones")

    def of(self, value: bytes) -> bytes:
        """The blind (16 bytes) of an id."""
        return hmac.digest(self._key, value, "sha256")[:16]


class Tombstones:
    """Says which events stay out. To be asked while nobody erases."""

    def __init__(self, offline: OfflineStore, card_key: CardKey) -> None:
        self._sql = offline.sql
        self._blinds = Blinds(card_key)

    def erased(self, transactions: pa.Table) -> npt.NDArray[np.bool_]:
        """Which of TRANSACTIONS (n,) are of an erased card and happened before it was erased."""
        numbers, cards = by_card(transactions["card_id"])
        blinds = [self._blinds.of(card_id) for card_id in cards]
        with reported():
            found = self._sql.execute(_TOMBSTONES, (blinds,)).fetchall()
        known: dict[bytes, datetime] = dict(found)
        through_ms = np.array(
            [round(known[b].timestamp() * 1000) if b in known else -1 for b in blinds], np.int64
        )
        is_erased: npt.NDArray[np.bool_] = to_ms(transactions["event_time"]) <= through_ms[numbers]
        return is_erased

    def erased_labels(self, transaction_ids: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Which of these (n,) are of erased transactions."""
        blinds = [self._blinds.of(name.encode()) for name in transaction_ids]
        with reported():
            rows = self._sql.execute(
                "SELECT blind FROM erased_transactions WHERE blind = ANY(%s)", (blinds,)
            ).fetchall()
        known = {blind for (blind,) in rows}
        return np.array([blind in known for blind in blinds], dtype=bool)


class Eraser:
    """Erases cards, and checks receipts."""

    def __init__(self, offline: OfflineStore, online: OnlineStore, card_key: CardKey) -> None:
        self._offline, self._online, self._card_key = offline, online, card_key
        self._blinds = Blinds(card_key)

    def erase(self, card_id: bytes) -> Receipt:
        """Removes a card from both stores. Done again, it removes what came since.

        Raises:
            LockedError: somebody writes for longer than TIMEOUT_S.
            StoreError: a store does not answer; Postgres may have erased already: do it again.
        """
        with self._offline.locked(ONLINE_STORE_LOCK, shared=False, timeout_s=TIMEOUT_S):
            receipt = self._erase(card_id)
            removed = receipt.removed | {"redis": self._forget(card_id)}
        return replace(receipt, removed=removed).sealed(self._card_key)

    def _erase(self, card_id: bytes) -> Receipt:
        sql = self._offline.sql
        receipt_id = secrets.token_hex(8)
        blind = self._blinds.of(card_id)
        with reported(), sql.transaction():
            transactions = [name for (name,) in sql.execute(_OF_CARD, (card_id,)).fetchall()]
            if transactions:
                forget_facts(sql, card_id)
            removed = {
                table: sql.execute(query.encode(), (card_id,)).rowcount
                for table, query in _REMOVALS.items()
            }
            row = sql.execute(
                "INSERT INTO erasures VALUES (%s, clock_timestamp(), %s) RETURNING erased_at",
                (receipt_id, blind),
            ).fetchone()
            sql.cursor().executemany(
                "INSERT INTO erased_transactions VALUES (%s, %s) ON CONFLICT DO NOTHING",
                [(self._blinds.of(name.encode()), receipt_id) for name in transactions],
            )
            removed["exports"] = end_exports(sql)
        assert row is not None
        erased_at = row[0].astimezone(UTC).isoformat(timespec="milliseconds")
        return Receipt(receipt_id, erased_at, blind.hex(), removed)

    def _forget(self, card_id: bytes) -> int:
        keys = [ledger_key(card_id), profile_key(card_id)]
        held = self._online.read(keys)
        self._online.swap((key, value, None) for key, value in zip(keys, held, strict=True))
        return sum(value is not None for value in held)

    # --- checking ---------------------------------------------------------------------------

    def check(self, receipt: Receipt) -> Iterator[tuple[int, list[str]]]:
        """Looks through everything for what should be gone.

        Yields:
            (rows and values looked at so far, what is wrong), in sentences.
        """
        looked_at = 0
        wrong: list[str] = []
        for looked, found in self._looks(receipt):
            looked_at += looked
            wrong += found
            yield looked_at, wrong

    def _looks(self, receipt: Receipt) -> Iterator[tuple[int, list[str]]]:
        sql = self._offline.sql
        blind = bytes.fromhex(receipt.card_blind)
        with reported():
            known = sql.execute(
                "SELECT FROM erasures WHERE receipt_id = %s AND card_blind = %s",
                (receipt.receipt_id, blind),
            ).fetchone()
            rows = sql.execute(
                "SELECT blind FROM erased_transactions WHERE receipt_id = %s",
                (receipt.receipt_id,),
            ).fetchall()
        yield 0, [] if known is not None else ["its tombstone is gone: a replay brings it back"]
        through_ms = round(datetime.fromisoformat(receipt.erased_at).timestamp() * 1000)
        for table in ("transactions", "profiles", "dropped"):
            yield from self._cards_in(table, blind, receipt.erased_at)
        erased = {value for (value,) in rows}
        for table in ("transactions", "transaction_ids", "labels", "features"):
            yield from self._ids_in(table, erased)
        yield from self._in_redis(blind, through_ms)

    def _cards_in(
        self, table: str, blind: bytes, erased_at: str
    ) -> Iterator[tuple[int, list[str]]]:
        time = "valid_from" if table == "profiles" else "event_time"
        query = f"SELECT DISTINCT card_id FROM {table} WHERE {time} <= timestamptz '{erased_at}'"
        for batch in self._offline.read(query):
            found = any(self._blinds.of(card) == blind for card in batch["card_id"].to_pylist())
            yield len(batch), [f"{table} has rows of the card"] if found else []

    def _ids_in(self, table: str, erased: set[bytes]) -> Iterator[tuple[int, list[str]]]:
        if not erased:
            return
        for batch in self._offline.read(f"SELECT transaction_id FROM {table}"):
            names = batch["transaction_id"].to_pylist()
            count = sum(self._blinds.of(name.encode()) in erased for name in names)
            yield len(names), [f"{table} has {count} erased transactions"] if count else []

    def _in_redis(self, blind: bytes, through_ms: int) -> Iterator[tuple[int, list[str]]]:
        for card in self._online.cards_with_values():
            found = []
            if self._blinds.of(card) == blind:
                (ledger,) = self._online.read([ledger_key(card)])
                if ledger is None or not is_ledger(ledger):
                    found = ["redis has a value of the card"]
                else:
                    records = np.frombuffer(ledger, RECORD, offset=HEADER.size)
                    if (record_times_ms(records) <= through_ms).any():
                        found = ["redis has transactions of the card"]
            yield 1, found
