"""`as_of` for a few points: one at a time, in plain Python.

An operation on an array costs a microsecond before it does anything, and `as_of` has two hundred
of them, while a card has some hundred records. A lone payment is answered three times as fast here.
These are the formulas of features.windows on the same integers in the same order of operations,
hence the same bits; the tests of one are the tests of both.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cached_property
from operator import mul

from features import request
from features.catalog import Aggregate, Feature
from features.geo import POSITION_MISSING, distance_km
from features.ledger import CATEGORY_BITS, NEVER_DROPPED, Ledgers
from features.points import (
    AMOUNT_MISSING,
    CATEGORY_MISSING,
    CATEGORY_UNKNOWN,
    MINOR_PER_UNIT,
    MS_PER_HOUR,
    Points,
)
from features.profile import Profiles
from features.status import Status

Answer = tuple[float, Status]
"""A value and its status; the value counts for nothing where the status is not PRESENT."""

_CATEGORY_MASK = (1 << CATEGORY_BITS) - 1
_NOTHING = math.nan


def answer_few(
    ledgers: Ledgers, points: Points, features: Sequence[Feature], profiles: Profiles
) -> tuple[list[list[Answer]], list[bool]]:
    """Each feature of each point, in order, and whether its card is known; arguments as for
    `as_of`."""
    asked = [_Point(ledgers, points, i, profiles) for i in range(len(points))]
    answers = [
        [_COMPUTE[feature.aggregate](point, feature.window_ms) for feature in features]
        for point in asked
    ]
    return answers, [not point.is_unknown for point in asked]


class _Point:
    """One point's computation."""

    def __init__(self, ledgers: Ledgers, points: Points, i: int, profiles: Profiles) -> None:
        self.card = int(points.card_index[i])
        self.time_ms = int(points.time_ms[i])
        self.amount_minor = int(points.amount_minor[i])
        self.category = int(points.category[i])
        self.merchant_udeg = int(points.latitude_udeg[i]), int(points.longitude_udeg[i])
        self.dropped_ms = int(ledgers.dropped_ms[self.card])
        begin, end = ledgers.offsets[self.card : self.card + 2].tolist()
        self.records = ledgers.records[begin:end]
        self.profiles = profiles
        self.windows: dict[int, _Window] = {}
        self.is_unknown = not self.end and self.dropped_ms == NEVER_DROPPED

    def window(self, length_ms: int) -> _Window:
        """The window [t - length, t)."""
        window = self.windows.get(length_ms)
        if window is None:
            window = self.windows[length_ms] = _Window(self, length_ms)
        return window

    @cached_property
    def stamps(self) -> list[int]:
        """Times and categories of all records: one is before t if it is below t's own stamp."""
        stamps: list[int] = self.records["stamp"].tolist()
        return stamps

    @cached_property
    def end(self) -> int:
        """One behind the last record before t."""
        return bisect_left(self.stamps, self.time_ms << CATEGORY_BITS)

    @cached_property
    def amounts(self) -> list[int]:
        """Amounts before t, in minor units."""
        amounts: list[int] = self.records["amount_minor"][: self.end].tolist()
        return amounts

    @cached_property
    def squares(self) -> list[int]:
        """Their squares."""
        return list(map(mul, self.amounts, self.amounts))

    @cached_property
    def merchants(self) -> list[int]:
        """Merchants before t."""
        merchants: list[int] = self.records["merchant"][: self.end].tolist()
        return merchants

    # --- card windows -----------------------------------------------------------------------

    def count(self, length_ms: int) -> Answer:
        window = self.window(length_ms)
        return float(window.count), window.worth_of_total

    def sum(self, length_ms: int) -> Answer:
        window = self.window(length_ms)
        return window.sum / MINOR_PER_UNIT, window.worth_of_total

    def mean(self, length_ms: int) -> Answer:
        window = self.window(length_ms)
        if not window.count:
            return _NOTHING, window.worth_of_mean
        return window.sum / (MINOR_PER_UNIT * window.count), window.worth_of_mean

    def std(self, length_ms: int) -> Answer:
        window = self.window(length_ms)
        if not window.count:
            return _NOTHING, window.worth_of_mean
        return window.root_numerator / (MINOR_PER_UNIT * window.count), window.worth_of_mean

    def max(self, length_ms: int) -> Answer:
        window = self.window(length_ms)
        if not window.count:
            return _NOTHING, window.worth_of_mean
        return max(self.amounts[window.begin :]) / MINOR_PER_UNIT, window.worth_of_mean

    def distinct_merchants(self, length_ms: int) -> Answer:
        window = self.window(length_ms)
        return float(len(set(self.merchants[window.begin :]))), window.worth_of_total

    def same_category_count(self, length_ms: int) -> Answer:
        window = self.window(length_ms)
        _, worth = self.category_code(0)
        if worth is not Status.PRESENT:
            return _NOTHING, worth
        categories = [stamp & _CATEGORY_MASK for stamp in self.stamps[window.begin : self.end]]
        return float(categories.count(self.category)), window.worth_of_total

    def zscore(self, length_ms: int) -> Answer:
        window = self.window(length_ms)
        if self.amount_minor == AMOUNT_MISSING:
            return _NOTHING, Status.MISSING_INPUT
        if window.worth_of_mean is not Status.PRESENT:
            return _NOTHING, window.worth_of_mean
        if window.root_numerator == 0:
            return _NOTHING, Status.UNDEFINED
        above = window.count * self.amount_minor - window.sum
        return above / window.root_numerator, Status.PRESENT

    # --- the card's last transaction --------------------------------------------------------

    @property
    def worth_of_last(self) -> Status:
        """What is known of the card's last transaction before t."""
        if self.end:
            return Status.PRESENT
        return Status.UNKNOWN_CARD if self.is_unknown else Status.BEFORE_HISTORY

    @property
    def elapsed_ms(self) -> int:
        """Time since the last transaction, which there is."""
        return self.time_ms - (self.stamps[self.end - 1] >> CATEGORY_BITS)

    def seconds_since_last(self, _: int) -> Answer:
        if not self.end:
            return _NOTHING, self.worth_of_last
        return self.elapsed_ms / 1000.0, Status.PRESENT

    def speed(self, _: int) -> Answer:
        if POSITION_MISSING in self.merchant_udeg:
            return _NOTHING, Status.MISSING_INPUT
        if not self.end:
            return _NOTHING, self.worth_of_last
        last = self.records[self.end - 1]
        place = int(last["latitude_udeg"]), int(last["longitude_udeg"])
        if POSITION_MISSING in place:
            return _NOTHING, Status.MISSING_FACT
        distance = distance_km(*place, *self.merchant_udeg)
        return distance / (self.elapsed_ms / MS_PER_HOUR), Status.PRESENT

    def distance(self, _: int) -> Answer:
        if POSITION_MISSING in self.merchant_udeg:
            return _NOTHING, Status.MISSING_INPUT
        home = self.profiles.one_as_of(self.card, self.time_ms)
        if home is None:
            return _NOTHING, Status.MISSING_FACT
        place = int(home["latitude_udeg"]), int(home["longitude_udeg"])
        if POSITION_MISSING in place:
            return _NOTHING, Status.MISSING_FACT
        return distance_km(*place, *self.merchant_udeg), Status.PRESENT

    # --- the payment alone ------------------------------------------------------------------

    def amount(self, _: int) -> Answer:
        if self.amount_minor == AMOUNT_MISSING:
            return _NOTHING, Status.MISSING_INPUT
        return self.amount_minor / MINOR_PER_UNIT, Status.PRESENT

    def category_code(self, _: int) -> Answer:
        if self.category == CATEGORY_MISSING:
            return _NOTHING, Status.MISSING_INPUT
        if self.category == CATEGORY_UNKNOWN:
            return _NOTHING, Status.UNKNOWN_CATEGORY
        return float(self.category), Status.PRESENT

    def hour_of_day(self, _: int) -> Answer:
        return float(request.hour_of_day(self.time_ms)), Status.PRESENT

    def day_of_week(self, _: int) -> Answer:
        return float(request.day_of_week(self.time_ms)), Status.PRESENT

    def is_night(self, _: int) -> Answer:
        return float(request.is_night(self.time_ms)), Status.PRESENT


class _Window:
    """One window of one point."""

    def __init__(self, point: _Point, length_ms: int) -> None:
        begin_ms = point.time_ms - length_ms
        self.begin = bisect_left(point.stamps, max(begin_ms, 0) << CATEGORY_BITS)
        self.count = point.end - self.begin
        if point.is_unknown:
            self.worth_of_total = Status.UNKNOWN_CARD
        elif begin_ms <= point.dropped_ms:
            self.worth_of_total = Status.BEFORE_HISTORY
        else:
            self.worth_of_total = Status.PRESENT
        self.worth_of_mean = self.worth_of_total
        if not self.count and self.worth_of_total is Status.PRESENT:
            self.worth_of_mean = Status.EMPTY_WINDOW
        self._point = point

    @cached_property
    def sum(self) -> int:
        """The exact sum, in minor units."""
        return sum(self._point.amounts[self.begin :])

    @cached_property
    def root_numerator(self) -> float:
        """sqrt(n Q - S S), of the exact integer rounded once."""
        squares = sum(self._point.squares[self.begin :])
        return math.sqrt(self.count * squares - self.sum * self.sum)


_COMPUTE: dict[Aggregate, Callable[[_Point, int], Answer]] = {
    Aggregate.COUNT: _Point.count,
    Aggregate.SUM: _Point.sum,
    Aggregate.MEAN: _Point.mean,
    Aggregate.STD: _Point.std,
    Aggregate.MAX: _Point.max,
    Aggregate.DISTINCT_MERCHANTS: _Point.distinct_merchants,
    Aggregate.SAME_CATEGORY_COUNT: _Point.same_category_count,
    Aggregate.ZSCORE: _Point.zscore,
    Aggregate.SECONDS_SINCE_LAST: _Point.seconds_since_last,
    Aggregate.SPEED: _Point.speed,
    Aggregate.AMOUNT: _Point.amount,
    Aggregate.DISTANCE: _Point.distance,
    Aggregate.HOUR_OF_DAY: _Point.hour_of_day,
    Aggregate.DAY_OF_WEEK: _Point.day_of_week,
    Aggregate.IS_NIGHT: _Point.is_night,
    Aggregate.CATEGORY: _Point.category_code,
}
