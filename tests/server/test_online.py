"""GetOnlineFeatures end to end: what it answers, and what the answer is worth."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import grpc
import numpy as np
import pytest
import tally
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from features import CATALOG, CATALOG_FINGERPRINT, CATEGORIES
from tests.batch_job.kaggle_rows import row, write
from tests.batch_job.test_load import load, new_card, new_id

T = datetime(2024, 3, 1, 10, tzinfo=UTC)


@pytest.fixture(scope="module")
def card(stack, tmp_path_factory):
    """A card with payments at T, one minute before, and two days before."""
    card = new_card()
    times = ["2024-03-01 10:00:00", "2024-03-01 09:59:00", "2024-02-28 10:00:00"]
    rows = [
        row(cc_num=card, trans_num=new_id(), trans_date_trans_time=t, amt="10.00") for t in times
    ]
    load(stack, write(tmp_path_factory.mktemp("card") / "a.csv", rows))
    return card


def ask(client: tally.Client, card: str, at: datetime, name: str, **given):
    answer = client.online([tally.Row(card=card, at=at, **given)], [name])
    return answer.to_dicts()[0][name] if not answer.exceptions(0) else answer.exceptions(0)[name]


def test_a_quiet_card_decays_while_nothing_is_written(client, card):
    name = "txn_count_last_10_min"
    minute = timedelta(minutes=1)
    asked = [T, T + minute / 60, T + 9 * minute, T + 10 * minute, T + 10 * minute + minute / 60]
    assert [ask(client, card, at, name) for at in asked] == [1, 2, 2, 1, 0]


def test_an_empty_window_has_a_count_and_no_mean(client, card):
    later = T + timedelta(days=2)
    assert ask(client, card, later, "txn_count_last_1_hour") == 0
    assert ask(client, card, later, "avg_amt_last_1_hour") == "EMPTY_WINDOW"


def test_an_unknown_card_says_so(client):
    answer = client.online(
        [tally.Row(card="4000000000000000000")], ["txn_count_last_1_hour", "is_night"]
    )
    assert not answer.known[0]
    assert answer.exceptions(0) == {"txn_count_last_1_hour": "UNKNOWN_CARD"}
    assert np.isnan(answer.values[0, 0])


def test_an_instant_before_the_kept_history_is_flagged(stack, client, tmp_path):
    card = new_card()
    times = ["2023-01-01 00:00:00", "2024-03-01 10:00:00"]
    rows = [row(cc_num=card, trans_num=new_id(), trans_date_trans_time=t) for t in times]
    load(stack, write(tmp_path / "a.csv", rows))
    long_ago = datetime(2023, 1, 2, tzinfo=UTC)
    assert ask(client, card, long_ago, "txn_count_last_7_days") == "BEFORE_HISTORY"
    assert ask(client, card, T, "txn_count_last_30_days") == 0


def test_names_values_statuses_and_fingerprint_come_back(client, card):
    rows = [tally.Row(card=card, at=T), tally.Row(card="4000000000000000000", at=T)]
    answer = client.online(rows)
    assert answer.names == tuple(feature.name for feature in CATALOG)
    assert answer.values.shape == (2, len(CATALOG))
    assert answer.known.tolist() == [True, False]
    assert answer.as_of_ms.tolist() == [round(T.timestamp() * 1000)] * 2
    assert answer.catalog_fingerprint == CATALOG_FINGERPRINT
    assert (np.isnan(answer.values) == (answer.statuses != 1)).all()
    assert answer.complete_through_ms[0] >= round(T.timestamp() * 1000)


def test_now_is_the_default(client, card):
    before = time.time_ns() // 1_000_000
    answer = client.online([tally.Row(card=card)], ["seconds_since_last_txn"])
    assert before <= answer.as_of_ms[0] <= time.time_ns() // 1_000_000


def test_the_distance_is_from_home_as_the_profile_has_it(client, card):
    here = {"merchant_latitude": 33.9659, "merchant_longitude": -80.9355}
    assert ask(client, card, T, "distance_to_merchant", **here) == 0
    assert ask(client, card, T, "distance_to_merchant") == "MISSING_INPUT"


def test_stale_when_less_complete_than_asked(client, card):
    with pytest.raises(tally.StaleError) as caught:
        client.online([tally.Row(card=card)], complete_through=datetime(2090, 1, 1, tzinfo=UTC))
    assert caught.value.reason == "STALE"
    assert int(caught.value.metadata["asked_ms"]) > int(
        caught.value.metadata["complete_through_ms"]
    )
    assert client.online([tally.Row(card=card)], complete_through=T).known[0]


def test_ten_thousand_rows_are_answered_in_order(client, card):
    unknown = "4000000000000000000"
    rows = [
        tally.Row(card=card if i % 3 else unknown, at=T + timedelta(seconds=i))
        for i in range(10_000)
    ]
    answer = client.online(rows, ["txn_count_last_10_min", "amt"])
    assert answer.known.tolist() == [bool(i % 3) for i in range(10_000)]
    one_by_one = [client.online([rows[i]], ["txn_count_last_10_min"]) for i in (1, 500, 601, 9_999)]
    for i, alone in zip((1, 500, 601, 9_999), one_by_one, strict=True):
        assert alone.values[0, 0].tobytes() == answer.values[i, 0].tobytes()


def test_overlapping_calls_share_a_read_and_keep_their_own_answers(stack, card):
    names = [f.name for f in CATALOG]

    async def many():
        async with tally.AsyncClient(stack.address) as client:
            calls = [
                client.online(
                    [tally.Row(card=card, at=T + timedelta(seconds=i)) for _ in range(i % 3 + 1)],
                    names[i % 5 :: 7],
                )
                for i in range(300)
            ]
            return await asyncio.gather(*calls)

    answers = asyncio.run(many())
    with tally.Client(stack.address) as client, ThreadPoolExecutor(1) as one:
        for i, answer in enumerate(answers):
            assert answer.names == tuple(names[i % 5 :: 7])
            if i % 20:
                continue
            rows = [tally.Row(card=card, at=T + timedelta(seconds=i)) for _ in range(i % 3 + 1)]
            alone = one.submit(client.online, rows, names[i % 5 :: 7]).result()
            assert alone.values.tobytes() == answer.values.tobytes()


def test_the_catalogue_is_the_code(client):
    catalog = client.catalog()
    assert [f.name for f in catalog.features] == [f.name for f in CATALOG]
    assert [f.window_ms for f in catalog.features] == [f.window_ms for f in CATALOG]
    assert tuple(catalog.categories) == CATEGORIES


def test_health_and_reflection_are_there(stack):
    with grpc.insecure_channel(stack.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "tally.v1.FeatureService", "tally.v1.AdminService"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        services = ProtoReflectionDescriptorDatabase(channel).get_services()
        assert {"tally.v1.FeatureService", "tally.v1.AdminService"} <= set(services)


def test_results_go_to_pandas_and_arrow(client, card):
    answer = client.online([tally.Row(card=card, at=T)], ["amt", "txn_count_last_24_hours"])
    assert answer.to_pandas()["txn_count_last_24_hours"].tolist() == [1.0]
    assert answer.to_arrow().to_pylist() == [{"amt": None, "txn_count_last_24_hours": 1.0}]


def test_a_time_without_a_zone_is_refused_by_the_client():
    with pytest.raises(ValueError, match="no time zone"):
        tally.Row(card="4111111111111111", at=datetime(2024, 1, 1)).to_message()
