"""The catalogue: each feature defined once.

Names in requests and answers, columns of tables, inputs of models and the reference page in docs/
are made from the entries here, and the fingerprint says which entries they were made from.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

SECOND_MS = 1_000
MINUTE_MS = 60 * SECOND_MS
HOUR_MS = 60 * MINUTE_MS
DAY_MS = 24 * HOUR_MS

RETENTION_MS = 31 * DAY_MS
"""How long a ledger keeps a transaction behind the card's newest: the longest window, and a day
for questions that are asked late."""

WINDOWS: tuple[tuple[str, int], ...] = (
    ("10_min", 10 * MINUTE_MS),
    ("1_hour", HOUR_MS),
    ("24_hours", DAY_MS),
    ("7_days", 7 * DAY_MS),
    ("30_days", 30 * DAY_MS),
)
"""The windows, by the suffix of their names, in milliseconds."""

CATEGORIES: tuple[str, ...] = (
    "entertainment",
    "food_dining",
    "gas_transport",
    "grocery_net",
    "grocery_pos",
    "health_fitness",
    "home",
    "kids_pets",
    "misc_net",
    "misc_pos",
    "personal_care",
    "shopping_net",
    "shopping_pos",
    "travel",
)
"""The vocabulary of `category`: the code of a category is its position here plus one."""

CATEGORY_CODES = {name: code for code, name in enumerate(CATEGORIES, start=1)}
CATEGORY_CODES_END = len(CATEGORIES) + 1
"""Behind the last code of a category; 0 is that of all others."""

DAY_DELAY_MS = 6 * HOUR_MS
"""Daily features are of whole days in UTC. Those of the days before day D are valid from so long after D
has begun, which is the time that the batch job has for them; before, those of the day before are."""
LABEL_DELAY_DAYS = 7
"""How old a payment must be for risk to count it: before, chargebacks are yet to come."""
RISK_PRIOR_TXNS = 20
"""With how many payments of the mean merchant a merchant's own are averaged."""
HABIT_DAYS = 28
"""The days that a habit is of: every day of the week as often as any other."""
MERCHANT_WINDOW_DAYS = (1, 7, 30)

NIGHT_BEGINS_HOUR = 22
NIGHT_ENDS_HOUR = 6


class Source(StrEnum):
    """What a feature is computed from."""

    LEDGER = "ledger"
    REQUEST = "request"
    LEDGER_AND_REQUEST = "ledger and request"
    PROFILE = "profile"
    PROFILE_AND_REQUEST = "profile and request"
    MERCHANT = "merchant"


class Aggregate(StrEnum):
    """How a feature's value comes about; `as_of` has one branch for each."""

    COUNT = "count"
    SUM = "sum"
    MEAN = "mean"
    STD = "std"
    MAX = "max"
    DISTINCT_MERCHANTS = "distinct"
    SAME_CATEGORY_COUNT = "same_category_count"
    ZSCORE = "zscore"
    SECONDS_SINCE_LAST = "seconds_since_last"
    SPEED = "speed"
    AMOUNT = "amount"
    DISTANCE = "distance"
    HOUR_OF_DAY = "hour_of_day"
    DAY_OF_WEEK = "day_of_week"
    IS_NIGHT = "is_night"
    CATEGORY = "category"
    GENDER = "gender"
    AGE = "age"
    CITY_POP = "city_pop"
    HABIT_MEAN = "habit_mean"
    HABIT_SHARE = "habit_share"
    MERCHANT_COUNT = "merchant_count"
    MERCHANT_MEAN = "merchant_mean"
    MERCHANT_RISK = "merchant_risk"


# Compared by identity: there is one definition, and sets of features are looked up at every call.
@dataclass(frozen=True, slots=True, eq=False)
class Feature:
    """One feature's definition."""

    name: str
    description: str
    unit: str
    source: Source
    aggregate: Aggregate
    window_ms: int = 0
    """Length of the window [t - window_ms, t); 0 where there is none. Of a daily feature, the window is
    [D - delay_ms - window_ms, D - delay_ms), D being the last day that was valid at t."""
    needs: tuple[str, ...] = ()
    """Fields of the request row without which the status is MISSING_INPUT."""
    version: int = 1
    """Raised when the meaning changes and nothing else here does."""
    delay_ms: int = 0
    """How long before D the window of a daily feature ends."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 (64 hex digits) of what this feature's values mean: its entry without the wording, and the
        catalogue's constants that it depends on; any other change of meaning raises `version`.

        It does not change when other features do. A model keeps those of its inputs, and checks them.
        """
        return _digest([*self._meaning(), _shared_meaning(self)])

    def _meaning(self) -> list[object]:
        """What its entry says, as fingerprints have it; wording is no part of it."""
        own = (self.name, self.version, self.unit, self.source, self.aggregate)
        return [*own, self.window_ms, self.delay_ms, list(self.needs)]


class UnknownFeatureError(ValueError):
    """A feature name that the catalogue does not have."""

    def __init__(self, name: str, position: int) -> None:
        near = difflib.get_close_matches(name, CATALOG_BY_NAME, n=1)
        self.name = name
        self.position = position
        self.did_you_mean = near[0] if near else None
        hint = f"; did you mean {near[0]!r}?" if near else ""
        super().__init__(f"no feature is named {name[:80]!r}{hint}")


def _spoken(suffix: str) -> str:
    number, unit = suffix.split("_")
    return f"{number} {'minutes' if unit == 'min' else unit}"


def _window_features() -> Iterable[Feature]:
    per_window = (
        ("txn_count_last_{}", "count", Aggregate.COUNT, "Transactions of the card in the last {}."),
        ("sum_amt_last_{}", "currency", Aggregate.SUM, "Total amount in the last {}."),
        ("avg_amt_last_{}", "currency", Aggregate.MEAN, "Mean amount in the last {}."),
        (
            "std_amt_last_{}",
            "currency",
            Aggregate.STD,
            "Population standard deviation of the amount in the last {}.",
        ),
        ("max_amt_last_{}", "currency", Aggregate.MAX, "Largest amount in the last {}."),
        (
            "distinct_merchants_last_{}",
            "count",
            Aggregate.DISTINCT_MERCHANTS,
            "Different merchants in the last {}.",
        ),
    )
    for name, unit, aggregate, text in per_window:
        for suffix, window_ms in WINDOWS:
            yield Feature(
                name.format(suffix),
                text.format(_spoken(suffix)),
                unit,
                Source.LEDGER,
                aggregate,
                window_ms,
            )
    for suffix, window_ms in WINDOWS:
        yield Feature(
            f"txn_count_same_category_last_{suffix}",
            f"Transactions in the payment's category in the last {_spoken(suffix)}.",
            "count",
            Source.LEDGER_AND_REQUEST,
            Aggregate.SAME_CATEGORY_COUNT,
            window_ms,
            ("category",),
        )


def _daily_features() -> Iterable[Feature]:
    for name, text, unit, aggregate in (
        (
            f"usual_amt_in_category_{HABIT_DAYS}_days",
            f"The card's mean amount in the payment's category over the {HABIT_DAYS} days before the day.",
            "currency",
            Aggregate.HABIT_MEAN,
        ),
        (
            f"usual_share_of_category_{HABIT_DAYS}_days",
            "Share of the payment's category in the card's transactions over the "
            f"{HABIT_DAYS} days before the day.",
            "ratio",
            Aggregate.HABIT_SHARE,
        ),
    ):
        yield Feature(
            *(name, text, unit, Source.LEDGER_AND_REQUEST, aggregate),
            *(HABIT_DAYS * DAY_MS, ("category",)),
        )
    per_window = (
        (
            "merchant_txn_count_{}",
            "Transactions at the payment's merchant in the {} before the day.",
            "count",
            Aggregate.MERCHANT_COUNT,
            0,
        ),
        (
            "merchant_avg_amt_{}",
            "Mean amount at the payment's merchant in the {} before the day.",
            "currency",
            Aggregate.MERCHANT_MEAN,
            0,
        ),
        (
            "merchant_risk_{}",
            "Share of frauds at the payment's merchant in the {} that ended "
            f"{LABEL_DELAY_DAYS} days before the day, as labels were known then, averaged with "
            f"{RISK_PRIOR_TXNS} payments at the mean merchant.",
            "ratio",
            Aggregate.MERCHANT_RISK,
            LABEL_DELAY_DAYS * DAY_MS,
        ),
    )
    for name, text, unit, aggregate, delay_ms in per_window:
        for days in MERCHANT_WINDOW_DAYS:
            spoken = "day" if days == 1 else f"{days} days"
            yield Feature(
                name.format("1_day" if days == 1 else f"{days}_days"),
                text.format(spoken),
                *(unit, Source.MERCHANT, aggregate, days * DAY_MS, ("merchant",)),
                delay_ms=delay_ms,
            )


_POSITION = ("merchant_latitude", "merchant_longitude")

CATALOG: tuple[Feature, ...] = (
    *_window_features(),
    Feature(
        "seconds_since_last_txn",
        "Seconds since the card's last transaction.",
        "seconds",
        Source.LEDGER,
        Aggregate.SECONDS_SINCE_LAST,
    ),
    Feature(
        "amt_zscore_last_30_days",
        "The payment's amount less the card's mean of the last 30 days, in standard deviations.",
        "ratio",
        Source.LEDGER_AND_REQUEST,
        Aggregate.ZSCORE,
        30 * DAY_MS,
        ("amount",),
    ),
    Feature(
        "speed_from_last_merchant_kmh",
        "Speed at which the card would have had to travel from its last merchant to this one.",
        "km/h",
        Source.LEDGER_AND_REQUEST,
        Aggregate.SPEED,
        needs=_POSITION,
    ),
    Feature(
        "amt",
        "The payment's amount.",
        "currency",
        Source.REQUEST,
        Aggregate.AMOUNT,
        needs=("amount",),
    ),
    Feature(
        "distance_to_merchant",
        "Great-circle distance from the card holder's home to the merchant.",
        "km",
        Source.PROFILE_AND_REQUEST,
        Aggregate.DISTANCE,
        needs=_POSITION,
    ),
    Feature(
        "hour_of_day", "Hour of the instant in UTC, 0 to 23.", "hour", Source.REQUEST,
        Aggregate.HOUR_OF_DAY,
    ),
    Feature(
        "day_of_week", "Day of the instant in UTC: 0 is Monday, 6 is Sunday.", "day",
        Source.REQUEST, Aggregate.DAY_OF_WEEK,
    ),
    Feature(
        "is_night",
        f"1 from {NIGHT_BEGINS_HOUR}:00 to {NIGHT_ENDS_HOUR:02}:00 UTC, otherwise 0.",
        "flag", Source.REQUEST, Aggregate.IS_NIGHT,
    ),
    Feature(
        "category", "Code of the payment's category in the vocabulary.", "code",
        Source.REQUEST, Aggregate.CATEGORY, needs=("category",),
    ),
    Feature(
        "gender", "Code of the card holder's gender: 1 is F, 2 is M.", "code", Source.PROFILE,
        Aggregate.GENDER,
    ),
    Feature(
        "age", "Age of the card holder at the instant, in mean years of the calendar.", "years",
        Source.PROFILE, Aggregate.AGE,
    ),
    Feature(
        "city_pop", "Population of the card holder's city.", "count", Source.PROFILE,
        Aggregate.CITY_POP,
    ),
    *_daily_features(),
)  # fmt: skip
"""Every feature, in the order of an unfiltered answer."""

CATALOG_BY_NAME = {feature.name: feature for feature in CATALOG}


_DAILY = frozenset(
    {
        *(Aggregate.HABIT_MEAN, Aggregate.HABIT_SHARE),
        *(Aggregate.MERCHANT_COUNT, Aggregate.MERCHANT_MEAN, Aggregate.MERCHANT_RISK),
    }
)
_OF_LEDGER = frozenset({Source.LEDGER, Source.LEDGER_AND_REQUEST})


def _shared_meaning(feature: Feature) -> dict[str, object]:
    """The constants and vocabularies that a feature's values depend on, by name."""
    found: dict[str, object] = {}
    if "category" in feature.needs:
        found["categories"] = list(CATEGORIES)
    if feature.aggregate in _DAILY:
        found["day_delay_ms"] = DAY_DELAY_MS
    if feature.aggregate is Aggregate.MERCHANT_RISK:
        found["risk"] = [LABEL_DELAY_DAYS, RISK_PRIOR_TXNS]
    if feature.aggregate is Aggregate.IS_NIGHT:
        found["night_hours"] = [NIGHT_BEGINS_HOUR, NIGHT_ENDS_HOUR]
    if feature.source in _OF_LEDGER:
        found["retention_ms"] = RETENTION_MS
    return found


def _digest(canonical: object) -> str:
    text = json.dumps(canonical, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint(features: Sequence[Feature], categories: Sequence[str]) -> str:
    """SHA-256 (64 hex digits) of all that decides what values mean; wording does not."""
    return _digest(
        {
            "categories": list(categories),
            "features": [feature._meaning() for feature in features],
            "daily": [DAY_DELAY_MS, LABEL_DELAY_DAYS, RISK_PRIOR_TXNS],
            "night_hours": [NIGHT_BEGINS_HOUR, NIGHT_ENDS_HOUR],
            "retention_ms": RETENTION_MS,
        }
    )


CATALOG_FINGERPRINT = fingerprint(CATALOG, CATEGORIES)


def select(names: Sequence[str]) -> tuple[Feature, ...]:
    """The features of these names, in this order; all of them for no names.

    Raises:
        UnknownFeatureError: the first name that the catalogue does not have.
    """
    if not names:
        return CATALOG
    chosen = []
    for position, name in enumerate(names):
        feature = CATALOG_BY_NAME.get(name)
        if feature is None:
            raise UnknownFeatureError(name, position)
        chosen.append(feature)
    return tuple(chosen)
