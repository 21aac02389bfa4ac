"""From a request to a question: validation and conversion, column by column.

The rules are those beside the fields in the contract; a test holds this code to a protovalidate
runtime on the same requests. By hand, because it runs for every row served.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from typing import Literal

import grpc
from tally.v1 import feature_service_pb2 as pb

from features import CardKey, Feature, UnknownFeatureError, merchant_key, select
from features.catalog import CATEGORY_CODES, Source
from features.keys import CARD_DIGITS, CARD_ID_BYTES, merchant_key_bytes
from features.points import (
    AMOUNT_MISSING,
    CATEGORY_MISSING,
    CATEGORY_UNKNOWN,
    EVENT_TIME_MS_MAX,
    MINOR_ERROR_MAX,
    MINOR_ERROR_SHARE_MAX,
)
from features.positions import POSITION_MISSING, UDEG_PER_DEGREE
from server.errors import CallError, Violation, invalid
from server.settings import FEATURES_MAX, ROWS_MAX

AMOUNT_MAX = 10_000_000_000
MERCHANT_CHARS_MAX = 256
CATEGORY_CHARS_MAX = 64
NAME_CHARS_MAX = 128
MERCHANTS_REMEMBERED_MAX = 65_536
"""Names of merchants whose keys are remembered."""

_is_card = CARD_DIGITS.match

Rows = Sequence[pb.FeatureRow]


@dataclass(slots=True)
class OnlineQuery:
    """A valid GetOnlineFeatures request, by columns."""

    features: tuple[Feature, ...]
    card_ids: list[bytes]
    time_ms: list[int]
    amount_minor: list[int]
    category: list[int]
    latitude_udeg: list[int]
    longitude_udeg: list[int]
    merchants: list[bytes | None]
    """The key of each one's merchant; all None where no feature needs it."""
    at_least_ms: int | None = None
    """Fail unless the store is complete through this instant."""

    def __len__(self) -> int:
        return len(self.card_ids)


def parse_online(
    request: pb.GetOnlineFeaturesRequest, card_key: CardKey, now_ms: int
) -> OnlineQuery:
    """Validates and converts a request; rows without an instant are asked about now.

    Raises:
        CallError: INVALID_ARGUMENT, with every field at fault.
    """
    rows = list(request.rows)  # one object for each row, for all columns
    if not rows:
        raise invalid([Violation("rows", f"must have 1 to {ROWS_MAX:,} rows; it is empty")])
    if len(rows) > ROWS_MAX:
        raise invalid(
            [Violation("rows", f"must have 1 to {ROWS_MAX:,} rows; it has {len(rows):,}")]
        )
    violations: list[Violation] = []
    query = OnlineQuery(
        parse_features(tuple(request.features)),
        _card_ids(rows, card_key, violations),
        _instants(rows, now_ms, violations),
        _amounts(rows, violations),
        _categories(rows, violations),
        _coordinates(rows, "merchant_latitude", 90, violations),
        _coordinates(rows, "merchant_longitude", 180, violations),
        [None] * len(rows),
    )
    _check_merchants(rows, violations)
    if wants_merchants(query.features):
        query.merchants = _merchants(rows)
    violations.sort(key=lambda violation: violation.row)
    if request.HasField("freshness"):
        policy = request.freshness
        if policy.WhichOneof("requirement") == "complete_through_at_least_ms":
            query.at_least_ms = policy.complete_through_at_least_ms
            if not 0 <= query.at_least_ms <= EVENT_TIME_MS_MAX:
                violations.append(Violation("freshness.complete_through_at_least_ms", TIME_RULE))
    if violations:
        raise invalid(violations)
    return query


TIME_RULE = f"must be milliseconds from 0 to {EVENT_TIME_MS_MAX} (1970 to 2100)"
AMOUNT_RULE = f"must be a finite number from -{AMOUNT_MAX:.0e} to {AMOUNT_MAX:.0e}"


@lru_cache(maxsize=256)
def parse_features(names: tuple[str, ...]) -> tuple[Feature, ...]:
    """The features of these names, all where there is none; cached, as a caller asks for the same
    ones in every call.

    Raises:
        CallError: UNKNOWN_FEATURE or INVALID_REQUEST.
    """
    if len(names) > FEATURES_MAX:
        raise invalid([Violation("features", f"must have at most {FEATURES_MAX:,} names")])
    long = next((i for i, name in enumerate(names) if len(name) > NAME_CHARS_MAX), None)
    if long is not None:
        rule = f"must have at most {NAME_CHARS_MAX} characters"
        raise invalid([Violation(f"features[{long}]", rule)])
    try:
        features = select(names)
    except UnknownFeatureError as error:
        metadata = {"feature": error.name[:128]}
        if error.did_you_mean:
            metadata["did_you_mean"] = error.did_you_mean
        raise CallError(
            grpc.StatusCode.INVALID_ARGUMENT,
            "UNKNOWN_FEATURE",
            f"features[{error.position}]: {error}",
            metadata=metadata,
            violations=[Violation(f"features[{error.position}]", str(error))],
        ) from None
    if len(set(names)) < len(names):
        raise invalid([Violation("features", "must not name a feature twice")])
    return features


@lru_cache(maxsize=256)
def wants_merchants(features: tuple[Feature, ...]) -> bool:
    """Whether a feature needs the facts of merchants."""
    return any(feature.source is Source.MERCHANT for feature in features)


@lru_cache(maxsize=MERCHANTS_REMEMBERED_MAX)
def _merchant_key(merchant: str) -> bytes:
    return merchant_key_bytes(merchant_key(merchant))


# Each function below turns one field of all rows into a column, and adds what is wrong with it to the
# violations; the column's entry then counts for nothing. A value other than 0 is there; only for 0
# does presence have to be asked about.


def _card_ids(rows: Rows, card_key: CardKey, violations: list[Violation]) -> list[bytes]:
    card_id = card_key.card_id
    ids = [card_id(card) if _is_card(card := row.card) else row.card_id for row in rows]
    for number, found in enumerate(ids):
        if len(found) != CARD_ID_BYTES:
            violations.append(_bad_subject(number, rows[number]))
    return ids


def _instants(rows: Rows, now_ms: int, violations: list[Violation]) -> list[int]:
    times_ms = [row.event_time_ms for row in rows]
    for number, time_ms in enumerate(times_ms):
        if time_ms == 0 and not rows[number].HasField("event_time_ms"):
            times_ms[number] = now_ms
        elif not 0 <= time_ms <= EVENT_TIME_MS_MAX:
            violations.append(_violation(number, "event_time_ms", TIME_RULE))
    return times_ms


def _amounts(rows: Rows, violations: list[Violation]) -> list[int]:
    amounts = [row.amount for row in rows]
    minors = [AMOUNT_MISSING] * len(amounts)
    for number, amount in enumerate(amounts):
        if amount == 0.0 and not rows[number].HasField("amount"):
            continue
        if not -AMOUNT_MAX <= amount <= AMOUNT_MAX:  # so is NaN
            violations.append(_violation(number, "amount", AMOUNT_RULE))
            continue
        exact = amount * 100
        minors[number] = minor = round(exact)
        error = abs(exact - minor)
        if error > MINOR_ERROR_MAX + MINOR_ERROR_SHARE_MAX * abs(minor):
            violations.append(_violation(number, "amount", "must be a whole number of hundredths"))
    return minors


def _categories(rows: Rows, violations: list[Violation]) -> list[int]:
    names = [row.category for row in rows]
    codes = [CATEGORY_CODES.get(name, CATEGORY_UNKNOWN) for name in names]
    for number, code in enumerate(codes):
        if code != CATEGORY_UNKNOWN:
            continue
        if not rows[number].HasField("category"):
            codes[number] = CATEGORY_MISSING
        elif len(names[number]) > CATEGORY_CHARS_MAX:
            rule = f"must have at most {CATEGORY_CHARS_MAX} characters"
            violations.append(_violation(number, "category", rule))
    return codes


def _coordinates(
    rows: Rows,
    field: Literal["merchant_latitude", "merchant_longitude"],
    degrees_max: int,
    violations: list[Violation],
) -> list[int]:
    degrees = list(map(attrgetter(field), rows))
    micro = [POSITION_MISSING] * len(degrees)
    for number, value in enumerate(degrees):
        if value == 0.0 and not rows[number].HasField(field):
            continue
        if -degrees_max <= value <= degrees_max:
            micro[number] = round(value * UDEG_PER_DEGREE)
        else:
            rule = f"must be degrees from -{degrees_max} to {degrees_max}"
            violations.append(_violation(number, field, rule))
    return micro


def _merchants(rows: Rows) -> list[bytes | None]:
    return [
        _merchant_key(name) if (name := row.merchant) or row.HasField("merchant") else None
        for row in rows
    ]


def _check_merchants(rows: Rows, violations: list[Violation]) -> None:
    for number, row in enumerate(rows):
        if len(row.merchant) > MERCHANT_CHARS_MAX:
            rule = f"must have at most {MERCHANT_CHARS_MAX} characters"
            violations.append(_violation(number, "merchant", rule))


def _violation(number: int, field: str, rule: str) -> Violation:
    return Violation(f"rows[{number}].{field}", rule, row=number)


def _bad_subject(number: int, row: pb.FeatureRow) -> Violation:
    match row.WhichOneof("subject"):
        case "card_id":
            return _violation(number, "card_id", f"must be {CARD_ID_BYTES} bytes")
        case "card":
            return _violation(number, "card", "must be 8 to 19 digits")
        case _:
            return _violation(number, "subject", "must be given: card or card_id")
