"""GetHistoricalFeatures: the oracle's answers at any instant, rows as they were, faults by row."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import grpc
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tally
from tally.v1 import feature_service_pb2 as pb
from tally.v1.feature_service_pb2_grpc import FeatureServiceStub

from features import CATALOG, Status
from tests.conftest import Stack
from tests.oracle import Question, answer
from tests.parity.test_parity import Cards, cards_of, draw, load_all

POINTS = 250
ROWS = 20_000
MANY = 200_000
NAMES = [feature.name for feature in CATALOG]


@pytest.fixture(scope="module")
def cards(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Cards:
    """Loaded payments of 150 cards over 120 days: four times what a ledger keeps."""
    path = tmp_path_factory.mktemp("historical") / "rows.csv"
    size = ("--rows", str(ROWS), "--days", "120", "--cards", "150", "--seed", "41")
    made = stack.tally("synth", "-o", path, *size)
    assert made.returncode == 0, made.stderr
    load_all(stack, [path])
    return cards_of([path])


def table_of(points: list[tuple[str, Question]]) -> pa.Table:
    """Points as a table."""

    def degrees(value: int | None) -> float | None:
        return None if value is None else value / 1e6

    return pa.table(
        {
            "card": pa.array([card for card, _ in points]),
            "event_time": pa.array([q.time_ms for _, q in points], pa.timestamp("ms", "UTC")),
            "amount": pa.array(
                [None if q.amount_minor is None else q.amount_minor / 100 for _, q in points],
                pa.float64(),
            ),
            "category": pa.array([q.category for _, q in points], pa.string()),
            "merchant_latitude": pa.array([degrees(q.latitude_udeg) for _, q in points]),
            "merchant_longitude": pa.array([degrees(q.longitude_udeg) for _, q in points]),
            "mine": pa.array([f"row {i}" for i in range(len(points))]),
        }
    )


def simple(card: str, n: int = 1) -> pa.Table:
    at = datetime(2024, 3, 1, tzinfo=UTC)
    times = [at + timedelta(minutes=i) for i in range(n)]
    return pa.table({"card": [card] * n, "event_time": pa.array(times, pa.timestamp("us", "UTC"))})


def bits(table: pa.Table) -> dict[str, list]:
    """Columns to the last bit: NaN equals NaN."""
    return {
        name: table[name].to_numpy().view(np.int64).tolist()
        if table[name].type == pa.float64()
        else table[name].to_pylist()
        for name in table.column_names
    }


def test_every_instant_of_the_past_is_answered_as_the_oracle_does(client, cards):
    points = draw(cards, POINTS)
    points.append(("4999999999999999", replace(points[0][1], home=None)))
    got = client.historical(table_of(points))
    assert got["mine"].to_pylist() == [f"row {i}" for i in range(len(points))]
    values = np.column_stack([got[name].to_numpy() for name in NAMES])
    statuses = np.array(got["statuses"].to_pylist())
    for row, (card, question) in enumerate(points):
        known = [event for event, _ in cards[card]] if card in cards else None
        for column, feature in enumerate(CATALOG):
            want, status = answer(feature, known, question, retention=False)
            what = f"{feature.name} at {question}"
            assert Status(statuses[row, column]).name == status.name, what
            value = values[row, column]
            assert np.isnan(value) if want is None else value == want, what


def test_it_agrees_with_online_wherever_online_does_not_flag_the_past(client, cards):
    points = draw(cards, POINTS)
    rows = [
        tally.Row(
            card=card,
            at=q.time_ms,
            amount=None if q.amount_minor is None else q.amount_minor / 100,
            category=q.category,
            merchant_latitude=None if q.latitude_udeg is None else q.latitude_udeg / 1e6,
            merchant_longitude=None if q.longitude_udeg is None else q.longitude_udeg / 1e6,
        )
        for card, q in points
    ]
    online = client.online(rows)
    got = client.historical(table_of(points))
    values = np.column_stack([got[name].to_numpy() for name in NAMES])
    is_kept = online.statuses != pb.FEATURE_STATUS_BEFORE_HISTORY
    same = (values.view(np.int64) == online.values.view(np.int64)) | (
        np.isnan(values) & np.isnan(online.values)
    )
    assert same[is_kept].all()
    assert is_kept.mean() > 0.3
    assert not is_kept.all()


def test_many_points_come_back_in_their_order_whatever_that_is(client, cards):
    rng = np.random.default_rng(5)
    names = sorted(cards)
    chosen = rng.integers(0, len(names), MANY)
    first = min(event.time_ms for history in cards.values() for event, _ in history)
    points = pa.table(
        {
            "number": np.arange(MANY),
            "card": pa.array(names).take(pa.array(chosen)),
            "event_time": pa.array(
                first + rng.integers(0, 120 * 86_400_000, MANY), pa.timestamp("ms", "UTC")
            ),
        }
    )
    features = ["txn_count_last_24_hours", "sum_amt_last_30_days"]
    whole = client.historical(points, features)
    assert whole.column_names == ["number", "card_id", "event_time", *features, "statuses", "known"]
    assert whole["number"].to_numpy().tolist() == list(range(MANY))
    assert whole["event_time"].equals(points["event_time"])
    # As given, one batch after the other, without being put in order of cards.
    answers = client.historical_batches(points, features)
    assert bits(pa.Table.from_batches(list(answers), answers.schema)) == bits(whole)
    few = client.historical(points.slice(150_000, 40), features)
    assert bits(few) == bits(whole.slice(150_000, 40))


def test_files_and_frames_are_points_too(stack, client, cards, tmp_path):
    card = sorted(cards)[0]
    table = simple(card, 5)
    want = client.historical(table, ["txn_count_last_30_days"])
    frame = pd.DataFrame({"card": [card] * 5, "event_time": table["event_time"].to_pandas()})
    frame["card"] = frame["card"].astype("category")
    assert client.historical(frame, ["txn_count_last_30_days"])["txn_count_last_30_days"].equals(
        want["txn_count_last_30_days"]
    )
    path, output = tmp_path / "points.parquet", tmp_path / "out.parquet"
    pq.write_table(table, path)
    made = stack.tally("historical", path, "-o", output, "-f", "txn_count_last_30_days")
    assert made.returncode == 0, made.stderr
    written = pq.read_table(output)
    assert written.equals(want)
    assert written.schema.metadata[b"tally.catalog_fingerprint"]
    text = tmp_path / "points.csv"
    text.write_text(f"card,event_time,note\n{card},2024-03-01T00:00:00Z,a\n")
    assert client.historical(text, ["amt"])["note"].to_pylist() == ["a"]
    assert list(tmp_path.glob("*.part")) == []


def changed(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    index = table.schema.get_field_index(name)
    if index < 0:
        return table.append_column(name, values)
    return table.set_column(index, name, values)


GOOD = simple("4000123412341234", 3)
NAIVE = pa.array([datetime(2024, 3, 1)] * 3, pa.timestamp("us"))


@pytest.mark.parametrize(
    ("table", "field"),
    [
        (GOOD.drop_columns("card"), "header.schema.card"),
        (GOOD.drop_columns("event_time"), "header.schema.event_time"),
        (changed(GOOD, "card", pa.array([4000123412341234] * 3)), "header.schema.card"),
        (changed(GOOD, "event_time", NAIVE), "header.schema.event_time"),
        (changed(GOOD, "amount", pa.array(["1"] * 3)), "header.schema.amount"),
        (changed(GOOD, "known", pa.array([True] * 3)), "header.schema.known"),
        (changed(GOOD, "txn_count_last_1_hour", pa.array([1.0] * 3)), "txn_count_last_1_hour"),
        (changed(GOOD, "card_id", pa.array([b"x" * 16] * 3)), "header.schema.card"),
        (changed(GOOD, "card", pa.array(["4000123412341234", None, None])), "points[0].card[1]"),
        (changed(GOOD, "card", pa.array(["4000123412341234", "4", "x"])), "points[0].card[1]"),
        (
            changed(GOOD, "event_time", pa.array([0, None, 0], pa.timestamp("us", "UTC"))),
            "points[0].event_time[1]",
        ),
        (
            changed(GOOD, "event_time", pa.array([0, 0, -1], pa.timestamp("ms", "UTC"))),
            "points[0].event_time[2]",
        ),
        (changed(GOOD, "amount", pa.array([1.0, 1.001, None])), "points[0].amount[1]"),
        (changed(GOOD, "amount", pa.array([1.0, float("nan"), None])), "points[0].amount[1]"),
        (changed(GOOD, "merchant_latitude", pa.array([0.0, 0.0, 91.0])), "merchant_latitude[2]"),
        (changed(GOOD, "category", pa.array(["x" * 65] * 3)), "points[0].category[0]"),
        (changed(GOOD, "merchant", pa.array(["x" * 257] * 3)), "points[0].merchant[0]"),
    ],
)
def test_malformed_points_are_refused_with_column_and_row(client, table, field):
    with pytest.raises(tally.InvalidRequestError) as caught:
        client.historical(table)
    assert field in caught.value.violations[0].field
    assert "4000123412341234" not in str(caught.value)


def test_what_is_fine_but_odd(client):
    assert len(client.historical(GOOD.slice(0, 0))) == 0
    nanoseconds = changed(
        GOOD, "event_time", pa.array([1_709_251_200_000_999_999] * 3, pa.timestamp("ns", "UTC"))
    )
    seconds = changed(GOOD, "event_time", pa.array([1_709_251_200] * 3, pa.timestamp("s", "UTC")))
    names = ["hour_of_day"]
    assert client.historical(nanoseconds, names)["hour_of_day"].equals(
        client.historical(seconds, names)["hour_of_day"]
    )
    with pytest.raises(tally.InvalidRequestError, match="txn_count_last_1_hours"):
        client.historical(GOOD, ["txn_count_last_1_hours"])


def test_a_stream_that_is_none_of_ours_is_refused(stack):
    schema = GOOD.schema.serialize().to_pybytes()
    header = pb.GetHistoricalFeaturesRequest(header=pb.HistoricalHeader(schema=schema))
    streams = {
        "header": [pb.GetHistoricalFeaturesRequest(points=b"x")],
        "header.schema": [
            pb.GetHistoricalFeaturesRequest(header=pb.HistoricalHeader(schema=b"\xff" * 40))
        ],
        "points[0]": [header, pb.GetHistoricalFeaturesRequest(points=b"\xff" * 100)],
        "points": [header, header],
    }
    with grpc.insecure_channel(stack.address) as channel:
        for field, requests in streams.items():
            with pytest.raises(grpc.RpcError) as caught:
                list(FeatureServiceStub(channel).GetHistoricalFeatures(iter(requests)))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert str(caught.value.details()).startswith(f"{field}:")
        with pytest.raises(grpc.RpcError) as caught:
            list(FeatureServiceStub(channel).GetHistoricalFeatures(iter([])))
        assert str(caught.value.details()).startswith("header:")


def test_a_caller_may_stop_at_any_time(stack, client, cards):
    points = pa.concat_tables([simple(card, 3_000) for card in sorted(cards)[:100]])
    for _ in range(5):
        with tally.Client(stack.address) as leaving:
            answers = iter(leaving.historical_batches(points, ["txn_count_last_7_days"]))
            next(answers)
    assert len(client.historical(GOOD)) == 3


def test_what_was_good_before_a_fault_is_answered(client, cards):
    card = sorted(cards)[0]
    good, bad = simple(card, 70_000), simple("4", 1)
    answers = iter(client.historical_batches(pa.concat_tables([good, bad]), ["amt"]))
    assert sum(len(next(answers)) for _ in range(2)) == 70_000
    with pytest.raises(tally.InvalidRequestError) as caught:
        next(answers)
    assert "card[0]" in caught.value.violations[0].field
