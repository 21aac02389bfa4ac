"""Windows that slide along a card's ledger: what `as_of` computes with. For `as_of` alone.

Points come in order of card and time. For one card, each window keeps its begin and its totals
while the points go by; a record enters every window once and leaves it once, so that many points of
a card cost little more than one, and one costs no more than its longest window:

             begin of 24 h     begin of 10 min   end
      ──○──○──●──●─────●────────●───●──────●──────┼──○──▶
              └ leave as t moves on               t  └ enter as t moves on

- Sums, and sums of squares in 128 bits, are exact integers: a record leaves without a trace.
- The largest amount: `peaks` has the records that no later one exceeds, from the largest down.
  The first of them inside a window is that window's maximum.
- Distinct merchants: a table has each merchant's last record. One that enters is new to a window
  if its merchant's last one is not in it; one that leaves takes its merchant along if it is the
  last one.

Formulas, in minor units, n records with amounts x, S = sum(x), Q = sum(x*x):

    sum = S / 100          mean = S / (100 n)         std = sqrt(nQ - S*S) / (100 n)
    zscore of a = (n a - S) / sqrt(nQ - S*S)          (population deviation)

S, nQ - S*S and n a - S are exact integers; each is rounded to float64 once, then divided.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from features import request, wide
from features.catalog import (
    CATEGORY_CODES_END,
    DAY_MS,
    HABIT_DAYS,
    Aggregate,
    Feature,
)
from features.compiled import array_type, compiled, integer
from features.daily import (
    HABIT_CELLS,
    merchant_totals,
    move_habit,
    of_habit,
    of_merchant,
    valid_day,
)
from features.geo import distance_km
from features.ledger import CATEGORY_BITS, CATEGORY_MASK, NEVER_DROPPED, RECORD, Records
from features.merchants import (
    MERCHANT_DAY,
    MERCHANT_MISSING,
    MERCHANT_TOTALS,
    N_WINDOWS,
)
from features.points import (
    AMOUNT_MISSING,
    CATEGORY_MISSING,
    CATEGORY_UNKNOWN,
    MINOR_PER_UNIT,
    MS_PER_HOUR,
)
from features.positions import POSITION_MISSING
from features.profile import DAYS_PER_YEAR, NUMBER_MISSING, PROFILE_FIELDS, PROFILE_RECORDS_MAX
from features.status import Status

Int64Array = npt.NDArray[np.int64]

AGGREGATE_CODES = {aggregate: code for code, aggregate in enumerate(Aggregate)}

# Plain integers, since machine code knows nothing of enumerations.
_COUNT = AGGREGATE_CODES[Aggregate.COUNT]
_SUM = AGGREGATE_CODES[Aggregate.SUM]
_MEAN = AGGREGATE_CODES[Aggregate.MEAN]
_STD = AGGREGATE_CODES[Aggregate.STD]
_MAX = AGGREGATE_CODES[Aggregate.MAX]
_DISTINCT_MERCHANTS = AGGREGATE_CODES[Aggregate.DISTINCT_MERCHANTS]
_SAME_CATEGORY_COUNT = AGGREGATE_CODES[Aggregate.SAME_CATEGORY_COUNT]
_ZSCORE = AGGREGATE_CODES[Aggregate.ZSCORE]
_SECONDS_SINCE_LAST = AGGREGATE_CODES[Aggregate.SECONDS_SINCE_LAST]
_SPEED = AGGREGATE_CODES[Aggregate.SPEED]
_AMOUNT = AGGREGATE_CODES[Aggregate.AMOUNT]
_DISTANCE = AGGREGATE_CODES[Aggregate.DISTANCE]
_HOUR_OF_DAY = AGGREGATE_CODES[Aggregate.HOUR_OF_DAY]
_DAY_OF_WEEK = AGGREGATE_CODES[Aggregate.DAY_OF_WEEK]
_IS_NIGHT = AGGREGATE_CODES[Aggregate.IS_NIGHT]
_CATEGORY = AGGREGATE_CODES[Aggregate.CATEGORY]
_GENDER = AGGREGATE_CODES[Aggregate.GENDER]
_AGE = AGGREGATE_CODES[Aggregate.AGE]
_CITY_POP = AGGREGATE_CODES[Aggregate.CITY_POP]
_HABIT_MEAN = AGGREGATE_CODES[Aggregate.HABIT_MEAN]
_HABIT_SHARE = AGGREGATE_CODES[Aggregate.HABIT_SHARE]
_MERCHANT_COUNT = AGGREGATE_CODES[Aggregate.MERCHANT_COUNT]
_MERCHANT_MEAN = AGGREGATE_CODES[Aggregate.MERCHANT_MEAN]
_MERCHANT_RISK = AGGREGATE_CODES[Aggregate.MERCHANT_RISK]

OF_WINDOWS = {
    *(Aggregate.COUNT, Aggregate.SUM, Aggregate.MEAN, Aggregate.STD, Aggregate.MAX),
    *(Aggregate.DISTINCT_MERCHANTS, Aggregate.SAME_CATEGORY_COUNT, Aggregate.ZSCORE),
}
OF_POSITIONS = {Aggregate.SECONDS_SINCE_LAST, Aggregate.SPEED, Aggregate.DISTANCE}
OF_PAYMENT = {
    *(Aggregate.AMOUNT, Aggregate.HOUR_OF_DAY, Aggregate.DAY_OF_WEEK, Aggregate.IS_NIGHT),
    Aggregate.CATEGORY,
}
OF_PROFILE = {Aggregate.GENDER, Aggregate.AGE, Aggregate.CITY_POP}
OF_HABITS = {Aggregate.HABIT_MEAN, Aggregate.HABIT_SHARE}
OF_MERCHANTS = {Aggregate.MERCHANT_COUNT, Aggregate.MERCHANT_MEAN, Aggregate.MERCHANT_RISK}
# A new aggregate that nothing computes must not pass for another one.
assert set(Aggregate) == (
    OF_WINDOWS | OF_POSITIONS | OF_PAYMENT | OF_PROFILE | OF_HABITS | OF_MERCHANTS
)
assert {AGGREGATE_CODES[kind] for kind in OF_WINDOWS} == set(range(_ZSCORE + 1))

_PRESENT = int(Status.PRESENT)
_EMPTY_WINDOW = int(Status.EMPTY_WINDOW)
_UNKNOWN_CARD = int(Status.UNKNOWN_CARD)
_BEFORE_HISTORY = int(Status.BEFORE_HISTORY)
_MISSING_INPUT = int(Status.MISSING_INPUT)
_UNDEFINED = int(Status.UNDEFINED)
_UNKNOWN_CATEGORY = int(Status.UNKNOWN_CATEGORY)
_MISSING_FACT = int(Status.MISSING_FACT)
_NOT_COMPUTED = int(Status.NOT_COMPUTED)

_STAMP_SHIFT = np.uint64(CATEGORY_BITS)
_NO_SLOT = np.int32(-1)


# State is kept in arrays of records, not in tuples of arrays: taking an array out of a tuple counts
# references, which costs more than all the arithmetic.
_WINDOW = np.dtype(
    [
        ("length_ms", np.int64),
        ("begin", np.int64),
        ("sum", np.int64),
        ("squares_high", np.uint64),
        ("squares_low", np.uint64),
        ("merchants", np.int64),
        ("root", np.float64),
        ("worth_of_total", np.int64),
        ("worth_of_mean", np.int64),
        ("wants_squares", np.bool_),
        ("wants_peaks", np.bool_),
        ("wants_merchants", np.bool_),
        ("wants_categories", np.bool_),
    ]
)
"""A window, the shortest first: the position of the first record inside; the totals of those inside;
sqrt(n Q - S S), of the exact integer rounded once; the status of what an empty window has, a count
or a sum, and of what it does not have; which totals the features asked for need of it."""

_ENTRY = np.dtype([("peak", np.int32), ("slot", np.int32)])
"""What is kept for each record of one card, by position less `base`. `peak` is a stack of its own:
the records that no later one exceeds, the largest first. `slot` is where the record's merchant is in
`slots`, a hash table of each merchant's last record or _NO_SLOT."""

Windows = npt.NDArray[np.void]
Entries = npt.NDArray[np.void]
Slots = npt.NDArray[np.int32]


def make_windows(features: Sequence[Feature]) -> Windows:
    """The windows (n_windows,) of _WINDOW that features have, each once, with what they want."""
    of_windows = [feature for feature in features if feature.aggregate in OF_WINDOWS]
    windows_ms = sorted({feature.window_ms for feature in of_windows})
    windows = np.zeros(len(windows_ms), _WINDOW)
    windows["length_ms"] = windows_ms
    for feature in of_windows:
        for wish in _WISHES.get(feature.aggregate, ()):
            windows[wish][windows_ms.index(feature.window_ms)] = True
    return windows


_WISHES = {
    Aggregate.STD: ["wants_squares"],
    Aggregate.ZSCORE: ["wants_squares"],
    Aggregate.MAX: ["wants_peaks"],
    Aggregate.DISTINCT_MERCHANTS: ["wants_merchants"],
    Aggregate.SAME_CATEGORY_COUNT: ["wants_categories"],
}


class _Point(NamedTuple):
    """One point, and what its card's records say of it that is in no window."""

    time_ms: int
    amount_minor: int
    category: int
    latitude_udeg: int
    longitude_udeg: int
    is_unknown: bool
    """Whether nobody knew the card at t."""
    has_last: bool
    """Whether there is a record before t: of the last one, the instant and the place."""
    last_ms: int
    last_latitude_udeg: int
    last_longitude_udeg: int
    profile_status: int
    """PRESENT where a profile holds at t: of it, where home is, and what is known of the holder. Otherwise
    what features of the profile say."""
    home_latitude_udeg: int
    home_longitude_udeg: int
    gender: int
    birth_date_days: int
    city_pop: int


@compiled()
def _first_not_before(records: Records, begin: int, end: int, time_ms: int) -> int:
    """Position of the first record of [begin, end) at or after an instant; near `begin` is fast."""
    stamp = np.uint64(max(time_ms, 0)) << _STAMP_SHIFT
    step = 1
    low = begin
    while low + step <= end and records[low + step - 1]["stamp"] < stamp:
        low += step
        step *= 2
    high = min(low + step - 1, end)
    while low < high:
        middle = (low + high) // 2
        if records[middle]["stamp"] < stamp:
            low = middle + 1
        else:
            high = middle
    return low


@compiled()
def _reset(windows: Windows, categories: Int64Array, w: int, begin: int) -> None:
    """An empty window at a position."""
    window = windows[w]
    window.begin = begin
    window.sum = 0
    window.squares_high = 0
    window.squares_low = 0
    window.merchants = 0
    if window.wants_categories:
        for code in range(CATEGORY_CODES_END):
            categories[w, code] = 0


@compiled()
def _square(amount: int) -> tuple[np.uint64, np.uint64]:
    size = np.uint64(abs(amount))
    return wide.multiply(size, size)


# Each of these works on a run of records: a call counts references to its arrays, which is dear for
# one record and nothing for a run.


@compiled()
def _leave(
    windows: Windows,
    categories: Int64Array,
    entries: Entries,
    slots: Slots,
    base: int,
    records: Records,
    end: int,
    now: int,
    t: int,
) -> None:
    """Moves every window's begin on to t; the records that lie before it leave.

    Args:
        end: one behind the last record that has entered.
        now: one behind the last record before t.
    """
    for w in range(len(windows)):
        window = windows[w]
        before = window.begin
        begin = _first_not_before(records, before, now, t - window.length_ms)
        if begin >= end:
            _reset(windows, categories, w, begin)
            continue
        window.begin = begin
        for i in range(before, begin):
            amount = records[i].amount_minor
            window.sum -= amount
            if window.wants_squares:
                high, low = _square(amount)
                window.squares_high, window.squares_low = wide.subtract(
                    window.squares_high, window.squares_low, high, low
                )
            if window.wants_merchants and slots[entries[i - base].slot] == i - base:
                window.merchants -= 1
            if window.wants_categories:
                code = records[i].stamp & CATEGORY_MASK
                if code < CATEGORY_CODES_END:
                    categories[w, code] -= 1


@compiled()
def _enter(
    windows: Windows,
    categories: Int64Array,
    entries: Entries,
    slots: Slots,
    slot_mask: int,
    base: int,
    records: Records,
    first: int,
    now: int,
) -> None:
    """Records [first, now) enter every window that does not begin behind them."""
    first_with_merchant = now
    for w in range(len(windows)):
        if windows[w].wants_merchants:
            first_with_merchant = windows[w].begin  # of the longest one, in the end
    for i in range(first, now):
        amount = records[i].amount_minor
        previous = base - 1
        if i >= first_with_merchant:
            slot = _slot(slots, slot_mask, base, records, i)
            previous += slots[slot] + 1
            slots[slot] = i - base
            entries[i - base].slot = slot
        high, low = _square(amount)
        code = records[i].stamp & CATEGORY_MASK
        for w in range(len(windows) - 1, -1, -1):
            window = windows[w]
            if window.begin > i:
                break  # and so do all shorter ones
            window.sum += amount
            if window.wants_squares:
                window.squares_high, window.squares_low = wide.add(
                    window.squares_high, window.squares_low, high, low
                )
            if window.wants_merchants and previous < window.begin:
                window.merchants += 1
            if window.wants_categories and code < CATEGORY_CODES_END:
                categories[w, code] += 1


@compiled()
def _slot(slots: Slots, slot_mask: int, base: int, records: Records, i: int) -> int:
    """The slot of record i's merchant, or a free one. Keys are hashes already."""
    merchant = records[i].merchant
    slot = integer(merchant & np.uint64(slot_mask))
    while slots[slot] != _NO_SLOT and records[base + slots[slot]].merchant != merchant:
        slot = (slot + 1) & slot_mask
    return slot


@compiled()
def _assess(windows: Windows, end: int, point: _Point, dropped_ms: int) -> None:
    """Works out what each window is worth, and its root."""
    for w in range(len(windows)):
        window = windows[w]
        n = end - window.begin
        if point.is_unknown:
            worth = _UNKNOWN_CARD
        elif point.time_ms - window.length_ms <= dropped_ms:
            worth = _BEFORE_HISTORY
        else:
            worth = _PRESENT
        window.worth_of_total = worth
        window.worth_of_mean = _EMPTY_WINDOW if n == 0 and worth == _PRESENT else worth
        if window.wants_squares:
            window.root = _root(np.uint64(n), window.sum, window.squares_high, window.squares_low)


@compiled()
def _root(n: np.uint64, total: int, squares_high: np.uint64, squares_low: np.uint64) -> float:
    """sqrt(n Q - S S). Amounts are at most 10**12 either way, hence n Q is below 2**128 for eight
    million records."""
    high, low = wide.multiply(n, squares_low)
    high += n * squares_high
    square_high, square_low = _square(total)
    high, low = wide.subtract(high, low, square_high, square_low)
    return math.sqrt(wide.to_float(high, low))


@compiled()
def _push_peaks(
    entries: Entries, n_peaks: int, base: int, records: Records, first: int, now: int
) -> int:
    """Puts records [first, now) on the stack of peaks; returns its new height."""
    for i in range(first, now):
        amount = records[i].amount_minor
        while n_peaks and records[base + entries[n_peaks - 1].peak].amount_minor <= amount:
            n_peaks -= 1
        entries[n_peaks].peak = i - base
        n_peaks += 1
    return n_peaks


@compiled()
def _largest(entries: Entries, n_peaks: int, begin: int) -> int:
    """The first of the peaks that is not before a position (less base)."""
    low, high = 0, n_peaks - 1
    while low < high:
        middle = (low + high) // 2
        if entries[middle].peak < begin:
            low = middle + 1
        else:
            high = middle
    return integer(entries[low].peak)


@compiled()
def _of_profile(kind: int, point: _Point) -> tuple[float, int]:
    """Value and status of what the card holder's profile says."""
    if point.profile_status != _PRESENT:
        return math.nan, point.profile_status
    if kind == _GENDER:
        known = point.gender != 0
        return (float(point.gender), _PRESENT) if known else (math.nan, _MISSING_FACT)
    if kind == _CITY_POP:
        if point.city_pop == NUMBER_MISSING:
            return math.nan, _MISSING_FACT
        return float(point.city_pop), _PRESENT
    # _AGE
    if point.birth_date_days == NUMBER_MISSING:
        return math.nan, _MISSING_FACT
    days = point.time_ms // DAY_MS - point.birth_date_days
    if days < 0:
        return math.nan, _UNDEFINED
    return days / DAYS_PER_YEAR, _PRESENT


@compiled()
def _profile_at(profiles: Any, begin: int, end: int, time_ms: int) -> int:
    """Position of the profile record that holds at an instant; -1 where none does."""
    i = end - 1
    while i >= begin and profiles[i]["valid_from_ms"] > time_ms:
        i -= 1
    return i if i >= begin else -1


@compiled()
def _status_before_profile(n_versions: int) -> int:
    """What features of the profile say where none of its versions holds yet: a full one has dropped, or
    may have dropped, the version that did."""
    return _BEFORE_HISTORY if n_versions >= PROFILE_RECORDS_MAX else _MISSING_FACT


@compiled()
def _of_window(
    kind: int, window: Any, same_category: int, largest: int, end: int, point: _Point
) -> tuple[float, int]:
    """Value and status of a window's aggregate; the value counts only where it is PRESENT."""
    n = end - window.begin
    if kind == _COUNT:
        return float(n), window.worth_of_total
    if kind == _SUM:
        return window.sum / MINOR_PER_UNIT, window.worth_of_total
    if kind == _MEAN:
        return window.sum / (MINOR_PER_UNIT * n), window.worth_of_mean
    if kind == _STD:
        return window.root / (MINOR_PER_UNIT * n), window.worth_of_mean
    if kind == _MAX:
        return largest / MINOR_PER_UNIT, window.worth_of_mean
    if kind == _DISTINCT_MERCHANTS:
        return float(window.merchants), window.worth_of_total
    if kind == _SAME_CATEGORY_COUNT:
        # What is wrong with the request comes before what is wrong with the card.
        worth = _worth_of_category(point)
        if worth != _PRESENT:
            return math.nan, worth
        return float(same_category), window.worth_of_total
    # _ZSCORE
    if point.amount_minor == AMOUNT_MISSING:
        return math.nan, _MISSING_INPUT
    if window.worth_of_mean == _PRESENT and window.root == 0:
        return math.nan, _UNDEFINED
    above = n * point.amount_minor - window.sum
    return above / window.root, window.worth_of_mean


@compiled()
def _worth_of_category(point: _Point) -> int:
    if point.category == CATEGORY_MISSING:
        return _MISSING_INPUT
    return _UNKNOWN_CATEGORY if point.category == CATEGORY_UNKNOWN else _PRESENT


@compiled()
def _of_positions(kind: int, point: _Point) -> tuple[float, int]:
    """Value and status of what is computed from positions, or from the card's last record."""
    if kind != _SECONDS_SINCE_LAST and (
        point.latitude_udeg == POSITION_MISSING or point.longitude_udeg == POSITION_MISSING
    ):
        return math.nan, _MISSING_INPUT
    if kind == _DISTANCE:
        if point.profile_status != _PRESENT:
            return math.nan, point.profile_status
        return _distance_to(point, point.home_latitude_udeg, point.home_longitude_udeg)
    if not point.has_last:
        return math.nan, _UNKNOWN_CARD if point.is_unknown else _BEFORE_HISTORY
    elapsed_ms = point.time_ms - point.last_ms
    if kind == _SECONDS_SINCE_LAST:
        return elapsed_ms / 1000.0, _PRESENT
    km, status = _distance_to(point, point.last_latitude_udeg, point.last_longitude_udeg)
    return km / (elapsed_ms / MS_PER_HOUR), status


@compiled()
def _distance_to(point: _Point, latitude_udeg: int, longitude_udeg: int) -> tuple[float, int]:
    """Kilometres from a recorded place to the payment's, which is given; and their status."""
    if latitude_udeg == POSITION_MISSING or longitude_udeg == POSITION_MISSING:
        return math.nan, _MISSING_FACT
    km = distance_km(latitude_udeg, longitude_udeg, point.latitude_udeg, point.longitude_udeg)
    return km, _PRESENT


@compiled()
def _of_payment(kind: int, point: _Point) -> tuple[float, int]:
    """Value and status of what the payment itself says."""
    if kind == _AMOUNT:
        if point.amount_minor == AMOUNT_MISSING:
            return math.nan, _MISSING_INPUT
        return point.amount_minor / MINOR_PER_UNIT, _PRESENT
    if kind == _CATEGORY:
        return float(point.category), _worth_of_category(point)
    if kind == _HOUR_OF_DAY:
        return float(request.hour_of_day(point.time_ms)), _PRESENT
    if kind == _DAY_OF_WEEK:
        return float(request.day_of_week(point.time_ms)), _PRESENT
    return (1.0 if request.is_night(point.time_ms) else 0.0), _PRESENT


@compiled()
def _power_of_two(n: int) -> int:
    """The least power of two that is not below n, and 2 at the least."""
    power = 2
    while power < n:
        power *= 2
    return power


_SIGNATURE = numba.void(
    *(
        array_type(RECORD),
        array_type(np.int64),
        array_type(np.int64),
    ),  # records, offsets, dropped_ms
    *(array_type(PROFILE_FIELDS), array_type(np.int64)),  # profiles, profile_offsets
    *(
        array_type(np.int64),
        array_type(np.int64),
        array_type(np.int64),
    ),  # order, card_index, time_ms
    *(array_type(np.int64), array_type(np.int16)),  # amount_minor, category
    *(array_type(np.int32), array_type(np.int32)),  # latitude_udeg, longitude_udeg
    *(array_type(np.int64), array_type(MERCHANT_DAY)),  # merchant_index, merchant_days
    *(array_type(np.int64), array_type(np.int64)),  # merchant_offsets, merchants_kept_from
    *(array_type(np.int64, 2), array_type(np.int64)),  # population, population_days
    *(
        array_type(_WINDOW),
        array_type(np.int64),
        array_type(np.int64),
    ),  # asked_windows, kinds, window_of
    *(array_type(np.float64, 2, readonly=False), array_type(np.uint8, 2, readonly=False)),
    array_type(np.bool_, readonly=False),
)


@compiled(_SIGNATURE)
def sweep(
    records: Records,
    offsets: Int64Array,
    dropped_ms: Int64Array,
    profiles: npt.NDArray[np.void],
    profile_offsets: Int64Array,
    order: Int64Array,
    card_index: Int64Array,
    time_ms: Int64Array,
    amount_minor: Int64Array,
    category: npt.NDArray[np.int16],
    latitude_udeg: npt.NDArray[np.int32],
    longitude_udeg: npt.NDArray[np.int32],
    merchant_index: Int64Array,
    merchant_days: npt.NDArray[np.void],
    merchant_offsets: Int64Array,
    merchants_kept_from: Int64Array,
    population: Int64Array,
    population_days: Int64Array,
    asked_windows: Windows,
    kinds: Int64Array,
    window_of: Int64Array,
    values: npt.NDArray[np.float64],
    statuses: npt.NDArray[np.uint8],
    known: npt.NDArray[np.bool_],
) -> None:
    """Fills in the answers of points.

    Args:
        records, offsets, dropped_ms: as in Ledgers.
        profiles, profile_offsets: as in Profiles; of PROFILE_FIELDS.
        order: (n_points,) the points, by card and time; the other columns are as in Points.
        merchant_days, merchant_offsets, merchants_kept_from: as in Merchants.
        population: as Population.totals.
        population_days: (3,) the first, the first that is kept, and the last that is complete, of
            Population.
        asked_windows: (n_windows,) as make_windows has them.
        kinds: (n_features,) each feature's AGGREGATE_CODES.
        window_of: (n_features,) the position of its window among these, or of a merchant's among
            MERCHANT_WINDOW_DAYS.
        values, statuses: (n_points, n_features), filled in.
        known: (n_points,), filled in.
    """
    windows = asked_windows.copy()
    n_windows = len(windows)
    categories = np.zeros((n_windows, CATEGORY_CODES_END), np.int64)
    longest = windows[n_windows - 1].length_ms if n_windows else 0
    wants_merchants, wants_peaks = False, False
    for w in range(n_windows):
        wants_merchants |= windows[w].wants_merchants
        wants_peaks |= windows[w].wants_peaks
    entries = np.empty(0, _ENTRY)
    slots = np.empty(0, np.int32)
    wants_habits, wants_merchant_days = False, False
    for kind in kinds:
        wants_habits |= kind in (_HABIT_MEAN, _HABIT_SHARE)
        wants_merchant_days |= kind in (_MERCHANT_COUNT, _MERCHANT_MEAN, _MERCHANT_RISK)
    habit = np.zeros(HABIT_CELLS, np.int64)
    totals = np.zeros(MERCHANT_TOTALS, np.int64)
    of_all = np.zeros(2 * N_WINDOWS, np.int64)
    current, base, end, n_peaks, slot_mask = -1, 0, 0, 0, 0
    for p in order:
        number, t = card_index[p], time_ms[p]
        stop = offsets[number + 1]
        if number != current:
            # --- the next card: every window is empty where the longest one begins
            current = number
            base = _first_not_before(records, offsets[number], stop, t - longest)
            end, n_peaks = base, 0
            if len(entries) < stop - base:
                entries = np.empty(stop - base, _ENTRY)
                slots = np.empty(_power_of_two(2 * (stop - base)), np.int32)
            if wants_merchants:
                slot_mask = _power_of_two(2 * (stop - base)) - 1
                slots[: slot_mask + 1] = _NO_SLOT
            for w in range(n_windows):
                _reset(windows, categories, w, base)
            habit[:] = 0
            habit[:2] = offsets[number]
        now = _first_not_before(records, end, stop, t)
        _leave(windows, categories, entries, slots, base, records, end, now, t)
        first = max(end, windows[n_windows - 1].begin) if n_windows else now
        _enter(windows, categories, entries, slots, slot_mask, base, records, first, now)
        if wants_peaks:
            n_peaks = _push_peaks(entries, n_peaks, base, records, first, now)
        end = now
        # --- the answers
        has_last = end > offsets[number]
        is_unknown = not has_last and dropped_ms[number] == NEVER_DROPPED
        last = end - 1
        held = _profile_at(profiles, profile_offsets[number], profile_offsets[number + 1], t)
        has_profile = held >= 0
        n_versions = profile_offsets[number + 1] - profile_offsets[number]
        profile_status = _PRESENT if has_profile else _status_before_profile(n_versions)
        point = _Point(
            t,
            amount_minor[p],
            integer(category[p]),
            integer(latitude_udeg[p]),
            integer(longitude_udeg[p]),
            is_unknown,
            has_last,
            integer(records[last].stamp >> _STAMP_SHIFT) if has_last else 0,
            integer(records[last].latitude_udeg) if has_last else 0,
            integer(records[last].longitude_udeg) if has_last else 0,
            profile_status,
            integer(profiles[held].latitude_udeg) if has_profile else 0,
            integer(profiles[held].longitude_udeg) if has_profile else 0,
            integer(profiles[held].gender) if has_profile else 0,
            integer(profiles[held].birth_date_days) if has_profile else 0,
            integer(profiles[held].city_pop) if has_profile else 0,
        )
        known[p] = not is_unknown
        _assess(windows, end, point, dropped_ms[number])
        day = valid_day(t)
        if wants_habits:
            begins = _first_not_before(records, habit[0], stop, (day - HABIT_DAYS) * DAY_MS)
            ends = _first_not_before(records, habit[1], stop, day * DAY_MS)
            move_habit(habit, records, begins, ends)
        merchant = merchant_index[p]
        if wants_merchant_days and merchant != MERCHANT_MISSING:
            begin, behind = merchant_offsets[merchant], merchant_offsets[merchant + 1]
            merchant_totals(merchant_days, begin, behind, day, totals)
            of_all[:] = 0
            if 0 <= day - population_days[0] < len(population):
                of_all[:] = population[day - population_days[0]]
        for f in range(len(kinds)):
            kind, w = kinds[f], window_of[f]
            if kind <= _ZSCORE:
                window = windows[w]
                largest, same = 0, 0
                if kind == _MAX and end > window.begin:
                    peak = _largest(entries, n_peaks, window.begin - base)
                    largest = records[base + peak].amount_minor
                elif kind == _SAME_CATEGORY_COUNT:
                    same = categories[w, max(point.category, 0)]
                value, status = _of_window(kind, window, same, largest, end, point)
            elif kind in (_SECONDS_SINCE_LAST, _SPEED, _DISTANCE):
                value, status = _of_positions(kind, point)
            elif kind in (_GENDER, _AGE, _CITY_POP):
                value, status = _of_profile(kind, point)
            elif kind in (_HABIT_MEAN, _HABIT_SHARE):
                value, status = math.nan, _worth_of_category(point)
                if status == _PRESENT and is_unknown:
                    status = _UNKNOWN_CARD
                if status == _PRESENT:
                    value, status = of_habit(
                        *(kind == _HABIT_SHARE, habit, point.category, day, dropped_ms[number])
                    )
            elif kind in (_MERCHANT_COUNT, _MERCHANT_MEAN, _MERCHANT_RISK):
                if merchant == MERCHANT_MISSING:
                    value, status = math.nan, _MISSING_INPUT
                elif day > population_days[2]:
                    value, status = math.nan, _NOT_COMPUTED
                else:
                    value, status = of_merchant(
                        *(kind == _MERCHANT_RISK, kind == _MERCHANT_MEAN, w, day, totals),
                        *(merchants_kept_from[merchant], of_all, population_days[1]),
                    )
            else:
                value, status = _of_payment(kind, point)
            values[p, f] = value if status == _PRESENT else math.nan
            statuses[p, f] = status
