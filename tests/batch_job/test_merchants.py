"""Facts of merchants from end to end: labels that come late, what the online store keeps, what is taken
away; against the oracle."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest
import tally
from tally.v1 import feature_service_pb2 as pb

from batch_job.batch_cli import _today
from features import CATALOG, Population, Status
from features.catalog import DAY_DELAY_MS, DAY_MS, Source
from features.keys import merchant_key_bytes
from ingest.events import LABEL_EVENTS
from stores.history import History
from stores.merchants import refresh
from stores.redis_store import POPULATION_KEY, PROGRESS_KEY
from stream_job.applier import Applier, Batch
from stream_job.settings import StreamSettings
from tests.conftest import Stack, running
from tests.oracle import Event, Question, World, answer, world_of
from tests.parity.test_parity import load_all, read

FEATURES = [feature for feature in CATALOG if feature.source is Source.MERCHANT]
NAMES = [feature.name for feature in FEATURES]
SIZE = ("--rows", "6000", "--cards", "40", "--days", "90")
SAMPLE = 300
END = datetime(2024, 4, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack of its own: merchants are shared by all cards."""
    with running(tmp_path_factory.mktemp("merchants") / "data") as stack:
        yield stack


@pytest.fixture(scope="module")
def events(own: Stack, tmp_path_factory: pytest.TempPathFactory) -> list[Event]:
    """Loaded payments without labels, by time."""
    folder = tmp_path_factory.mktemp("rows")
    path, unlabelled = folder / "rows.csv", folder / "unlabelled.csv"
    assert own.tally("synth", "-o", path, *SIZE, "--seed", "17").returncode == 0
    with path.open(newline="") as file, unlabelled.open("w", newline="") as target:
        rows = csv.DictReader(file)
        names = [name for name in rows.fieldnames or () if name != "is_fraud"]
        writer = csv.DictWriter(target, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    load_all(own, [unlabelled])
    seen = [event for history in read(unlabelled).values() for event, _ in history]
    return sorted(seen, key=lambda event: event.time_ms)


def batch(stack: Stack) -> dict | None:
    result = stack.tally("batch", "run", "--json")
    assert result.returncode == 0, result.stderr
    outcome: dict | None = json.loads(result.stdout)
    return outcome


def label(stack: Stack, events: list[Event]) -> None:
    """Tells of frauds when they are known."""
    rows = [
        {
            "transaction_id": event.transaction_id,
            "is_fraud": True,
            "label_time": datetime.fromtimestamp(event.fraud_known_ms / 1000, UTC),
        }
        for event in events
        if event.fraud_known_ms is not None
    ]
    with closing(stack.offline()) as offline:
        assert not len(offline.accept_labels(pa.Table.from_pylist(rows, LABEL_EVENTS)))


def with_frauds(events: list[Event], seed: int) -> list[Event]:
    """A third of the payments turn out to be fraud, at once or up to 60 days later, often at midnight."""
    rng = random.Random(seed)

    def known(event: Event) -> int | None:
        if rng.random() > 1 / 3:
            return None
        delay = rng.randrange(60 * DAY_MS)
        midnight = (event.time_ms + delay) // DAY_MS * DAY_MS + DAY_MS
        return rng.choice([event.time_ms + delay, midnight, midnight - 1])

    return [replace(event, fraud_known_ms=known(event)) for event in events]


def draw(events: list[Event], seed: int) -> list[tuple[str, int]]:
    """Merchants at instants: at payments, and where a day begins to be valid."""
    rng = random.Random(seed)
    asked = []
    for event in rng.choices(events, k=SAMPLE):
        day = event.time_ms // DAY_MS + rng.randrange(50)
        t = rng.choice([event.time_ms, day * DAY_MS + DAY_DELAY_MS - rng.randrange(2)])
        asked.append((event.merchant, t))
    return [*asked, ("nobody knows it", asked[0][1])]


def historical(stack: Stack, asked: list[tuple[str, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Values and statuses of points that have merchants for their subjects, and no cards."""
    times = pa.array([t for _, t in asked], pa.timestamp("ms", "UTC"))
    points = pa.table({"merchant": [name for name, _ in asked], "event_time": times})
    with tally.Client(stack.address) as client:
        table = client.historical(points, NAMES)
    values = np.column_stack([table[name].to_numpy() for name in NAMES])
    return values, np.array(table["statuses"].to_pylist())


def online(stack: Stack, asked: list[tuple[str, int]]) -> tuple[np.ndarray, np.ndarray]:
    rows = [tally.Row(card="4000000000000000", merchant=name, at=t) for name, t in asked]
    with tally.Client(stack.address) as client:
        got = client.online(rows, NAMES)
    return got.values, got.statuses


def assert_oracles(stack: Stack, world: World, asked: list[tuple[str, int]]) -> None:
    """Both stores say what the oracle does; the online one flags what it has not kept."""
    expected = [
        [answer(feature, None, Question(t, merchant=name), world=world) for feature in FEATURES]
        for name, t in asked
    ]
    want = np.array([[np.nan if v is None else v for v, _ in row] for row in expected])
    statuses = np.array([[int(status) for _, status in row] for row in expected])
    got, got_statuses = historical(stack, asked)
    assert (got_statuses == statuses).all()
    assert np.array_equal(got, want, equal_nan=True)
    got, got_statuses = online(stack, asked)
    kept = got_statuses != Status.BEFORE_HISTORY
    newest = max(p.time_ms for some in world.of_merchant.values() for p in some)
    assert kept[[t > newest for _, t in asked]].all()
    assert kept.mean() > 0.1
    assert (got_statuses == statuses)[kept].all()
    assert np.array_equal(got[kept], want[kept], equal_nan=True)


def held(stack: Stack) -> dict[bytes, bytes | None]:
    """What Redis has of merchants, whichever publication brought it."""
    with closing(stack.online()) as store:
        (population,) = store.read([POPULATION_KEY])
        keys = list(store.merchant_keys())
        values = dict(zip(keys, store.read(keys), strict=True))
    return {
        **values,
        POPULATION_KEY: replace(Population.from_bytes(population), publication=0).to_bytes(),
    }


def test_nothing_is_claimed_before_the_batch_job_has_run(own, events):
    asked = draw(events, 1)
    for values, statuses in (historical(own, asked), online(own, asked)):
        assert (statuses == Status.NOT_COMPUTED).all()
        assert np.isnan(values).all()


def test_labels_count_from_the_day_on_that_follows_them(own, events):
    known = with_frauds(events, 2)
    first, rest = known[::2], known[1::2]
    label(own, first)
    assert batch(own) is not None
    late = [replace(event, fraud_known_ms=None) for event in rest]
    assert_oracles(own, world_of(first + late), draw(events, 3))
    # Labels that come after the run change what it wrote, and nothing came in but labels.
    label(own, rest)
    repaired = batch(own)
    assert repaired is not None
    assert repaired["rows_new"] == 0
    assert repaired["rows_repaired"] > 0
    assert_oracles(own, world_of(known), draw(events, 4))
    assert batch(own) is None
    checked = own.tally("verify", "--all", "--json")
    assert checked.returncode == 0, checked.stdout


def test_the_stream_computes_with_what_was_published(own, events):
    last = events[-1]
    payment = {
        "transaction_id": "a later one",
        "card": "4000000000000002",
        "event_time": datetime.fromtimestamp(last.time_ms / 1000 + 86_400, UTC).isoformat(),
        "amount": "12.00",
        "merchant": last.merchant,
        "category": "travel",
    }
    applier = Applier(StreamSettings(data=own.data, stream_format="tally"))
    value = json.dumps(payment).encode()
    assert applier.apply(Batch(["transactions"], [9], [0], [0], [value])) == [None]
    applier.close()
    with closing(own.offline()) as offline:
        row = offline.sql.execute(
            "SELECT feature_values FROM features WHERE transaction_id = 'a later one'"
        ).fetchone()
    assert row is not None
    got = dict(zip([feature.name for feature in CATALOG], row[0], strict=True))
    at = last.time_ms + DAY_MS
    want, statuses = historical(own, [(last.merchant, at)])
    assert (statuses == Status.PRESENT).sum() > 3
    assert np.array_equal([got[name] for name in NAMES], want[0], equal_nan=True)
    assert got["merchant_txn_count_30_days"] > 0
    assert own.tally("erase", payment["card"], "--yes").returncode == 0
    assert batch(own) is not None


def test_a_redis_that_lost_its_data_has_the_same_bytes_after_a_sync(own, events):
    before = held(own)
    assert len(before) > 100
    with closing(own.online()) as store:
        store.redis.delete(*before)
    assert (online(own, draw(events, 5))[1] == Status.NOT_COMPUTED).all()
    assert own.tally("sync").returncode == 0
    assert held(own) == before
    through = json.loads(own.tally("status", "--json").stdout)["merchants_through"]
    tomorrow = datetime.now(UTC).date() + timedelta(days=1)
    assert through == f"{tomorrow}T05:59:59.999+00:00"


def test_a_day_that_the_job_has_not_come_to_is_not_computed(own, events):
    later = datetime.now(UTC) + timedelta(days=2)
    asked = [(events[0].merchant, round(later.timestamp() * 1000))]
    for _, statuses in (historical(own, asked), online(own, asked)):
        assert (statuses == Status.NOT_COMPUTED).all()
    with closing(own.offline()) as offline:
        assert refresh(offline, later.date()) == 0
    assert (historical(own, asked)[1] != Status.NOT_COMPUTED).all()
    assert (online(own, asked)[1] == Status.NOT_COMPUTED).all()  # it was not published
    with closing(own.offline()) as offline:
        offline.sql.execute("DELETE FROM fact_runs WHERE through_day = %s", (later.date(),))


def test_facts_are_read_a_few_merchants_at_a_time(own, monkeypatch):
    """Whatever is held and given up, each merchant's facts are its own."""
    url = own.settings.store_urls()[1]
    with History(url) as history:
        every = dict(history.merchants.all())
        keys = np.array([int.from_bytes(key, "little") for key in every], np.uint64)
        monkeypatch.setattr("stores.merchants.MERCHANTS_TOGETHER", 7)
        monkeypatch.setattr("stores.merchants.RECORDS_HELD_MAX", 500)
        assert dict(history.merchants.all()).keys() == every.keys()
        for begin in range(0, len(keys), 10):
            asked = np.concatenate([keys[begin : begin + 10], keys[:2], keys[begin : begin + 1]])
            facts, places = history.merchants.of(asked)
            for key, place in zip(asked.tolist(), places.tolist(), strict=True):
                part = facts.records[facts.offsets[place] : facts.offsets[place + 1]]
                name = merchant_key_bytes(key)
                assert part.tobytes() == every[name].tobytes()


def test_an_export_goes_on_seeing_the_facts_that_it_saw(own, events):
    with tally.Client(own.address) as client:
        before = pa.Table.from_batches([rows for rows, _ in client.export("features")])
        first, cursor = next(iter(client.export("features", batch_rows=1_000)))
        quiet = [e for e in events if e.merchant == events[100].merchant]
        with closing(own.offline()) as offline:
            labelled = {
                name
                for (name,) in offline.sql.execute("SELECT transaction_id FROM labels").fetchall()
            }
        news = [
            replace(e, fraud_known_ms=e.time_ms) for e in quiet if e.transaction_id not in labelled
        ]
        label(own, news)
        assert batch(own) is not None
        assert batch(own) is None  # superseded facts stay while somebody may need them
        rest = pa.Table.from_batches([rows for rows, _ in client.resume_export(cursor)])
        after = pa.Table.from_batches([rows for rows, _ in client.export("features")])

    def risks(table: pa.Table) -> dict[str, float]:
        ids = table["transaction_id"].to_pylist()
        return dict(zip(ids, table["merchant_risk_30_days"].to_pylist(), strict=True))

    was, said, now = risks(before), risks(rest), risks(after)
    assert len(said) == len(events) - len(first)
    assert all(was[name] == risk or np.isnan(risk) for name, risk in said.items())
    assert any(now[name] != risk for name, risk in said.items() if not np.isnan(risk))
    with closing(own.offline()) as offline:
        offline.sql.execute("DELETE FROM exports")


def superseded(stack: Stack) -> int:
    with closing(stack.offline()) as offline:
        row = offline.sql.execute(
            "SELECT count(*) - count(DISTINCT (merchant_key, month)) FROM merchant_facts"
        ).fetchone()
    assert row is not None
    return int(row[0])


def test_what_was_superseded_stays_as_long_as_an_export_needs_it(own):
    """And no longer, however many exports are begun later."""
    assert superseded(own) > 0
    with tally.Client(own.address) as client, closing(own.offline()) as offline:
        offline.sql.execute("DELETE FROM exports")  # as if they had expired
        _, cursor = next(iter(client.export("features", batch_rows=1_000)))
        assert batch(own) is None
        assert superseded(own) == 0
        assert sum(len(rows) for rows, _ in client.resume_export(cursor)) > 0


def test_a_redis_that_lost_its_data_does_not_know_how_far_the_stream_is(own):
    today = datetime.now(UTC).date()
    tomorrow = today + timedelta(days=1)  # it may be midnight
    with closing(own.offline()) as offline, closing(own.online()) as online:
        assert online.stream_through_ms() is None
        said = online.redis.get(PROGRESS_KEY)
        assert said is not None
        offline.sql.execute("DELETE FROM stream_progress")
        assert _today(own.settings) in (today, tomorrow)
        offline.sql.execute("INSERT INTO stream_progress VALUES ('of old', 0, 5, now())")
        try:
            # Of a stack that has no stream any more.
            assert _today(own.settings) in (today, tomorrow)
            online.redis.delete(PROGRESS_KEY)
            assert _today(own.settings) is None
            online.redis.set(PROGRESS_KEY, said.replace(said.split()[1], b"-1"))
            assert _today(own.settings) is None
        finally:
            offline.sql.execute("DELETE FROM stream_progress WHERE topic = 'of old'")
            online.redis.set(PROGRESS_KEY, said)


def test_points_without_a_card_cannot_ask_for_what_a_card_has(own, events):
    at = pa.array([events[0].time_ms], pa.timestamp("ms", "UTC"))
    points = pa.table({"merchant": [events[0].merchant], "event_time": at})
    with tally.Client(own.address) as client:
        whole = client.historical(points)
        assert set(NAMES) < set(whole.column_names)
        assert "txn_count_last_10_min" not in whole.column_names
        with pytest.raises(tally.InvalidRequestError, match="txn_count_last_10_min"):
            client.historical(points, ["txn_count_last_10_min"])
        without = client.historical(
            pa.table({"merchant": pa.array([None], pa.string()), "event_time": at}), NAMES
        )
    assert without["statuses"].to_pylist() == [[pb.FEATURE_STATUS_MISSING_INPUT] * len(NAMES)]


def test_an_erased_card_is_no_part_of_any_merchants_days(own, events, tmp_path):
    """Of two cards at a merchant of their own, one is erased."""
    rows = tmp_path / "rows.csv"
    assert own.tally("synth", "-o", rows, *SIZE, "--seed", "18").returncode == 0
    two = tmp_path / "two.csv"
    with rows.open(newline="") as file, two.open("w", newline="") as target:
        reader = csv.DictReader(file)
        cards = dict.fromkeys(row["cc_num"] for row in reader)
        chosen = list(cards)[:2]
        file.seek(0)
        reader = csv.DictReader(file)
        writer = csv.DictWriter(target, reader.fieldnames or ())
        writer.writeheader()
        writer.writerows(
            row | {"merchant": "their own"} for row in reader if row["cc_num"] in chosen
        )
    load_all(own, [two])
    histories = read(two)
    kept = [event for event, _ in histories[chosen[1]]]
    t = max(event.time_ms for event in kept) + DAY_MS + DAY_DELAY_MS
    column = NAMES.index("merchant_txn_count_30_days")
    # Facts that lack what was loaded are not claimed.
    first_ms = min(event.time_ms for history in histories.values() for event, _ in history)
    for instant, claimed in ((t, False), (first_ms // DAY_MS * DAY_MS, True)):
        for _, statuses in (
            historical(own, [("their own", instant)]),
            online(own, [("their own", instant)]),
        ):
            assert (statuses[0, column] != Status.NOT_COMPUTED) == claimed
    assert batch(own) is not None
    together = historical(own, [("their own", t)])[0][0, column]
    assert own.tally("erase", chosen[0], "--yes").returncode == 0
    assert batch(own) is not None
    alone = answer(FEATURES[column], None, Question(t, merchant="their own"), world=world_of(kept))[
        0
    ]
    assert together > alone
    assert historical(own, [("their own", t)])[0][0, column] == alone
    assert online(own, [("their own", t)])[0][0, column] == alone


def test_days_before_what_is_kept_are_flagged(own, events):
    """The last test: January is dropped."""
    assert own.tally("batch", "prune", "--before", "2024-02-01", "--yes").returncode == 0
    day = datetime(2024, 2, 10, 12, tzinfo=UTC)
    asked = [(events[0].merchant, round(day.timestamp() * 1000))]
    for _, statuses in (historical(own, asked), online(own, asked)):
        said = dict(zip(NAMES, statuses[0].tolist(), strict=True))
        assert said["merchant_txn_count_30_days"] == Status.BEFORE_HISTORY
        assert said["merchant_risk_7_days"] == Status.BEFORE_HISTORY
    _, statuses = historical(own, asked)
    assert statuses[0, NAMES.index("merchant_txn_count_7_days")] == Status.PRESENT
    assert statuses[0, NAMES.index("merchant_risk_1_day")] == Status.PRESENT
