"""`as_of`: windows of many cards at many instants, computed from ledgers. The only such place.

How. Records lie sorted by card and time. Each record and each question becomes one integer, its
card's base plus its time, so that one binary search over one array finds where a window begins
and ends, for all cards, windows and points at once. Then

- count, sum and sum of squares are differences of running totals in exact integers,
- the maximum is the larger of two overlapping power-of-two blocks (a sparse table),
- the number of distinct merchants is a difference of counts: a record is its merchant's last one
  before t exactly while t_i < t <= t_next, and in the window exactly while t <= t_i + w. It counts
  once for t in (t_i, min(t_i + w, t_next)], so "how many intervals began before t, less how many
  ended before t" is the answer.

Where every card has one point, as when serving, the last two kinds are counted by flags on the
records instead: no sort for each window. Both ways are exact, and tests hold them to one oracle.

Points are taken in blocks that fit the processor's cache.

Formulas, in minor units, n records with amounts x, S = sum(x), Q = sum(x*x):

    sum = S / 100          mean = S / (100 n)         std = sqrt(nQ - S*S) / (100 n)
    zscore of a = (n a - S) / sqrt(nQ - S*S)          (population deviation)

S, nQ - S*S and n a - S are exact integers; each is rounded to float64 once, then divided.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from features import request
from features.catalog import CATALOG, CATEGORIES, Aggregate, Feature, Source
from features.geo import POSITION_MISSING, great_circle_km
from features.ledger import NEVER_DROPPED, Ledgers, record_categories, record_times_ms
from features.points import AMOUNT_MISSING, CATEGORY_MISSING, CATEGORY_UNKNOWN, Points
from features.profile import Profiles
from features.status import Status

Int64Array = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
StatusArray = npt.NDArray[np.uint8]
BoolArray = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.intp]
_Integer = TypeVar("_Integer", np.int64, np.uint64)

BLOCK_POINTS = 8_192
BLOCK_RECORDS = 65_536
"""Points and records that are worked on together: a few MB of temporaries, near the L2 cache."""

MINOR_PER_UNIT = 100.0
MS_PER_HOUR = 3_600_000.0

_PRESENT = np.uint8(Status.PRESENT)


@dataclass(frozen=True, slots=True)
class Answers:
    """Feature values of points."""

    values: FloatArray
    """(n_points, n_features) float64; NaN where the status is not PRESENT."""
    statuses: StatusArray
    """(n_points, n_features) uint8 of Status."""


def as_of(
    ledgers: Ledgers,
    points: Points,
    features: Sequence[Feature] = CATALOG,
    profiles: Profiles | None = None,
) -> Answers:
    """Compute features for many (card, instant) points at once.

    Args:
        ledgers: every card's records.
        points: (n_points,) in any order; `card_index` counts into `ledgers`.
        features: what to compute, in output order.
        profiles: every card's profile, by the same index; none by default.

    Returns:
        values (n_points, n_features) float64, NaN where the status is not PRESENT, and
        statuses (n_points, n_features) uint8. A window of length w at t is [t - w, t).
    """
    plan = _plan(tuple(features))
    profiles = profiles or Profiles.empty(len(ledgers))
    n = len(points)
    values = np.empty((n, len(features)), dtype=np.float64)
    statuses = np.empty((n, len(features)), dtype=np.uint8)
    order = _order(points)
    ordered = points if order is None else points.take(order)
    for block in _blocks(ledgers, ordered):
        part = _Block(ledgers, ordered.take(block), profiles, plan)
        part.compute()
        target = block if order is None else order[block]
        values[target] = part.values.T
        statuses[target] = part.statuses.T
    return Answers(values, statuses)


def _order(points: Points) -> Int64Array | None:
    """The order of points by card and time; None when they are in it already."""
    card, time = points.card_index, points.time_ms
    same = card[1:] == card[:-1]
    if bool(np.all((card[1:] > card[:-1]) | (same & (time[1:] >= time[:-1])))):
        return None
    span = int(time.max()) + 1
    if (int(card.max()) + 1) * span < 2**63:
        return np.argsort(card * span + time, kind="stable")
    return np.lexsort((time, card))


def _blocks(ledgers: Ledgers, points: Points) -> list[slice]:
    """Cuts ordered points into runs of neighbouring cards with a bounded number of records."""
    blocks = []
    card, offsets = points.card_index, ledgers.offsets
    start, n = 0, len(points)
    while start < n:
        end = min(start + BLOCK_POINTS, n)
        first = card[start]
        limit = int(np.searchsorted(offsets, offsets[first] + BLOCK_RECORDS, side="right")) - 2
        last = max(int(first), limit)
        if card[end - 1] > last:
            end = int(np.searchsorted(card, last, side="right"))
        blocks.append(slice(start, end))
        start = end
    return blocks


@dataclass(frozen=True, slots=True)
class _Plan:
    """Which rows of the output each aggregate fills, and from which window."""

    windows_ms: Int64Array
    """(n_windows, 1) the different windows asked for."""
    rows: dict[Aggregate, Rows]
    """Output rows of each aggregate."""
    windows: dict[Aggregate, Rows]
    """For each of those rows, the window's position in windows_ms."""
    n_features: int
    reads_ledger: bool


@lru_cache(maxsize=256)
def _plan(features: tuple[Feature, ...]) -> _Plan:
    windows_ms = sorted({f.window_ms for f in features if f.window_ms})
    rows: dict[Aggregate, list[int]] = {}
    for row, feature in enumerate(features):
        rows.setdefault(feature.aggregate, []).append(row)
    windows = {
        aggregate: [windows_ms.index(features[row].window_ms) for row in of]
        for aggregate, of in rows.items()
        if features[of[0]].window_ms
    }
    return _Plan(
        np.array(windows_ms, dtype=np.int64).reshape(-1, 1),
        {aggregate: np.array(of, dtype=np.intp) for aggregate, of in rows.items()},
        {aggregate: np.array(of, dtype=np.intp) for aggregate, of in windows.items()},
        len(features),
        any(f.source in (Source.LEDGER, Source.LEDGER_AND_REQUEST) for f in features),
    )


class _Block:
    """One block's computation: features are rows here, points columns."""

    def __init__(self, ledgers: Ledgers, points: Points, profiles: Profiles, plan: _Plan) -> None:
        self.points = points
        self.plan = plan
        self.profiles = profiles
        self.values = np.empty((plan.n_features, len(points)), dtype=np.float64)
        self.statuses = np.full((plan.n_features, len(points)), _PRESENT, dtype=np.uint8)
        if plan.reads_ledger:
            self._locate(ledgers)

    def _locate(self, ledgers: Ledgers) -> None:
        """Finds, for each point, its card's records before t and where each window begins."""
        points, plan = self.points, self.plan
        first, last = int(points.card_index[0]), int(points.card_index[-1])
        begin, end = int(ledgers.offsets[first]), int(ledgers.offsets[last + 1])
        self.records = ledgers.records[begin:end]
        self.offsets = ledgers.offsets[first : last + 2] - begin
        self.card = points.card_index - first
        self.known = ledgers.known[points.card_index]
        self.dropped_ms = ledgers.dropped_ms[points.card_index]

        self.record_ms = record_times_ms(self.records)
        n_cards = last - first + 1
        self.record_card = np.repeat(np.arange(n_cards), np.diff(self.offsets))
        if len(self.records):
            self.origin_ms = int(self.record_ms.min())
            newest_ms = int(self.record_ms.max())
        else:
            self.origin_ms = newest_ms = 0
        # Beyond the newest record plus the longest window every window is empty.
        horizon_ms = newest_ms + int(plan.windows_ms.max(initial=0)) + 1
        self.span = horizon_ms - self.origin_ms + 1
        self.keys = self.record_card * self.span + (self.record_ms - self.origin_ms)

        instants = np.empty((len(plan.windows_ms) + 1, len(points)), dtype=np.int64)
        instants[0] = points.time_ms
        np.subtract(points.time_ms, plan.windows_ms, out=instants[1:])
        self.begins_ms = instants[1:]
        self.within = np.clip(instants, self.origin_ms, horizon_ms) - self.origin_ms
        self.queries = self.within + self.card * self.span
        positions = np.searchsorted(self.keys, self.queries)
        self.hi = positions[0]
        """(n_points,) one behind the last record before t."""
        self.lo = positions[1:]
        """(n_windows, n_points) the first record in each window."""
        self.count = self.hi - self.lo
        self.one_point_per_card = len(points) == n_cards and bool(
            np.all(self.card[1:] != self.card[:-1])
        )

    def compute(self) -> None:
        """Fills values and statuses."""
        for aggregate, rows in self.plan.rows.items():
            _COMPUTE[aggregate](self, rows)
        self.values[self.statuses != _PRESENT] = np.nan

    # --- statuses ---------------------------------------------------------------------------

    def _mark(self, rows: Rows, where: BoolArray, status: Status) -> None:
        """Sets a status where nothing was found wrong before; `where` is (n_points,) or
        (len(rows), n_points)."""
        current = self.statuses[rows]
        current[where & (current == _PRESENT)] = status
        self.statuses[rows] = current

    def _mark_window(self, rows: Rows, windows: Rows) -> None:
        """Marks unknown cards, and windows that begin before the history that is kept."""
        if not self.known.all():
            self._mark(rows, np.broadcast_to(~self.known, (len(rows), len(self.card))), Status.UNKNOWN_CARD)
        if (self.dropped_ms > NEVER_DROPPED).any():
            self._mark(rows, self.begins_ms[windows] <= self.dropped_ms, Status.BEFORE_HISTORY)

    # --- card windows -----------------------------------------------------------------------

    def count_(self, rows: Rows) -> None:
        windows = self.plan.windows[Aggregate.COUNT]
        self.values[rows] = self.count[windows]
        self._mark_window(rows, windows)

    @cached_property
    def amounts(self) -> Int64Array:
        """(n_records,) amounts in minor units."""
        return np.ascontiguousarray(self.records["amount_minor"])

    @cached_property
    def sums(self) -> Int64Array:
        """(n_windows, n_points) exact sums in minor units."""
        return self._gained(_running_total(self.amounts))

    def sum_(self, rows: Rows) -> None:
        windows = self.plan.windows[Aggregate.SUM]
        self.values[rows] = self.sums[windows] / MINOR_PER_UNIT
        self._mark_window(rows, windows)

    def mean(self, rows: Rows) -> None:
        windows = self.plan.windows[Aggregate.MEAN]
        count = self.count[windows]
        with np.errstate(invalid="ignore"):
            self.values[rows] = self.sums[windows] / (MINOR_PER_UNIT * count)
        self._mark_window(rows, windows)
        self._mark(rows, count == 0, Status.EMPTY_WINDOW)

    def std(self, rows: Rows) -> None:
        windows = self.plan.windows[Aggregate.STD]
        count = self.count[windows]
        with np.errstate(invalid="ignore"):
            self.values[rows] = self.root_numerators[windows] / (MINOR_PER_UNIT * count)
        self._mark_window(rows, windows)
        self._mark(rows, count == 0, Status.EMPTY_WINDOW)

    @cached_property
    def root_numerators(self) -> FloatArray:
        """(n_windows, n_points) sqrt(n Q - S S), of the exact integer rounded once."""
        # In uint64 everything wraps, and the result is exact while the true one is below 2**64,
        # which n * sum(|x|)**2 bounds from above.
        amounts = self.amounts.view(np.uint64)
        squares = self._gained(_running_total(amounts * amounts))
        sums = self.sums.view(np.uint64)
        numerators = self.count.view(np.uint64) * squares - sums * sums
        result = numerators.astype(np.float64)
        n_max = int(self.count.max(initial=0))
        if (n_max * int(np.abs(self.amounts).max(initial=0))) ** 2 >= 2**63:
            self._mend_large_numerators(result)
        return np.sqrt(result)

    def _mend_large_numerators(self, result: FloatArray) -> None:
        """Redoes in unbounded integers what may have wrapped."""
        sizes = self._gained(_running_total(np.abs(self.amounts))).astype(np.float64)
        unsure = self.count * sizes * sizes >= 2.0**63
        amounts = self.amounts
        for window, point in zip(*np.nonzero(unsure), strict=True):
            window_amounts = amounts[self.lo[window, point] : self.hi[point]].tolist()
            n, total = len(window_amounts), sum(window_amounts)
            result[window, point] = float(n * sum(x * x for x in window_amounts) - total * total)

    def max_(self, rows: Rows) -> None:
        windows = self.plan.windows[Aggregate.MAX]
        count, lo = self.count[windows], self.lo[windows]
        table = _sparse_table(self.amounts, int(count.max(initial=0)))
        empty = count == 0
        # Positions in the flattened table; an empty window reads any, and is marked.
        level = (np.frexp(np.arange(int(count.max(initial=0)) + 1, dtype=np.float64))[1] - 1)[count]
        level = np.maximum(level, 0).astype(np.int64)
        row = level * len(self.records)
        left = np.where(empty, 0, row + lo)
        right = np.where(empty, 0, row + self.hi - (np.int64(1) << level))
        self.values[rows] = np.maximum(table[left], table[right]) / MINOR_PER_UNIT
        self._mark_window(rows, windows)
        self._mark(rows, empty, Status.EMPTY_WINDOW)

    def distinct_merchants(self, rows: Rows) -> None:
        windows = self.plan.windows[Aggregate.DISTINCT_MERCHANTS]
        next_ms = self._next_same_merchant_ms()
        if self.one_point_per_card:
            t = np.repeat(self.points.time_ms, np.diff(self.offsets))
            last_before_t = (self.record_ms < t) & (next_ms >= t)
            counts = self._gained(_running_count(last_before_t))[windows]
        else:
            counts = np.empty((len(windows), len(self.card)), dtype=np.int64)
            base = self.record_card * self.span - self.origin_ms
            for row, window in enumerate(windows):
                window_ms = self.plan.windows_ms[window]
                ends = np.sort(base + np.minimum(self.record_ms + window_ms, next_ms))
                counts[row] = self.hi - np.searchsorted(ends, self.queries[0])
        self.values[rows] = counts
        self._mark_window(rows, windows)

    def _next_same_merchant_ms(self) -> Int64Array:
        """(n_records,) time of the card's next record at the same merchant; far off if none."""
        n = len(self.records)
        result = np.full(n, 2**62, dtype=np.int64)
        if n < 2:
            return result
        merchant = np.ascontiguousarray(self.records["merchant"])
        # One sort of (hash of card and merchant, position) packed into 64 bits.
        bits = np.uint64(n.bit_length())
        mask = (np.uint64(1) << bits) - np.uint64(1)
        mixed = merchant + self.record_card.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        packed = np.sort((mixed & ~mask) | np.arange(n, dtype=np.uint64))
        position = (packed & mask).view(np.int64)
        before, after = position[:-1], position[1:]
        same = (packed[1:] & ~mask) == (packed[:-1] & ~mask)
        alike = (merchant[before] == merchant[after]) & (
            self.record_card[before] == self.record_card[after]
        )
        if bool(np.any(same & ~alike)):  # the hash's kept bits collided: sort in full
            position = np.lexsort((np.arange(n), merchant, self.record_card))
            before, after = position[:-1], position[1:]
            alike = (merchant[before] == merchant[after]) & (
                self.record_card[before] == self.record_card[after]
            )
        result[before[alike]] = self.record_ms[after[alike]]
        return result

    def same_category_count(self, rows: Rows) -> None:
        windows = self.plan.windows[Aggregate.SAME_CATEGORY_COUNT]
        category = self.points.category.astype(np.int64)
        record_category = record_categories(self.records)
        if self.one_point_per_card:
            same = record_category == np.repeat(category, np.diff(self.offsets))
            counts = self._gained(_running_count(same))[windows]
        else:
            groups = len(CATEGORIES) + 1
            keys = np.sort(self.keys + (self.record_card * (groups - 1) + record_category) * self.span)
            group = self.card * (groups - 1) + np.maximum(category, 0)
            positions = np.searchsorted(keys, self.queries + group * self.span)
            counts = positions[0] - positions[1:][windows]
        self.values[rows] = counts
        self._mark(rows, category == CATEGORY_MISSING, Status.MISSING_INPUT)
        self._mark(rows, category == CATEGORY_UNKNOWN, Status.UNKNOWN_CATEGORY)
        self._mark_window(rows, windows)

    # --- the card's last transaction, and the payment ---------------------------------------

    def _last(self) -> tuple[Int64Array, BoolArray]:
        """Position of each point's last record (0 where there is none), and whether there is."""
        has = self.hi > self.offsets[self.card]
        return np.where(has, self.hi - 1, 0), has

    def _mark_last(self, rows: Rows, has: BoolArray) -> None:
        self._mark(rows, ~self.known, Status.UNKNOWN_CARD)
        self._mark(rows, ~has & (self.dropped_ms > NEVER_DROPPED), Status.BEFORE_HISTORY)
        self._mark(rows, ~has, Status.EMPTY_WINDOW)

    def seconds_since_last(self, rows: Rows) -> None:
        last, has = self._last()
        if has.any():
            self.values[rows] = (self.points.time_ms - self.record_ms[last]) / 1000.0
        self._mark_last(rows, has)

    def zscore(self, rows: Rows) -> None:
        windows = self.plan.windows[Aggregate.ZSCORE]
        amount = self.points.amount_minor
        count, root = self.count[windows], self.root_numerators[windows]
        given = np.where(amount == AMOUNT_MISSING, 0, amount)
        with np.errstate(invalid="ignore", divide="ignore"):
            self.values[rows] = (count * given - self.sums[windows]) / root
        self._mark(rows, amount == AMOUNT_MISSING, Status.MISSING_INPUT)
        self._mark_window(rows, windows)
        self._mark(rows, count == 0, Status.EMPTY_WINDOW)
        self._mark(rows, root == 0, Status.UNDEFINED)

    def speed(self, rows: Rows) -> None:
        last, has = self._last()
        given = request.has_position(self.points)
        self._mark(rows, ~given, Status.MISSING_INPUT)
        self._mark_last(rows, has)
        usable = np.flatnonzero(has & given)
        recorded = self.records["latitude_udeg"][last[usable]] != POSITION_MISSING
        recorded &= self.records["longitude_udeg"][last[usable]] != POSITION_MISSING
        lacking = np.zeros(len(has), dtype=bool)
        lacking[usable[~recorded]] = True
        self._mark(rows, lacking, Status.MISSING_FACT)
        usable = usable[recorded]
        before = self.records[last[usable]]
        distance_km = great_circle_km(
            before["latitude_udeg"],
            before["longitude_udeg"],
            self.points.latitude_udeg[usable],
            self.points.longitude_udeg[usable],
        )
        elapsed_ms = self.points.time_ms[usable] - self.record_ms[last[usable]]
        self.values[np.ix_(rows, usable)] = distance_km / (elapsed_ms / MS_PER_HOUR)

    # --- the payment alone ------------------------------------------------------------------

    def amount(self, rows: Rows) -> None:
        self.values[rows] = self.points.amount_minor / MINOR_PER_UNIT
        self._mark(rows, self.points.amount_minor == AMOUNT_MISSING, Status.MISSING_INPUT)

    def category(self, rows: Rows) -> None:
        self.values[rows] = self.points.category
        self._mark(rows, self.points.category == CATEGORY_MISSING, Status.MISSING_INPUT)
        self._mark(rows, self.points.category == CATEGORY_UNKNOWN, Status.UNKNOWN_CATEGORY)

    def hour_of_day(self, rows: Rows) -> None:
        self.values[rows] = request.hour_of_day(self.points.time_ms)

    def day_of_week(self, rows: Rows) -> None:
        self.values[rows] = request.day_of_week(self.points.time_ms)

    def is_night(self, rows: Rows) -> None:
        self.values[rows] = request.is_night(self.points.time_ms)

    def distance(self, rows: Rows) -> None:
        points = self.points
        home = self.profiles.index_as_of(points.card_index, points.time_ms)
        given = request.has_position(points)
        self._mark(rows, ~given, Status.MISSING_INPUT)
        lacking = home < 0
        located = np.flatnonzero(~lacking)
        homes = self.profiles.records[home[located]]
        unlocated = (homes["latitude_udeg"] == POSITION_MISSING) | (
            homes["longitude_udeg"] == POSITION_MISSING
        )
        lacking[located[unlocated]] = True
        self._mark(rows, lacking, Status.MISSING_FACT)
        usable = np.flatnonzero(given & ~lacking)
        homes = self.profiles.records[home[usable]]
        self.values[np.ix_(rows, usable)] = great_circle_km(
            homes["latitude_udeg"],
            homes["longitude_udeg"],
            points.latitude_udeg[usable],
            points.longitude_udeg[usable],
        )

    def _gained(self, total: npt.NDArray[_Integer]) -> npt.NDArray[_Integer]:
        """What a running total gained over each window: (n_windows, n_points)."""
        gained: npt.NDArray[_Integer] = total[self.hi] - total[self.lo]
        return gained


_COMPUTE: dict[Aggregate, Callable[[_Block, Rows], None]] = {
    Aggregate.COUNT: _Block.count_,
    Aggregate.SUM: _Block.sum_,
    Aggregate.MEAN: _Block.mean,
    Aggregate.STD: _Block.std,
    Aggregate.MAX: _Block.max_,
    Aggregate.DISTINCT_MERCHANTS: _Block.distinct_merchants,
    Aggregate.SAME_CATEGORY_COUNT: _Block.same_category_count,
    Aggregate.ZSCORE: _Block.zscore,
    Aggregate.SECONDS_SINCE_LAST: _Block.seconds_since_last,
    Aggregate.SPEED: _Block.speed,
    Aggregate.AMOUNT: _Block.amount,
    Aggregate.DISTANCE: _Block.distance,
    Aggregate.HOUR_OF_DAY: _Block.hour_of_day,
    Aggregate.DAY_OF_WEEK: _Block.day_of_week,
    Aggregate.IS_NIGHT: _Block.is_night,
    Aggregate.CATEGORY: _Block.category,
}


def _running_total(amounts: npt.NDArray[_Integer]) -> npt.NDArray[_Integer]:
    """(n + 1,) totals of the first 0, 1, ... n elements; wraps as its dtype does."""
    total = np.zeros(len(amounts) + 1, dtype=amounts.dtype)
    np.cumsum(amounts, out=total[1:])
    return total


def _running_count(flags: BoolArray) -> Int64Array:
    """(n + 1,) how many of the first 0, 1, ... n flags are set."""
    total = np.zeros(len(flags) + 1, dtype=np.int64)
    np.cumsum(flags, out=total[1:])
    return total


def _sparse_table(amounts: Int64Array, longest: int) -> Int64Array:
    """Maxima of runs of 1, 2, 4, ... up to `longest` records: level k at [k * n, (k + 1) * n)."""
    n = len(amounts)
    levels = max(longest, 1).bit_length()
    table = np.zeros(max(levels * n, 1), dtype=np.int64)
    table[:n] = amounts
    for level in range(1, levels):
        half, row = 1 << (level - 1), level * n
        below = table[row - n : row]
        np.maximum(below[: n - half], below[half:], out=table[row : row + n - half])
    return table
