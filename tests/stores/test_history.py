"""Histories from Postgres answer for any instant of the past as the oracle does."""

from __future__ import annotations

import secrets

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import stores.history
from features import CATALOG, CATEGORIES, as_of
from stores.arrow import LABELS, TRANSACTIONS, with_records
from stores.history import GROWTH_MAX, History
from tests.oracle import Event, Question, answer
from tests.strategies import ORIGIN_MS, histories, questions, to_points

DAY_MS = 86_400_000


@pytest.fixture(scope="module")
def offline(stack):
    """Postgres of the stack that tests share; at the end, Redis has what it was given."""
    store = stack.offline()
    yield store
    store.close()
    done = stack.tally("sync")
    assert done.returncode == 0, done.stderr


def accept(offline, histories_by_card: dict[bytes, list[Event]]) -> None:
    """Writes histories; ids are made unique by the card."""
    rows = [
        {
            "card_id": card_id,
            "event_time": event.time_ms * 1000,
            "transaction_id": f"{event.transaction_id} {card_id.hex()}",
            "amount_minor": event.amount_minor,
            "merchant": event.merchant,
            "category": CATEGORIES[event.category - 1] if event.category else None,
            "merchant_latitude": None if event.latitude_udeg is None else event.latitude_udeg / 1e6,
            "merchant_longitude": None
            if event.longitude_udeg is None
            else event.longitude_udeg / 1e6,
            "is_fraud": None,
            "label_time": None,
        }
        for card_id, events in histories_by_card.items()
        for event in events
    ]
    offline.accept(with_records(pa.Table.from_pylist(rows, pa.schema([*TRANSACTIONS, *LABELS]))))


def named(card_id: bytes, events: list[Event]) -> list[Event]:
    """The events under the ids that `accept` gave them."""
    return [
        Event(
            e.time_ms,
            f"{e.transaction_id} {card_id.hex()}",
            *(e.merchant, e.amount_minor, e.category, e.latitude_udeg, e.longitude_udeg),
        )
        for e in events
    ]


@given(st.lists(histories, min_size=1, max_size=3), st.data())
@settings(max_examples=40)
def test_any_instant_is_answered_as_the_oracle_does(stack, offline, drawn, data):
    known = {secrets.token_bytes(16): history for history in drawn}
    accept(offline, known)
    cards = [*known, secrets.token_bytes(16)]  # and one that nobody knows
    asked: list[tuple[int, Question]] = [
        (card, data.draw(questions(known.get(cards[card]))))
        for card in range(len(cards))
        for _ in range(3)
    ]
    with History(stack.settings.store_urls()[1]) as history:
        ((begin, end, ledgers, profiles),) = history.read(cards)
    assert (begin, end) == (0, len(cards))
    got = as_of(ledgers, to_points(asked), CATALOG, profiles)
    for row, (card, question) in enumerate(asked):
        events = known.get(cards[card])
        events = None if events is None else named(cards[card], events)
        for column, feature in enumerate(CATALOG):
            want, status = answer(feature, events, question, retention=False)
            what = f"{feature.name} at {question}"
            assert got.statuses[row, column] == status, what
            value = got.values[row, column]
            assert np.isnan(value) if want is None else value == want, what


def test_what_comes_after_the_snapshot_is_not_in_it(stack, offline):
    card_id = secrets.token_bytes(16)
    accept(offline, {card_id: [Event(ORIGIN_MS, "first", "m", 1, 1)]})
    with History(stack.settings.store_urls()[1]) as history:
        accept(offline, {card_id: [Event(ORIGIN_MS + 1, "second", "m", 1, 1)]})
        ((_, _, before, _),) = history.read([card_id])
    with History(stack.settings.store_urls()[1]) as history:
        ((_, _, after, _),) = history.read([card_id])
    assert (len(before.records), len(after.records)) == (1, 2)


def test_a_card_of_few_records_says_little_of_others(stack, offline):
    cards = list(offline.all_cards())
    with History(stack.settings.store_urls()[1]) as history:
        history.mean_records = 400.0
        (part,) = history.read([bytes(16)])  # of nobody
        assert len(part[2].records) == 0
        assert history.mean_records == 400.0 / GROWTH_MAX
        assert sum(end - begin for begin, end, _, _ in history.read(cards)) == len(cards)


def test_many_cards_are_read_in_parts_and_in_order(stack, offline, monkeypatch):
    monkeypatch.setattr(stores.history, "RECORDS_TOGETHER", 12)
    monkeypatch.setattr(stores.history, "CARDS_AT_FIRST", 4)
    cards = [secrets.token_bytes(16) for _ in range(20)]
    sizes = [3 * (number % 4) for number in range(20)]
    accept(
        offline,
        {
            card: [Event(ORIGIN_MS + i * DAY_MS, f"{i}", "m", number, 1) for i in range(size)]
            for number, (card, size) in enumerate(zip(cards, sizes, strict=True))
        },
    )
    with History(stack.settings.store_urls()[1]) as history:
        parts = list(history.read(cards))
    assert [begin for begin, *_ in parts] == [0, *(end for _, end, *_ in parts[:-1])]
    assert parts[-1][1] == len(cards)
    assert len(parts) > 2
    found = [count for _, _, ledgers, _ in parts for count in np.diff(ledgers.offsets).tolist()]
    assert found == sizes
