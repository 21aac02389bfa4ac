"""Windows of many cards at many instants, computed on arrays. For `as_of` alone.

How. Records lie sorted by card and time. Each record and each question becomes one integer, its
card's base plus its time, so that one binary search over one array finds where a window begins
and ends, for all cards, windows and points at once. Then

- count, sum and sum of squares are differences of running totals in exact integers,
- the maximum is taken piece by piece between the beginnings of a point's nested windows,
- the number of distinct merchants is a difference of counts: a record is its merchant's last one
  before t exactly while t_i < t <= t_next, and in the window exactly while t <= t_i + w. It counts
  once for t in (t_i, min(t_i + w, t_next)], so "how many intervals began before t, less how many
  ended before t" is the answer.

Where every card has one point, as when serving, the last two kinds are counted by flags on the
records instead: no sort for each window. Both ways are exact, and tests hold them to one oracle.

Formulas, in minor units, n records with amounts x, S = sum(x), Q = sum(x*x):

    sum = S / 100          mean = S / (100 n)         std = sqrt(nQ - S*S) / (100 n)
    zscore of a = (n a - S) / sqrt(nQ - S*S)          (population deviation)

S, nQ - S*S and n a - S are exact integers; each is rounded to float64 once, then divided.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from features import request
from features.catalog import CATEGORIES, Aggregate, Feature
from features.geo import POSITION_MISSING, great_circle_km
from features.ledger import NEVER_DROPPED, Ledgers, record_categories, record_times_ms
from features.points import (
    AMOUNT_MISSING,
    CATEGORY_MISSING,
    CATEGORY_UNKNOWN,
    MINOR_PER_UNIT,
    MS_PER_HOUR,
    SPAN_MS,
    Points,
)
from features.profile import Profiles
from features.status import Status

Int64Array = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
StatusArray = npt.NDArray[np.uint8]
BoolArray = npt.NDArray[np.bool_]
Rows = slice | npt.NDArray[np.intp]
_Integer = TypeVar("_Integer", np.int64, np.uint64)

_NO_AMOUNT = -(2**63)
_PADDING = np.array([_NO_AMOUNT], dtype=np.int64)

PRESENT = np.uint8(Status.PRESENT)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to compute for a set of features."""

    windows_ms: Int64Array
    """(n_windows, 1) the different windows asked for, ascending."""
    steps: tuple[tuple[Aggregate, Rows, Rows], ...]
    """Each aggregate, the output rows that it fills, and for each of those rows the window's
    position in windows_ms."""
    aggregates: frozenset[Aggregate]


@lru_cache(maxsize=256)
def make_plan(features: tuple[Feature, ...]) -> Plan:
    """The plan for features, made once for each set of them."""
    windows_ms = sorted({f.window_ms for f in features if f.window_ms})
    rows: dict[Aggregate, list[int]] = {}
    for row, feature in enumerate(features):
        rows.setdefault(feature.aggregate, []).append(row)
    steps = [
        (
            aggregate,
            _compact(of),
            _compact([windows_ms.index(w) for row in of if (w := features[row].window_ms)]),
        )
        for aggregate, of in rows.items()
    ]
    return Plan(
        np.array(windows_ms, dtype=np.int64).reshape(-1, 1),
        tuple(steps),
        frozenset(rows),
    )


def _compact(positions: list[int]) -> Rows:
    """A slice where it says the same: views cost nothing, and most plans have neighbours."""
    first = positions[0] if positions else 0
    if positions == list(range(first, first + len(positions))):
        return slice(first, first + len(positions))
    return np.array(positions, dtype=np.intp)


class Block:
    """One block's computation: features are rows here, points columns.

    Its points are in order of card and time, and its cards fewer than 65,536 apart.
    """

    def __init__(self, ledgers: Ledgers, points: Points, profiles: Profiles, plan: Plan) -> None:
        self.points = points
        self.plan = plan
        self.profiles = profiles
        self._locate(ledgers)

    def _locate(self, ledgers: Ledgers) -> None:
        """Finds, for each point, its card's records before t and where each window begins."""
        points, plan = self.points, self.plan
        first, last = int(points.card_index[0]), int(points.card_index[-1])
        begin, end = int(ledgers.offsets[first]), int(ledgers.offsets[last + 1])
        self.records = ledgers.records[begin:end]
        self.offsets = ledgers.offsets[first : last + 2] - begin
        self.card = points.card_index - first
        self.dropped_ms = ledgers.dropped_ms[points.card_index]
        n_cards = last - first + 1
        self.counts_by_card = np.diff(self.offsets)
        self.one_point_per_card = len(points) == n_cards and bool((np.diff(self.card) == 1).all())

        self.record_ms = record_times_ms(self.records)
        self.record_base = (np.arange(n_cards) * SPAN_MS).repeat(self.counts_by_card)
        instants = np.empty((len(plan.windows_ms) + 1, len(points)), dtype=np.int64)
        instants[0] = points.time_ms
        np.subtract(points.time_ms, plan.windows_ms, out=instants[1:])
        self.begins_ms = instants[1:]
        # No record is before 1970, so a window that begins earlier may as well begin there.
        self.queries = np.maximum(instants, 0) + self.card * SPAN_MS
        positions = (self.record_base + self.record_ms).searchsorted(self.queries)
        self.hi = positions[0]
        """(n_points,) one behind the last record before t."""
        self.unknown = (self.hi == self.offsets[self.card]) & (self.dropped_ms == NEVER_DROPPED)
        """(n_points,) whether the card has no transaction before t: then nobody knew it at t."""
        self.lo = positions[1:]
        """(n_windows, n_points) the first record in each window."""
        self.count = self.hi - self.lo

    def compute(self, values: FloatArray, statuses: StatusArray) -> None:
        """Fills values and statuses, both (n_features, n_points); statuses come as PRESENT."""
        self.values, self.statuses = values, statuses
        with np.errstate(invalid="ignore", divide="ignore"):
            for aggregate, rows, windows in self.plan.steps:
                _COMPUTE[aggregate](self, rows, windows)
        values[statuses != PRESENT] = np.nan

    # --- statuses ---------------------------------------------------------------------------

    def _mark(self, rows: Rows, where: BoolArray, status: Status) -> None:
        """Sets a status where nothing was found wrong before; `where` is (n_points,) or
        (len(rows), n_points)."""
        if np.count_nonzero(where):
            current = self.statuses[rows]
            self.statuses[rows] = np.where(where & (current == PRESENT), np.uint8(status), current)

    def _overrule(self, rows: Rows, where: BoolArray, status: Status) -> None:
        """Sets a status whatever was found before; `where` is (n_points,)."""
        if np.count_nonzero(where):
            current = self.statuses[rows]
            current[:, where] = status
            self.statuses[rows] = current

    def _set(self, rows: Rows, worth: StatusArray | None, windows: Rows) -> None:
        """Sets the statuses of windows, before anything else of these rows is marked."""
        if worth is not None:
            self.statuses[rows] = worth[windows]

    @cached_property
    def worth_of_total(self) -> StatusArray | None:
        """(n_windows, n_points) what a count or a sum is worth; None where all are PRESENT."""
        truncated = self.begins_ms <= self.dropped_ms
        if not (truncated.any() or self.unknown.any()):
            return None
        worth = np.where(truncated, np.uint8(Status.BEFORE_HISTORY), PRESENT)
        worth[:, self.unknown] = Status.UNKNOWN_CARD
        return worth

    @cached_property
    def worth_of_mean(self) -> StatusArray | None:
        """The same of what an empty window does not have: a mean, a deviation, a maximum."""
        empty = self.count == 0
        if not empty.any():
            return self.worth_of_total
        if self.worth_of_total is None:
            return np.where(empty, np.uint8(Status.EMPTY_WINDOW), PRESENT)
        empty &= self.worth_of_total == PRESENT
        return np.where(empty, np.uint8(Status.EMPTY_WINDOW), self.worth_of_total)

    # --- card windows -----------------------------------------------------------------------

    def _count(self, rows: Rows, windows: Rows) -> None:
        self.values[rows] = self.count[windows]
        self._set(rows, self.worth_of_total, windows)

    @cached_property
    def amounts(self) -> Int64Array:
        """(n_records,) amounts in minor units."""
        return np.ascontiguousarray(self.records["amount_minor"])

    @cached_property
    def sums(self) -> Int64Array:
        """(n_windows, n_points) exact sums in minor units."""
        return self._gained(_running_total(self.amounts))

    def _sum(self, rows: Rows, windows: Rows) -> None:
        self.values[rows] = self.sums[windows] / MINOR_PER_UNIT
        self._set(rows, self.worth_of_total, windows)

    def _mean(self, rows: Rows, windows: Rows) -> None:
        self.values[rows] = self.sums[windows] / (MINOR_PER_UNIT * self.count[windows])
        self._set(rows, self.worth_of_mean, windows)

    def _std(self, rows: Rows, windows: Rows) -> None:
        self.values[rows] = self.root_numerators[windows] / (MINOR_PER_UNIT * self.count[windows])
        self._set(rows, self.worth_of_mean, windows)

    @cached_property
    def root_numerators(self) -> FloatArray:
        """(n_windows, n_points) sqrt(n Q - S S), of the exact integer rounded once."""
        # In uint64 everything wraps, and the result is exact while the true one is below 2**64,
        # which n * sum(|x|)**2 bounds from above.
        amounts = self.amounts.view(np.uint64)
        squares = self._gained(_running_total(amounts * amounts))
        sums = self.sums.view(np.uint64)
        numerators = self.count.view(np.uint64) * squares - sums * sums
        result: FloatArray = numerators.astype(np.float64)
        n_max = int(self.count.max(initial=0))
        if (n_max * int(np.abs(self.amounts).max(initial=0))) ** 2 >= 2**63:
            self._mend_large_numerators(result)
        np.sqrt(result, out=result)
        return result

    def _mend_large_numerators(self, result: FloatArray) -> None:
        """Redoes in unbounded integers what may have wrapped."""
        sizes = self._gained(_running_total(np.abs(self.amounts))).astype(np.float64)
        unsure = self.count * sizes * sizes >= 2.0**63
        amounts = self.amounts
        for window, point in zip(*np.nonzero(unsure), strict=True):
            window_amounts = amounts[self.lo[window, point] : self.hi[point]].tolist()
            n, total = len(window_amounts), sum(window_amounts)
            result[window, point] = float(n * sum(x * x for x in window_amounts) - total * total)

    def _max(self, rows: Rows, windows: Rows) -> None:
        # The windows of a point nest: the maximum over each is that of the pieces between their
        # beginnings, from the shortest window outwards.
        bounds = np.empty((len(self.hi), len(self.lo) + 1), dtype=np.int64)
        bounds[:, :-1] = self.lo[::-1].T
        bounds[:, -1] = self.hi
        # reduceat wants every bound to be a position.
        padded = np.concatenate((self.amounts, _PADDING))
        pieces = np.maximum.reduceat(padded, bounds.ravel()).reshape(bounds.shape)[:, :-1]
        pieces[bounds[:, :-1] == bounds[:, 1:]] = (
            _NO_AMOUNT  # reduceat reads one for an empty piece
        )
        largest = np.maximum.accumulate(pieces[:, ::-1], axis=1).T
        self.values[rows] = largest[windows] / MINOR_PER_UNIT
        self._set(rows, self.worth_of_mean, windows)

    def _distinct_merchants(self, rows: Rows, windows: Rows) -> None:
        if self.one_point_per_card:
            self.values[rows] = self._distinct_of_one_point(windows)
        else:
            self.values[rows] = self._distinct_of_many_points(windows)
        self._set(rows, self.worth_of_total, windows)

    def _distinct_of_one_point(self, windows: Rows) -> Int64Array:
        """(len(windows), n_points): flags each merchant's last record before the card's t."""
        lo = self.lo[windows]
        longest = lo.min(axis=0)
        counts = self.hi - longest
        bounds = np.zeros(len(counts) + 1, dtype=np.int64)
        np.cumsum(counts, out=bounds[1:])
        shift = longest - bounds[:-1]
        position = np.arange(bounds[-1]) + shift.repeat(counts)
        card = np.arange(len(counts)).repeat(counts)
        order, same_as_next = _merchant_runs(self.records["merchant"][position], card)
        last = np.empty(len(order), dtype=bool)
        last[order] = ~same_as_next
        total = _running_count(last)
        distinct: Int64Array = total[bounds[1:]] - total[lo - shift]
        return distinct

    def _distinct_of_many_points(self, windows: Rows) -> Int64Array:
        """(len(windows), n_points): intervals that began before t, less those that ended."""
        order, same_as_next = _merchant_runs(self.records["merchant"], self.record_base // SPAN_MS)
        next_ms = np.full(len(self.records), SPAN_MS, dtype=np.int64)
        repeated = np.flatnonzero(same_as_next)
        next_ms[order[repeated]] = self.record_ms[order[repeated + 1]]
        windows_ms = self.plan.windows_ms[windows]
        counts = np.empty((len(windows_ms), len(self.card)), dtype=np.int64)
        for row, window_ms in enumerate(windows_ms):
            ends = self.record_base + np.minimum(self.record_ms + window_ms, next_ms)
            ends.sort()
            counts[row] = self.hi - np.searchsorted(ends, self.queries[0])
        return counts

    def _same_category_count(self, rows: Rows, windows: Rows) -> None:
        category = self.points.category.astype(np.int64)
        record_category = record_categories(self.records)
        if self.one_point_per_card:
            same = record_category == category.repeat(self.counts_by_card)
            counts = self._gained(_running_count(same))[windows]
        else:
            # Each category of each card gets a stretch of its own.
            groups = len(CATEGORIES) + 1
            keys = (self.record_base * groups + record_category * SPAN_MS) + self.record_ms
            keys.sort()
            group = self.card * (groups - 1) + np.maximum(category, 0)
            positions = np.searchsorted(keys, self.queries + group * SPAN_MS)
            counts = positions[0] - positions[1:][windows]
        self.values[rows] = counts
        self._set(rows, self.worth_of_total, windows)
        self._mark_category(rows)

    # --- the card's last transaction --------------------------------------------------------

    @cached_property
    def last(self) -> Int64Array:
        """(n_points,) position of the card's last record before t; -1 where there is none."""
        return np.where(self.hi > self.offsets[self.card], self.hi - 1, -1)

    def _mark_last(self, rows: Rows) -> None:
        none = self.last < 0
        if none.any():
            self._mark(rows, self.unknown, Status.UNKNOWN_CARD)
            self._mark(rows, none, Status.BEFORE_HISTORY)

    def _seconds_since_last(self, rows: Rows, _: Rows) -> None:
        if len(self.records):
            self.values[rows] = (self.points.time_ms - self.record_ms[self.last]) / 1000.0
        self._mark_last(rows)

    def _zscore(self, rows: Rows, windows: Rows) -> None:
        amount = self.points.amount_minor
        missing = amount == AMOUNT_MISSING
        root = self.root_numerators[windows]
        given = np.where(missing, 0, amount)
        self.values[rows] = (self.count[windows] * given - self.sums[windows]) / root
        self._set(rows, self.worth_of_mean, windows)
        self._mark(rows, root == 0, Status.UNDEFINED)
        self._overrule(rows, missing, Status.MISSING_INPUT)

    # --- distances --------------------------------------------------------------------------

    @cached_property
    def distances_km(self) -> tuple[FloatArray, FloatArray]:
        """(n_points,) from the last merchant, and (n_points,) from home; NaN where a position is
        missing. Both in one go, since a distance has a price for small arrays."""
        points = self.points
        ends = np.empty((4, 2, len(points)), dtype=np.int32)
        ends[:2] = POSITION_MISSING
        if Aggregate.SPEED in self.plan.aggregates:
            _place(ends[:2, 0], self.records, self.last)
        if Aggregate.DISTANCE in self.plan.aggregates:
            home = self.profiles.index_as_of(points.card_index, points.time_ms)
            _place(ends[:2, 1], self.profiles.records, home)
        ends[2] = points.latitude_udeg
        ends[3] = points.longitude_udeg
        flat = ends.reshape(4, -1)
        missing = np.flatnonzero((flat == POSITION_MISSING).any(axis=0))
        flat[:, missing] = 0
        distances = great_circle_km(*flat)
        distances[missing] = np.nan
        return distances[: len(points)], distances[len(points) :]

    def _speed(self, rows: Rows, _: Rows) -> None:
        distance_km, _home = self.distances_km
        if len(self.records):
            elapsed_ms = self.points.time_ms - self.record_ms[self.last]
            self.values[rows] = distance_km / (elapsed_ms / MS_PER_HOUR)
        self._mark(rows, ~self.has_position, Status.MISSING_INPUT)
        self._mark_last(rows)
        self._mark(rows, np.isnan(distance_km), Status.MISSING_FACT)

    def _distance(self, rows: Rows, _: Rows) -> None:
        _last, distance_km = self.distances_km
        self.values[rows] = distance_km
        self._mark(rows, ~self.has_position, Status.MISSING_INPUT)
        self._mark(rows, np.isnan(distance_km), Status.MISSING_FACT)

    @cached_property
    def has_position(self) -> BoolArray:
        """(n_points,) whether the payment says where its merchant is."""
        return request.has_position(self.points)

    # --- the payment alone ------------------------------------------------------------------

    def _amount(self, rows: Rows, _: Rows) -> None:
        self.values[rows] = self.points.amount_minor / MINOR_PER_UNIT
        self._mark(rows, self.points.amount_minor == AMOUNT_MISSING, Status.MISSING_INPUT)

    def _category(self, rows: Rows, _: Rows) -> None:
        self.values[rows] = self.points.category
        self._mark_category(rows)

    def _mark_category(self, rows: Rows) -> None:
        """What is wrong with the request comes before what is wrong with the card."""
        self._overrule(rows, self.points.category == CATEGORY_MISSING, Status.MISSING_INPUT)
        self._overrule(rows, self.points.category == CATEGORY_UNKNOWN, Status.UNKNOWN_CATEGORY)

    def _hour_of_day(self, rows: Rows, _: Rows) -> None:
        self.values[rows] = request.hour_of_day(self.points.time_ms)

    def _day_of_week(self, rows: Rows, _: Rows) -> None:
        self.values[rows] = request.day_of_week(self.points.time_ms)

    def _is_night(self, rows: Rows, _: Rows) -> None:
        self.values[rows] = request.is_night(self.points.time_ms)

    def _gained(self, total: npt.NDArray[_Integer]) -> npt.NDArray[_Integer]:
        """What a running total gained over each window: (n_windows, n_points)."""
        gained: npt.NDArray[_Integer] = total[self.hi] - total[self.lo]
        return gained


_COMPUTE: dict[Aggregate, Callable[[Block, Rows, Rows], None]] = {
    Aggregate.COUNT: Block._count,
    Aggregate.SUM: Block._sum,
    Aggregate.MEAN: Block._mean,
    Aggregate.STD: Block._std,
    Aggregate.MAX: Block._max,
    Aggregate.DISTINCT_MERCHANTS: Block._distinct_merchants,
    Aggregate.SAME_CATEGORY_COUNT: Block._same_category_count,
    Aggregate.ZSCORE: Block._zscore,
    Aggregate.SECONDS_SINCE_LAST: Block._seconds_since_last,
    Aggregate.SPEED: Block._speed,
    Aggregate.AMOUNT: Block._amount,
    Aggregate.DISTANCE: Block._distance,
    Aggregate.HOUR_OF_DAY: Block._hour_of_day,
    Aggregate.DAY_OF_WEEK: Block._day_of_week,
    Aggregate.IS_NIGHT: Block._is_night,
    Aggregate.CATEGORY: Block._category,
}


def _place(places: npt.NDArray[np.int32], records: npt.NDArray[np.void], at: Int64Array) -> None:
    """Fills in (2, n_points) latitude and longitude of the records at positions, -1 for none."""
    if len(records):
        found = records[at]
        places[0] = found["latitude_udeg"]
        places[1] = found["longitude_udeg"]
        places[:, at < 0] = POSITION_MISSING


def _running_total(amounts: npt.NDArray[_Integer]) -> npt.NDArray[_Integer]:
    """(n + 1,) totals of the first 0, 1, ... n elements; wraps as its dtype does."""
    total = np.zeros(len(amounts) + 1, dtype=amounts.dtype)
    amounts.cumsum(out=total[1:])
    return total


def _running_count(flags: BoolArray) -> Int64Array:
    """(n + 1,) how many of the first 0, 1, ... n flags are set."""
    total = np.zeros(len(flags) + 1, dtype=np.int64)
    flags.cumsum(out=total[1:])
    return total


def _merchant_runs(
    merchant: npt.NDArray[np.uint64], card: Int64Array
) -> tuple[Int64Array, BoolArray]:
    """Brings the records of one card at one merchant together.

    Args:
        merchant: (n,) merchant keys, in ledger order.
        card: (n,) card of each.

    Returns:
        positions (n,) such that each (card, merchant) is one run, in ledger order inside it, and
        whether (n,) the next position belongs to the same run.
    """
    n = len(merchant)
    same_as_next = np.zeros(n, dtype=bool)
    # (card, merchant) as one 64-bit key, as good a hash as the merchant key itself. Its upper bits
    # and the position sort as one integer, several times faster than an argsort.
    mixed = merchant + card.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mask = np.uint64((1 << n.bit_length()) - 1)
    packed = (mixed & ~mask) | np.arange(n, dtype=np.uint64)
    packed.sort()
    order = (packed & mask).view(np.int64)
    ordered = mixed[order]
    np.equal(ordered[1:], ordered[:-1], out=same_as_next[:-1])
    alike = (packed[1:] ^ packed[:-1]) <= mask
    if not np.array_equal(alike, same_as_next[:-1]):
        # Two keys differ only in the bits that made room for the position: sort in full.
        order = np.argsort(mixed, kind="stable")
        ordered = mixed[order]
        np.equal(ordered[1:], ordered[:-1], out=same_as_next[:-1])
    return order, same_as_next
