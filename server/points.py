"""Points as Arrow batches: what their schema may be, and from a batch to what `as_of` takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from features import CardKey, Feature, Points, merchant_key
from features.catalog import Source
from features.keys import CARD_DIGITS, CARD_ID_BYTES
from features.points import (
    AMOUNT_MISSING,
    EVENT_TIME_MS_MAX,
    MINOR_ERROR_MAX,
    MINOR_ERROR_SHARE_MAX,
    MINOR_PER_UNIT,
)
from features.positions import to_udeg
from server.batches import is_compressed
from server.errors import CallError, Violation, invalid
from server.query import (
    AMOUNT_MAX,
    AMOUNT_RULE,
    CATEGORY_CHARS_MAX,
    MERCHANT_CHARS_MAX,
    TIME_RULE,
)
from stores.arrow import (
    CARD_ID,
    KNOWN,
    LABELS,
    STATUSES,
    TIME,
    answer_fields,
    category_code,
    map_distinct,
)

ROWS_MAX = 65_536
"""Rows in one batch; part of the contract."""
TRANSACTION_ID = "transaction_id"
NO_CARD = bytes(CARD_ID_BYTES)
"""Stands for the card where the subjects are merchants: of no number."""

OF_TRANSACTIONS = pa.schema(
    [
        pa.field("card_id", CARD_ID, nullable=False),
        pa.field("event_time", TIME, nullable=False),
        pa.field(TRANSACTION_ID, pa.string(), nullable=False),
        pa.field("amount", pa.float64(), nullable=False),
        pa.field("merchant", pa.string(), nullable=False),
        pa.field("category", pa.string()),
        pa.field("merchant_latitude", pa.float64()),
        pa.field("merchant_longitude", pa.float64()),
    ]
)
"""Points that are made from transactions."""

_TIMES = "timestamp with a time zone"
_TEXT = "text"
_NUMBER = "floating-point, decimal or integer number"
_AMOUNT = "float64, decimal or integer number"

Check = Callable[[pa.DataType], bool]


def _is_text(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_null(kind)
    )


def _is_number(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_floating(kind)
        or pa.types.is_integer(kind)
        or pa.types.is_decimal(kind)
        or pa.types.is_null(kind)
    )


def _is_amount(kind: pa.DataType) -> bool:
    return _is_number(kind) and not _is_narrow(kind)


def _is_narrow(kind: pa.DataType) -> bool:
    return bool(pa.types.is_float32(kind) or pa.types.is_float16(kind))


def _is_zoned(kind: pa.DataType) -> bool:
    return bool((pa.types.is_timestamp(kind) and kind.tz) or pa.types.is_null(kind))


def _is_id(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or (pa.types.is_fixed_size_binary(kind) and kind.byte_width == CARD_ID_BYTES)
        or pa.types.is_null(kind)
    )


_COLUMNS: dict[str, tuple[Check, str]] = {
    "card": (_is_text, _TEXT),
    "card_id": (_is_id, f"binary, of {CARD_ID_BYTES} bytes each"),
    "event_time": (_is_zoned, _TIMES),
    "amount": (_is_amount, _AMOUNT),
    "merchant": (_is_text, _TEXT),
    "category": (_is_text, _TEXT),
    "merchant_latitude": (_is_number, _NUMBER),
    "merchant_longitude": (_is_number, _NUMBER),
}
"""Columns that mean something, each with the types that it may have. A column of nulls alone has the type
null, whatever it means."""


def _hint(name: str, kind: pa.DataType) -> str:
    """What a column's type was and, where that is a common mistake, what is to be done."""
    types = pa.types
    if types.is_dictionary(kind):
        return f"{kind}; send it without its dictionary"
    if name == "card" and types.is_integer(kind):
        return f"{kind}; 19 digits do not fit most numbers: read the column as text from its source"
    if name == "card" and (types.is_floating(kind) or types.is_decimal(kind)):
        lost = "card numbers that went through a float have lost their digits (CARD_PRECISION_LOST)"
        return f"{_float_name(kind)}; {lost}: read the column as text from its source"
    if name == "amount" and _is_narrow(kind):
        lost = "which has lost digits of amounts"
        return f"{_float_name(kind)}, {lost}: take the column from its source as float64 or decimal"
    if name == "event_time":
        return f"{kind}; a time without one is not an instant"
    return _float_name(kind)


def _float_name(kind: pa.DataType) -> str:
    """A type by its usual name: Arrow prints `float` for 32 bits, and `double` for 64."""
    return f"float{kind.bit_width}" if pa.types.is_floating(kind) else str(kind)


_UNREADABLE = (pa.ArrowException, OSError, EOFError, UnicodeDecodeError)
"""What reading an Arrow message may raise."""


def malformed(field: str, detail: str) -> CallError:
    """An Arrow message that cannot be read."""
    return CallError(
        grpc.StatusCode.INVALID_ARGUMENT,
        "MALFORMED_PAYLOAD",
        f"{field}: {detail}",
        metadata={"field": field},
        violations=[Violation(field, detail)],
    )


@dataclass(frozen=True, slots=True)
class PointsSchema:
    """The schema of points, and that of the answers to them."""

    points: pa.Schema
    answers: pa.Schema
    features: tuple[Feature, ...]
    """Those that are asked for; of all, those that points without a card can have."""

    @classmethod
    def parse(
        cls,
        message: bytes,
        features: tuple[Feature, ...],
        *,
        with_labels: bool,
        are_named: bool,
    ) -> PointsSchema:
        """Reads an Arrow IPC schema message. Where no features were named, those are answered that its
        points can have.

        Raises:
            CallError: MALFORMED_PAYLOAD, or INVALID_REQUEST with every column at fault.
        """
        try:
            schema = pa.ipc.read_schema(pa.py_buffer(message))
            _ = schema.names  # these are read now
        except _UNREADABLE as error:
            raise malformed("header.schema", f"it is no Arrow IPC schema: {error}") from None
        if not are_named and is_of_merchants(schema):
            features = without_card(features)
        violations = _faults(schema, features, with_labels)
        if violations:
            raise invalid(violations)
        return cls(schema, _answers(schema, features, with_labels), features)

    @classmethod
    def of_transactions(cls, features: tuple[Feature, ...], *, with_labels: bool) -> PointsSchema:
        """The schema of points that are made from transactions."""
        answers = _answers(OF_TRANSACTIONS, features, with_labels)
        return cls(OF_TRANSACTIONS, answers, features)

    def read(self, data: bytes, number: int) -> pa.RecordBatch:
        """Reads an Arrow IPC record batch message; `number` is its place among all, from 0.

        Raises:
            CallError: MALFORMED_PAYLOAD, or INVALID_REQUEST where it has too many rows.
        """
        field = f"points[{number}]"
        try:
            if is_compressed(data):
                raise malformed(field, "it is compressed, which is not taken")
            batch = pa.ipc.read_record_batch(pa.py_buffer(data), self.points)
            batch.validate(full=True)
        except _UNREADABLE as error:
            raise malformed(field, f"it is no record batch of the schema: {error}") from None
        if len(batch) > ROWS_MAX:
            rule = f"must have at most {ROWS_MAX:,} rows; it has {len(batch):,}"
            raise invalid([Violation(field, rule)])
        return batch


def without_card(features: tuple[Feature, ...]) -> tuple[Feature, ...]:
    """Those features that can be asked for without a card."""
    return tuple(f for f in features if f.source in (Source.MERCHANT, Source.REQUEST))


def is_of_merchants(schema: pa.Schema) -> bool:
    """Whether points have merchants for their subjects, and no cards."""
    return "merchant" in schema.names and not {"card", "card_id"} & set(schema.names)


def _faults(schema: pa.Schema, features: tuple[Feature, ...], with_labels: bool) -> list[Violation]:
    names = schema.names
    found = []

    def at(name: str, rule: str) -> None:
        found.append(Violation(f"header.schema.{name}", rule))

    if is_of_merchants(schema):
        can_be = set(without_card(features))
        of_cards = [feature for feature in features if feature not in can_be]
        if of_cards:
            rule = f"exactly one of `card` and `card_id` must be there for {of_cards[0].name}"
            at("card", rule)
    elif ("card" in names) == ("card_id" in names):
        at("card", "exactly one of `card` and `card_id` must be there")
    if "event_time" not in names:
        at("event_time", "must be there")
    for name in sorted({name for name in names if names.count(name) > 1}):
        at(name, "must be there once")
    for name, (is_allowed, rule) in _COLUMNS.items():
        index = schema.get_field_index(name)
        if index >= 0 and not is_allowed(schema.field(index).type):
            at(name, f"must be {rule}; it is {_hint(name, schema.field(index).type)}")
    added = {STATUSES, KNOWN, *(feature.name for feature in features)}
    if with_labels:
        added.update(LABELS.names)
        index = schema.get_field_index(TRANSACTION_ID)
        if index < 0 or not _is_text(schema.field(index).type):
            at(TRANSACTION_ID, "must be there, and be text: labels are of transactions")
    if "category" in names:
        added.add("request_category")
    if "card" in names:
        added.add("card_id")
    for name in names:
        if name in added - {"category"}:
            at(name, "is the name of a column that the answer adds")
    return found


def _answers(schema: pa.Schema, features: tuple[Feature, ...], with_labels: bool) -> pa.Schema:
    fields = []
    for field in schema:
        if field.name == "card":
            fields.append(pa.field("card_id", CARD_ID))
        elif field.name == "category":
            fields.append(field.with_name("request_category"))
        else:
            fields.append(field)
    fields += answer_fields(features)
    if with_labels:
        fields += LABELS
    return pa.schema(fields)


def rows_of(transactions: pa.Table) -> pa.RecordBatch:
    """TRANSACTIONS as a batch of OF_TRANSACTIONS."""
    whole = transactions.combine_chunks().to_batches()[0]
    columns = {name: whole.column(name) for name in OF_TRANSACTIONS.names if name != "amount"}
    columns["card_id"] = columns["card_id"].cast(CARD_ID)
    columns["amount"] = pc.divide(whole.column("amount_minor").cast(pa.float64()), MINOR_PER_UNIT)
    return pa.RecordBatch.from_arrays(
        [columns[name] for name in OF_TRANSACTIONS.names], schema=OF_TRANSACTIONS
    )


def subjects(batch: pa.RecordBatch, number: int, card_key: CardKey) -> pa.Array:
    """The card id of each point, (n,) of CARD_ID.

    Raises:
        CallError: INVALID_REQUEST, with the rows at fault.
    """
    if is_of_merchants(batch.schema):
        return pa.array([NO_CARD] * len(batch), CARD_ID)
    is_card = "card" in batch.schema.names
    name = "card" if is_card else "card_id"
    column = batch.column(name)
    _refuse(batch, number, name, column.is_null().to_numpy(False), "must not be null")
    if pa.types.is_null(column.type):  # and there is no row
        return pa.array([], CARD_ID)
    if not is_card:
        wrong = pc.not_equal(pc.binary_length(column.cast(pa.binary())), CARD_ID_BYTES)
        rule = f"must be {CARD_ID_BYTES} bytes"
        _refuse(batch, number, name, wrong.to_numpy(False), rule)
        return column.cast(pa.binary()).cast(CARD_ID)
    encoded = pc.dictionary_encode(column)
    cards = encoded.dictionary.to_pylist()
    codes = encoded.indices.to_numpy()
    good = np.array([bool(CARD_DIGITS.match(card)) for card in cards], dtype=bool)
    _refuse(batch, number, name, ~good[codes], "must be 8 to 19 digits")
    return pa.array([card_key.card_id(card) for card in cards], CARD_ID).take(encoded.indices)


def merchant_keys(batch: pa.RecordBatch) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
    """The key (n,) of each point's merchant, and whether it has one."""
    column = _texts(batch, "merchant")
    if column is None:
        return np.zeros(len(batch), np.uint64), np.zeros(len(batch), np.bool_)

    def key(merchant: str | None) -> int:
        return 0 if merchant is None else merchant_key(merchant)

    keys = map_distinct(pa.chunked_array([column]), key, np.uint64)
    return keys, ~column.is_null().to_numpy(False)


def check_ids(batch: pa.RecordBatch, number: int) -> None:
    """Refuses transaction ids that no store can hold.

    Raises:
        CallError: INVALID_REQUEST, with the rows at fault.
    """
    has_nul = pc.match_substring(_texts(batch, TRANSACTION_ID), "\0")
    wrong = pc.fill_null(has_nul, False).to_numpy(False)
    _refuse(batch, number, TRANSACTION_ID, wrong, "must not have the character NUL")


def points(batch: pa.RecordBatch, number: int) -> Points:
    """The points (n,) of a batch; `card_index` is 0 everywhere, and no merchant is looked up.

    Raises:
        CallError: INVALID_REQUEST, with the rows at fault.
    """
    merchants = _texts(batch, "merchant")
    if merchants is not None:
        long = pc.greater(pc.utf8_length(merchants), MERCHANT_CHARS_MAX)
        rule = f"must have at most {MERCHANT_CHARS_MAX} characters"
        _refuse(batch, number, "merchant", pc.fill_null(long, False).to_numpy(False), rule)
    return Points.at(
        np.zeros(len(batch), np.int64),
        _times_ms(batch, number),
        amount_minor=_amounts(batch, number),
        category=_categories(batch, number),
        latitude_udeg=_degrees(batch, number, "merchant_latitude", 90),
        longitude_udeg=_degrees(batch, number, "merchant_longitude", 180),
    )


def _column(batch: pa.RecordBatch, name: str) -> Any:
    index = batch.schema.get_field_index(name)
    return None if index < 0 else batch.column(index)


def _texts(batch: pa.RecordBatch, name: str) -> Any:
    """A column of text, of whichever of Arrow's types for it."""
    column = _column(batch, name)
    return None if column is None else column.cast(pa.string())


def _refuse(
    batch: pa.RecordBatch, number: int, name: str, wrong: npt.NDArray[np.bool_], rule: str
) -> None:
    """Refuses a batch that has rows at fault."""
    rows = np.flatnonzero(wrong).tolist()
    if rows:
        raise invalid([Violation(f"points[{number}].{name}[{row}]", rule, row) for row in rows])


def _times_ms(batch: pa.RecordBatch, number: int) -> npt.NDArray[np.int64]:
    column = batch.column("event_time")
    _refuse(batch, number, "event_time", column.is_null().to_numpy(False), "must not be null")
    if pa.types.is_null(column.type):  # and there is no row
        return np.empty(0, np.int64)
    ticks = column.cast(pa.int64()).to_numpy()
    per_ms = {"ms": 1, "us": 1_000, "ns": 1_000_000}
    unit = column.type.unit
    if unit == "s":  # what would not fit is out of range in any case
        ticks = np.clip(ticks, -1, EVENT_TIME_MS_MAX)
    times_ms: npt.NDArray[np.int64] = ticks * 1_000 if unit == "s" else ticks // per_ms[unit]
    wrong = (times_ms < 0) | (times_ms > EVENT_TIME_MS_MAX)
    _refuse(batch, number, "event_time", wrong, TIME_RULE)
    return times_ms


def _numbers(column: Any) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """A column as float64, 0 where it is null; and where that is."""
    missing = column.is_null().to_numpy(False)
    # An integer beyond 2**53 is rounded; whoever asks refuses it as too large.
    numbers = column.cast(pa.float64(), safe=False)
    return pc.fill_null(numbers, 0.0).to_numpy(False), missing


def _amounts(batch: pa.RecordBatch, number: int) -> npt.NDArray[np.int64] | None:
    column = _column(batch, "amount")
    if column is None:
        return None
    amounts, missing = _numbers(column)
    _refuse(batch, number, "amount", ~(np.abs(amounts) <= AMOUNT_MAX), AMOUNT_RULE)
    exact = amounts * 100
    minor = np.rint(exact)
    wrong = np.abs(exact - minor) > MINOR_ERROR_MAX + MINOR_ERROR_SHARE_MAX * np.abs(minor)
    if pa.types.is_decimal(column.type):
        wrong = _has_finer_digits(column)
    _refuse(batch, number, "amount", wrong, "must be a whole number of hundredths")
    return np.where(missing, AMOUNT_MISSING, minor.astype(np.int64))


def _has_finer_digits(column: pa.Array) -> npt.NDArray[np.bool_]:
    """Where decimals (n,) have other digits than 0 behind the hundredths."""
    scale = column.type.scale
    if scale <= 2:
        return np.zeros(len(column), np.bool_)
    wide = column.cast(pa.decimal256(76, scale))
    hundredths = wide.cast(pa.decimal256(76, 2), safe=False).cast(wide.type)
    finer: npt.NDArray[np.bool_] = pc.fill_null(pc.not_equal(hundredths, wide), False).to_numpy(
        False
    )
    return finer


def _categories(batch: pa.RecordBatch, number: int) -> npt.NDArray[np.int16] | None:
    column = _texts(batch, "category")
    if column is None:
        return None
    long = pc.greater(pc.utf8_length(column), CATEGORY_CHARS_MAX)
    rule = f"must have at most {CATEGORY_CHARS_MAX} characters"
    _refuse(batch, number, "category", pc.fill_null(long, False).to_numpy(False), rule)
    return map_distinct(pa.chunked_array([column]), category_code, np.int16)


def _degrees(
    batch: pa.RecordBatch, number: int, name: str, degrees_max: int
) -> npt.NDArray[np.int32] | None:
    column = _column(batch, name)
    if column is None:
        return None
    degrees, missing = _numbers(column)
    rule = f"must be degrees from -{degrees_max} to {degrees_max}"
    _refuse(batch, number, name, ~(np.abs(degrees) <= degrees_max), rule)
    return to_udeg(np.where(missing, np.nan, degrees))
