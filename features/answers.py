"""`as_of`: the features of cards at instants. The only place where a window is computed.

Points are put in order of card and time, and features.sweep, which is machine code, goes along each
card's ledger once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from features.catalog import CATALOG, CATEGORY_CODES_END, DAY_MS, MERCHANT_WINDOW_DAYS, Feature
from features.compiled import array_type, compiled
from features.insertion import insert as insert  # loaded with the rest of the machine code
from features.ledger import Ledgers
from features.merchants import MERCHANT_MISSING, Merchants
from features.points import CATEGORY_MISSING, Points
from features.profile import PROFILE_FIELDS, Profiles
from features.sweep import (
    AGGREGATE_CODES,
    OF_MERCHANTS,
    OF_WINDOWS,
    Windows,
    make_windows,
    sweep,
)

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Answers:
    """Feature values of points, row by row in memory."""

    values: npt.NDArray[np.float64]
    """(n_points, n_features) float64; NaN where the status is not PRESENT."""
    statuses: npt.NDArray[np.uint8]
    """(n_points, n_features) uint8 of Status."""
    known: npt.NDArray[np.bool_]
    """(n_points,) whether the card has a transaction before the instant."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """What to compute for a set of features."""

    windows: Windows
    """(n_windows,) the different windows asked for, the shortest first."""
    kinds: Int64Array
    """(n_features,) AGGREGATE_CODES of each."""
    window_of: Int64Array
    """(n_features,) position of each one's window among these, or of a merchant's among
    MERCHANT_WINDOW_DAYS; 0 where it has none."""


@lru_cache(maxsize=256)
def _plan(features: tuple[Feature, ...]) -> _Plan:
    """The plan for features, made once for each set of them."""
    windows = make_windows(features)
    lengths_ms: list[int] = windows["length_ms"].tolist()

    def position(feature: Feature) -> int:
        if feature.aggregate in OF_MERCHANTS:
            return MERCHANT_WINDOW_DAYS.index(feature.window_ms // DAY_MS)
        return lengths_ms.index(feature.window_ms) if feature.aggregate in OF_WINDOWS else 0

    return _Plan(
        windows,
        np.array([AGGREGATE_CODES[feature.aggregate] for feature in features], np.int64),
        np.array([position(feature) for feature in features], np.int64),
    )


def as_of(
    ledgers: Ledgers,
    points: Points,
    features: Sequence[Feature] = CATALOG,
    profiles: Profiles | None = None,
    merchants: Merchants | None = None,
) -> Answers:
    """Compute features for many (card, instant) points at once.

    Args:
        ledgers: every card's records.
        points: (n_points,) in any order; `card_index` counts into `ledgers`.
        features: what to compute, in output order.
        profiles: every card's profile, by the same index; none by default.
        merchants: every merchant's facts, which `merchant_index` counts into; by default none, and they
            were not computed.

    Returns:
        values (n_points, n_features) float64, NaN where the status is not PRESENT, and
        statuses (n_points, n_features) uint8. A window of length w at t is [t - w, t).

    Raises:
        IndexError: a point's card is not among the ledgers, a ledger's not among the profiles, a
            point's merchant not among the merchants, or a category code not in the vocabulary.
        ValueError: columns of different lengths.
    """
    plan = _plan(tuple(features))
    profiles = profiles or Profiles.empty(len(ledgers))
    merchants = merchants or _NO_MERCHANTS
    population = merchants.population
    n_points = len(points)
    shape = (n_points, len(features))
    answers = Answers(np.empty(shape), np.empty(shape, np.uint8), np.empty(n_points, np.bool_))
    if n_points:
        sweep(
            ledgers.records,
            ledgers.offsets,
            ledgers.dropped_ms,
            profiles.records.view(PROFILE_FIELDS),
            profiles.offsets,
            _order(ledgers, points, profiles, merchants),
            points.card_index,
            points.time_ms,
            points.amount_minor,
            points.category,
            points.latitude_udeg,
            points.longitude_udeg,
            points.merchant_index,
            merchants.records,
            merchants.offsets,
            merchants.kept_from_day,
            population.totals,
            np.array(
                [population.first_day, population.kept_from_day, population.through_day], np.int64
            ),
            plan.windows,
            plan.kinds,
            plan.window_of,
            answers.values,
            answers.statuses,
            answers.known,
        )
    return answers


_NO_MERCHANTS = Merchants.none()

_types: Any = numba.types  # without types of its own
_TWO_FLAGS = _types.UniTuple(numba.boolean, 2)


@compiled(
    _TWO_FLAGS(
        *(array_type(np.int64), array_type(np.int64), array_type(np.int16), array_type(np.int64)),
        *(numba.int64, numba.int64),
    )
)
def _examine(
    card: Int64Array,
    time_ms: Int64Array,
    category: npt.NDArray[np.int16],
    merchant: Int64Array,
    n_cards: int,
    n_merchants: int,
) -> tuple[bool, bool]:
    """Whether points stay within bounds, and whether they are in order of card and time."""
    is_within, is_ordered = True, True
    for i in range(len(card)):
        is_within &= 0 <= card[i] < n_cards and CATEGORY_MISSING <= category[i] < CATEGORY_CODES_END
        is_within &= MERCHANT_MISSING <= merchant[i] < n_merchants
        if i > 0 and (
            card[i] < card[i - 1] or (card[i] == card[i - 1] and time_ms[i] < time_ms[i - 1])
        ):
            is_ordered = False
    return is_within, is_ordered


def _order(
    ledgers: Ledgers, points: Points, profiles: Profiles, merchants: Merchants
) -> Int64Array:
    """The order of points by card and time. Machine code checks no bounds: they are checked here."""
    card, time_ms = points.card_index, points.time_ms
    lengths = {len(column) for column in points.columns}
    if len(lengths) > 1:
        raise ValueError(f"the points' columns have different lengths: {sorted(lengths)}")
    if ledgers.offsets[-1] > len(ledgers.records):
        raise ValueError(f"the ledgers' offsets go beyond their {len(ledgers.records)} records")
    is_within, is_ordered = _examine(
        *(card, time_ms, points.category, points.merchant_index, len(ledgers), len(merchants))
    )
    if not is_within or len(profiles.offsets) <= len(ledgers):
        raise IndexError(
            f"points of cards {card.min()} to {card.max()}, merchants up to "
            f"{points.merchant_index.max()} and category codes up to {points.category.max()}; there "
            f"are {len(ledgers)} ledgers, {len(profiles.offsets) - 1} profiles, {len(merchants)} "
            f"merchants and {CATEGORY_CODES_END} codes"
        )
    if is_ordered:
        return np.arange(len(points))
    span = int(time_ms.max()) + 1
    if (int(card.max()) + 1) * span < 2**63:
        return np.argsort(card * span + time_ms, kind="stable")
    return np.lexsort((time_ms, card))
