"""Sync: Redis holds what Postgres says, byte for byte, and nobody is ever told anything wrong meanwhile."""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest
import tally
from tally.v1 import admin_service_pb2 as admin_pb
from tally.v1 import feature_service_pb2 as pb

from features import CATALOG, encode_ledger, merge_ledger
from features.ledger import record_times_ms
from stores.arrow import LABELS, TRANSACTIONS, with_records
from stores.errors import StoreError
from stores.redis_store import PROGRESS_KEY, ledger_key, profile_key
from stores.sync import Syncer
from tests import slices
from tests.conftest import Stack, loaded
from tests.contents import contents
from tests.oracle import Event, Question, answer
from tests.server.test_export import wait_for
from tests.strategies import ORIGIN_MS, to_records

ROWS = 12_000
CARDS = 150
KILLS = slices.of(20, 4)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack of its own: its Redis is emptied and its server killed."""
    size = ("--rows", str(ROWS), "--cards", str(CARDS), "--days", "90", "--seed", "81")
    with loaded(tmp_path_factory.mktemp("sync"), *size) as stack:
        yield stack


@pytest.fixture
def client(own: Stack) -> Iterator[tally.Client]:
    with tally.Client(own.address) as client:
        yield client


@pytest.fixture
def online(own: Stack):
    with closing(own.online()) as online:
        yield online


def last(run: Iterator[pb.SyncResponse]) -> pb.SyncResponse:
    *_, final = run
    assert final.done
    assert final.cards_done == final.cards_total
    return final


def everything(online) -> dict[bytes, bytes]:
    keys = sorted(online.redis.keys(b"{c*"))
    return dict(zip(keys, online.redis.mget(keys), strict=True))


def test_an_empty_redis_is_complete_again_to_the_same_bytes(own, client, online):
    before = everything(online)
    said = online.redis.get(PROGRESS_KEY)
    online.redis.flushall()
    assert client.status().online_store.state == admin_pb.STORE_STATE_INCOMPLETE
    result = own.tally("sync", "--json")
    assert result.returncode == 0, result.stderr
    outcome = json.loads(result.stdout)
    assert outcome["cards_done"] == outcome["cards_differing"] == len(before) / 2
    assert outcome["transactions_written"] > 1_000
    assert everything(online) == before
    assert online.redis.get(PROGRESS_KEY) == said
    assert client.status().online_store.state == admin_pb.STORE_STATE_SERVING
    assert last(client.sync()).cards_differing == 0


def damage(online, rng: random.Random) -> list[bytes]:
    """Makes five values of five cards something else; returns these cards."""
    cards = sorted(online.cards_with_ledgers())
    chosen = rng.sample(cards, 5)
    some, more, none, other, profile = chosen
    ledger = online.read([ledger_key(some)])[0]
    online.redis.set(ledger_key(some), encode_ledger(_body(ledger)[:-1]))
    ledger = online.read([ledger_key(more)])[0]
    newest_ms = int(record_times_ms(_body(ledger))[-1])
    stranger = to_records([Event(newest_ms, "stranger", "m", 1, 1)])
    online.redis.set(ledger_key(more), merge_ledger(ledger, stranger))
    online.redis.delete(ledger_key(none))
    online.redis.set(ledger_key(other), b"\x09 no ledger")
    online.redis.delete(profile_key(profile))
    return chosen


def _body(ledger: bytes) -> np.ndarray:
    return np.frombuffer(ledger, to_records([]).dtype, offset=16)


def test_whatever_differs_is_found_and_mended(own, client, online):
    before = everything(online)
    damage(online, random.Random(1))
    orphan = secrets.token_bytes(16)
    online.redis.set(ledger_key(orphan), next(iter(before.values())))
    damaged = everything(online)
    dry = last(client.sync(dry_run=True))
    assert (dry.cards_differing, dry.transactions_written) == (6, 0)
    assert everything(online) == damaged
    mended = last(client.sync())
    assert mended.cards_differing == 6
    assert everything(online) == before


def test_one_card_or_those_that_changed_are_mended_alone(own, client, online):
    before = everything(online)
    chosen = damage(online, random.Random(2))
    assert last(client.sync(card_id=chosen[2])).cards_differing == 1
    assert online.read([ledger_key(chosen[2])])[0] == before[ledger_key(chosen[2])]
    assert everything(online) != before
    assert last(client.sync(changed_since=datetime.now(UTC))).cards_done == 0
    since = datetime(2000, 1, 1, tzinfo=UTC)
    assert last(client.sync(changed_since=since)).cards_differing == 4
    assert everything(online) == before
    assert last(client.sync(card_id=secrets.token_bytes(16))).cards_differing == 0


def test_what_postgres_lacks_is_reported(own, client, online):
    assert last(client.sync("redis")).cards_differing == 0
    before = everything(online)
    chosen = damage(online, random.Random(3))
    online.redis.set(ledger_key(chosen[3]), before[ledger_key(chosen[3])])
    result = own.tally("sync", "--audit", "--json")
    assert result.returncode == 1
    assert json.loads(result.stdout)["cards_differing"] == 1
    assert last(client.sync("redis", card_id=chosen[1])).cards_differing == 1
    assert last(client.sync("redis", card_id=chosen[0])).cards_differing == 0
    last(client.sync())
    assert everything(online) == before


def test_a_caller_may_leave_a_sync(own, client):
    """What it does is then done, and what it uses is closed."""
    wait_for(client)
    log_file = own.data / "logs" / "server.log"
    before = log_file.stat().st_size
    for _ in range(10):
        with tally.Client(own.address) as leaving:
            next(iter(leaving.sync()))
    assert last(client.sync()).cards_differing == 0
    time.sleep(0.5)
    with log_file.open() as file:
        file.seek(before)
        said = file.read()
    for word in ("a call failed", "RuntimeError", "Traceback", "never retrieved"):
        assert word not in said


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.SyncRequest(), "direction"),
        (pb.SyncRequest(direction=pb.SYNC_DIRECTION_POSTGRES_TO_REDIS, card_id=b"x"), "card_id"),
    ],
)
def test_requests_that_break_the_contract_are_refused(client, request_, field):
    with pytest.raises(tally.InvalidRequestError) as caught:
        list(tally.client._narrowed(client._features.Sync(request_), client._address))
    assert caught.value.violations[0].field == field


def test_a_store_that_is_emptied_meanwhile_is_not_declared_complete(own, online):
    online.redis.flushall()
    with closing(own.offline()) as offline:
        online.install()
        fingerprint = own.card_key.fingerprint
        run = Syncer(offline, online, card_key_fingerprint=fingerprint).everything()
        next(run)
        online.redis.flushall()
        with pytest.raises(StoreError, match="lost its data again"):
            list(run)
        assert not online.is_initialised
        first = Syncer(offline, online, card_key_fingerprint=fingerprint).everything()
        next(first)
        *_, done = Syncer(offline, online, card_key_fingerprint=fingerprint).everything()
        assert done.is_done
        with pytest.raises(StoreError):
            list(first)
        assert online.is_initialised


@pytest.mark.sliced
@pytest.mark.budget(slices.of(90, 20), "a server is killed and started KILLS times")
def test_a_sync_that_is_killed_anywhere_is_run_again_and_ends_the_same(own, client, online):
    wait_for(client)
    before = contents(own)
    rng = slices.drawn("sync")
    for _ in range(KILLS):
        online.redis.flushall()
        wait_for(client)
        killer = threading.Timer(
            rng.random() * 0.15, os.kill, (client.status().worker_pid, signal.SIGKILL)
        )
        killer.start()
        with suppress(tally.UnavailableError):
            last(client.sync())
        killer.join()
        wait_for(client)
        last(client.sync())
        assert contents(own).differences(before) == []


# --- beside the stream --------------------------------------------------------------------------

LIVE_CARDS = 4
EVENTS = 250


class Writer:
    """Applies a card's events one after the other, Postgres first, as the stream does."""

    def __init__(self, stack: Stack, card_id: bytes, events: list[Event]) -> None:
        self.card_id, self.events = card_id, events
        self.begun = self.applied = 0
        self._offline, self._online = stack.offline(), stack.online()

    def apply_next(self) -> None:
        event = self.events[self.begun]
        self.begun += 1
        row = {
            "card_id": self.card_id,
            "event_time": event.time_ms * 1000,
            "transaction_id": event.transaction_id,
            "amount_minor": event.amount_minor,
            "merchant": event.merchant,
        }
        table = with_records(pa.Table.from_pylist([row], pa.schema([*TRANSACTIONS, *LABELS])))
        self._offline.accept(table)
        self._online.append([(self.card_id, table["record"][0].as_py())])
        self.applied += 1

    def close(self) -> None:
        self._offline.close()
        self._online.close()


def live_events(rng: random.Random) -> list[Event]:
    """Payments in any order of their times, of which many are the same."""
    return [
        Event(
            ORIGIN_MS + rng.randrange(40) * 3_600_000,
            secrets.token_hex(8),
            f"m{rng.randrange(5)}",
            rng.randrange(100, 9_000),
            -1,
        )
        for _ in range(EVENTS)
    ]


def test_a_live_card_is_never_answered_wrongly_while_everything_is_synced(own, client, online):
    """
    writer   ├─ event 1 ─┤├─ event 2 ─┤├─ event 3 ─┤ …
    sync     ├──────── everything ────────┤├──────── everything ──── …
    reader      ├ ask ┤   the oracle's answer for 1 or 2 events: those applied before it asked, and
                          perhaps those begun before it was told
    """
    wait_for(client)
    rng = random.Random(9)
    writers = [Writer(own, secrets.token_bytes(16), live_events(rng)) for _ in range(LIVE_CARDS)]
    question = Question(ORIGIN_MS + 41 * 3_600_000, amount_minor=1_234)
    is_over = threading.Event()
    failures: list[Exception] = []
    runs = 0

    def sync() -> None:
        nonlocal runs
        try:
            while not is_over.is_set():
                last(client.sync())
                runs += 1
        except Exception as error:  # noqa: BLE001 (the main thread is told)
            failures.append(error)

    def write(writer: Writer) -> None:
        try:
            while writer.begun < EVENTS:
                writer.apply_next()
                time.sleep(0.01)  # a few syncs long
        except Exception as error:  # noqa: BLE001 (the main thread is told)
            failures.append(error)

    threads = [threading.Thread(target=sync)]
    threads += [threading.Thread(target=write, args=(writer,)) for writer in writers]
    for thread in threads:
        thread.start()
    asked = 0

    def ask() -> None:
        writer = rng.choice(writers)
        applied = writer.applied
        got = client.online([tally.Row(card_id=writer.card_id, at=question.time_ms, amount=12.34)])
        begun = writer.begun
        count = got.to_dicts()[0]["txn_count_last_7_days"]
        known = 0 if count is None else int(count)
        assert applied <= known <= begun
        history = writer.events[:known] or None
        for column, feature in enumerate(CATALOG):
            want, status = answer(feature, history, question)
            value = got.values[0, column]
            assert got.statuses[0, column] == status, feature.name
            assert np.isnan(value) if want is None else value == want, feature.name

    try:
        while (any(w.applied < EVENTS for w in writers) or runs < 3) and not failures:
            ask()
            asked += 1
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    for writer in writers:
        writer.close()
    assert failures == []
    assert asked > 50
    assert own.tally("verify", "--all").returncode == 0


def test_damage_is_mended_beside_writers_and_nothing_newer_is_lost(own, client, online):
    """Records are taken out of a live card's ledger again and again; in the end all are there."""
    wait_for(client)
    rng = random.Random(10)
    writer = Writer(own, secrets.token_bytes(16), live_events(rng))
    key = ledger_key(writer.card_id)
    for number in range(EVENTS // 2):
        writer.apply_next()
        if number % 10 == 9:
            held = online.read([key])[0]
            thread = threading.Thread(target=lambda: last(client.sync(card_id=writer.card_id)))
            online.swap([(key, held, encode_ledger(_body(held)[::2]))])
            thread.start()
            writer.apply_next()
            thread.join()
    last(client.sync(card_id=writer.card_id))
    expected = merge_ledger(None, to_records(writer.events[: writer.applied]))
    assert online.read([key])[0] == expected
    writer.close()
