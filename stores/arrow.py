"""Facts as Arrow tables, and the way from them to the records of ledgers and profiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from features import PROFILE_RECORD, make_records, merchant_key, transaction_key
from features.catalog import CATEGORY_CODES
from features.geo import to_udeg
from features.ledger import RECORD, Records, sort_unique_by_card
from features.points import CATEGORY_UNKNOWN
from features.profile import GENDERS, NUMBER_MISSING, ProfileRecords
from stores.errors import StoreError

Column: TypeAlias = Any  # pyarrow.ChunkedArray; pyarrow ships no types

TIME = pa.timestamp("us", "UTC")

TRANSACTIONS = pa.schema(
    [
        pa.field("card_id", pa.binary(), nullable=False),
        pa.field("event_time", TIME, nullable=False),
        pa.field("transaction_id", pa.string(), nullable=False),
        pa.field("amount_minor", pa.int64(), nullable=False),
        pa.field("merchant", pa.string(), nullable=False),
        pa.field("category", pa.string()),
        pa.field("merchant_latitude", pa.float64()),
        pa.field("merchant_longitude", pa.float64()),
    ]
)
"""Transactions: amounts in minor units, positions in degrees to the micro-degree."""

RECORD_COLUMN = pa.field("record", pa.binary(), nullable=False)
"""Beside TRANSACTIONS: what a ledger keeps of each, as bytes (features.ledger.RECORD)."""

FEATURE_ROWS = pa.schema(
    [
        pa.field("event_time", TIME, nullable=False),
        pa.field("transaction_id", pa.string(), nullable=False),
        pa.field("catalog_fingerprint", pa.string(), nullable=False),
        pa.field("feature_values", pa.list_(pa.float64()), nullable=False),
    ]
)
"""Feature rows: NaN where the status is not PRESENT, in the order of the catalogue."""

LABELS = pa.schema([pa.field("is_fraud", pa.bool_()), pa.field("label_time", TIME)])
"""What a file may say of its transactions besides: null where it does not."""

PROFILES = pa.schema(
    [
        pa.field("card_id", pa.binary(), nullable=False),
        pa.field("content", pa.binary(), nullable=False),
        pa.field("valid_from", TIME, nullable=False),
        pa.field("gender", pa.string()),
        pa.field("birth_date", pa.date32()),
        pa.field("job", pa.string()),
        pa.field("home_latitude", pa.float64()),
        pa.field("home_longitude", pa.float64()),
        pa.field("city", pa.string()),
        pa.field("state", pa.string()),
        pa.field("zip", pa.string()),
        pa.field("city_pop", pa.int32()),
    ]
)
"""Card profiles; `content` is a digest of all columns behind valid_from."""

_cached_merchant_key = lru_cache(maxsize=1 << 20)(merchant_key)


def to_ms(times: Column) -> npt.NDArray[np.int64]:
    """Timestamps as whole milliseconds since 1970-01-01 UTC, (n,)."""
    ms: npt.NDArray[np.int64] = times.cast(pa.int64()).to_numpy() // 1000
    return ms


def map_distinct(
    column: Column, convert: Callable[[str | None], int], dtype: npt.DTypeLike
) -> npt.NDArray[Any]:
    """Converts each distinct value of a text column once; (n,) of dtype."""
    encoded = pc.dictionary_encode(column, null_encoding="encode").combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.chunk(0)
    table = np.array([convert(v) for v in encoded.dictionary.to_pylist()], dtype=dtype)
    result: npt.NDArray[Any] = table[encoded.indices.to_numpy()]
    return result


def category_code(category: str | None) -> int:
    """The code of a category in the vocabulary, or CATEGORY_UNKNOWN."""
    return CATEGORY_CODES.get(category, CATEGORY_UNKNOWN) if category else CATEGORY_UNKNOWN


def _merchant_key(merchant: str | None) -> int:
    assert merchant is not None  # the column is not nullable
    return _cached_merchant_key(merchant)


def to_records(transactions: pa.Table) -> Records:
    """The ledger records (n,) of TRANSACTIONS, in their order."""
    return make_records(
        time_ms=to_ms(transactions["event_time"]),
        transaction=np.array(
            [transaction_key(name) for name in transactions["transaction_id"].to_pylist()],
            dtype=np.uint64,
        ),
        merchant=map_distinct(transactions["merchant"], _merchant_key, np.uint64),
        amount_minor=transactions["amount_minor"].to_numpy(),
        category=map_distinct(transactions["category"], category_code, np.int64),
        latitude_udeg=to_udeg(transactions["merchant_latitude"].to_numpy()),
        longitude_udeg=to_udeg(transactions["merchant_longitude"].to_numpy()),
    )


def with_records(transactions: pa.Table) -> pa.Table:
    """TRANSACTIONS with RECORD_COLUMN behind all else."""
    records = to_records(transactions)
    offsets = np.arange(len(records) + 1, dtype=np.int32) * RECORD.itemsize
    column = pa.Array.from_buffers(
        RECORD_COLUMN.type,
        len(records),
        [None, pa.py_buffer(offsets), pa.py_buffer(records.tobytes())],
    )
    return transactions.append_column(RECORD_COLUMN, column)


def records_of(column: Column) -> Records:
    """The records (n,) in a RECORD_COLUMN; they are not copied where it has one chunk.

    Raises:
        StoreError: one of them is missing, or of another size.
    """
    parts = []
    for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
        if not len(chunk):
            continue
        _, offsets, data = chunk.buffers()
        bounds = np.frombuffer(offsets, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
        if chunk.null_count or (np.diff(bounds) != RECORD.itemsize).any():
            raise StoreError(
                "postgres has transactions without their record, or with one of another version: "
                "stop whatever old version still writes, then `tally up` or `tally load` mends them"
            )
        parts.append(np.frombuffer(data, RECORD, len(chunk), int(bounds[0])))
    return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, RECORD), *parts])


def bytes_by_card(
    numbers: npt.NDArray[np.int64], records: Records, card_ids: Sequence[bytes]
) -> list[tuple[bytes, bytes]]:
    """(card id, its records in ledger order and each once, as bytes) of every card that has any.

    Args:
        numbers: (n,) whose each record is, counting into card_ids.
        records: (n,) in any order.
        card_ids: of all cards.
    """
    ordered, offsets = sort_unique_by_card(numbers, records, len(card_ids))
    content = ordered.tobytes()
    bounds = (offsets * RECORD.itemsize).tolist()
    return [
        (card_id, content[begin:end])
        for card_id, begin, end in zip(card_ids, bounds, bounds[1:], strict=False)
        if begin < end
    ]


def to_profile_records(profiles: pa.Table) -> ProfileRecords:
    """The profile records (n,) of PROFILES, in their order."""
    records = np.zeros(len(profiles), dtype=PROFILE_RECORD)
    records["valid_from_ms"] = to_ms(profiles["valid_from"])
    records["latitude_udeg"] = to_udeg(profiles["home_latitude"].to_numpy())
    records["longitude_udeg"] = to_udeg(profiles["home_longitude"].to_numpy())
    days = profiles["birth_date"].cast(pa.int32())
    records["birth_date_days"] = pc.fill_null(days, NUMBER_MISSING).to_numpy()
    records["city_pop"] = pc.fill_null(profiles["city_pop"], NUMBER_MISSING).to_numpy()
    records["gender"] = [
        GENDERS.index(gender) if gender in GENDERS else 0
        for gender in profiles["gender"].to_pylist()
    ]
    return records


def by_card(card_ids: Column) -> tuple[npt.NDArray[np.int64], list[bytes]]:
    """Numbers cards in order of appearance: the number (n,) of each row's, and their ids."""
    encoded = pc.dictionary_encode(card_ids).combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.chunk(0)
    return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary.to_pylist()


def runs_of_cards(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Cuts batches that are ordered by card_id between cards, so that no card is in two tables."""
    held: list[pa.RecordBatch] = []
    for batch in batches:
        if not len(batch):
            continue
        last = batch["card_id"][-1]
        index = pc.index(batch["card_id"], last).as_py()
        if index == 0 and held and held[-1]["card_id"][-1] == last:
            held.append(batch)
            continue
        held.append(batch.slice(0, index))
        if sum(map(len, held)):
            yield pa.Table.from_batches(held)
        held = [batch.slice(index)]
    if held:
        yield pa.Table.from_batches(held)
