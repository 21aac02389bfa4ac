"""Facts as Arrow tables, and the way from them to the records of ledgers and profiles."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from features import (
    PROFILE_RECORD,
    Feature,
    Merchants,
    Points,
    make_records,
    merchant_key,
    transaction_key,
)
from features.catalog import CATEGORY_CODES
from features.keys import CARD_ID_BYTES
from features.ledger import (
    RECORD,
    Records,
    record_categories,
    record_times_ms,
    sort_unique_by_card,
)
from features.points import CATEGORY_MISSING, CATEGORY_UNKNOWN
from features.positions import to_udeg
from features.profile import GENDERS, NUMBER_MISSING, ProfileRecords
from stores.errors import NotReadyError

if TYPE_CHECKING:
    from features.answers import Answers

Column: TypeAlias = Any  # pyarrow.ChunkedArray; pyarrow ships no types

TIME = pa.timestamp("us", "UTC")
CARD_ID = pa.binary(CARD_ID_BYTES)
STATUSES, KNOWN = "statuses", "known"

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
    """The code of a category: in the vocabulary, CATEGORY_UNKNOWN, or CATEGORY_MISSING for None."""
    return CATEGORY_MISSING if category is None else CATEGORY_CODES.get(category, CATEGORY_UNKNOWN)


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
        NotReadyError: one of them is missing, or of another size.
    """
    parts = []
    for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
        if not len(chunk):
            continue
        _, offsets, data = chunk.buffers()
        bounds = np.frombuffer(offsets, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
        if chunk.null_count or (np.diff(bounds) != RECORD.itemsize).any():
            raise NotReadyError(
                "postgres",
                "postgres has transactions without their record, or with one of another version: "
                "stop whatever old version still writes, then `tally up` or `tally load` mends them",
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


def points_at(
    records: Records,
    card_index: npt.NDArray[np.int64],
    merchant_index: npt.NDArray[np.int64] | None = None,
) -> Points:
    """One point (n,) right at each record's transaction, with what it says of its payment.

    Args:
        records: (n,).
        card_index: (n,) whose each is.
        merchant_index: (n,) at which of some merchants; by default none is given.
    """
    return Points.at(
        card_index,
        record_times_ms(records),
        amount_minor=records["amount_minor"],
        category=record_categories(records),
        latitude_udeg=records["latitude_udeg"],
        longitude_udeg=records["longitude_udeg"],
        merchant_index=merchant_index,
    )


FindMerchants = Callable[[npt.NDArray[np.uint64]], tuple[Merchants, npt.NDArray[np.int64]]]
"""Finds the facts of merchants by their keys (n,): the facts, and where in them each one's are, (n,)."""


def with_points(
    found: pa.Table, card_ids: Sequence[bytes], rows_together: int, find: FindMerchants
) -> Iterator[tuple[pa.Table, Points, Merchants]]:
    """Transactions, some at a time, a point right at each, and the facts of their merchants.

    Args:
        found: with card_id and RECORD_COLUMN.
        card_ids: all of theirs, in order; `card_index` counts into them.
        rows_together: how many at a time, at the most.
        find: finds the facts.
    """
    # Once for all: what is found for a part of them is a copy of what was found before.
    merchants, places = find(np.ascontiguousarray(records_of(found["record"])["merchant"]))
    for begin in range(0, len(found), rows_together):
        rows = found.slice(begin, rows_together)
        numbers = positions_of(rows["card_id"], card_ids)
        records = records_of(rows["record"])
        yield rows, points_at(records, numbers, places[begin : begin + len(rows)]), merchants


def answer_fields(features: Sequence[Feature]) -> list[pa.Field]:
    """The columns that answers are written in: each feature, their statuses, whether it is known."""
    return [
        *(pa.field(feature.name, pa.float64(), nullable=False) for feature in features),
        pa.field(STATUSES, pa.list_(pa.uint8(), len(features)), nullable=False),
        pa.field(KNOWN, pa.bool_(), nullable=False),
    ]


def answer_columns(answers: Answers) -> list[pa.Array]:
    """Answers (n,) as columns of `answer_fields`."""
    by_feature = np.ascontiguousarray(answers.values.T)
    statuses = pa.array(answers.statuses.reshape(-1))
    return [
        *(pa.array(column) for column in by_feature),
        pa.FixedSizeListArray.from_arrays(statuses, len(by_feature)),
        pa.array(answers.known),
    ]


def by_card(card_ids: Column) -> tuple[npt.NDArray[np.int64], list[bytes]]:
    """Numbers cards in order of appearance: the number (n,) of each row's, and their ids."""
    encoded = pc.dictionary_encode(card_ids).combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.chunk(0)
    return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary.to_pylist()


def positions_of(column: Column, card_ids: Sequence[bytes]) -> npt.NDArray[np.int64]:
    """Where in card_ids, which are in order, each row's card is, (n,)."""
    codes, cards = by_card(column)
    places = np.array([bisect_left(card_ids, card_id) for card_id in cards], dtype=np.int64)
    positions: npt.NDArray[np.int64] = places[codes]
    return positions
