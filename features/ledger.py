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
    repr((LEDGER_VERSION, RECORD.descr, CATEGORIES)).encode(), digest_size=8
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
    """Packs columns (n,) into records (n,) of RECORD, in the order given."""
    times = np.asarray(time_ms, dtype=np.int64).astype(np.uint64)
    records = np.empty(len(times), dtype=RECORD)
    codes = np.asarray(category, dtype=np.int64).astype(np.uint64)
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


def record_categories(records: Records) -> npt.NDArray[np.int64]:
    """Category codes (n,) int64, contiguous."""
    masked: npt.NDArray[np.uint64] = records["stamp"] & np.uint64((1 << CATEGORY_BITS) - 1)
    return masked.view(np.int64)


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
    # The category is content, not order: the same key with another category is the same record.
    columns = (records["transaction"], record_times_ms(records), card_index)
    order = np.lexsort(columns)  # stable
    again = np.ones(max(len(order) - 1, 0), dtype=bool)
    for column in columns:
        ordered = column[order]
        again &= ordered[1:] == ordered[:-1]
    if again.any():
        order = np.delete(order, np.flatnonzero(again) + 1)
    offsets = np.zeros(n_cards + 1, dtype=np.int64)
    np.cumsum(np.bincount(card_index[order], minlength=n_cards), out=offsets[1:])
    return records[order], offsets


def encode_ledger(records: Records, dropped_ms: int = NEVER_DROPPED) -> bytes:
    """The ledger of records in ledger order, after retention; at least one record.

    Args:
        records: (n,) of RECORD, as `sort_unique` returns them.
        dropped_ms: event time of the newest record dropped before.
    """
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
        cls, card_index: npt.NDArray[np.int64], records: Records, n_cards: int
    ) -> Ledgers:
        """Whole histories, nothing dropped: records (n,) in any order, each of card_index[i]."""
        times = record_times_ms(records)
        order = np.lexsort((records["transaction"], times, card_index))
        counts = np.bincount(card_index, minlength=n_cards)
        offsets = np.zeros(n_cards + 1, dtype=np.int64)
        np.cumsum(counts, out=offsets[1:])
        return cls(
            records[order],
            offsets,
            np.full(n_cards, NEVER_DROPPED, dtype=np.int64),
        )
