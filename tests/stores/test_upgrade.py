"""A store that an earlier version wrote is brought up to date at the next start, and nothing is lost."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from importlib import resources
from typing import Any

import numpy as np
import psycopg
import pytest
import yoyo
from psycopg import sql

from stores.history import History
from stores.merchants import refresh
from stores.postgres import OfflineStore, migrate
from stores.prepare import opened_stores
from stores.publishing import publish_merchants
from stores.redis_store import (
    META_KEY,
    POPULATION_KEY,
    PROGRESS_KEY,
    OnlineStore,
    ledger_key,
    merchant_redis_key,
    profile_key,
)
from tests.batch_job.test_load import load
from tests.conftest import Stack

SCHEMAS = sorted(
    path.name.split("_")[0]
    for path in resources.files("stores").joinpath("migrations").iterdir()
    if path.name.endswith(".sql") and ".rollback." not in path.name
)
OF_TRANSACTIONS = {
    "transactions": "card_id = ANY(%(cards)s)",
    "transaction_ids": "transaction_id = ANY(%(ids)s)",
    "labels": "transaction_id = ANY(%(ids)s)",
    "profiles": "card_id = ANY(%(cards)s)",
    "loads": "finished_at IS NOT NULL",
}
"""The tables that all versions have, and which of their rows are some cards'."""
NEW_COLUMNS = {"record", "ingested_xid"}
"""What an earlier version did not write, or not as this one does."""


@pytest.fixture(scope="module")
def rows(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """A few cards' rows of each table, as this version stored them."""
    path = tmp_path_factory.mktemp("upgrade") / "rows.csv"
    size = ("--rows", "400", "--cards", "7", "--days", "60", "--seed", "4711")
    assert stack.tally("synth", "-o", path, *size).returncode == 0
    load(stack, path)
    with path.open(newline="") as file:
        cards = sorted({stack.card_key.card_id(row["cc_num"]) for row in csv.DictReader(file)})
    with closing(stack.offline()) as offline:
        cursor = offline.sql.cursor(row_factory=psycopg.rows.dict_row)
        found = cursor.execute(
            "SELECT transaction_id FROM transactions WHERE card_id = ANY(%s)", (cards,)
        ).fetchall()
        named = {"cards": cards, "ids": [row["transaction_id"] for row in found]}
        return {
            table: cursor.execute(f"SELECT * FROM {table} WHERE {where}", named).fetchall()
            for table, where in OF_TRANSACTIONS.items()
        }


@pytest.fixture
def older(stack: Stack) -> Iterator[tuple[str, str]]:
    """A Redis database that an earlier version wrote, and an empty database of Postgres."""
    redis_url, postgres_url = stack.settings.store_urls()
    others = postgres_url.rpartition("/")[0]
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("DROP DATABASE IF EXISTS older WITH (FORCE)")
        connection.execute("CREATE DATABASE older")
        own = redis_url.rpartition("/")[0] + "/1"
        with OnlineStore(own) as online:
            online.redis.flushdb()
            write_older_redis(online, stack.card_key.fingerprint)
            yield own, f"{others}/older"
            online.redis.flushdb()
        connection.execute("DROP DATABASE older WITH (FORCE)")


def write_older_redis(online: OnlineStore, key: str) -> None:
    """What claims to be complete, and cannot be read by this version."""
    of_that_version: dict[Any, Any] = {
        "card_key": key,
        "format": "of that version",
        "complete_through_ms": 5,
    }
    online.redis.hset(META_KEY, mapping=of_that_version)
    online.redis.set(PROGRESS_KEY, f"{key} 5 of-that-version")
    online.redis.set(POPULATION_KEY, b"\x01\x06" + bytes(18))
    online.redis.set(merchant_redis_key(b"merchant"), b"\x01\x10" + bytes(6))
    online.redis.set(ledger_key(bytes(16)), b"\x01\x10" + bytes(14))


def write_older(url: str, schema: str, rows: dict[str, list[dict[str, Any]]], key: str) -> None:
    """Makes what the version of a schema had."""
    scheme, rest = url.split("://", 1)
    backend = yoyo.get_backend(f"{scheme}+psycopg://{rest}")
    with (
        closing(backend.connection),
        resources.as_file(resources.files("stores").joinpath("migrations")) as folder,
    ):
        every = yoyo.read_migrations(str(folder))
        backend.apply_migrations(every.filter(lambda migration: migration.id[:4] <= schema))
    with OfflineStore(url) as offline:
        times = [row["event_time"].timestamp() * 1000 for row in rows["transactions"]]
        offline.ensure_partitions(np.array(times, np.int64))
        offline.sql.execute("INSERT INTO installation (card_key_fingerprint) VALUES (%s)", (key,))
        with suppress(psycopg.errors.UndefinedColumn):
            offline.sql.execute("UPDATE installation SET record_format = 'of that version'")
        for table, content in rows.items():
            for row in content:
                names = [name for name in row if name not in NEW_COLUMNS]
                offline.sql.execute(
                    sql.SQL("INSERT INTO {} ({}) VALUES ({})").format(
                        sql.Identifier(table),
                        sql.SQL(", ").join(map(sql.Identifier, names)),
                        sql.SQL(", ").join(sql.Placeholder() * len(names)),
                    ),
                    [row[name] for name in names],
                )


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_earlier_schema_is_brought_up_to_date(stack, rows, older, schema):
    redis_url, postgres_url = older
    write_older(postgres_url, schema, rows, stack.card_key.fingerprint)
    said: list[str] = []
    for _ in range(2):  # the second time there is nothing left to do
        with opened_stores(redis_url, postgres_url, stack.card_key.fingerprint, said.append) as (
            offline,
            online,
        ):
            assert offline.has_current_records
            assert online.is_initialised
    assert [text for text in said if "rebuilt" in text] == ["rebuilt 7 cards"]
    cards = sorted({row["card_id"] for row in rows["transactions"]})
    keys = [key for card in cards for key in (ledger_key(card), profile_key(card))]
    with closing(stack.online()) as current, OnlineStore(redis_url) as online:
        assert online.read(keys) == current.read(keys)
        assert None not in online.read(keys)
        assert online.read([ledger_key(bytes(16))]) == [None]
        with OfflineStore(postgres_url) as offline:
            for table, content in rows.items():
                names = [name for name in content[0] if name != "ingested_xid"]
                stored = offline.sql.execute(f"SELECT {', '.join(names)} FROM {table}").fetchall()
                assert sorted(map(repr, stored)) == sorted(
                    repr(tuple(row[name] for name in names)) for row in content
                ), table
            refresh(offline, rows["transactions"][0]["event_time"].date())
            publish_merchants(offline, online)
        merchants = {row["merchant"] for row in rows["transactions"]}
        assert len(set(online.merchant_keys())) == len(merchants)
    with History(postgres_url) as history:
        assert len(list(history.merchants.all())) == len(merchants)


KILLED = """
import os, signal, sys
from yoyo.migrations import Migration
from stores.postgres import migrate

steps, left = Migration.process_steps, int(sys.argv[2])

def killed(self, *arguments):
    global left
    steps(self, *arguments)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

Migration.process_steps = killed
migrate(sys.argv[1])
"""
"""Applies so many migrations, and is killed before the last of them is noted."""


@pytest.mark.parametrize("number", range(1, len(SCHEMAS) + 1))
def test_a_start_that_is_killed_while_it_makes_the_schema_leaves_nothing_half_done(older, number):
    _, url = older
    command = [sys.executable, "-c", KILLED, url, str(number)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    migrate(url)
    with psycopg.connect(url) as connection:
        found = connection.execute("SELECT migration_id FROM _yoyo_migration ORDER BY 1").fetchall()
    assert [name.split("_")[0] for (name,) in found] == SCHEMAS


def test_a_lock_that_a_killed_start_of_an_earlier_version_left_is_no_lock(older):
    _, url = older
    migrate(url)
    rollback = resources.files("stores").joinpath("migrations", "0009_merchants.rollback.sql")
    with psycopg.connect(url) as connection:
        connection.execute(rollback.read_text())  # something is to be applied, for which it locks
        connection.execute("DELETE FROM _yoyo_migration WHERE migration_id = '0009_merchants'")
        connection.execute("INSERT INTO yoyo_lock (locked, ctime, pid) VALUES (1, now(), 1)")
    migrate(url)
    with psycopg.connect(url) as connection:
        assert connection.execute("SELECT count(*) FROM merchant_facts").fetchone() == (0,)
