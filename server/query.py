"""From a request to a question: validation and conversion in one pass over the rows.

The rules are those beside the fields in the contract; a test holds this code to a protovalidate
runtime on the same requests. By hand, because it runs for every row served.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import grpc
from tally.v1 import feature_service_pb2 as pb

from features import CardKey, Feature, UnknownFeatureError, select
from features.catalog import CATEGORY_CODES
from features.geo import POSITION_MISSING, UDEG_PER_DEGREE
from features.keys import CARD_DIGITS, CARD_ID_BYTES
from features.points import (
    AMOUNT_MISSING,
    CATEGORY_MISSING,
    CATEGORY_UNKNOWN,
    EVENT_TIME_MS_MAX,
)
from server.errors import CallError, Violation, invalid
from server.settings import FEATURES_MAX, ROWS_MAX

AMOUNT_MAX = 10_000_000_000
MERCHANT_CHARS_MAX = 256
CATEGORY_CHARS_MAX = 64
HUNDREDTH_TOLERANCE = 1e-6
"""How far from a whole number of hundredths an amount may be, in hundredths per unit of amount
above one: the noise of decimal text read as float64."""

_is_card = CARD_DIGITS.match


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
    rows = request.rows
    if not rows:
        raise invalid([Violation("rows", f"must have 1 to {ROWS_MAX:,} rows; it is empty")])
    if len(rows) > ROWS_MAX:
        raise invalid(
            [Violation("rows", f"must have 1 to {ROWS_MAX:,} rows; it has {len(rows):,}")]
        )
    query = OnlineQuery(_features(request), [], [], [], [], [], [])
    violations: list[Violation] = []
    for row in rows:
        _parse_row(row, card_key, now_ms, query, violations)
    if request.HasField("freshness"):
        policy = request.freshness
        if policy.WhichOneof("requirement") == "complete_through_at_least_ms":
            query.at_least_ms = policy.complete_through_at_least_ms
            if not 0 <= query.at_least_ms <= EVENT_TIME_MS_MAX:
                violations.append(Violation("freshness.complete_through_at_least_ms", _TIME_RULE))
    if violations:
        raise invalid(violations)
    return query


_TIME_RULE = f"must be milliseconds from 0 to {EVENT_TIME_MS_MAX} (1970 to 2100)"


def _features(request: pb.GetOnlineFeaturesRequest) -> tuple[Feature, ...]:
    names = request.features
    if len(names) > FEATURES_MAX:
        raise invalid([Violation("features", f"must have at most {FEATURES_MAX:,} names")])
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


def _parse_row(
    row: pb.FeatureRow,
    card_key: CardKey,
    now_ms: int,
    query: OnlineQuery,
    violations: list[Violation],
) -> None:
    """Appends one row to the query's columns, or what is wrong with it to the violations."""
    number = len(query.card_ids)

    def refuse(field: str, description: str) -> None:
        violations.append(Violation(f"rows[{number}].{field}", description))

    card = row.card
    if card:
        if _is_card(card):
            query.card_ids.append(card_key.card_id(card))
        else:
            query.card_ids.append(b"")
            refuse("card", "must be 8 to 19 digits")
    else:
        query.card_ids.append(row.card_id)
        if len(row.card_id) != CARD_ID_BYTES:
            subject = row.WhichOneof("subject")
            if subject == "card_id":
                refuse("card_id", f"must be {CARD_ID_BYTES} bytes")
            elif subject == "card":
                refuse("card", "must be 8 to 19 digits")
            else:
                refuse("subject", "must be given: card or card_id")

    time_ms = now_ms
    if row.HasField("event_time_ms"):
        time_ms = row.event_time_ms
        if not 0 <= time_ms <= EVENT_TIME_MS_MAX:
            refuse("event_time_ms", _TIME_RULE)
    query.time_ms.append(time_ms)

    amount_minor = AMOUNT_MISSING
    if row.HasField("amount"):
        amount = row.amount
        if not -AMOUNT_MAX <= amount <= AMOUNT_MAX:  # NaN is not within, either
            refuse("amount", f"must be a finite number from -{AMOUNT_MAX:.0e} to {AMOUNT_MAX:.0e}")
        else:
            amount_minor = round(amount * 100)
            if abs(amount * 100 - amount_minor) > HUNDREDTH_TOLERANCE * max(1.0, abs(amount)):
                refuse("amount", "must be a whole number of hundredths")
    query.amount_minor.append(amount_minor)

    if row.HasField("merchant") and len(row.merchant) > MERCHANT_CHARS_MAX:
        refuse("merchant", f"must have at most {MERCHANT_CHARS_MAX} characters")

    code = CATEGORY_MISSING
    if row.HasField("category"):
        category = row.category
        code = CATEGORY_CODES.get(category, CATEGORY_UNKNOWN)
        if len(category) > CATEGORY_CHARS_MAX:
            refuse("category", f"must have at most {CATEGORY_CHARS_MAX} characters")
    query.category.append(code)

    latitude = POSITION_MISSING
    if row.HasField("merchant_latitude"):
        latitude = _udeg(row.merchant_latitude, 90)
        if latitude == POSITION_MISSING:
            refuse("merchant_latitude", "must be degrees from -90 to 90")
    query.latitude_udeg.append(latitude)

    longitude = POSITION_MISSING
    if row.HasField("merchant_longitude"):
        longitude = _udeg(row.merchant_longitude, 180)
        if longitude == POSITION_MISSING:
            refuse("merchant_longitude", "must be degrees from -180 to 180")
    query.longitude_udeg.append(longitude)


def _udeg(degrees: float, limit: int) -> int:
    """Micro-degrees, rounded as features.geo.to_udeg does; POSITION_MISSING out of range."""
    if not -limit <= degrees <= limit or math.isnan(degrees):
        return POSITION_MISSING
    return round(degrees * UDEG_PER_DEGREE)
