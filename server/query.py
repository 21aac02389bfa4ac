"""From a request to a question: validation and conversion in one pass over the rows.

The rules are those beside the fields in the contract; a test holds this code to a protovalidate
runtime on the same requests. By hand, because it runs for every row served.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

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
    MINOR_ERROR_MAX,
    MINOR_ERROR_SHARE_MAX,
)
from server.errors import CallError, Violation, invalid
from server.settings import FEATURES_MAX, ROWS_MAX

AMOUNT_MAX = 10_000_000_000
MERCHANT_CHARS_MAX = 256
CATEGORY_CHARS_MAX = 64
NAME_CHARS_MAX = 128

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
    query = OnlineQuery(_features(tuple(request.features)), [], [], [], [], [], [])
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
_AMOUNT_RULE = f"must be a finite number from -{AMOUNT_MAX:.0e} to {AMOUNT_MAX:.0e}"


@lru_cache(maxsize=256)
def _features(names: tuple[str, ...]) -> tuple[Feature, ...]:
    """The features of these names; cached, as a caller asks for the same ones in every call."""
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


def _parse_row(
    row: pb.FeatureRow,
    card_key: CardKey,
    now_ms: int,
    query: OnlineQuery,
    violations: list[Violation],
) -> None:
    """Appends one row to the query's columns, or what is wrong with it to the violations.

    A value other than 0 is there; only for 0 does presence have to be asked about.
    """
    number = len(query.card_ids)
    card = row.card
    if _is_card(card):
        query.card_ids.append(card_key.card_id(card))
    else:
        query.card_ids.append(row.card_id)
        if len(row.card_id) != CARD_ID_BYTES:
            violations.append(_bad_subject(number, row))

    time_ms = row.event_time_ms
    if time_ms == 0 and not row.HasField("event_time_ms"):
        time_ms = now_ms
    elif not 0 <= time_ms <= EVENT_TIME_MS_MAX:
        violations.append(_violation(number, "event_time_ms", _TIME_RULE))
    query.time_ms.append(time_ms)

    amount = row.amount
    if amount == 0.0 and not row.HasField("amount"):
        query.amount_minor.append(AMOUNT_MISSING)
    elif -AMOUNT_MAX <= amount <= AMOUNT_MAX:  # NaN is not
        minor = round(amount * 100)
        error = abs(amount * 100 - minor)
        if error > MINOR_ERROR_MAX + MINOR_ERROR_SHARE_MAX * abs(minor):
            violations.append(_violation(number, "amount", "must be a whole number of hundredths"))
        query.amount_minor.append(minor)
    else:
        violations.append(_violation(number, "amount", _AMOUNT_RULE))
        query.amount_minor.append(AMOUNT_MISSING)

    if len(row.merchant) > MERCHANT_CHARS_MAX:
        rule = f"must have at most {MERCHANT_CHARS_MAX} characters"
        violations.append(_violation(number, "merchant", rule))

    category = row.category
    if category:
        query.category.append(CATEGORY_CODES.get(category, CATEGORY_UNKNOWN))
        if len(category) > CATEGORY_CHARS_MAX:
            rule = f"must have at most {CATEGORY_CHARS_MAX} characters"
            violations.append(_violation(number, "category", rule))
    else:
        given = row.HasField("category")
        query.category.append(CATEGORY_UNKNOWN if given else CATEGORY_MISSING)

    latitude, longitude = row.merchant_latitude, row.merchant_longitude
    if latitude == 0.0 and not row.HasField("merchant_latitude"):
        query.latitude_udeg.append(POSITION_MISSING)
    elif -90 <= latitude <= 90:
        query.latitude_udeg.append(round(latitude * UDEG_PER_DEGREE))
    else:
        rule = "must be degrees from -90 to 90"
        violations.append(_violation(number, "merchant_latitude", rule))
        query.latitude_udeg.append(POSITION_MISSING)
    if longitude == 0.0 and not row.HasField("merchant_longitude"):
        query.longitude_udeg.append(POSITION_MISSING)
    elif -180 <= longitude <= 180:
        query.longitude_udeg.append(round(longitude * UDEG_PER_DEGREE))
    else:
        rule = "must be degrees from -180 to 180"
        violations.append(_violation(number, "merchant_longitude", rule))
        query.longitude_udeg.append(POSITION_MISSING)


def _violation(number: int, field: str, rule: str) -> Violation:
    return Violation(f"rows[{number}].{field}", rule)


def _bad_subject(number: int, row: pb.FeatureRow) -> Violation:
    match row.WhichOneof("subject"):
        case "card_id":
            return _violation(number, "card_id", f"must be {CARD_ID_BYTES} bytes")
        case "card":
            return _violation(number, "card", "must be 8 to 19 digits")
        case _:
            return _violation(number, "subject", "must be given: card or card_id")
