"""Daily features: of whole days before a day D, which is valid for a day. For `as_of` alone.

What a card usually does is read from its ledger, and slides along it like a window whose end jumps from day to
day. What a merchant takes on comes from its own days (features/merchants.py, which has the formulas).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from features.catalog import (
    CATEGORY_CODES_END,
    DAY_DELAY_MS,
    DAY_MS,
    HABIT_DAYS,
    LABEL_DELAY_DAYS,
    MERCHANT_WINDOW_DAYS,
    RISK_PRIOR_TXNS,
)
from features.compiled import compiled, integer
from features.ledger import CATEGORY_MASK, Records
from features.merchants import DAYS_MAX, N_WINDOWS, MerchantDays
from features.points import MINOR_PER_UNIT
from features.status import Status

Int64Array = npt.NDArray[np.int64]

HABIT_CELLS = 2 + 2 * CATEGORY_CODES_END
"""Of a card's habit: the position of the first record of its days and of the one behind them; then for each
category the number of records and their total amount."""

_PRESENT = int(Status.PRESENT)
_EMPTY_WINDOW = int(Status.EMPTY_WINDOW)
_BEFORE_HISTORY = int(Status.BEFORE_HISTORY)


@compiled()
def valid_day(time_ms: int) -> int:
    """The day D whose features are valid at an instant."""
    return (time_ms - DAY_DELAY_MS) // DAY_MS


@compiled()
def merchant_totals(
    records: MerchantDays, begin: int, end: int, day: int, totals: Int64Array
) -> None:
    """A merchant's totals as of day D.

    Args:
        records: with the merchant's at [begin, end).
        day: D.
        totals: (MERCHANT_TOTALS,), filled in: four times one for each window.
    """
    totals[:] = 0
    low, high = begin, end
    while low < high:
        middle = (low + high) // 2
        if np.int64(records[middle]["day"]) < day - DAYS_MAX:
            low = middle + 1
        else:
            high = middle
    for i in range(low, end):
        age = day - np.int64(records[i]["day"])
        if age < 1:
            break
        known_day = np.int64(records[i]["known_day"])
        if known_day > day:
            continue
        count = np.int64(records[i]["count"])
        is_fraud = known_day != np.int64(records[i]["day"])
        for w in range(N_WINDOWS):
            length = MERCHANT_WINDOW_DAYS[w]
            if not is_fraud and age <= length:
                totals[w] += count
                totals[N_WINDOWS + w] += records[i]["amount_minor"]
            if LABEL_DELAY_DAYS < age <= LABEL_DELAY_DAYS + length:
                totals[(3 if is_fraud else 2) * N_WINDOWS + w] += count


@compiled()
def move_habit(habit: Int64Array, records: Records, begins: int, ends: int) -> None:
    """Moves a card's habit on to the days whose records are at [begins, ends).

    Args:
        habit: (HABIT_CELLS,), filled in; of nothing, it has the card's first position twice, and zeros.
        records: with the card's among them.
    """
    for i in range(habit[0], min(begins, habit[1])):
        _count(habit, records, i, -1)
    for i in range(max(begins, habit[1]), ends):
        _count(habit, records, i, 1)
    habit[0] = begins
    habit[1] = ends


@compiled()
def _count(habit: Int64Array, records: Records, i: int, sign: int) -> None:
    code = integer(records[i].stamp & CATEGORY_MASK)
    if code < CATEGORY_CODES_END:
        habit[2 + code] += sign
        habit[2 + CATEGORY_CODES_END + code] += sign * records[i].amount_minor


@compiled()
def of_habit(
    is_share: bool, habit: Int64Array, category: int, day: int, dropped_ms: int
) -> tuple[float, int]:
    """Value and status of a habit as of day D, of a card that is known.

    Args:
        is_share: whether the category's share is asked for, or its mean amount.
        habit: (HABIT_CELLS,) of the days before D.
        category: its code.
        dropped_ms: of the card's ledger.
    """
    if (day - HABIT_DAYS) * DAY_MS <= dropped_ms:
        return math.nan, _BEFORE_HISTORY
    of_category = habit[2 + category]
    of_all = habit[1] - habit[0]
    if of_all == 0 or (not is_share and of_category == 0):
        return math.nan, _EMPTY_WINDOW
    if is_share:
        return of_category / of_all, _PRESENT
    return habit[2 + CATEGORY_CODES_END + category] / (MINOR_PER_UNIT * of_category), _PRESENT


@compiled()
def of_merchant(
    is_risk: bool,
    is_mean: bool,
    w: int,
    day: int,
    totals: Int64Array,
    kept_from_day: int,
    population: Int64Array,
    population_kept_from_day: int,
) -> tuple[float, int]:
    """Value and status of a merchant's risk, mean amount or, if neither, payments as of day D.

    Args:
        w: which of MERCHANT_WINDOW_DAYS.
        totals: (MERCHANT_TOTALS,) of the merchant.
        kept_from_day: the first day of which its facts are kept.
        population: (2 * N_WINDOWS,) of all merchants: payments that risk counts, and frauds.
        population_kept_from_day: the first day of which these are kept.
    """
    begins = day - MERCHANT_WINDOW_DAYS[w]
    if is_risk:
        begins -= LABEL_DELAY_DAYS
        kept_from_day = max(kept_from_day, population_kept_from_day)
    if begins < kept_from_day:
        return math.nan, _BEFORE_HISTORY
    if is_risk:
        of_all, frauds_of_all = population[w], population[N_WINDOWS + w]
        if of_all == 0:
            return math.nan, _EMPTY_WINDOW
        n, frauds = totals[2 * N_WINDOWS + w], totals[3 * N_WINDOWS + w]
        risk = (frauds * of_all + RISK_PRIOR_TXNS * frauds_of_all) / (
            (n + RISK_PRIOR_TXNS) * of_all
        )
        return risk, _PRESENT
    if not is_mean:
        return float(totals[w]), _PRESENT
    if totals[w] == 0:
        return math.nan, _EMPTY_WINDOW
    return totals[N_WINDOWS + w] / (MINOR_PER_UNIT * totals[w]), _PRESENT
