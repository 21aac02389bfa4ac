"""Gathering calls: bounded, and every call answered whatever happens to the others."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import structlog

from features import CATALOG, LedgerFormatError, encode_ledger
from server.errors import CallError
from server.logs import configure_logs
from server.online import OnlineAnswers
from server.query import OnlineQuery
from stores.errors import StoreUnavailableError
from stores.redis_store import FORMAT
from tests.oracle import Event
from tests.strategies import ORIGIN_MS, to_records

LEDGER = encode_ledger(to_records([Event(ORIGIN_MS, "t", "m", 100, 1)]))
Mget = Callable[[list[bytes]], Awaitable[list[bytes | None]]]


class Reader:
    """Stands for the connection: what a read gives is up to the test."""

    def __init__(self, mget: Mget) -> None:
        self.mget = mget


def query(card_id: bytes) -> OnlineQuery:
    return OnlineQuery(CATALOG[:3], [card_id], [ORIGIN_MS + 1], [0], [1], [0], [0], [None])


def answers_from(mget: Mget, calls_max: int = 100) -> OnlineAnswers:
    reader: Any = Reader(mget)
    return OnlineAnswers(reader, "key", gather_wait_us=1_000, queued_calls_max=calls_max)


async def stored(keys: list[bytes]) -> list[bytes | None]:
    values: list[bytes | None] = [f"key 5 {FORMAT}".encode()]
    for key in keys[1:]:
        bad = b"bad" in key
        values.append((b"no ledger" if bad else LEDGER) if key.endswith(b"l") else None)
    return values


def test_more_calls_than_allowed_are_refused_and_the_rest_answered():
    async def run() -> list[object]:
        released = asyncio.Event()

        async def slow(keys: list[bytes]) -> list[bytes | None]:
            await released.wait()
            return await stored(keys)

        online = answers_from(slow, calls_max=50)
        calls = [asyncio.create_task(online.answer(query(bytes([i] * 16)))) for i in range(80)]
        await asyncio.sleep(0.1)
        released.set()
        return await asyncio.gather(*calls, return_exceptions=True)

    outcomes = asyncio.run(run())
    refused = [outcome for outcome in outcomes if isinstance(outcome, CallError)]
    assert [error.reason for error in refused] == ["OVERLOADED"] * 30
    assert all(error.retry_after_ms for error in refused)
    assert sum(isinstance(outcome, bytes) for outcome in outcomes) == 50


@pytest.mark.parametrize(
    "failure", [StoreUnavailableError("redis", "gone"), ValueError("a malformed statement")]
)
def test_calls_that_wait_behind_a_failed_read_are_answered_at_once(failure):
    async def run() -> list[object]:
        reads = 0

        async def fails_once(keys: list[bytes]) -> list[bytes | None]:
            nonlocal reads
            reads += 1
            await asyncio.sleep(0.02)
            if reads == 1:
                raise failure
            return await stored(keys)

        online = answers_from(fails_once)
        calls = [asyncio.create_task(online.answer(query(b"0" * 16)))]
        await asyncio.sleep(0.01)
        calls.append(asyncio.create_task(online.answer(query(b"1" * 16))))
        async with asyncio.timeout(1):
            return await asyncio.gather(*calls, return_exceptions=True)

    first, second = asyncio.run(run())
    assert isinstance(first, CallError | ValueError)
    assert isinstance(second, bytes)


def test_a_caller_that_is_gone_takes_nobody_along():
    # One ledger of the batch cannot be read, and whoever asked for it has given up already.
    async def run() -> list[object]:
        released = asyncio.Event()

        async def slow(keys: list[bytes]) -> list[bytes | None]:
            await released.wait()
            return await stored(keys)

        online = answers_from(slow)
        cards = [b"first" + b"." * 11, b"bad" + b"." * 13, b"good" + b"." * 12]
        calls = [asyncio.create_task(online.answer(query(card))) for card in cards]
        await asyncio.sleep(0.05)
        calls[1].cancel()
        await asyncio.sleep(0)
        released.set()
        return await asyncio.gather(*calls, return_exceptions=True)

    first, bad, good = asyncio.run(run())
    assert isinstance(bad, asyncio.CancelledError)
    assert isinstance(first, bytes)
    assert isinstance(good, bytes)


def test_a_ledger_that_cannot_be_read_leaves_other_features_alone():
    async def run() -> list[object]:
        online = answers_from(stored)
        one, other = query(b"bad" + b"." * 13), query(b"good" + b"." * 12)
        other.features = CATALOG[3:5]
        calls = [online.answer(one), online.answer(other)]
        return await asyncio.gather(*calls, return_exceptions=True)

    bad, good = asyncio.run(run())
    assert isinstance(bad, LedgerFormatError)
    assert isinstance(good, bytes)


def test_a_ledger_that_cannot_be_read_fails_its_own_caller_alone():
    async def run() -> list[object]:
        online = answers_from(stored)
        online._until_probe = 0  # so that these three are gathered
        ids = [b"good" * 4, b"bad!" * 4, b"fine" * 4]
        calls = [online.answer(query(card_id)) for card_id in ids]
        return await asyncio.gather(*calls, return_exceptions=True)

    good, bad, fine = asyncio.run(run())
    assert isinstance(good, bytes)
    assert isinstance(bad, ValueError)
    assert isinstance(fine, bytes)


def test_logged_errors_show_no_variables(capsys):
    configure_logs("info")

    def fails(card: str) -> None:
        raise ValueError("something")

    try:
        fails("4000123412341234")
    except ValueError:
        structlog.get_logger().exception("a call failed")
    logged = capsys.readouterr().err
    assert "fails" in json.dumps(json.loads(logged)["exception"])
    assert "4000123412341234" not in logged
