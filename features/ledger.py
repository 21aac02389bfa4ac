"""The ledger: a card's transactions of the last 31 days, as the bytes that every store keeps.

    header (16 bytes)                          records (40 bytes each), ascending by
    ┌─────────┬─────────────┬──────┬─────────┐ (event time, transaction)
    │ version │ record_size │ zero │ dropped │┌────────┬────────┬─────┐
    │ u8      │ u8          │ u48  │ i64     ││ record │ record │  …  │
    └─────────┴─────────────┴──────┴─────────┘└────────┴────────┴─────┘

`dropped` is the event time of the newest transaction that retention has dropped, or NEVER_DROPPED.
A window is exact if and only if it begins after it.

What is kept is a function of the *set* of transactions alone, whatever order they came in:

- a record stays while it is less than RETENTION_MS behind the card's newest,
- and among the LEDGER_RECORDS_MAX newest;
- hence `dropped` is the event time of the newest record that did not stay.

The Redis function in stores/tally.lua applies the same rules; tests hold the two to the same
bytes. All numbers are little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from features.catalog import CATEGORIES, RETENTION_MS

LEDGER_VERSION = 1
LEDGER_RECORDS_MAX = 10_000
"""Records that a ledger holds at the most (400 kB); the oldest go first."""

NEVER_DROPPED = -(2**63)

CATEGORY_BITS = 16
CATEGORY_MASK = np.uint64((1 << CATEGORY_BITS) - 1)

RECORD = np.dtype(
    [
        # event_time_ms << 16 | category code: ascending by time, and 40 bytes instead of 48.
        ("stamp", "<u8"),
        ("transaction", "<u8"),
        ("merchant", "<u8"),
        ("amount_minor", "<i8"),
        ("latitude_udeg", "<i4"),
        ("longitude_udeg", "<i4"),
    ]
)
"""One transaction: keys are those of features.keys, positions those of features.geo."""

RECORD_FORMAT = blake2b(
    repr((LEDGER_VERSION, RECORD.descr, CATEGORIES, "no category: -1")).encode(), digest_size=8
).hexdigest()
"""What a record's bytes mean, the codes of the vocabulary among it."""

HEADER = struct.Struct("<BB6xq")

Records = npt.NDArray[np.void]


class LedgerFormatError(ValueError):
    """Bytes that are no ledger of a version known here."""


def make_records(
    *,
    time_ms: npt.ArrayLike,
    transaction: npt.ArrayLike,
    merchant: npt.ArrayLike,
    amount_minor: npt.ArrayLike,
    category: npt.ArrayLike,
    latitude_udeg: npt.ArrayLike,
    longitude_udeg: npt.ArrayLike,
) -> Records:
    """Packs columns (n,) into records (n,) of RECORD, in the order given. A category is a code, 0 for
    one that is not in the vocabulary, or -1 for none."""
    times = np.asarray(time_ms, dtype=np.int64).astype(np.uint64)
    records = np.empty(len(times), dtype=RECORD)
    codes = np.asarray(category, dtype=np.int64).astype(np.uint64) & CATEGORY_MASK
    records["stamp"] = (times << np.uint64(CATEGORY_BITS)) | codes
    records["transaction"] = transaction
    records["merchant"] = merchant
    records["amount_minor"] = amount_minor
    records["latitude_udeg"] = latitude_udeg
    records["longitude_udeg"] = longitude_udeg
    return records


def record_times_ms(records: Records) -> npt.NDArray[np.int64]:
    """Event times (n,) int64, contiguous."""
    shifted: npt.NDArray[np.uint64] = records["stamp"] >> np.uint64(CATEGORY_BITS)
    return shifted.view(np.int64)


def record_categories(records: Records) -> npt.NDArray[np.int16]:
    """Category codes (n,) int16, contiguous, as `make_records` takes them."""
    return (records["stamp"] & CATEGORY_MASK).astype(np.uint16).view(np.int16)


def sort_unique(records: Records) -> Records:
    """Records in ledger order, the first given kept where (time, transaction) is the same."""
    return sort_unique_by_card(np.zeros(len(records), dtype=np.int64), records, 1)[0]


def sort_unique_by_card(
    card_index: npt.NDArray[np.int64], records: Records, n_cards: int
) -> tuple[Records, npt.NDArray[np.int64]]:
    """The same for many cards at once.

    Args:
        card_index: (n,) whose each record is, from 0.
        records: (n,) of RECORD in any order.

    Returns:
        records (m,), m <= n, by card and then in ledger order, and offsets (n_cards + 1,): card i
        has records[offsets[i]:offsets[i + 1]].
    """
    order, offsets = _order(card_index, records, n_cards)
    again = np.ones(max(len(order) - 1, 0), dtype=bool)
    # The category is content, not order: the same key with another category is the same record.
    for column in (records["transaction"], record_times_ms(records), card_index):
        ordered = column[order]
        again &= ordered[1:] == ordered[:-1]
    if again.any():
        order = np.delete(order, np.flatnonzero(again) + 1)
        np.cumsum(np.bincount(card_index[order], minlength=n_cards), out=offsets[1:])
    return _take(records, order), offsets


def _take(records: Records, order: npt.NDArray[np.int64]) -> Records:
    """records[order], ten times as fast: as mere bytes."""
    taken = np.ascontiguousarray(records).view(f"V{RECORD.itemsize}").take(order)
    return taken.view(RECORD)


def _order(
    card_index: npt.NDArray[np.int64], records: Records, n_cards: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The order (n,) of records by card, time and transaction, stable; and each card's offsets."""
    offsets = np.zeros(n_cards + 1, dtype=np.int64)
    np.cumsum(np.bincount(card_index, minlength=n_cards), out=offsets[1:])
    if len(records) >= _RECORDS_MANY:
        from features.insertion import insert  # loads machine code, once

        order = np.empty(len(records), dtype=np.int64)
        moves_max = _MOVES_PER_RECORD * len(records)
        if insert(np.ascontiguousarray(records), card_index, offsets, order, moves_max):
            return order, offsets
    return np.lexsort((records["transaction"], record_times_ms(records), card_index)), offsets


_RECORDS_MANY = 2_000
"""Fewer are sorted in less than a millisecond by numpy, which a short command waits for more gladly than for
machine code."""
_MOVES_PER_RECORD = 4
"""How far records are moved, on the average, before another way of sorting is faster."""


def encode_ledger(records: Records, dropped_ms: int = NEVER_DROPPED) -> bytes:
    """The ledger of records in ledger order, after retention; of none only where some were dropped.

    Args:
        records: (n,) of RECORD, as `sort_unique` returns them.
        dropped_ms: event time of the newest record dropped before.
    """
    if not len(records):
        if dropped_ms == NEVER_DROPPED:
            raise ValueError("a card without any record, dropped ones included, has no ledger")
        return HEADER.pack(LEDGER_VERSION, RECORD.itemsize, dropped_ms)
    times = record_times_ms(records)
    first = int(np.searchsorted(times, times[-1] - RETENTION_MS, side="right"))
    first = max(first, len(records) - LEDGER_RECORDS_MAX)
    if first > 0:
        dropped_ms = max(dropped_ms, int(times[first - 1]))
    return HEADER.pack(LEDGER_VERSION, RECORD.itemsize, dropped_ms) + records[first:].tobytes()


def decode_header(ledger: bytes) -> int:
    """Checks a ledger's frame and returns `dropped` in milliseconds.

    Raises:
        LedgerFormatError: too short, of an unknown version, or cut off inside a record.
    """
    if len(ledger) < HEADER.size:
        raise LedgerFormatError(f"a ledger of {len(ledger)} bytes is shorter than its header")
    version, record_size, dropped_ms = HEADER.unpack_from(ledger)
    if version != LEDGER_VERSION or record_size != RECORD.itemsize:
        raise LedgerFormatError(
            f"ledger version {version} with records of {record_size} bytes; this build reads "
            f"version {LEDGER_VERSION} with records of {RECORD.itemsize} bytes"
        )
    if (len(ledger) - HEADER.size) % RECORD.itemsize:
        raise LedgerFormatError(f"a ledger of {len(ledger)} bytes ends inside a record")
    return int(dropped_ms)


def is_ledger(ledger: bytes) -> bool:
    """Whether bytes are a ledger, as far as its frame tells."""
    try:
        decode_header(ledger)
    except LedgerFormatError:
        return False
    return True


_NO_LEDGER = HEADER.pack(LEDGER_VERSION, RECORD.itemsize, NEVER_DROPPED)
_DROPPED_AT = HEADER.size - 8
_FRAMES = {_NO_LEDGER[:_DROPPED_AT]}
"""What every ledger of this version begins with."""


def merge_ledger(ledger: bytes | None, records: Records) -> bytes:
    """The ledger after more transactions: what the Redis function does, for tests and benches.

    Args:
        ledger: as stored, or None for a card never seen.
        records: (n,) of RECORD in any order, duplicates allowed; n >= 1.
    """
    if ledger is None:
        return encode_ledger(sort_unique(records))
    dropped_ms = decode_header(ledger)
    known = np.frombuffer(ledger, dtype=RECORD, offset=HEADER.size)
    return encode_ledger(sort_unique(np.concatenate((known, records))), dropped_ms)


@dataclass(frozen=True, slots=True)
class Ledgers:
    """Many cards' ledgers, concatenated."""

    records: Records
    """(n_records,) of RECORD, by card and then in ledger order."""
    offsets: npt.NDArray[np.int64]
    """(n_cards + 1,): card i has records[offsets[i]:offsets[i + 1]]."""
    dropped_ms: npt.NDArray[np.int64]
    """(n_cards,) `dropped` of each."""

    def __len__(self) -> int:
        return len(self.dropped_ms)

    @classmethod
    def from_bytes(cls, ledgers: Sequence[bytes | None]) -> Ledgers:
        """Concatenates ledgers as stored; None stands for a card never seen.

        Raises:
            LedgerFormatError: as `decode_header`, naming the ledger's position.
        """
        stored = [_NO_LEDGER if ledger is None else ledger for ledger in ledgers]
        bytes_of_records = np.array([len(ledger) for ledger in stored], np.int64) - HEADER.size
        counts, rest = np.divmod(bytes_of_records, RECORD.itemsize)
        if rest.any() or not {ledger[:_DROPPED_AT] for ledger in stored} <= _FRAMES:
            for i, ledger in enumerate(stored):
                try:
                    decode_header(ledger)
                except LedgerFormatError as error:
                    raise LedgerFormatError(f"ledger {i}: {error}") from None
        offsets = np.zeros(len(stored) + 1, dtype=np.int64)
        counts.cumsum(out=offsets[1:])
        bodies = [memoryview(ledger)[HEADER.size :] for ledger in stored]
        records = np.frombuffer(b"".join(bodies), RECORD)
        dropped = b"".join([ledger[_DROPPED_AT : HEADER.size] for ledger in stored])
        dropped_ms = np.frombuffer(dropped, np.int64)
        return cls(records, offsets, dropped_ms)

    @classmethod
    def from_columns(
        cls,
        card_index: npt.NDArray[np.int64],
        records: Records,
        n_cards: int,
        dropped_ms: npt.NDArray[np.int64] | None = None,
    ) -> Ledgers:
        """Histories: records (n,) in any order, each of card_index[i]; `dropped` (n_cards,) of each
        card, by default nothing."""
        order, offsets = _order(card_index, records, n_cards)
        return cls(
            _take(records, order),
            offsets,
            np.full(n_cards, NEVER_DROPPED, dtype=np.int64) if dropped_ms is None else dropped_ms,
        )
