"""The naive oracle: every feature straight from its definition, in O(n) per value, plain Python.

It shares nothing with `features` but the catalogue's entries and the great-circle function, whose
own test compares it with libm's. Exact arithmetic is Python's integers.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import cache

import numpy as np

from features import CATEGORIES, RETENTION_MS, Feature, Status, transaction_key
from features.catalog import Aggregate
from features.geo import distance_km


@dataclass(frozen=True)
class Event:
    """One transaction of one card."""

    time_ms: int
    transaction_id: str
    merchant: str
    amount_minor: int
    category: int
    latitude_udeg: int | None = None
    longitude_udeg: int | None = None
    fraud_known_ms: int | None = None
    """When it became known to be fraud, if it is."""


@dataclass(frozen=True)
class Holder:
    """What is known of a card holder."""

    home: tuple[int, int]
    """Latitude and longitude in micro-degrees."""
    gender: str | None = None
    birth_date: date | None = None
    city_pop: int | None = None


@dataclass(frozen=True)
class Question:
    """One point of one card."""

    time_ms: int
    amount_minor: int | None = None
    category: str | None = None
    latitude_udeg: int | None = None
    longitude_udeg: int | None = None
    holder: Holder | None = None
    merchant: str | None = None


@dataclass(frozen=True)
class Payment:
    """What a merchant saw of a transaction, and when it was known to be fraud."""

    merchant: str
    time_ms: int
    amount_minor: int
    fraud_known_ms: int | None = None


DAY_MS = 86_400_000


def world_of(events: Iterable[Event]) -> World:
    """What merchants saw of all these, as a batch run of today sees it."""
    payments = (Payment(e.merchant, e.time_ms, e.amount_minor, e.fraud_known_ms) for e in events)
    return World(payments, int(time.time() * 1000 // DAY_MS))


class World:
    """All payments at all merchants, up to the last day that the batch job has computed."""

    def __init__(self, payments: Iterable[Payment], through_day: int) -> None:
        self.through_day = through_day
        self.of_merchant: dict[str, list[Payment]] = defaultdict(list)
        for payment in payments:
            self.of_merchant[payment.merchant].append(payment)
        everything = [p for some in self.of_merchant.values() for p in some]
        self._times = np.array([p.time_ms for p in everything], dtype=np.int64)
        self._known = np.array(
            [2**62 if p.fraud_known_ms is None else p.fraud_known_ms for p in everything],
            dtype=np.int64,
        )
        self.mean = cache(self._mean)

    def _mean(self, begins: int, ends: int, known_before: int) -> tuple[int, int]:
        """Of all payments in a range: their number, and that of known frauds."""
        inside = (begins <= self._times) & (self._times < ends)
        return int(inside.sum()), int((inside & (self._known < known_before)).sum())


Answer = tuple[float | None, Status]


def answer(
    feature: Feature,
    events: Sequence[Event] | None,
    question: Question,
    *,
    retention: bool = True,
    world: World | None = None,
) -> Answer:
    """One feature of one card at one instant; `events` is None for a card never seen, `world` where
    nothing was ever computed of merchants."""
    if feature.aggregate in _OF_PAYMENT:
        return _OF_PAYMENT[feature.aggregate](question)
    if feature.name.startswith("merchant_"):
        return _of_merchant(feature, question, world)
    code = CATEGORIES.index(question.category) + 1 if question.category in CATEGORIES else 0
    position = (question.latitude_udeg, question.longitude_udeg)
    habits = (Aggregate.HABIT_MEAN, Aggregate.HABIT_SHARE)
    if feature.aggregate in (Aggregate.SAME_CATEGORY_COUNT, *habits) and question.category is None:
        return None, Status.MISSING_INPUT
    if feature.aggregate in (Aggregate.SAME_CATEGORY_COUNT, *habits) and code == 0:
        return None, Status.UNKNOWN_CATEGORY
    if feature.aggregate is Aggregate.ZSCORE and question.amount_minor is None:
        return None, Status.MISSING_INPUT
    if feature.aggregate is Aggregate.SPEED and None in position:
        return None, Status.MISSING_INPUT
    t = question.time_ms
    if events is None:
        return None, Status.UNKNOWN_CARD
    horizon = max(e.time_ms for e in events) - RETENTION_MS
    dropped = [e for e in events if retention and e.time_ms <= horizon]
    kept = [e for e in events if not (retention and e.time_ms <= horizon)]
    dropped_ms = max((e.time_ms for e in dropped), default=None)
    if not dropped and not any(e.time_ms < t for e in kept):
        return None, Status.UNKNOWN_CARD
    if feature.aggregate in (Aggregate.SECONDS_SINCE_LAST, Aggregate.SPEED):
        before = [e for e in kept if e.time_ms < t]
        if not before:
            return None, Status.BEFORE_HISTORY
        last = max(before, key=lambda e: (e.time_ms, _key(e)))
        if feature.aggregate is Aggregate.SECONDS_SINCE_LAST:
            return (t - last.time_ms) / 1000, Status.PRESENT
        if last.latitude_udeg is None or last.longitude_udeg is None:
            return None, Status.MISSING_FACT
        assert question.latitude_udeg is not None
        assert question.longitude_udeg is not None
        km = distance_km(
            *(last.latitude_udeg, last.longitude_udeg),
            *(question.latitude_udeg, question.longitude_udeg),
        )
        return km / ((t - last.time_ms) / 3_600_000), Status.PRESENT

    ends = _midnight(t) if feature.aggregate in habits else t
    begins = ends - feature.window_ms
    if dropped_ms is not None and begins <= dropped_ms:
        return None, Status.BEFORE_HISTORY
    window = [e for e in kept if begins <= e.time_ms < ends]
    return _aggregate(feature.aggregate, window, question, code)


def _midnight(t: int) -> int:
    """The beginning of the day whose daily features are valid at t: from six in the morning on, that day."""
    return (t - 6 * 3_600_000) // DAY_MS * DAY_MS


def _of_merchant(feature: Feature, question: Question, world: World | None) -> Answer:
    if question.merchant is None:
        return None, Status.MISSING_INPUT
    midnight = _midnight(question.time_ms)
    if world is None or midnight > world.through_day * DAY_MS:
        return None, Status.NOT_COMPUTED
    is_risk = feature.aggregate is Aggregate.MERCHANT_RISK
    ends = midnight - (7 * DAY_MS if is_risk else 0)
    begins = ends - feature.window_ms
    window = [p for p in world.of_merchant.get(question.merchant, []) if begins <= p.time_ms < ends]
    n = len(window)
    if feature.aggregate is Aggregate.MERCHANT_COUNT:
        return float(n), Status.PRESENT
    if feature.aggregate is Aggregate.MERCHANT_MEAN:
        if n == 0:
            return None, Status.EMPTY_WINDOW
        return float(sum(p.amount_minor for p in window)) / float(100 * n), Status.PRESENT
    of_all, frauds_of_all = world.mean(begins, ends, midnight)
    if of_all == 0:
        return None, Status.EMPTY_WINDOW
    frauds = sum(p.fraud_known_ms is not None and p.fraud_known_ms < midnight for p in window)
    return float(frauds * of_all + 20 * frauds_of_all) / float((n + 20) * of_all), Status.PRESENT


def _key(event: Event) -> int:
    return transaction_key(event.transaction_id)


def _aggregate(kind: Aggregate, window: list[Event], question: Question, code: int) -> Answer:
    n = len(window)
    amounts = [e.amount_minor for e in window]
    total = sum(amounts)
    numerator = n * sum(x * x for x in amounts) - total * total
    if kind is Aggregate.COUNT:
        return float(n), Status.PRESENT
    if kind is Aggregate.SUM:
        return total / 100, Status.PRESENT
    if kind is Aggregate.DISTINCT_MERCHANTS:
        return float(len({e.merchant for e in window})), Status.PRESENT
    if kind is Aggregate.SAME_CATEGORY_COUNT:
        return float(sum(e.category == code for e in window)), Status.PRESENT
    if n == 0:
        return None, Status.EMPTY_WINDOW
    same = [e.amount_minor for e in window if e.category == code]
    if kind is Aggregate.HABIT_SHARE:
        return len(same) / n, Status.PRESENT
    if kind is Aggregate.HABIT_MEAN:
        if not same:
            return None, Status.EMPTY_WINDOW
        return float(sum(same)) / float(100 * len(same)), Status.PRESENT
    if kind is Aggregate.MEAN:
        return float(total) / float(100 * n), Status.PRESENT
    if kind is Aggregate.STD:
        return math.sqrt(float(numerator)) / (100 * n), Status.PRESENT
    if kind is Aggregate.MAX:
        return max(amounts) / 100, Status.PRESENT
    assert kind is Aggregate.ZSCORE
    assert question.amount_minor is not None
    if numerator == 0:
        return None, Status.UNDEFINED
    return float(n * question.amount_minor - total) / math.sqrt(float(numerator)), Status.PRESENT


def _amount(q: Question) -> Answer:
    if q.amount_minor is None:
        return None, Status.MISSING_INPUT
    return q.amount_minor / 100, Status.PRESENT


def _category(q: Question) -> Answer:
    if q.category is None:
        return None, Status.MISSING_INPUT
    if q.category not in CATEGORIES:
        return None, Status.UNKNOWN_CATEGORY
    return float(CATEGORIES.index(q.category) + 1), Status.PRESENT


def _distance(q: Question) -> Answer:
    if q.latitude_udeg is None or q.longitude_udeg is None:
        return None, Status.MISSING_INPUT
    if q.holder is None:
        return None, Status.MISSING_FACT
    return distance_km(*q.holder.home, q.latitude_udeg, q.longitude_udeg), Status.PRESENT


def _gender(q: Question) -> Answer:
    if q.holder is None or q.holder.gender is None:
        return None, Status.MISSING_FACT
    return {"F": 1.0, "M": 2.0}[q.holder.gender], Status.PRESENT


def _age(q: Question) -> Answer:
    if q.holder is None or q.holder.birth_date is None:
        return None, Status.MISSING_FACT
    today = datetime.fromtimestamp(q.time_ms // 1000, UTC).date()
    if today < q.holder.birth_date:
        return None, Status.UNDEFINED
    return (today - q.holder.birth_date).days / 365.2425, Status.PRESENT


def _city_pop(q: Question) -> Answer:
    if q.holder is None or q.holder.city_pop is None:
        return None, Status.MISSING_FACT
    return float(q.holder.city_pop), Status.PRESENT


def _hour(q: Question) -> int:
    return int(np.datetime64(q.time_ms, "ms").astype("datetime64[h]").astype(int) % 24)


def _weekday(q: Question) -> int:
    return int(np.datetime64(q.time_ms, "ms").astype(object).weekday())


_OF_PAYMENT = {
    Aggregate.AMOUNT: _amount,
    Aggregate.CATEGORY: _category,
    Aggregate.DISTANCE: _distance,
    Aggregate.GENDER: _gender,
    Aggregate.AGE: _age,
    Aggregate.CITY_POP: _city_pop,
    Aggregate.HOUR_OF_DAY: lambda q: (float(_hour(q)), Status.PRESENT),
    Aggregate.DAY_OF_WEEK: lambda q: (float(_weekday(q)), Status.PRESENT),
    Aggregate.IS_NIGHT: lambda q: (float(_hour(q) >= 22 or _hour(q) < 6), Status.PRESENT),
}
