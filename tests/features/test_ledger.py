"""The ledger's bytes are a function of the set of transactions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import features.ledger
from features import RETENTION_MS, LedgerFormatError, Ledgers, merge_ledger
from features.ledger import HEADER, NEVER_DROPPED, RECORD, decode_header
from tests.oracle import Event
from tests.strategies import ORIGIN_MS, events, histories, to_records


@st.composite
def deliveries(draw: st.DrawFn) -> tuple[list, list[list]]:
    """A history, and the same in any order, with duplicates, in any split."""
    history = draw(histories)
    repeated = draw(st.permutations(history + draw(st.lists(st.sampled_from(history), max_size=9))))
    cuts = sorted(draw(st.lists(st.integers(1, len(repeated)), max_size=5)))
    parts = [repeated[a:b] for a, b in zip([0, *cuts], [*cuts, len(repeated)], strict=True)]
    return history, [part for part in parts if part]


@given(
    deliveries(),
    st.sampled_from([1, 3, features.ledger.LEDGER_RECORDS_MAX]),
    st.sampled_from([0, features.ledger._RECORDS_MANY]),
)
def test_any_order_duplication_and_split_leaves_the_same_bytes(delivery, records_max, many):
    """Whether machine code sorts them, as it does many, or numpy."""
    history, parts = delivery
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features.ledger, "_RECORDS_MANY", many)
        patch.setattr(features.ledger, "LEDGER_RECORDS_MAX", records_max)
        at_once = merge_ledger(None, to_records(history))
        ledger = None
        for part in parts:
            ledger = merge_ledger(ledger, to_records(part))
    assert ledger == at_once


@given(histories)
def test_retention_keeps_what_the_longest_window_may_need(history):
    ledger = merge_ledger(None, to_records(history))
    newest = max(e.time_ms for e in history)
    kept = [e.time_ms for e in history if e.time_ms > newest - RETENTION_MS]
    gone = [e.time_ms for e in history if e.time_ms <= newest - RETENTION_MS]
    assert len(ledger) == HEADER.size + RECORD.itemsize * len(kept)
    assert decode_header(ledger) == max(gone, default=NEVER_DROPPED)


@given(events)
def test_a_record_takes_forty_bytes(event):
    assert len(merge_ledger(None, to_records([event]))) == 16 + 40


def test_the_first_content_of_a_transaction_wins():
    first = to_records([Event(ORIGIN_MS, "t", "m", 100, 1)])
    second = to_records([Event(ORIGIN_MS, "t", "m", 999, 2)])
    ledger = merge_ledger(None, first)
    assert merge_ledger(ledger, second) == ledger


@pytest.mark.parametrize(
    ("ledger", "what"),
    [
        (b"", "shorter than its header"),
        (b"\x02" + bytes(15), "version 2"),
        (b"\x01\x28" + bytes(14 + 39), "ends inside a record"),
    ],
)
def test_bytes_that_are_no_ledger_are_refused(ledger, what):
    with pytest.raises(LedgerFormatError, match=what):
        Ledgers.from_bytes([None, ledger])


def test_whole_histories_are_grouped_by_card():
    records = to_records([Event(ORIGIN_MS + i, f"t{i}", "m", i, 1) for i in range(6)])
    ledgers = Ledgers.from_columns(np.array([2, 0, 2, 0, 2, 0]), records, 4)
    assert ledgers.offsets.tolist() == [0, 3, 3, 6, 6]
    assert ledgers.records["amount_minor"].tolist() == [1, 3, 5, 0, 2, 4]


@given(st.lists(st.tuples(st.integers(0, 3), histories), max_size=4), st.randoms())
def test_both_ways_of_sorting_give_the_same_order(cards, rng):
    every = [(card, event) for card, history in cards for event in history]
    rng.shuffle(every)
    card_index = np.array([card for card, _ in every], dtype=np.int64)
    records = to_records([event for _, event in every])
    orders = []
    for many in (0, len(every) + 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(features.ledger, "_RECORDS_MANY", many)
            orders.append([a.tolist() for a in features.ledger._order(card_index, records, 4)])
    assert orders[0] == orders[1]
