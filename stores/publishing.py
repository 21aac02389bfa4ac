"""Hands facts of merchants to Redis, so that whoever reads sees all of them as they were, or all as they
are now.

A risk is made of a merchant's days and of the totals of all. Millions of keys cannot be replaced at once,
one can:

    each merchant that changes    its new days and its old ones, under this publication's number
    all together                  the new totals, with that number: from here on new days count
    each merchant that changed    its new days alone

Readers take merchants and totals in one MGET. Wherever it ends before its time, old days go on counting, or
new ones: the next publication settles what was left.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace

from features import Population
from features.merchants import changing, settled
from stores.errors import NotReadyError
from stores.history import History
from stores.merchants import (
    FACTS_LOCK,
    FACTS_TIMEOUT_S,
    OnlineFacts,
    online_facts,
    withdraw,
)
from stores.postgres import OfflineStore
from stores.redis_store import POPULATION_KEY, OnlineStore, in_chunks, merchant_redis_key


def publish_merchants(offline: OfflineStore, online: OnlineStore) -> None:
    """Brings the facts of merchants in Redis up to date. Whoever comes later publishes what is newer.

    Raises:
        StoreError: a store does not answer.
    """
    with (
        offline.locked(FACTS_LOCK, shared=False, timeout_s=FACTS_TIMEOUT_S),
        History(offline.url) as history,
    ):
        publish(online, online_facts(history.merchants))


def withdraw_merchants(offline: OfflineStore, online: OnlineStore) -> None:
    """After a load: what the facts of merchants lack is not claimed, in either store, until the next batch
    run.

    Raises:
        StoreError: a store does not answer.
    """
    with offline.locked(FACTS_LOCK, shared=False, timeout_s=FACTS_TIMEOUT_S):
        if not withdraw(offline.sql):
            return
        with History(offline.url) as history:
            facts = online_facts(history.merchants)
            held = replace(_held(online)[1], publication=0)
            if held.to_bytes() != facts.population.to_bytes():
                publish(online, facts)


def publish(online: OnlineStore, facts: OnlineFacts) -> None:
    """Puts facts in place of all that Redis holds of merchants. To be called by one at a time.

    Raises:
        StoreError: Redis does not answer, or has lost its data meanwhile, or somebody else publishes.
    """
    raw, held = _held(online)
    number = secrets.randbits(64)
    open_keys: list[bytes] = []
    wanted: set[bytes] = set()
    for merchants in in_chunks(facts.merchants):
        keys = [merchant_redis_key(name) for name, _ in merchants]
        wanted.update(keys)
        values = [value for _, value in merchants]
        open_keys += _change(online, held.publication, number, keys, values)
    strangers = (key for key in online.merchant_keys() if key not in wanted)
    for keys in in_chunks(strangers):
        open_keys += _change(online, held.publication, number, keys, [None] * len(keys))
    new = replace(facts.population, publication=number).to_bytes()
    if online.swap([(POPULATION_KEY, raw, new)]) != [True]:
        text = "facts of merchants were changed while they were published: start anew"
        raise NotReadyError("redis", text)
    for keys in in_chunks(open_keys):
        _settle(online, number, keys)


def _held(online: OnlineStore) -> tuple[bytes | None, Population]:
    """What Redis holds of all merchants together."""
    (raw,) = online.read([POPULATION_KEY])
    return raw, Population.from_bytes(raw)


def _change(
    online: OnlineStore,
    held: int,
    number: int,
    keys: Sequence[bytes],
    values: Sequence[bytes | None],
) -> list[bytes]:
    """Puts new facts beside those that count. Returns the keys that are to be settled."""
    found = online.read(keys)
    differing = [
        (key, value, there)
        for key, value, there in zip(keys, values, found, strict=True)
        if there != value
    ]
    online.put_whole(
        (key, changing(number, value, settled(there, held)))
        for key, value, there in differing
        # What a publication left that was ended may be right already, now and then.
        if settled(there, number) != value
    )
    return [key for key, _, _ in differing]


def _settle(online: OnlineStore, number: int, keys: Sequence[bytes]) -> None:
    """Leaves of facts those that count."""
    values = {
        key: settled(value, number) for key, value in zip(keys, online.read(keys), strict=True)
    }
    online.put_whole((key, value) for key, value in values.items() if value is not None)
    online.forget(key for key, value in values.items() if value is None)
