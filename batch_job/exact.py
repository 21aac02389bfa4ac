"""What the batch job computes: exact features of every transaction, from whole histories.

The work of one part, a span of card ids: engines call it, wherever they run, with nothing but numbers
and an address. It can be done again, by anybody, and changes nothing but what was missing or differed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from features import CATALOG, Status, as_of
from stores.arrow import to_ms, with_points
from stores.conditions import Range
from stores.feature_rows import FeatureRows
from stores.history import History, Span
from stores.postgres import ONLINE_STORE_LOCK, OfflineStore
from stores.runs import BatchRuns

ROWS_TOGETHER = 131_072
"""Transactions that are computed and written together, 46 MB of features: the more, the fewer pages of the
table's index are touched twice."""

ALONE_MAX_S = 3_600.0
"""How long somebody may need the stores alone, such as for a rebuild."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a run."""

    run_id: str
    number: int
    begin: int
    """The first card id, as a number."""
    end: int
    """Behind the last one."""
    from_ms: int
    """The first instant of transactions whose features are computed."""
    before_ms: int
    """The first instant behind them."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a part."""

    computed: int = 0
    """Transactions whose features were computed."""
    new: int = 0
    """Of these, those that had no row."""
    repaired: int = 0
    """Those whose row differed: events came late, or the definitions have changed."""


def compute(postgres_url: str, part: Part) -> Outcome:
    """Computes a part and writes what is missing or differs; notes that it is done.

    Raises:
        LockedError: somebody has needed the stores alone for ALONE_MAX_S.
        StoreError: Postgres does not do its part; the part can be done again.
    """
    within = (part.from_ms, part.before_ms)
    computed = new = repaired = 0
    likely_new = True
    with (
        OfflineStore(postgres_url) as offline,
        # Before the snapshot: what is erased meanwhile would be written again out of it.
        offline.locked(ONLINE_STORE_LOCK, shared=True, timeout_s=ALONE_MAX_S),
        History(postgres_url) as history,
    ):
        for span in history.spans(part.begin, part.end, before_ms=part.before_ms):
            for whole, cut in _computed(history, span, within):
                offline.ensure_partitions(to_ms(whole.transactions["event_time"]))
                written = offline.features.put_exact(whole, likely_new=likely_new)
                added = offline.features.put_if_missing(cut, likely_new=False) if len(cut) else 0
                likely_new = written[0] == len(whole)
                computed += len(whole) + len(cut)
                new += written[0] + added
                repaired += written[1]
    with BatchRuns(postgres_url) as runs:
        runs.note_part(part.run_id, part.number, computed, new, repaired)
    return Outcome(computed, new, repaired)


def _computed(
    history: History, span: Span, within: Range
) -> Iterator[tuple[FeatureRows, FeatureRows]]:
    """The features of a span's transactions, ROWS_TOGETHER at a time: those that are whole, and those
    that retention has cut off. What was written of the latter while it was whole is to stay."""
    found = history.identities_of(span.where, within)
    if not len(found):
        return
    profiles = history.profiles_of(span)
    find = history.merchants.of
    for rows, points, merchants in with_points(found, span.card_ids, ROWS_TOGETHER, find):
        answers = as_of(span.ledgers, points, CATALOG, profiles, merchants)
        is_whole = ~(answers.statuses == Status.BEFORE_HISTORY).any(axis=1)
        # In the order of the table's index, whose pages are then touched once, or a few times.
        order = np.argsort(points.time_ms, kind="stable")
        whole, cut = order[is_whole[order]], order[~is_whole[order]]
        yield FeatureRows(rows, answers.values, whole), FeatureRows(rows, answers.values, cut)
