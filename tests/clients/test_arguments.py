"""Arguments of the SDK: what is taken, and what the error says of anything else."""
# Wrong types are what this is about:
# mypy: disable-error-code="arg-type,list-item"

from __future__ import annotations

import asyncio
import copy
import pickle
import random
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import tally
from hypothesis import given
from hypothesis import strategies as st
from tally.exports import export_request
from tally.instants import to_ms, to_timestamp
from tally.rows import online_request

AT = datetime(2024, 3, 1, 10, tzinfo=UTC)
AT_MS = 1_709_287_200_000
CARD = "4000123412341234"


def test_a_card_number_that_is_no_text_says_why_it_must_be():
    for card, what in (
        (4000123412341234, "card takes the card number as text .*, not int: 19 digits do not fit"),
        (np.int64(4000123412341234), "card takes the card number as text .*, not int64: 19 digits"),
        (4.000123412341234e15, "not float: .*CARD_PRECISION_LOST"),
        (np.float64(4e15), "not float64: .*CARD_PRECISION_LOST"),
        (float("nan"), "not float"),
        (Decimal(4000123412341234), "not Decimal"),
        (b"4000123412341234", "not bytes"),
        (True, "not bool"),
        (pd.NA, "not NAType"),
    ):
        with pytest.raises(TypeError, match=what):
            tally.Row(card=card)
    assert tally.Row(card=np.str_(CARD)).to_message().card == CARD


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("card_id", "00" * 16, r"16 bytes .*, not str: bytes.fromhex"),
        ("at", "2024-03-01T10:00:00Z", r"at takes a datetime .*, not str: datetime.fromisoformat"),
        ("at", 1_709_287_200.5, "at takes a datetime with a time zone, or whole milliseconds"),
        ("at", date(2024, 3, 1), "at takes a datetime .*, not date"),
        ("at", True, "at takes .*, not bool"),
        ("at", pd.NA, "at takes .*, not NAType"),
        ("amount", "12.34", r"amount takes a number .*, not str: float\(text\)"),
        ("amount", True, "amount takes a number .*, not bool"),
        ("amount", np.True_, "amount takes a number .*, not bool"),
        ("amount", np.float32(12.34), "amount takes a float of 64 bits, .*, not float32"),
        ("amount", np.array([1.0]), "amount takes a number .*, not ndarray"),
        ("amount", 1j, "amount takes a number .*, not complex"),
        ("merchant", float("nan"), "merchant takes text .*, not float: None where there is none"),
        ("merchant", 7, "merchant takes text .*, not int"),
        ("category", b"travel", "category takes text .*, not bytes"),
        ("merchant_latitude", "40.1", "merchant_latitude takes a number"),
        ("merchant_longitude", False, "merchant_longitude takes a number"),
    ],
)
def test_a_field_of_a_wrong_type_says_what_it_takes(field, value, what):
    with pytest.raises(TypeError, match=what):
        tally.Row(**({"card": CARD} | {field: value}))


@pytest.mark.parametrize(
    ("instant", "what"),
    [
        (datetime(2024, 3, 1), "at: 2024-03-01T00:00:00 has no time zone"),
        (pd.Timestamp("2024-03-01"), "has no time zone"),
        (pd.NaT, "at is NaT"),
        (np.datetime64("NaT"), "at is NaT"),
    ],
)
def test_an_instant_that_could_be_any_is_a_value_error(instant, what):
    with pytest.raises(ValueError, match=what):
        tally.Row(card=CARD, at=instant)


@pytest.mark.parametrize(
    "instant",
    [
        AT,
        AT.astimezone(timezone(timedelta(hours=-7))),
        AT_MS,
        np.int64(AT_MS),
        np.uint64(AT_MS),
        np.datetime64("2024-03-01T10:00:00"),
        np.datetime64("2024-03-01T10:00:00.000000000", "ns"),
        np.datetime64(AT_MS // 3_600_000, "h"),
        pd.Timestamp(AT),
        pd.Timestamp("2024-03-01 11:00", tz="Europe/Berlin"),
    ],
)
def test_instants_of_numpy_and_pandas_are_taken(instant):
    assert tally.Row(card=CARD, at=instant).to_message().event_time_ms == AT_MS
    assert to_timestamp(instant).seconds == AT_MS // 1000
    assert tally.TimeRange(instant, None).to_message().start_time.seconds == AT_MS // 1000


@given(st.integers(0, 4_102_444_800_000_000))
def test_an_instant_of_any_kind_is_the_same_millisecond(micros):
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=micros)
    naive = np.datetime64(micros, "us")
    for instant in (moment, naive, pd.Timestamp(moment), naive.astype("datetime64[ns]")):
        assert to_ms(instant) == micros // 1000
        assert to_timestamp(instant).ToMicroseconds() == micros
    assert to_ms(np.datetime64(micros // 1000, "ms")) == micros // 1000


@pytest.mark.parametrize(
    ("amount", "want"),
    [
        (12, 12.0),
        (np.int32(12), 12.0),
        (np.float64(12.34), 12.34),
        (Decimal("12.34"), 12.34),
        (Decimal("9999999999.99"), 9999999999.99),
        (Decimal("1E+3"), 1000.0),
        (Fraction(5, 4), 1.25),
    ],
)
def test_amounts_of_other_types_are_taken_exactly(amount, want):
    assert tally.Row(card=CARD, amount=amount).to_message().amount == want
    assert tally.Row(card=CARD, merchant_latitude=np.float32(1.5)).merchant_latitude == 1.5


@given(st.integers(-(10**12), 10**12))
def test_a_decimal_is_the_same_hundredths(minor):
    row = tally.Row(card=CARD, amount=Decimal(minor).scaleb(-2))
    assert round(row.to_message().amount * 100) == minor


@pytest.mark.parametrize("amount", ["0.001", "12345678.901", "NaN", "Infinity", "sNaN"])
def test_a_decimal_of_other_digits_is_a_value_error(amount):
    with pytest.raises(ValueError, match="amount must be a whole number of hundredths"):
        tally.Row(card=CARD, amount=Decimal(amount))


ROW = tally.Row(card=CARD)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (([ROW], "amt"), r"features takes a sequence of names \(str\), not str: \['amt'\]"),
        (([ROW], b"amt"), "features takes .*, not bytes"),
        (([ROW], None), "features takes .*, not NoneType"),
        (([ROW], ["amt", 7]), r"features\[1\] takes a name"),
        ((ROW,), r"rows takes several rows .*, not Row: \[row\]"),
        (([ROW, {"card": CARD}],), r"rows\[1\] takes a row .*, not dict"),
        ((CARD,), r"rows\[0\] takes a row .*, not str"),
        (([ROW], ["amt"], "2024"), "complete_through takes a datetime"),
    ],
)
def test_a_call_with_arguments_of_wrong_types_names_them(arguments, what):
    with pytest.raises(TypeError, match=what):
        online_request(*arguments)
    assert online_request(iter([ROW]), np.array(["amt"])).features == ["amt"]


def test_other_calls_name_arguments_of_wrong_types():
    with tally.Client("127.0.0.1:1") as client:
        for call, what in (
            (
                lambda: client.export("transactions", card_ids=b"x" * 16),
                "card_ids takes a sequence",
            ),
            (
                lambda: client.export("transactions", card_ids=["00"]),
                r"card_ids\[0\] takes 16 bytes",
            ),
            (
                lambda: client.export("transactions", event_time=(AT, AT)),
                "event_time takes a tally",
            ),
            (lambda: client.resume_export("abc"), "cursor takes"),
            (lambda: client.sync(card_id="00"), "card_id takes 16 bytes"),
            (lambda: client.sync(changed_since="2024"), "changed_since takes a datetime"),
            (lambda: tally.TimeRange("2024-01-01", AT), "start takes a datetime"),
            (lambda: tally.TimeRange(AT, date(2024, 1, 1)), "end takes a datetime"),
            (lambda: tally.Client(7600), "address takes host:port"),
            (lambda: tally.AsyncClient(None), "address takes host:port"),
            (lambda: tally.Client("127.0.0.1:1", {"token": "x"}), "config takes a tally"),
            (lambda: tally.ClientConfig(token=b"x"), "token takes text"),
            (lambda: tally.ClientConfig(deadline_ms="5"), "deadline_ms takes whole milliseconds"),
            (
                lambda: tally.TlsConfig(server_root_ca="ca.pem"),
                "server_root_ca takes PEM .*read_by",
            ),
        ):
            with pytest.raises(TypeError, match=what):
                call()
        with pytest.raises(ValueError, match="source is postgres or redis, not 'Postgres'"):
            client.sync("Postgres")
        with pytest.raises(ValueError, match=r"what is one of transactions, .*, not 'everything'"):
            export_request("everything")


@pytest.mark.parametrize("kind", [tally.Client, tally.AsyncClient])
@pytest.mark.parametrize("take", [pickle.dumps, copy.copy, copy.deepcopy], ids=lambda f: f.__name__)
def test_a_client_is_neither_pickled_nor_copied(kind, take):
    with pytest.raises(TypeError, match="make one in each process"):
        take(kind("127.0.0.1:1"))


def every_call(client):
    points = pd.DataFrame({"card": [CARD], "event_time": [pd.Timestamp(AT)]})
    return {
        "online": lambda: client.online([ROW], ["amt"]),
        "historical_batches": lambda: client.historical_batches(points, ["amt"]),
        "catalog": lambda: client.catalog(),
        "status": lambda: client.status(),
    }


def test_a_closed_client_says_so(stack):
    client = tally.Client(stack.address)
    calls = every_call(client) | {
        "export": lambda: client.export("labels"),
        "sync": lambda: client.sync(dry_run=True),
    }
    client.catalog()
    client.close()
    client.close()
    for call in calls.values():
        with pytest.raises(tally.ClientStateError, match="the client is closed") as caught:
            call()
        assert isinstance(caught.value, tally.TallyError)
        again = pickle.loads(pickle.dumps(caught.value))
        assert (str(again), again.code) == (str(caught.value), caught.value.code)


def test_a_closed_async_client_says_so(stack):
    async def ask():
        client = tally.AsyncClient(stack.address)
        await client.catalog()
        await client.close()
        await client.close()
        for call in every_call(client).values():
            with pytest.raises(tally.ClientStateError, match="the client is closed"):
                await call()

    asyncio.run(ask())


def test_an_async_client_in_another_loop_says_so(stack):
    client = tally.AsyncClient(stack.address)  # outside of any loop

    async def ask():
        assert (await client.catalog()).features

    async def ask_elsewhere():
        calls = list(every_call(client).values())
        random.shuffle(calls)
        for call in calls:
            with pytest.raises(tally.ClientStateError, match="another event loop"):
                await call()

    with asyncio.Runner() as first, asyncio.Runner() as second:
        first.run(ask())
        second.run(ask_elsewhere())
        with pytest.raises(tally.ClientStateError, match="another event loop"):
            second.run(client.close())
        first.run(ask())
        first.run(client.close())


def test_calls_that_are_under_way_when_a_client_is_closed_say_so(stack):
    points = pd.DataFrame(
        {
            "card": [CARD] * 200_000,
            "event_time": pd.date_range("2024-01-01", periods=200_000, freq="s", tz="UTC"),
        }
    )
    client = tally.Client(stack.address)
    answers = iter(client.historical_batches(points, rows_together=1))
    next(answers)
    client.close()
    with pytest.raises(tally.ClientStateError, match="the client is closed"):
        list(answers)

    async def ask():
        other = tally.AsyncClient(stack.address)
        batches = aiter(await other.historical_batches(points, rows_together=1))
        await anext(batches)
        await other.close()
        with pytest.raises(tally.ClientStateError, match="the client is closed"):
            async for _ in batches:
                pass

    asyncio.run(ask())


def test_a_task_that_is_cancelled_while_it_waits_is_cancelled(stack):
    async def ask():
        async with tally.AsyncClient(stack.address) as client:
            task = asyncio.create_task(client.online([ROW]))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(ask())
