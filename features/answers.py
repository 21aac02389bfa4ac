"""`as_of`: the features of cards at instants. The only place where a window is computed.

Points are put in order of card and time, and taken in blocks that fit the processor's cache:
features.windows has the formulas. A few points go one at a time, by the same formulas without
arrays, in features.few. Whichever way, the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from features.catalog import CATALOG, Feature
from features.few import answer_few
from features.ledger import Ledgers
from features.points import Points
from features.profile import Profiles
from features.windows import PRESENT, Block, make_plan

BLOCK_POINTS = 8_192
BLOCK_RECORDS = 65_536
"""Points and records that are worked on together: a few MB of temporaries, near the L2 cache."""

FEW_POINTS = 3
FEW_RECORDS = 500
"""Up to so many points and records a point, one point at a time is faster than arrays."""


@dataclass(frozen=True, slots=True)
class Answers:
    """Feature values of points, feature by feature in memory: a column is contiguous."""

    values: npt.NDArray[np.float64]
    """(n_points, n_features) float64; NaN where the status is not PRESENT."""
    statuses: npt.NDArray[np.uint8]
    """(n_points, n_features) uint8 of Status."""
    known: npt.NDArray[np.bool_]
    """(n_points,) whether the card has a transaction before the instant."""


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
    plan = make_plan(tuple(features))
    profiles = profiles or Profiles.empty(len(ledgers))
    if len(points) <= FEW_POINTS and len(ledgers.records) <= FEW_RECORDS * len(points):
        return _as_of_few(ledgers, points, features, profiles)
    shape = (len(features), len(points))
    values = np.empty(shape, dtype=np.float64)
    statuses = np.full(shape, PRESENT, dtype=np.uint8)
    known = np.empty(len(points), dtype=bool)
    order = _order(points)
    ordered = points if order is None else points.take(order)
    for part in _blocks(ledgers, ordered):
        whole = part.stop - part.start == len(ordered)
        block = Block(ledgers, ordered if whole else ordered.take(part), profiles, plan)
        block.compute(values[:, part], statuses[:, part])
        known[part] = ~block.unknown
    if order is not None:
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        values, statuses, known = values[:, back], statuses[:, back], known[back]
    return Answers(values.T, statuses.T, known)


def _as_of_few(
    ledgers: Ledgers, points: Points, features: Sequence[Feature], profiles: Profiles
) -> Answers:
    answers, known = answer_few(ledgers, points, features, profiles)
    pairs = np.array(answers, dtype=np.float64).reshape(len(points), len(features), 2)
    values, statuses = pairs[:, :, 0].copy(), pairs[:, :, 1].astype(np.uint8)
    values[statuses != PRESENT] = np.nan
    return Answers(values, statuses, np.array(known, dtype=bool))


def _order(points: Points) -> npt.NDArray[np.int64] | None:
    """The order of points by card and time; None when they are in it already."""
    if len(points) < 2:
        return None
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
    if n <= BLOCK_POINTS and max(len(ledgers), len(ledgers.records)) <= BLOCK_RECORDS:
        return [slice(0, n)] if n else []
    while start < n:
        end = min(start + BLOCK_POINTS, n)
        first = card[start]
        limit = int(np.searchsorted(offsets, offsets[first] + BLOCK_RECORDS, side="right")) - 2
        last = max(int(first), min(limit, int(first) + BLOCK_RECORDS))
        if card[end - 1] > last:
            end = int(np.searchsorted(card, last, side="right"))
        blocks.append(slice(start, end))
        start = end
    return blocks
