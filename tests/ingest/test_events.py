"""Every kind of poison ends where it should, with its reason; the rest is unaffected."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tally.v1 import events_pb2

from features import CardKey
from ingest.events import Format, decode_labels, decode_transactions
from ingest.profiles import profiles_of
from stores.arrow import to_ms

KEY = CardKey(b"a secret of some length" * 2)
NOW = datetime(2026, 1, 1, tzinfo=UTC)
CARD = "4111111111111111"


def tally_json(**changed: Any) -> bytes:
    event: dict[str, Any] = {
        "transaction_id": "t1",
        "card": CARD,
        "event_time": "2025-06-01T12:00:00.125Z",
        "amount": 12.34,
        "merchant": "Kirlin",
        "category": "travel",
        "merchant_latitude": 33.9,
        "merchant_longitude": -81.2,
    }
    event |= changed
    return json.dumps({name: v for name, v in event.items() if v is not ...}).encode()


def protobuf(**changed: Any) -> bytes:
    event: dict[str, Any] = {
        "transaction_id": "t1",
        "card": CARD,
        "event_time_ms": 1_748_779_200_125,
        "amount_minor": 1234,
        "merchant": "Kirlin",
        "category": "travel",
        "merchant_latitude": 33.9,
        "merchant_longitude": -81.2,
    }
    return events_pb2.Transaction(**event | changed).SerializeToString()


def kaggle_json(**changed: Any) -> bytes:
    event: dict[str, Any] = {
        "trans_num": "t1",
        "cc_num": CARD,
        "trans_date_trans_time": "2025-06-01 12:00:00.125",
        "amt": "12.34",
        "merchant": "fraud_Kirlin",
        "category": "travel",
        "merch_lat": 33.9,
        "merch_long": -81.2,
    }
    return json.dumps(event | changed).encode()


@pytest.mark.parametrize(
    ("form", "value"),
    [
        (Format.TALLY, tally_json()),
        (Format.TALLY, tally_json(event_time=1_748_779_200_125)),
        (Format.TALLY, tally_json(card=..., card_id=KEY.card_id(CARD).hex())),
        (Format.PROTOBUF, protobuf()),
        (Format.KAGGLE, kaggle_json()),
        (Format.KAGGLE, kaggle_json(cc_num=int(CARD), amt=12.34)),
    ],
)
def test_every_format_says_the_same(form, value):
    facts, refusals = decode_transactions([value], form, KEY.card_id, NOW)
    assert refusals == []
    (row,) = facts.transactions.to_pylist()
    assert to_ms(facts.transactions["event_time"]).tolist() == [1_748_779_200_125]
    assert row["card_id"] == KEY.card_id(CARD)
    assert (row["transaction_id"], row["amount_minor"]) == ("t1", 1234)
    assert (row["merchant"], row["category"]) == ("Kirlin", "travel")
    assert (row["merchant_latitude"], row["merchant_longitude"]) == (33.9, -81.2)


POISON = [
    (Format.TALLY, b"not json", "NOT_JSON"),
    (Format.TALLY, b"[1]", "NOT_JSON"),
    (Format.TALLY, b"", "NOT_JSON"),
    (Format.TALLY, b"\xff\xfe", "NOT_JSON"),
    (Format.TALLY, None, "EMPTY"),
    (Format.TALLY, b" " * (1 << 20), "TOO_LARGE"),
    (Format.TALLY, tally_json(merchant=...), "MISSING_FIELD"),
    (Format.TALLY, tally_json(card=...), "MISSING_FIELD"),
    (Format.TALLY, tally_json(card=4.1e18), "CARD_PRECISION_LOST"),
    (Format.TALLY, tally_json(card="4" * 20), "BAD_CARD"),
    (Format.TALLY, tally_json(card_id="xyz"), "BAD_CARD"),
    (Format.TALLY, tally_json(amount="NaN"), "BAD_AMOUNT"),
    (Format.TALLY, tally_json(amount=1e12), "AMOUNT_OUT_OF_RANGE"),
    (Format.TALLY, tally_json(amount=[1]), "BAD_TYPE"),
    (Format.TALLY, tally_json(amount=1.234), "AMOUNT_NOT_MINOR"),
    (Format.TALLY, tally_json(amount=True), "BAD_TYPE"),
    (Format.TALLY, tally_json(event_time=True), "BAD_TYPE"),
    (Format.TALLY, tally_json(transaction_id="a\0b"), "BAD_ENCODING"),
    (Format.TALLY, tally_json(event_time="2100-01-01T00:00:00Z"), "TIME_OUT_OF_RANGE"),
    (Format.TALLY, tally_json(event_time=5_000_000_000_000), "TIME_OUT_OF_RANGE"),
    (Format.TALLY, tally_json(event_time="soon"), "BAD_TIME"),
    (Format.TALLY, tally_json(transaction_id="x" * 65), "BAD_TRANSACTION_ID"),
    (Format.TALLY, tally_json(merchant_latitude=91), "BAD_POSITION"),
    (Format.PROTOBUF, protobuf()[:-3], "NOT_PROTOBUF"),
    (Format.PROTOBUF, protobuf(event_time_ms=-1), "TIME_OUT_OF_RANGE"),
    (Format.PROTOBUF, protobuf(merchant=""), "MISSING_FIELD"),
    (Format.PROTOBUF, protobuf(merchant_latitude=float("nan")), "BAD_POSITION"),
    (Format.KAGGLE, kaggle_json(cc_num="2.29E+15"), "CARD_PRECISION_LOST"),
    (Format.KAGGLE, kaggle_json(amt=None), "BAD_AMOUNT"),
]


@pytest.mark.parametrize(("form", "value", "reason"), POISON)
def test_poison_is_refused_with_its_reason_and_the_rest_is_taken(form, value, reason):
    good = {Format.TALLY: tally_json, Format.PROTOBUF: protobuf, Format.KAGGLE: kaggle_json}[form]
    values = [good(), value, good()]
    facts, refusals = decode_transactions(values, form, KEY.card_id, NOW)
    assert [(refusal.row, refusal.reason) for refusal in refusals] == [(1, reason)]
    assert facts.rows.tolist() == [0, 2]
    assert len(facts.transactions) == 2


@pytest.mark.parametrize(
    "value",
    [
        tally_json(amount=-20.0),
        tally_json(card="4" * 19),
        tally_json(category="no such category"),
        tally_json(category=None),
        tally_json(event_time="1970-01-01T00:00:00Z"),
        tally_json(merchant_latitude=None, merchant_longitude=None),
    ],
)
def test_what_is_odd_but_clear_is_taken(value):
    facts, refusals = decode_transactions([value], Format.TALLY, KEY.card_id, NOW)
    assert (len(facts.transactions), refusals) == (1, [])


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b'{"transaction_id": "t", "is_fraud": true, "label_time": "2025-01-01T00:00:00Z"}', None),
        (b'{"transaction_id": "t", "is_fraud": 0, "label_time": 1735689600000}', None),
        (b'{"transaction_id": "t", "is_fraud": 2, "label_time": 1735689600000}', "BAD_LABEL"),
        (b'{"transaction_id": "t", "is_fraud": [], "label_time": 1735689600000}', "BAD_TYPE"),
        (b'{"transaction_id": "t", "is_fraud": "1", "label_time": 1735689600000}', None),
        (b'{"transaction_id": 5, "is_fraud": 1, "label_time": 1735689600000}', None),
        (b'{"transaction_id": "a\\u0000b", "is_fraud": 1, "label_time": 0}', "BAD_ENCODING"),
        (b'{"transaction_id": "t", "is_fraud": 1, "label_time": true}', "BAD_TIME"),
        (b'{"transaction_id": "t", "is_fraud": 1, "label_time": -1}', "TIME_OUT_OF_RANGE"),
        (
            b'{"transaction_id": "t", "is_fraud": 1, "label_time": "0001-01-01T00:00:00+05:00"}',
            "BAD_TIME",
        ),
        (
            b'{"transaction_id": "t", "is_fraud": 1, "label_time": "9999-12-31T23:59:59-05:00"}',
            "BAD_TIME",
        ),
        (
            b'{"transaction_id": "t", "is_fraud": 1, "label_time": "1969-12-31T00:00:00Z"}',
            "TIME_OUT_OF_RANGE",
        ),
        (b'{"transaction_id": "t", "is_fraud": true, "label_time": "then"}', "BAD_TIME"),
        (b'{"transaction_id": "t", "is_fraud": true}', "BAD_TIME"),
        (b'{"is_fraud": true, "label_time": 1735689600000}', "BAD_TRANSACTION_ID"),
        (b"{", "NOT_JSON"),
    ],
)
def test_labels(value, reason):
    labels, rows, refusals = decode_labels([value], Format.TALLY)
    assert [refusal.reason for refusal in refusals] == ([reason] if reason else [])
    assert rows == ([] if reason else [0])
    assert len(labels) == len(rows)


def test_labels_of_the_contract():
    nul = events_pb2.Label(transaction_id="n\0l", is_fraud=True)
    nul.label_time.FromSeconds(5)
    far = events_pb2.Label(transaction_id=" t ", is_fraud=True)
    far.label_time.FromSeconds(5_000_000_000)
    good = events_pb2.Label(transaction_id=" t ", is_fraud=True)
    good.label_time.FromSeconds(5)
    values = [message.SerializeToString() for message in (nul, far, good)]
    labels, rows, refusals = decode_labels(values, Format.PROTOBUF)
    assert [r.reason for r in refusals] == ["BAD_ENCODING", "TIME_OUT_OF_RANGE"]
    assert rows == [2]
    assert labels["transaction_id"].to_pylist() == ["t"]  # as that of the transaction is


def test_a_profile_does_not_depend_on_what_others_of_the_batch_say():
    holder = {"lat": "33.9", "long": "-80.9", "gender": "F", "dob": "1968-03-19"}
    values = [
        kaggle_json(**holder),
        kaggle_json(trans_num="t2"),
        kaggle_json(trans_num="t3", job="Chef"),
    ]
    facts, _ = decode_transactions(values, Format.KAGGLE, KEY.card_id, NOW)
    together = profiles_of(facts, np.empty(0, np.int64))
    apart = []
    for value in values:
        facts, _ = decode_transactions([value], Format.KAGGLE, KEY.card_id, NOW)
        apart.append(profiles_of(facts, np.empty(0, np.int64)))
    assert together.sort_by("content").equals(pa.concat_tables(apart).sort_by("content"))
    assert len(together) == 2


def test_no_refusal_repeats_a_card_number():
    values = [
        tally_json(merchant=...),
        tally_json(card=CARD + "9" * 8),
        b'{"card": "' + CARD.encode(),
    ]
    _, refusals = decode_transactions(values, Format.TALLY, KEY.card_id, NOW)
    assert len(refusals) == 3
    assert not any(CARD[:12] in refusal.detail for refusal in refusals)
