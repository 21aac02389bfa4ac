"""The Redis functions leave the bytes that the core leaves."""

from __future__ import annotations

import secrets

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.crc import key_slot

from features import LEDGER_RECORDS_MAX, PROFILE_RECORD, encode_profile, merge_ledger
from features.catalog import DAY_MS
from features.ledger import HEADER, sort_unique
from stores.errors import StoreUnavailableError
from stores.redis_store import POPULATION_KEY, PROGRESS_KEY, OnlineStore, ledger_key, profile_key
from tests.features.test_ledger import deliveries
from tests.oracle import Event
from tests.strategies import ORIGIN_MS, to_records


@pytest.fixture(scope="module")
def online(stack):
    """A database of its own: what is written there, Postgres does not know."""
    store = OnlineStore(stack.settings.store_urls()[0].rpartition("/")[0] + "/3")
    store.install()
    store.initialise(stack.card_key.fingerprint, -1, [], token=store.begin_rebuild())
    yield store
    store.redis.flushdb()
    store.close()


def deliver(online: OnlineStore, card_id: bytes, *parts: list[Event]) -> bytes | None:
    for part in parts:
        online.append([(card_id, sort_unique(to_records(part)).tobytes())])
    return online.read([ledger_key(card_id)])[0]


@given(deliveries())
@settings(max_examples=150)
def test_any_delivery_leaves_the_bytes_of_the_core(online, delivery):
    history, parts = delivery
    stored = deliver(online, secrets.token_bytes(16), *parts)
    assert stored == merge_ledger(None, to_records(history))


def test_a_ledger_is_bounded_and_says_what_it_dropped(online):
    history = [Event(ORIGIN_MS + i, f"t{i}", "m", 1, 1) for i in range(LEDGER_RECORDS_MAX + 10)]
    halves = history[::2], history[1::2]
    stored = deliver(online, secrets.token_bytes(16), *halves)
    assert stored == merge_ledger(None, to_records(history))


def test_what_comes_back_has_the_past_of_all_that_was_added(online):
    card_id = secrets.token_bytes(16)
    old, new = Event(ORIGIN_MS, "old", "m", 1, 1), Event(ORIGIN_MS + 40 * DAY_MS, "new", "m", 1, 1)
    records = sort_unique(to_records([old, new])).tobytes()
    (ledger,), _ = online.append_and_read([(card_id, records)])
    assert ledger[HEADER.size :] == records
    assert online.read([ledger_key(card_id)])[0] == merge_ledger(None, to_records([old, new]))


def test_a_store_that_lost_its_data_gives_no_ledgers_without_their_past(online):
    records = sort_unique(to_records([Event(ORIGIN_MS, "t", "m", 1, 1)])).tobytes()
    said = {key: online.redis.get(key) for key in (PROGRESS_KEY, POPULATION_KEY)}
    online.begin_rebuild()
    try:
        with pytest.raises(StoreUnavailableError, match="rebuilt"):
            online.append_and_read([(secrets.token_bytes(16), records)])
    finally:
        for key, value in said.items():
            if value is not None:
                online.redis.set(key, value)


def test_another_content_of_a_known_transaction_changes_nothing(online):
    card_id = secrets.token_bytes(16)
    before = deliver(online, card_id, [Event(ORIGIN_MS, "t", "m", 100, 1)])
    assert deliver(online, card_id, [Event(ORIGIN_MS, "t", "other", 999, 2)]) == before


def test_card_ids_with_braces_keep_both_keys_in_one_cluster_slot(online):
    for card_id in (b"}" * 16, b"{" * 16, b"a}b{c" + bytes(11)):
        slots = {key_slot(key(card_id)) for key in (ledger_key, profile_key)}
        assert len(slots) == 1


contents = st.tuples(st.integers(0, 3), st.integers(0, 40 * DAY_MS))


@given(st.lists(contents, min_size=1, max_size=8), st.randoms())
@settings(max_examples=60)
def test_profiles_keep_each_content_from_its_earliest_instant(online, seen, random):
    records = np.zeros(len(seen), dtype=PROFILE_RECORD)
    records["city_pop"] = [content for content, _ in seen]
    records["valid_from_ms"] = [valid_from for _, valid_from in seen]
    card_id = secrets.token_bytes(16)
    order = list(range(len(seen)))
    random.shuffle(order)
    for row in order:
        online.put_profiles([(card_id, records[row].tobytes())])
    assert online.read([profile_key(card_id)])[0] == encode_profile(records)
