"""Whoever reads facts of merchants sees those of one publication, wherever the next one is or has ended."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import numpy as np
import pytest

from features import MERCHANT_DAY, Population
from features.keys import merchant_key_bytes
from features.merchants import NEVER, encode_merchant
from stores.errors import StoreError
from stores.merchants import OnlineFacts
from stores.publishing import publish
from stores.redis_store import POPULATION_KEY, OnlineStore, function_library

KEYS = np.arange(1, 13, dtype=np.uint64)
Facts = dict[int, int]
"""By merchants' keys, what each took on a day."""
OLD: Facts = dict.fromkeys(range(1, 10), 1)
NEW: Facts = {**OLD, 2: 2, 5: 2, 10: 2, 11: 2}
del NEW[9]  # and 12 is there in neither


class KilledError(Exception):
    """Stands for a kill."""


class WatchedStore(OnlineStore):
    """Has somebody look on after each of its writes, which are of one key each, or end there."""

    writes = 0
    ends_after = -1
    seen: list[Facts]

    def _send_together(self, commands):
        replies = []
        for command in commands:
            if self.writes == self.ends_after:
                raise KilledError
            self.writes += 1
            replies += super()._send_together([command])
            self.seen.append(seen_by_readers(self))
        return replies


@pytest.fixture
def online(own_redis: str) -> Iterator[WatchedStore]:
    with WatchedStore(own_redis) as store:
        store.redis.flushdb()
        store.seen = []
        yield store
        store.redis.flushdb()


@pytest.fixture
def own_redis(stack) -> str:
    """A database of its own in the shared Redis."""
    url = stack.settings.store_urls()[0]
    with OnlineStore(url) as store:
        store.redis.function_load(function_library(), replace=True)
    base, _, database = url.rpartition("/")
    assert database == "0", url
    return f"{base}/1"


def facts_of(facts: Facts) -> OnlineFacts:
    def days(amount: int) -> np.ndarray:
        return np.array([(100, 100, 1, amount)], MERCHANT_DAY)

    through = 200 + sum(facts.values())  # every publication of another content has another
    population = Population.of(days(sum(facts.values())), NEVER, through)
    values = (
        (merchant_key_bytes(key), encode_merchant(days(amount), NEVER))
        for key, amount in facts.items()
    )
    return OnlineFacts(population, values)


def seen_by_readers(store: OnlineStore) -> Facts:
    """What an answer would be made of; its parts belong together."""
    merchants, places = store.merchants(KEYS)
    amounts = {}
    for key, place in zip(KEYS.tolist(), places.tolist(), strict=True):
        part = merchants.records[merchants.offsets[place] : merchants.offsets[place + 1]]
        if len(part):
            amounts[key] = int(part["amount_minor"][0])
    if merchants.population.through_day != NEVER:
        assert merchants.population.through_day == 200 + sum(amounts.values())
    return amounts if merchants.population.through_day != NEVER else {}


def stored(store: OnlineStore) -> dict[bytes, bytes]:
    keys = sorted(store.merchant_keys())
    return {key: value for key, value in zip(keys, store.read(keys), strict=True) if value}


def test_readers_see_all_of_one_publication_after_every_write(online):
    publish(online, facts_of(OLD))
    assert online.seen[-1] == OLD
    assert online.seen.count({}) == len(OLD)  # nothing counts before all is there
    online.seen.clear()
    publish(online, facts_of(NEW))
    changes = 5
    turn = changes + 1  # each changed merchant, then all together
    assert online.seen == [OLD] * changes + [NEW] * turn
    plain = {value[1] for value in stored(online).values()}
    assert plain == {MERCHANT_DAY.itemsize}
    assert len(stored(online)) == len(NEW)


@pytest.mark.parametrize("after", [{}, OLD, NEW, {1: 7, 5: 3, 12: 9}])
def test_a_publication_that_ended_anywhere_is_settled_by_the_next(online, after):
    publish(online, facts_of(after))
    want = stored(online)
    publish(online, facts_of(NEW))
    n_writes = 0
    while True:
        publish(online, facts_of(OLD))
        online.writes, online.ends_after = 0, n_writes
        try:
            publish(online, facts_of(NEW))
            break
        except KilledError:
            online.ends_after = -1
        assert seen_by_readers(online) in (OLD, NEW)
        online.seen.clear()
        publish(online, facts_of(after))
        seen = [facts for facts, _ in groupby(online.seen)]
        assert seen in ([OLD, after], [NEW, after], [after])
        assert stored(online) == want
        n_writes += 1
    assert n_writes > len(NEW)


def test_two_at_once_are_told_so(online):
    publish(online, facts_of(OLD))

    def meanwhile() -> Iterator[tuple[bytes, bytes]]:
        publish(online, facts_of(NEW))
        yield from facts_of(OLD).merchants

    with pytest.raises(StoreError, match="start anew"):
        publish(online, OnlineFacts(facts_of(OLD).population, meanwhile()))
    publish(online, facts_of(OLD))
    assert seen_by_readers(online) == OLD


def test_a_redis_that_loses_its_data_meanwhile_claims_nothing(online):
    publish(online, facts_of(OLD))

    def meanwhile() -> Iterator[tuple[bytes, bytes]]:
        yield from list(facts_of(NEW).merchants)[:3]
        online.redis.flushdb()
        yield from list(facts_of(NEW).merchants)[3:]

    with pytest.raises(StoreError, match="start anew"):
        publish(online, OnlineFacts(facts_of(NEW).population, meanwhile()))
    assert online.read([POPULATION_KEY]) == [None]
