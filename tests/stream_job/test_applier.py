"""Applying events: any order, any company, any number of times, whatever fails in between."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features import CATALOG, Ledgers, merge_ledger
from features.catalog import Source
from features.ledger import record_times_ms
from stores.errors import DataRefusedError, StoreUnavailableError
from stores.feature_rows import FeatureTable
from stores.redis_store import OnlineStore, ledger_key
from stream_job.applier import Applier, Batch
from stream_job.dead_letters import DeadLetter, Sealer, read_letter
from stream_job.settings import StreamSettings
from tests.batch_job.test_load import ledger, new_card, new_id, stored
from tests.oracle import Event, Question, answer
from tests.strategies import ORIGIN_MS, to_records

MINUTE_MS = 60_000
_offsets = itertools.count()


@pytest.fixture(scope="module")
def applier(stack):
    made = Applier(StreamSettings(data=stack.data, stream_format="tally"))
    yield made
    made.close()


def batch(values: Sequence[bytes | None], topic: str = "transactions") -> Batch:
    n = len(values)
    offsets = [next(_offsets) for _ in range(n)]
    return Batch([topic] * n, [0] * n, offsets, [ORIGIN_MS] * n, values)


def published(card: str, event: Event) -> bytes:
    category = ["none such", "entertainment", "food_dining", "gas_transport", "grocery_net", None]
    document: dict[str, Any] = {
        "transaction_id": event.transaction_id,
        "card": card,
        "event_time": event.time_ms,
        "amount": event.amount_minor / 100,
        "merchant": event.merchant,
        "category": category[event.category],
    }
    return json.dumps(document).encode()


def payments(n: int, rng: random.Random) -> list[Event]:
    """Payments of one card, with ties, over two hours."""
    return [
        Event(
            ORIGIN_MS + rng.randrange(120) * MINUTE_MS,
            new_id(),
            f"merchant {rng.randrange(5)}",
            rng.randrange(-500, 50_000),
            rng.randrange(-1, 5),  # -1: the payment has none
        )
        for _ in range(n)
    ]


def letters(found: list[str | None]) -> list[DeadLetter]:
    read = [read_letter(letter.encode()) for letter in found if letter]
    return [letter for letter in read if letter is not None]


@given(st.randoms(use_true_random=False))
@settings(max_examples=15)
def test_order_company_and_repetition_leave_the_same_stores(stack, applier, rng):
    card = new_card()
    events = payments(30, rng)
    deliveries = [*events, *rng.choices(events, k=15)]
    rng.shuffle(deliveries)
    while deliveries:
        n = rng.randint(1, 12)
        part, deliveries = deliveries[:n], deliveries[n:]
        assert letters(applier.apply(batch([published(card, event) for event in part]))) == []
    assert ledger(stack, card) == merge_ledger(None, to_records(events))
    assert {row["transaction_id"] for row in stored(stack, card)} == {
        event.transaction_id for event in events
    }


def test_features_on_arrival_are_what_the_oracle_says_of_the_past(stack, applier):
    card = new_card()
    events = sorted(payments(25, random.Random(3)), key=lambda event: event.time_ms)
    for event in events:
        applier.apply(batch([published(card, event)]))
    offline = stack.offline()
    rows = offline.sql.execute(
        "SELECT transaction_id, feature_values FROM features WHERE transaction_id = ANY(%s)",
        ([event.transaction_id for event in events],),
    ).fetchall()
    offline.close()
    on_arrival = dict(rows)
    for number, event in enumerate(events):
        known = events[: number + 1]
        category = [
            "none such",
            "entertainment",
            "food_dining",
            "gas_transport",
            "grocery_net",
            None,
        ]
        question = Question(event.time_ms, event.amount_minor, category[event.category])
        for feature, value in zip(CATALOG, on_arrival[event.transaction_id], strict=True):
            if feature.source is Source.MERCHANT:
                continue  # merchants are shared by all tests: see tests/batch_job/test_merchants.py
            want, _ = answer(feature, known, question)
            assert (value == want) if want is not None else value != value, feature.name


@pytest.mark.parametrize("fails", ["append_and_read", "put_if_missing"])
def test_a_store_that_fails_half_way_is_waited_for_and_nothing_is_lost(stack, monkeypatch, fails):
    owner: type[Any] = OnlineStore if fails == "append_and_read" else FeatureTable
    genuine, failures = getattr(owner, fails), [3]
    pauses: list[float] = []

    def failing(self: Any, *arguments: Any, **options: Any) -> Any:
        if failures[0]:
            failures[0] -= 1
            raise StoreUnavailableError("redis", "gone")
        return genuine(self, *arguments, **options)

    monkeypatch.setattr(owner, fails, failing)
    applier = Applier(StreamSettings(data=stack.data, stream_format="tally"), sleep=pauses.append)
    card = new_card()
    events = payments(10, random.Random(4))
    assert letters(applier.apply(batch([published(card, event) for event in events]))) == []
    applier.close()
    assert len(pauses) == 3
    assert pauses == sorted(pauses)
    assert ledger(stack, card) == merge_ledger(None, to_records(events))
    assert len(stored(stack, card)) == 10


def test_another_content_under_a_known_id_becomes_a_dead_letter(stack, applier):
    card, other = new_card(), new_card()
    event = payments(1, random.Random(5))[0]
    first, second = published(card, event), published(other, event)
    good = published(card, payments(1, random.Random(6))[0])
    assert letters(applier.apply(batch([first]))) == []
    (letter,) = letters(applier.apply(batch([good, second])))
    assert (letter.reason, letter.topic, letter.partition) == ("CONFLICT", "transactions", 0)
    assert Sealer(stack.card_key).open(letter) == second
    assert ledger(stack, other) is None
    assert len(stored(stack, card)) == 2


def test_two_contents_of_one_id_in_one_batch(stack, applier):
    card, other = new_card(), new_card()
    event = payments(1, random.Random(7))[0]
    found = applier.apply(batch([published(card, event), published(other, event)]))
    assert found[0] is None
    assert [letter.reason for letter in letters(found)] == ["CONFLICT"]


def test_a_label_may_come_before_its_transaction_and_the_first_one_stays(stack, applier):
    card = new_card()
    event = payments(1, random.Random(8))[0]

    def label(is_fraud: bool) -> bytes:
        document = {
            "transaction_id": event.transaction_id,
            "is_fraud": is_fraud,
            "label_time": "2020-02-01T00:00:00Z",
        }
        return json.dumps(document).encode()

    assert letters(applier.apply(batch([label(True), label(True)], "labels"))) == []
    applier.apply(batch([published(card, event)]))
    (row,) = stored(stack, card)
    assert row["is_fraud"] is True
    assert row["label_time"] == datetime(2020, 2, 1, tzinfo=UTC)
    (letter,) = letters(applier.apply(batch([label(False)], "labels")))
    assert letter.reason == "CONFLICT"
    assert stored(stack, card)[0]["is_fraud"] is True


def test_a_dead_letter_shows_no_card_number_and_keeps_every_byte(stack, applier):
    value = b'{"card": "4000123412341234", "transaction_id": '
    found = applier.apply(batch([value]))
    assert "4000123412341234" not in str(found)
    assert Sealer(stack.card_key).open(letters(found)[0]) == value


def test_progress_is_the_offset_behind_the_last_event_and_never_goes_back(stack, applier):
    event = published(new_card(), payments(1, random.Random(9))[0])
    newer = Batch(["transactions"] * 2, [9, 9], [40, 41], [5, 6], [event, event])
    applier.apply(newer)
    applier.apply(Batch(["transactions"], [9], [40], [5], [event]))
    offline = stack.offline()
    assert offline.stream_progress()["transactions", 9] == (42, 6)
    offline.close()


def test_a_probe_is_seen_and_kept_out_of_postgres_and_the_rest_is_as_without_it(stack, applier):
    probe_id, card, other = stack.card_key.probe_id, new_card(), new_card()
    event = payments(1, random.Random(10))[0]

    def probe(name: str, time_ms: int) -> bytes:
        document = {
            "transaction_id": name,
            "card_id": probe_id.hex(),
            "event_time": time_ms,
            "amount": 0,
            "merchant": "probe",
        }
        return json.dumps(document).encode()

    values = [probe("a", ORIGIN_MS + 9), published(card, event), probe("b", ORIGIN_MS + 5)]
    found = applier.apply(batch([*values, published(other, event)]))
    assert [letter is None for letter in found] == [True, True, True, False]
    shown = stack.online()
    (bytes_of_probe,) = shown.read([ledger_key(probe_id)])
    shown.close()
    (record,) = Ledgers.from_bytes([bytes_of_probe]).records
    assert record_times_ms(np.array([record])).tolist() == [ORIGIN_MS + 9]
    assert ledger(stack, card) == merge_ledger(None, to_records([event]))
    assert len(stored(stack, card)) == 1
    offline = stack.offline()
    query = "SELECT 1 FROM transactions WHERE card_id = %s"
    assert offline.sql.execute(query, (probe_id,)).fetchall() == []
    offline.close()


@pytest.mark.parametrize(
    ("where", "error", "reason"),
    [
        ("accept", DataRefusedError("postgres refused: text '4000123412341234'"), "REFUSED"),
        ("append_and_read", OverflowError("of a kind that nobody thought of"), "UNEXPECTED"),
    ],
)
def test_an_event_that_nobody_thought_of_is_found_and_the_others_are_applied(
    stack, monkeypatch, where, error, reason
):
    from stores.postgres import OfflineStore

    owner: type[Any] = OfflineStore if where == "accept" else OnlineStore
    genuine = getattr(owner, where)
    poison, others = new_card(), new_card()
    marker = stack.card_key.card_id(poison)

    def failing(self: Any, batch: Any, *arguments: Any) -> Any:
        ids = batch["card_id"].to_pylist() if where == "accept" else [card for card, _ in batch]
        if marker in ids:
            raise error
        return genuine(self, batch, *arguments)

    monkeypatch.setattr(owner, where, failing)
    applier = Applier(StreamSettings(data=stack.data, stream_format="tally"))
    bad, *good = payments(14, random.Random(11))
    values = [published(others, event) for event in good]
    values.insert(5, published(poison, bad))
    sent = batch(values)
    found = applier.apply(sent)
    applier.close()
    (letter,) = letters(found)
    assert found[5] is not None
    assert (letter.reason, letter.offset) == (reason, sent.offset[5])
    assert "4000123412341234" not in letter.detail
    assert ledger(stack, others) == merge_ledger(None, to_records(good))
    offline = stack.offline()
    assert offline.stream_progress()["transactions", 0][0] == sent.offset[-1] + 1
    offline.close()
    monkeypatch.undo()  # once the cause is gone, the same event is applied, whatever of it was written
    applier = Applier(StreamSettings(data=stack.data, stream_format="tally"))
    assert letters(applier.apply(batch([published(poison, bad)]))) == []
    applier.close()
    assert ledger(stack, poison) == merge_ledger(None, to_records([bad]))
    assert [row["transaction_id"] for row in stored(stack, poison)] == [bad.transaction_id]


def test_a_connection_that_ends_within_a_batch_is_made_anew(stack):
    applier = Applier(StreamSettings(data=stack.data, stream_format="tally"), sleep=lambda _: None)
    card = new_card()
    first, second = payments(2, random.Random(12))
    assert letters(applier.apply(batch([published(card, first)]))) == []
    offline = stack.offline()
    offline.sql.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() "
        "AND backend_type = 'client backend'"
    )
    offline.close()
    assert letters(applier.apply(batch([published(card, second)]))) == []
    applier.close()
    assert ledger(stack, card) == merge_ledger(None, to_records([first, second]))
