"""GetHistoricalFeatures: the oracle's answers at any instant, rows as they were, faults by row."""

from __future__ import annotations

import asyncio
import csv
import gzip
import subprocess
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import grpc
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
import tally
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given, settings
from hypothesis import strategies as st
from tally.v1 import feature_service_pb2 as pb
from tally.v1.feature_service_pb2_grpc import FeatureServiceStub

from features import CATALOG, Status
from stores.arrow import LABELS, TRANSACTIONS, with_records
from tests import slices
from tests.commands import TALLY
from tests.conftest import Stack, loaded, run_tally
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
    points.append(("4999999999999999", replace(points[0][1], holder=None)))
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


def test_many_points_come_back_in_their_order_whatever_that_is(stack, client, cards):
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
    # As given, one batch after the other, without being put in order of cards; and some at a time.
    for rows_together in (1, 50_000):
        answers = client.historical_batches(points, features, rows_together=rows_together)
        assert bits(pa.Table.from_batches(answers, answers.schema)) == bits(whole)

    async def ask() -> pa.Table:
        async with tally.AsyncClient(stack.address) as other:
            later = await other.historical_batches(points, features, rows_together=50_000)
            return pa.Table.from_batches([batch async for batch in later], later.schema)

    assert bits(asyncio.run(ask())) == bits(whole)
    few = client.historical(points.slice(150_000, 40), features)
    assert bits(few) == bits(whole.slice(150_000, 40))


def test_columns_of_any_kind_go_with_their_rows(client):
    """Also those that look like an answer's own, and have nulls."""
    n = 40_000
    rng = np.random.default_rng(3)
    vectors = [None if i % 7 == 0 else [i % 256, i // 256] for i in range(n)]
    points = pa.table(
        {
            "card": [f"4000{number:012}" for number in rng.integers(0, 50, n)],
            "event_time": pa.array([0] * n, pa.timestamp("ms", "UTC")),
            "vector": pa.array(vectors, pa.list_(pa.uint8(), 2)),
            "share": pa.array([None if i % 5 == 0 else i / 7 for i in range(n)]),
        }
    )
    got = client.historical(points, ["amt"])
    assert got["vector"].to_pylist() == vectors
    assert got["share"].to_pylist() == points["share"].to_pylist()


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
    with pytest.raises(ValueError, match=r"\.csv and \.parquet"):
        client.historical(tmp_path / "points.xlsx")
    with pytest.raises(FileNotFoundError):
        client.historical(tmp_path / "none.csv")
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
        (changed(GOOD, "card", pa.nulls(3)), "card[0]"),
        (changed(GOOD, "event_time", pa.nulls(3)), "event_time[0]"),
        (changed(GOOD, "amount", pa.array([1.0] * 3, pa.float32())), "header.schema.amount"),
        (changed(GOOD, "amount", pa.array([Decimal("1.001"), None, None])), "amount[0]"),
        (
            changed(
                GOOD, "amount", pa.array([None, Decimal("1e-70"), None], pa.decimal256(76, 70))
            ),
            "amount[1]",
        ),
        (changed(GOOD, "amount", pa.array([None, None, Decimal(10**11)])), "amount[2]"),
        (changed(GOOD, "event_time", NAIVE), "header.schema.event_time"),
        (changed(GOOD, "amount", pa.array(["1"] * 3)), "header.schema.amount"),
        (changed(GOOD, "known", pa.array([True] * 3)), "header.schema.known"),
        (
            changed(GOOD, "txn_count_last_1_hour", pa.array([1.0] * 3)),
            "header.schema.txn_count_last_1_hour",
        ),
        (changed(GOOD, "card_id", pa.array([b"x" * 16] * 3)), "header.schema.card"),
        (changed(GOOD, "card", pa.array(["4000123412341234", None, None])), "card[1]"),
        (changed(GOOD, "card", pa.array(["4000123412341234", "4", "x"])), "card[1]"),
        (
            changed(GOOD, "event_time", pa.array([0, None, 0], pa.timestamp("us", "UTC"))),
            "event_time[1]",
        ),
        (
            changed(GOOD, "event_time", pa.array([0, 0, -1], pa.timestamp("ms", "UTC"))),
            "event_time[2]",
        ),
        (
            changed(GOOD, "event_time", pa.array([0, 0, 2**63 - 10**6], pa.timestamp("s", "UTC"))),
            "event_time[2]",
        ),
        (
            # Times a thousand and cut to 64 bits, it would be an instant of today.
            changed(
                GOOD,
                "event_time",
                pa.array([0, 18_446_745_779_709_552, 0], pa.timestamp("s", "UTC")),
            ),
            "event_time[1]",
        ),
        (changed(GOOD, "amount", pa.array([1.0, 1.001, None])), "amount[1]"),
        (changed(GOOD, "amount", pa.array([1.0, float("nan"), None])), "amount[1]"),
        (changed(GOOD, "amount", pa.array([1, 2**53 + 1, None])), "amount[1]"),
        (changed(GOOD, "merchant_longitude", pa.array([0, 2**62 + 1, 0])), "merchant_longitude[1]"),
        (changed(GOOD, "merchant_latitude", pa.array([0.0, 0.0, 91.0])), "merchant_latitude[2]"),
        (changed(GOOD, "category", pa.array(["x" * 65] * 3)), "category[0]"),
        (changed(GOOD, "merchant", pa.array(["x" * 257] * 3)), "merchant[0]"),
    ],
)
def test_malformed_points_are_refused_with_column_and_row(client, table, field):
    with pytest.raises(tally.InvalidRequestError) as caught:
        client.historical(table)
    assert caught.value.violations[0].field == field
    assert str(caught.value).startswith(f"{field}: ")
    assert "4000123412341234" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "column", "what"),
    [
        ("card", pa.array([4000123412341234] * 3), "int64; 19 digits do not fit .* as text"),
        ("card", pa.array([4000123412341234.0] * 3), r"float64; .*CARD_PRECISION_LOST"),
        ("amount", pa.array([1.5] * 3, pa.float32()), "it is float32, which has lost digits"),
        ("event_time", NAIVE, "a time without one is not an instant"),
    ],
)
def test_a_column_of_a_common_wrong_type_says_what_to_do(client, name, column, what):
    with pytest.raises(tally.InvalidRequestError, match=what) as caught:
        client.historical(changed(GOOD, name, column))
    assert [violation.field for violation in caught.value.violations] == [f"header.schema.{name}"]


ASKED = ["amt", "hour_of_day", "distance_to_merchant", "merchant_txn_count_7_days"]
PLAIN = {
    "card": pa.array(["4000123412341234", "4000123412341235", "4000123412341234"]),
    "event_time": pa.array([1_709_251_200_000] * 3, pa.timestamp("ms", "UTC")),
    "amount": pa.array([12.25, None, 0.07]),
    "merchant": pa.array(["Corner Shop", None, "Corner Shop"]),
    "category": pa.array(["travel", "travel", None]),
    "merchant_latitude": pa.array([40.5, 41.25, None]),
    "merchant_longitude": pa.array([-75.0, 10.125, None]),
    "transaction_id": pa.array(["a", None, "b"]),
}


def as_type(kind: pa.DataType) -> Callable[[pa.Array], pa.Array]:
    exact = pa.decimal128(20, 3)  # a float cast to more digits shows what it is nearest to
    return lambda column: (column.cast(exact) if pa.types.is_decimal(kind) else column).cast(kind)


TYPES = {
    "large_string": (
        as_type(pa.large_string()),
        ("card", "merchant", "category", "transaction_id"),
    ),
    "string_view": (as_type(pa.string_view()), ("card", "merchant", "category", "transaction_id")),
    "dictionary": (pa.Array.dictionary_encode, tuple(PLAIN)),
    "decimal32": (as_type(pa.decimal32(9, 4)), ("amount", "merchant_latitude")),
    "decimal64": (as_type(pa.decimal64(18, 4)), ("amount", "merchant_latitude")),
    "decimal128": (as_type(pa.decimal128(38, 10)), ("amount", "merchant_longitude")),
    "decimal256": (as_type(pa.decimal256(76, 60)), ("amount", "merchant_longitude")),
    "float32": (as_type(pa.float32()), ("merchant_latitude", "merchant_longitude")),
}


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_of_the_same_values_has_the_same_answers(stack, client, kind):
    """Also where another client sends the columns as they are."""
    convert, names = TYPES[kind]
    plain = pa.table(PLAIN)
    given = pa.table(PLAIN | {name: convert(PLAIN[name]) for name in names})
    want = client.historical(plain, ASKED, labels_as_of=0)
    got = client.historical(given, ASKED, labels_as_of=0)
    added = [name for name in want.column_names if name not in PLAIN]
    assert bits(got.select(added)) == bits(want.select(added))
    echoed = {name: name for name in PLAIN} | {"card": "card_id", "category": "request_category"}
    for name in PLAIN:
        if name in names and kind in ("string_view", "dictionary"):
            assert got[echoed[name]].type == want[echoed[name]].type, "it comes back plain"
        elif name != "card":
            assert got[echoed[name]].combine_chunks() == given[name].combine_chunks()
    if kind != "dictionary":  # which the contract does not take
        (raw,) = asked_raw(
            stack, given.schema, batch_messages(given), features=ASKED, labels_as_of=Timestamp()
        )
        assert bits(pa.table(raw).select(added)) == bits(want.select(added))


def test_columns_of_nulls_alone_are_taken_whatever_they_mean(stack, client):
    nothing = {name: pa.nulls(3) for name in PLAIN if name not in ("card", "event_time")}
    given = pa.table(PLAIN | nothing | {"mine": pa.nulls(3)})
    typed = {name: column.cast(PLAIN[name].type) for name, column in nothing.items()}
    got = client.historical(given, ASKED, labels_as_of=0)
    want = client.historical(pa.table(PLAIN | typed), ASKED, labels_as_of=0)
    added = [name for name in want.column_names if name not in PLAIN]
    assert bits(got.select(added)) == bits(want.select(added))
    assert got["mine"].type == got["amount"].type == pa.null()
    frame = pd.DataFrame({"card": ["4000123412341234"], "event_time": [pd.Timestamp(0, tz="UTC")]})
    frame["category"], frame["note"] = None, None
    assert client.historical(frame, ["amt"])["note"].to_pylist() == [None]


@pytest.mark.parametrize("name", ["card", "card_id"])
def test_points_without_rows_are_taken_of_any_type(stack, client, name):
    features = ["amt", "txn_count_last_1_hour"]
    columns = [name, "event_time", "amount", "merchant", "category", "mine"]
    for points in (
        pd.DataFrame({column: [] for column in columns}),
        pd.DataFrame({column: pd.Series([], dtype=object) for column in columns}),
        pa.table({column: pa.nulls(0) for column in columns}),
    ):
        got = client.historical(points, features)
        assert len(got) == 0
        assert got.schema.field("amt").type == pa.float64()
    nothing = pa.RecordBatch.from_pydict({column: pa.nulls(0) for column in columns})
    (raw,) = asked_raw(stack, nothing.schema, [nothing.serialize().to_pybytes()], features=features)
    assert len(raw) == 0


def test_card_ids_are_bytes_of_any_of_arrows_types(client):
    card_id = bytes(range(16))
    answers = []
    for kind in (pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(16)):
        points = pa.table(
            {"card_id": pa.array([card_id], kind), "event_time": PLAIN["event_time"][:1]}
        )
        answers.append(client.historical(points, ["txn_count_last_1_hour"]))
    assert {answer["card_id"][0].as_py() for answer in answers} == {card_id}


def test_types_nested_in_columns_come_back_plain_with_their_rows(client):
    n = 20_000
    texts = pa.array([f"text {i % 7}" for i in range(n)])
    cards = pa.array([f"4000{i % 50:012}" for i in range(n)])
    runs = pc.run_end_encode(pa.array([i // 100 for i in range(n)]))
    nested = pa.StructArray.from_arrays([texts.dictionary_encode()], ["x"])
    times = pa.array([0] * n, pa.timestamp("ms", "UTC"))
    points = pa.table(
        {
            "card": cards.cast(pa.string_view()),
            "event_time": times,
            "runs": runs,
            "nested": nested,
            "view": texts.cast(pa.string_view()),
            "money": pa.array([Decimal(i) / 100 for i in range(n)]),
        }
    )
    got = client.historical(points, ["amt"])
    assert got["runs"].to_pylist() == [i // 100 for i in range(n)]
    assert got["nested"].to_pylist() == [{"x": text} for text in texts.to_pylist()]
    assert got["view"].to_pylist() == texts.to_pylist()
    assert got["money"].equals(points["money"])


@given(
    st.lists(st.decimals(-(10**10), 10**10, places=2, allow_nan=False), min_size=1, max_size=50),
    st.integers(2, 20),
)
@settings(max_examples=20)
def test_decimals_are_hundredths_exactly(client, amounts, scale):
    n = len(amounts)
    points = pa.table(
        {
            "card": ["4000123412341234"] * n,
            "event_time": pa.array([0] * n, pa.timestamp("ms", "UTC")),
            "amount": pa.array(amounts, pa.decimal128(38, scale)),
        }
    )
    assert client.historical(points, ["amt"])["amt"].to_pylist() == [
        int(amount * 100) / 100 for amount in amounts
    ]


def test_points_of_other_libraries_are_taken_by_arrows_stream(client):
    class Frame:
        def __arrow_c_stream__(self, requested_schema: object = None) -> object:
            return GOOD.__arrow_c_stream__(requested_schema)

    want = bits(client.historical(GOOD, ["hour_of_day"]))
    batch = GOOD.combine_chunks().to_batches()[0]
    for points in (Frame(), batch, pa.RecordBatchReader.from_batches(GOOD.schema, [batch])):
        assert bits(client.historical(points, ["hour_of_day"])) == want


def test_points_of_another_type_are_a_type_error_that_names_them(client):
    mixed = pd.DataFrame({"card": ["4000123412341234", 4000123412341234]})
    for points, what in (
        ([{"card": "1"}], "points takes a pyarrow Table, .* not list"),
        (None, "not NoneType"),
        (mixed, "more than one type: .*column card"),
    ):
        with pytest.raises(TypeError, match=what):
            client.historical(points)
    with pytest.raises(TypeError, match="features takes a sequence of names"):
        client.historical(GOOD, "amt")
    with pytest.raises(TypeError, match="labels_as_of takes a datetime"):
        client.historical(GOOD, labels_as_of="2024-01-01")


CASE = """card,event_time,amount,country,last_name,sku,flag,when
2703186189652095,2019-01-05T00:00:00Z,12.34,NA,Null,12E4,true,2019-01-05
2703186189652095,2019-01-05T00:00:00Z,12.34,NA,null,0012,false,2019-01-06
"""


def test_points_from_csv_come_back_as_they_were(stack, client, tmp_path):
    path, parquet, output = (
        tmp_path / name for name in ("points.csv", "points.parquet", "out.csv")
    )
    path.write_text(CASE)
    names = ["country", "last_name", "sku", "flag", "when"]
    want = [line.split(",")[3:] for line in CASE.splitlines()[1:]]
    got = client.historical(path, ["amt"])
    assert [list(row.values()) for row in got.select(names).to_pylist()] == want
    # As CSV once more, and by Parquet.
    done = stack.tally("historical", path, "-o", output, "-f", "amt", "-f", "avg_amt_last_1_hour")
    assert done.returncode == 0, done.stderr
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [[row[name] for name in names] for row in rows] == want
    assert [(row["amount"], row["amt"], row["known"]) for row in rows] == [
        ("12.34", "12.34", "false")
    ] * 2
    assert {row["statuses"].split()[0] for row in rows} == {"PRESENT"}
    assert {row["avg_amt_last_1_hour"] for row in rows} == {""}
    assert rows[0]["card_id"] == got["card_id"][0].as_py().hex()
    pq.write_table(
        client.historical(path, ["amt"]).drop_columns(["amt", "statuses", "known"]), parquet
    )
    assert client.historical(parquet, ["amt"]).equals(got)


@pytest.mark.parametrize("name", ["out.txt", "out", "out.csv.gz"])
def test_an_output_of_no_known_ending_is_refused_before_any_work(tmp_path, name):
    done = run_tally("historical", tmp_path / "p.csv", "-o", tmp_path / name, data=tmp_path)
    assert done.returncode == 2
    assert "written as .parquet or .csv" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_points_through_standard_input_are_answered(stack, cards, tmp_path):
    card = sorted(cards)[0]
    text = f"card;event_time;mine\n{card};2024-03-01T00:00:00Z;NA\n"
    output = tmp_path / "out.parquet"
    command = [TALLY, "historical", "-", "-o", output, "--separator", ";", "-f", "amt"]
    done = subprocess.run(
        [*map(str, command), "--data", str(stack.data)],
        input=gzip.compress(text.encode()),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert pq.read_table(output)["mine"].to_pylist() == ["NA"]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_bad_value_of_many_is_named_by_its_row_in_the_file(client, tmp_path, suffix):
    n, bad = 40_000, 31_234
    times = pa.array([1_709_251_200_000 + i for i in range(n)], pa.timestamp("ms", "UTC"))
    cards = [f"4000{(i * 7_919) % 500:012}" for i in range(n)]
    amounts = [1.0] * bad + [1.001] + [1.0] * (n - bad - 1)
    points = pa.table({"card": cards, "event_time": times, "amount": amounts})
    path = tmp_path / f"points{suffix}"
    (pacsv.write_csv if suffix == ".csv" else pq.write_table)(points, path)
    for asked in (points, path):
        with pytest.raises(tally.InvalidRequestError) as caught:
            client.historical(asked, ["amt"])
        assert caught.value.violations[0].field == f"amount[{bad}]"


def test_a_file_that_is_damaged_is_named(client, tmp_path):
    path = tmp_path / "points.parquet"
    pq.write_table(simple("4000123412341234", 50_000), path, compression="snappy")
    damaged = bytearray(path.read_bytes())
    damaged[20_000:24_000] = b"\xff" * 4_000
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"points\.parquet: "):
        client.historical(path, ["amt"])


def test_a_file_that_cannot_be_read_to_its_end_is_answered_until_there(client, tmp_path):
    path = tmp_path / "points.csv"
    good = [f"4000123412{i % 500:06},2024-03-01T00:00:00Z,1" for i in range(100_000)]
    path.write_text("\n".join(["card,event_time,amount", *good, "4000,2024-03-01T00:00:00Z,x", ""]))
    answers = client.historical_batches(path, ["amt"], rows_together=20_000)
    read: list[int] = []
    with pytest.raises(
        ValueError, match=r"points\.csv: line 100002, column amount: it is no number"
    ):
        read.extend(map(len, answers))
    assert sum(read) == len(good)


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


def batch_messages(points: pa.Table, compression: str | None = None) -> list[bytes]:
    """The record batch messages of points."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(sink, points.schema, options=options) as writer:
        writer.write_table(points)
    _, *messages = pa.ipc.MessageReader.open_stream(sink.getvalue())
    return [message.serialize().to_pybytes() for message in messages]


def asked_raw(stack: Stack, schema: pa.Schema, messages: list[bytes], **header) -> list[pa.Table]:
    """What a client is answered that sends messages as they are."""
    request = pb.HistoricalHeader(schema=schema.serialize().to_pybytes(), **header)
    requests = [
        pb.GetHistoricalFeaturesRequest(header=request),
        *(pb.GetHistoricalFeaturesRequest(points=message) for message in messages),
    ]
    with grpc.insecure_channel(stack.address) as channel:
        first, *rest = FeatureServiceStub(channel).GetHistoricalFeatures(iter(requests))
    of_answers = pa.ipc.read_schema(pa.py_buffer(first.header.schema))
    return [pa.ipc.read_record_batch(pa.py_buffer(r.batch.data), of_answers) for r in rest]


def code_of(stack: Stack, schema: pa.Schema, messages: list[bytes]) -> list[grpc.StatusCode]:
    """The code that a call ends with, if it is an error."""
    try:
        asked_raw(stack, schema, messages)
    except grpc.RpcError as error:
        return [error.code()]
    return []


def test_compressed_points_are_refused_before_they_grow(stack):
    points = simple("4000123412341234", 50_000)
    for compression in ("zstd", "lz4"):
        with pytest.raises(grpc.RpcError) as caught:
            asked_raw(stack, points.schema, batch_messages(points, compression))
        assert str(caught.value.details()).startswith("points[0]: it is compressed")
    (answer,) = asked_raw(stack, GOOD.schema, batch_messages(GOOD))
    assert len(answer) == 3


@pytest.mark.sliced
def test_metadata_of_any_bytes_are_no_fault_of_the_servers(stack):
    (message,) = batch_messages(GOOD)
    rng = slices.drawn("metadata of any bytes")
    codes: set[grpc.StatusCode] = set()
    for _ in range(slices.of(300, 60)):
        broken = bytearray(message)
        broken[rng.randrange(len(message) // 2)] = rng.randrange(256)
        codes.update(code_of(stack, GOOD.schema, [bytes(broken)]))
    assert codes == {grpc.StatusCode.INVALID_ARGUMENT}


def test_names_that_are_no_text_are_refused(stack):
    schema = GOOD.append_column("mine", pa.array([1, 2, 3])).schema.serialize().to_pybytes()
    header = pb.HistoricalHeader(schema=schema.replace(b"mine", b"min\x97"))
    with grpc.insecure_channel(stack.address) as channel:
        requests = iter([pb.GetHistoricalFeaturesRequest(header=header)])
        with pytest.raises(grpc.RpcError) as caught:
            list(FeatureServiceStub(channel).GetHistoricalFeatures(requests))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert str(caught.value.details()).startswith("header.schema:")


def test_two_commands_that_write_one_file_leave_a_whole_one(stack, cards, tmp_path):
    points, output = tmp_path / "points.parquet", tmp_path / "answers.parquet"
    pq.write_table(pa.concat_tables([simple(card, 300) for card in sorted(cards)[:100]]), points)
    command = [TALLY, "historical", points, "-o", output, "--data", stack.data]
    processes = [subprocess.Popen(list(map(str, command))) for _ in range(3)]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    assert len(pq.read_table(output)) == 30_000
    assert {path.name for path in tmp_path.iterdir()} == {points.name, output.name}


def test_batches_may_be_empty(stack):
    points = GOOD.append_column("transaction_id", pa.array(["a", "b", "c"]))
    points = points.append_column("merchant", pa.array(["m", None, "m"]))
    none = points.slice(0, 0).combine_chunks().to_batches() or [
        pa.RecordBatch.from_pylist([], points.schema)
    ]
    empty, full = none[0].serialize().to_pybytes(), batch_messages(points)[0]
    for messages in ([empty], [empty, full, empty, empty], [full, empty]):
        for known in ({}, {"labels_as_of": Timestamp(seconds=1_700_000_000)}):
            answers = asked_raw(stack, points.schema, messages, **known)
            assert [len(answer) for answer in answers] == [3 * (m is full) for m in messages]


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
    assert sum(len(next(answers)) for _ in range(5)) == 70_000
    with pytest.raises(tally.InvalidRequestError) as caught:
        next(answers)
    assert caught.value.violations[0].field == "card[70000]"


def test_labels_are_as_they_were_known(stack, client):
    """
    payment ──── label_time ──── later
       │   null      │ is_fraud
    """
    card = "4000777712341234"
    with closing(stack.offline()) as offline:
        offline.accept(labelled(stack.card_key.card_id(card), [(1, True), (2, False), (3, None)]))
    list(client.sync(card_id=stack.card_key.card_id(card)))  # other tests find both stores alike
    points = pa.table(
        {
            "card": [card] * 4,
            "event_time": pa.array([LABELLED + timedelta(days=20)] * 4, pa.timestamp("us", "UTC")),
            "transaction_id": ["label 3", "label 1", None, "label 2"],
        }
    )
    for shift, fraud in ((-1, None), (0, True), (1, True)):
        at = LABELLED + timedelta(days=8, microseconds=shift)
        got = client.historical(points, ["amt"], labels_as_of=at)
        assert got.column_names[-2:] == ["is_fraud", "label_time"]
        assert got["is_fraud"].to_pylist() == [None, fraud, None, None], shift
    got = client.historical(points, ["amt"], labels_as_of=LABELLED + timedelta(days=9))
    assert got["is_fraud"].to_pylist() == [None, True, None, False]
    assert got["label_time"].to_pylist()[3] == LABELLED + timedelta(days=9)
    with pytest.raises(tally.InvalidRequestError, match="transaction_id"):
        client.historical(points.drop_columns("transaction_id"), labels_as_of=LABELLED)
    nul = points.set_column(2, "transaction_id", pa.array(["a", "b\0", "c", None]))
    with pytest.raises(tally.InvalidRequestError, match=r"transaction_id\[1\]"):
        client.historical(nul, labels_as_of=LABELLED)


LABELLED = datetime(2021, 5, 1, 10, tzinfo=UTC)


def labelled(card_id: bytes, labels: list[tuple[int, bool | None]]) -> pa.Table:
    """Payments of a card, one a day from LABELLED on; each label is known seven days later."""
    rows = [
        {
            "card_id": card_id,
            "event_time": LABELLED + timedelta(days=day),
            "transaction_id": f"label {day}",
            "amount_minor": 100 * day,
            "merchant": "m",
            "category": "travel",
            "is_fraud": fraud,
            "label_time": None if fraud is None else LABELLED + timedelta(days=day + 7),
        }
        for day, fraud in labels
    ]
    return with_records(pa.Table.from_pylist(rows, pa.schema([*TRANSACTIONS, *LABELS])))


def test_a_range_is_every_transaction_in_it_as_points_would_be(stack, client, cards, tmp_path):
    start, end = datetime(2024, 2, 10, 3, tzinfo=UTC), datetime(2024, 3, 20, 17, tzinfo=UTC)
    got = client.historical(tally.TimeRange(start, end), labels_as_of=end)
    of_file = {stack.card_key.card_id(card): history for card, history in cards.items()}
    events = {
        (card_id, event.transaction_id): event
        for card_id in of_file
        for event, _ in of_file[card_id]
    }
    keys = list(zip(got["card_id"].to_pylist(), got["transaction_id"].to_pylist(), strict=True))
    inside = (start.timestamp() * 1000, end.timestamp() * 1000)
    want = {key for key, event in events.items() if inside[0] <= event.time_ms < inside[1]}
    assert {key for key in keys if key[0] in of_file} == want
    assert len(keys) == len(set(keys))
    order = list(zip(got["card_id"].to_pylist(), got["event_time"].to_pylist(), strict=True))
    assert order == sorted(order)
    points = got.select(
        ["card_id", "event_time", "transaction_id", "amount", "merchant", "merchant_latitude"]
    ).append_column("merchant_longitude", got["merchant_longitude"])
    points = points.append_column("category", got["request_category"])
    again = client.historical(points, labels_as_of=end)
    assert bits(again.select([*NAMES, "statuses", "known", "is_fraud", "label_time"])) == bits(
        got.select([*NAMES, "statuses", "known", "is_fraud", "label_time"])
    )
    # Other tests' cards may have no profile: at its first payment such a card is not known yet.
    assert got.filter(got["known"])["txn_count_last_30_days"].to_numpy().max() > 3
    output = tmp_path / "range.parquet"
    made = stack.tally(
        *("historical", "--from", start.isoformat(), "--to", end.isoformat(), "-o", output),
        *("--labels-as-of", end.isoformat()),
    )
    assert made.returncode == 0, made.stderr
    assert bits(pq.read_table(output)) == bits(got)


def test_ranges_that_make_no_sense_are_refused(stack, client):
    with pytest.raises(tally.InvalidRequestError, match="end_time"):
        client.historical(tally.TimeRange(LABELLED, LABELLED - timedelta(days=1)))
    assert len(client.historical(tally.TimeRange(0, 1), ["amt"])) == 0
    refused = stack.tally("historical", "-o", "x.parquet")
    assert refused.returncode == 2
    assert "--from" in refused.stderr
    header = pb.GetHistoricalFeaturesRequest(
        header=pb.HistoricalHeader(transactions=pb.TimeRange())
    )
    more = pb.GetHistoricalFeaturesRequest(points=b"x")
    with (
        grpc.insecure_channel(stack.address) as channel,
        pytest.raises(grpc.RpcError, match="must not follow a range"),
    ):
        list(FeatureServiceStub(channel).GetHistoricalFeatures(iter([header, more])))


def test_the_async_client_gives_the_same(stack, client, cards):
    points = simple(sorted(cards)[0], 40_000)
    want = client.historical(points, ["txn_count_last_7_days"])

    async def ask() -> pa.Table:
        async with tally.AsyncClient(stack.address) as other:
            answers = await other.historical_batches(points, ["txn_count_last_7_days"])
            return pa.Table.from_batches([batch async for batch in answers], answers.schema)

    assert bits(asyncio.run(ask())) == bits(want)


def test_batches_of_more_cards_than_are_read_together_are_answered_rightly(tmp_path):
    """Two batches have 16,384 cards each, with more records than are read together; one is read in parts while the
    next is looked up."""
    size = ("--rows", "340000", "--cards", "34000", "--days", "60", "--seed", "43")
    with loaded(tmp_path, *size) as wide, tally.Client(wide.address) as other:
        everything = other.historical(tally.TimeRange(), ["txn_count_last_7_days"])
        last = everything.group_by("card_id").aggregate([("event_time", "max")])
        assert len(last) > 2 * 16_384
        points = last.rename_columns(["card_id", "event_time"])
        for labels_as_of in (None, datetime(2024, 4, 1, tzinfo=UTC)):
            asked = points.append_column("transaction_id", pa.array(["none"] * len(points)))
            got = other.historical(asked, ["txn_count_last_7_days"], labels_as_of=labels_as_of)
            assert got["card_id"].to_pylist() == points["card_id"].to_pylist()
            want = {
                (card, at): count
                for card, at, count in zip(
                    *(
                        everything[n].to_pylist()
                        for n in ("card_id", "event_time", "txn_count_last_7_days")
                    ),
                    strict=True,
                )
            }
            keys = zip(got["card_id"].to_pylist(), got["event_time"].to_pylist(), strict=True)
            counts = got["txn_count_last_7_days"].to_numpy()
            assert np.array_equal(counts, [want[key] for key in keys], equal_nan=True)
