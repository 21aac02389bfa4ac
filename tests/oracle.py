"""The naive oracle: every feature straight from its definition, in O(n) per value, plain Python.

It shares nothing with `features` but the catalogue's entries and the great-circle function, whose
own test compares it with libm's. Exact arithmetic is Python's integers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Question:
    """One point of one card."""

    time_ms: int
    amount_minor: int | None = None
    category: str | None = None
    latitude_udeg: int | None = None
    longitude_udeg: int | None = None
    home: tuple[int, int] | None = None


Answer = tuple[float | None, Status]


def answer(
    feature: Feature, events: Sequence[Event] | None, question: Question, *, retention: bool = True
) -> Answer:
    """One feature of one card at one instant; `events` is None for a card never seen."""
    if feature.aggregate in _OF_PAYMENT:
        return _OF_PAYMENT[feature.aggregate](question)
    code = CATEGORIES.index(question.category) + 1 if question.category in CATEGORIES else 0
    position = (question.latitude_udeg, question.longitude_udeg)
    if feature.aggregate is Aggregate.SAME_CATEGORY_COUNT and question.category is None:
        return None, Status.MISSING_INPUT
    if feature.aggregate is Aggregate.SAME_CATEGORY_COUNT and code == 0:
        return None, Status.UNKNOWN_CATEGORY
    if feature.aggregate is Aggregate.ZSCORE and question.amount_minor is None:
        return None, Status.MISSING_INPUT
    if feature.aggregate is Aggregate.SPEED and None in position:
        return None, Status.MISSING_INPUT
    t = question.time_ms
    if events is None:
        return None, Status.UNKNOWN_CARD
    newest = max(e.time_ms for e in events)
    dropped = [e for e in events if retention and e.time_ms <= newest - RETENTION_MS]
    kept = [e for e in events if e not in dropped]
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

    begins = t - feature.window_ms
    if dropped_ms is not None and begins <= dropped_ms:
        return None, Status.BEFORE_HISTORY
    window = [e for e in kept if begins <= e.time_ms < t]
    return _aggregate(feature.aggregate, window, question, code)


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
    if q.home is None:
        return None, Status.MISSING_FACT
    return distance_km(*q.home, q.latitude_udeg, q.longitude_udeg), Status.PRESENT


def _hour(q: Question) -> int:
    return int(np.datetime64(q.time_ms, "ms").astype("datetime64[h]").astype(int) % 24)


def _weekday(q: Question) -> int:
    return int(np.datetime64(q.time_ms, "ms").astype(object).weekday())


_OF_PAYMENT = {
    Aggregate.AMOUNT: _amount,
    Aggregate.CATEGORY: _category,
    Aggregate.DISTANCE: _distance,
    Aggregate.HOUR_OF_DAY: lambda q: (float(_hour(q)), Status.PRESENT),
    Aggregate.DAY_OF_WEEK: lambda q: (float(_weekday(q)), Status.PRESENT),
    Aggregate.IS_NIGHT: lambda q: (float(_hour(q) >= 22 or _hour(q) < 6), Status.PRESENT),
}
