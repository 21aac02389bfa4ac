"""From published bytes to facts: the formats of the topics, and what is refused and why.

Every format becomes text columns under Kaggle's names, and takes the same way to facts as a file
does (ingest.kaggle): one set of rules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, TypeVar

import orjson
import pyarrow as pa
from google.protobuf.message import DecodeError
from tally.v1 import events_pb2

from features.points import EVENT_TIME_MS_MAX
from ingest.kaggle import CARD_ID, HOLDER, TRANSACTION_ID_CHARS_MAX, CardId, Facts, convert
from stores.arrow import TIME

_EPOCH = datetime(1970, 1, 1)
_EPOCH_UTC = datetime(1970, 1, 1, tzinfo=UTC)
VALUE_BYTES_MAX = 64 << 10
"""A larger value is no event."""


class Format(StrEnum):
    """How the values of a topic are written."""

    KAGGLE = "kaggle"
    """JSON with the field names of the Kaggle files."""
    TALLY = "tally"
    """JSON with the field names of the contract."""
    PROTOBUF = "protobuf"
    """The contract's messages Transaction and Label."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why an event of a batch was not taken."""

    row: int
    """Its position in the batch."""
    reason: str
    detail: str


class _UnreadableError(ValueError):
    """A value that is no event; the arguments are reason and detail."""


Read = TypeVar("Read")

Fields = dict[str, str]
"""One event as texts, by Kaggle's names."""

_TRANSACTION_FIELDS = (
    *("trans_date_trans_time", "cc_num", "merchant", "amt", "trans_num"),
    *("category", "merch_lat", "merch_long", "is_fraud", "unix_time"),
)
_KAGGLE_NAMES = {
    "transaction_id": "trans_num",
    "card": "cc_num",
    "card_id": CARD_ID,
    "event_time": "trans_date_trans_time",
    "amount": "amt",
    "merchant": "merchant",
    "category": "category",
    "merchant_latitude": "merch_lat",
    "merchant_longitude": "merch_long",
}


def decode_transactions(
    values: Sequence[bytes | None], form: Format, card_id: CardId, now: datetime
) -> tuple[Facts, list[Refusal]]:
    """The facts in values of the topic of transactions; `rows` in them count into values."""
    read: Callable[[bytes], Fields] = {
        Format.KAGGLE: _kaggle_fields,
        Format.TALLY: _tally_fields,
        Format.PROTOBUF: _protobuf_fields,
    }[form]
    found, rows, refusals = _read_each(values, read)
    names = _TRANSACTION_FIELDS
    optional = HOLDER if form is Format.KAGGLE else ()
    names += tuple(n for n in (CARD_ID, *optional) if any(n in fields for fields in found))
    columns = {name: [fields.get(name, "") for fields in found] for name in names}
    facts = convert(pa.table(columns, pa.schema([(n, pa.string()) for n in names])), card_id, now)
    refusals += [
        Refusal(rows[problem.row], problem.reason, f"{problem.field}: {problem.detail}")
        for problem in facts.problems
    ]
    facts.rows = pa.array(rows, pa.int64()).take(pa.array(facts.rows)).to_numpy()
    return facts, refusals


LABEL_EVENTS = pa.schema(
    [
        pa.field("transaction_id", pa.string(), nullable=False),
        pa.field("is_fraud", pa.bool_(), nullable=False),
        pa.field("label_time", TIME, nullable=False),
    ]
)


def decode_labels(
    values: Sequence[bytes | None], form: Format
) -> tuple[pa.Table, list[int], list[Refusal]]:
    """The labels (of LABEL_EVENTS) in values of the topic of labels, and their positions there."""
    read = _protobuf_label if form is Format.PROTOBUF else _json_label
    found, rows, refusals = _read_each(values, read)
    arrays = [
        pa.array([label[i] for label in found], column.type)
        for i, column in enumerate(LABEL_EVENTS)
    ]
    return pa.table(arrays, schema=LABEL_EVENTS), rows, refusals


def _read_each(
    values: Sequence[bytes | None], read: Callable[[bytes], Read]
) -> tuple[list[Read], list[int], list[Refusal]]:
    """What can be read of values, its positions, and why the others cannot."""
    found: list[Read] = []
    rows: list[int] = []
    refusals: list[Refusal] = []
    for row, value in enumerate(values):
        try:
            found.append(read(_checked(value)))
            rows.append(row)
        except _UnreadableError as error:
            refusals.append(Refusal(row, *error.args))
    return found, rows, refusals


def _checked(value: bytes | None) -> bytes:
    if value is None:
        raise _UnreadableError("EMPTY", "it has no value")
    if len(value) > VALUE_BYTES_MAX:
        raise _UnreadableError(
            "TOO_LARGE",
            f"it has {len(value):,} bytes; an event has {VALUE_BYTES_MAX:,} at most",
        )
    return value


# --- JSON -----------------------------------------------------------------------------------


def _json(value: bytes) -> dict[str, Any]:
    try:
        document = orjson.loads(value)
    except orjson.JSONDecodeError as error:
        raise _UnreadableError("NOT_JSON", f"it is no JSON: {error.msg} at {error.pos}") from None
    if not isinstance(document, dict):
        raise _UnreadableError("NOT_JSON", "it is JSON, but no object")
    return document


def _text(name: str, value: Any) -> str:
    match value:
        case str():
            return value
        case None:
            return ""
        case bool():
            if name != "is_fraud":
                raise _UnreadableError("BAD_TYPE", f"{name}: it is true or false")
            return "1" if value else "0"
        case int():
            return str(value)
        case float():
            return repr(value)
    raise _UnreadableError("BAD_TYPE", f"{name}: it is a list or an object")


def _kaggle_fields(value: bytes) -> Fields:
    return {name: _text(name, given) for name, given in _json(value).items()}


def _tally_fields(value: bytes) -> Fields:
    document = _json(value)
    fields = {
        kaggle: _text(name, document[name])
        for name, kaggle in _KAGGLE_NAMES.items()
        if name in document
    }
    if isinstance(document.get("event_time"), int):  # no bool: _text has refused it
        fields["trans_date_trans_time"] = _instant(document["event_time"])
    return fields


def _json_label(value: bytes) -> tuple[str, bool, datetime]:
    document = _json(value)
    name = _text("transaction_id", document.get("transaction_id", document.get("trans_num")))
    is_fraud = _text("is_fraud", document.get("is_fraud"))
    if is_fraud not in ("0", "1"):
        raise _UnreadableError("BAD_LABEL", "is_fraud: it is neither 0 nor 1")
    given = document.get("label_time")
    if isinstance(given, int) and not isinstance(given, bool):
        return _id(name), is_fraud == "1", _EPOCH_UTC + timedelta(milliseconds=_in_range(given))
    try:
        instant = datetime.fromisoformat(_text("label_time", given))
        time = instant.astimezone(UTC) if instant.tzinfo else instant.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise _UnreadableError("BAD_TIME", "label_time: it is no time") from None
    return _id(name), is_fraud == "1", _label_time(time)


def _label_time(time: datetime) -> datetime:
    _in_range((time - _EPOCH_UTC) // timedelta(milliseconds=1))
    return time


def _id(text: str) -> str:
    """A transaction id, by the rules that the transaction's own went by (ingest.kaggle)."""
    name = text.strip()
    if "\0" in name:
        raise _UnreadableError("BAD_ENCODING", "transaction_id: it has a NUL character")
    if not 0 < len(name) <= TRANSACTION_ID_CHARS_MAX:
        raise _UnreadableError(
            "BAD_TRANSACTION_ID", "transaction_id: it is no text of 1 to 64 characters"
        )
    return name


def _in_range(time_ms: int) -> int:
    if not 0 <= time_ms <= EVENT_TIME_MS_MAX:
        raise _UnreadableError("TIME_OUT_OF_RANGE", "it is before 1970 or after 2100")
    return time_ms


def _instant(time_ms: int) -> str:
    # Without a time zone: such a column becomes times in one step.
    instant = _EPOCH + timedelta(milliseconds=_in_range(time_ms))
    return instant.isoformat(timespec="milliseconds")


# --- protobuf -------------------------------------------------------------------------------


def _protobuf_fields(value: bytes) -> Fields:
    try:
        message = events_pb2.Transaction.FromString(value)
    except DecodeError:
        raise _UnreadableError("NOT_PROTOBUF", "it is no Transaction message") from None
    minor = message.amount_minor
    sign, size = "-" if minor < 0 else "", abs(minor)
    fields = {
        "trans_num": message.transaction_id,
        "cc_num": message.card,
        CARD_ID: message.card_id.hex(),
        "trans_date_trans_time": _instant(message.event_time_ms),
        "amt": f"{sign}{size // 100}.{size % 100:02}",
        "merchant": message.merchant,
        "category": message.category,
    }
    if message.HasField("merchant_latitude"):
        fields["merch_lat"] = repr(message.merchant_latitude)
    if message.HasField("merchant_longitude"):
        fields["merch_long"] = repr(message.merchant_longitude)
    return fields


def _protobuf_label(value: bytes) -> tuple[str, bool, datetime]:
    try:
        message = events_pb2.Label.FromString(value)
        time = message.label_time.ToDatetime(UTC)
    except (DecodeError, ValueError):
        raise _UnreadableError("NOT_PROTOBUF", "it is no Label message") from None
    if not message.HasField("label_time"):
        raise _UnreadableError("BAD_TIME", "label_time: it is not given")
    return _id(message.transaction_id), message.is_fraud, _label_time(time)
