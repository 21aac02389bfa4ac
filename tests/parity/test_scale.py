"""One meaning, at scale: historical, online, batch on both engines and the oracle, at thousands of points
of the Handbook's simulation and of generated payments, of which some come late and some twice.

`make parity` runs it on 2 M generated rows; TALLY_PARITY_ROWS says how many.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tally
from tally.v1 import feature_service_pb2 as pb

from features import CATALOG, CATEGORIES
from tests import slices
from tests.conftest import ROOT, Stack, run_tally, running
from tests.oracle import Event, Holder, Question, World, answer, world_of
from tests.parity.test_parity import LABEL_DELAY_MS, read

pytestmark = [
    pytest.mark.timeout(1_800),
    pytest.mark.sliced,
    pytest.mark.budget(
        slices.of(600, 30), "the oracle looks at each payment in the plainest of ways"
    ),
]

HANDBOOK = ROOT.parent / "shared" / "data" / "handbook" / "handbook_transactions.parquet"
HANDBOOK_CUSTOMERS = 5_000
HANDBOOK_CUSTOMERS_CHOSEN = slices.of(HANDBOOK_CUSTOMERS, 250)
GENERATED_ROWS = int(os.environ.get("TALLY_PARITY_ROWS", str(slices.of(60_000, 30_000))))
SAMPLE = slices.of(2_000, 500)
NEVER = 2**62
LATE_SHARE, TWICE_SHARE = 0.05, 0.05
NAMES = [feature.name for feature in CATALOG]
RETENTION_FLAG = pb.FEATURE_STATUS_BEFORE_HISTORY

Histories = dict[str, list[Event]]
"""All events of a card, by its number."""


@dataclass(frozen=True)
class Source:
    """Files of payments, and what they say in plain Python."""

    early: Path
    """All but those that come late."""
    whole: Path
    """All, and some of them twice."""
    rows: int
    histories: Callable[[set[str]], Histories]
    """Those of some cards."""
    holders: dict[str, Holder]
    points: list[tuple[str, Event]]
    """A sample of payments, with their cards."""
    world: World
    """What merchants saw."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scale")


def of_handbook(folder: Path) -> Source:
    if not HANDBOOK.exists():
        pytest.skip(
            "the Handbook's data is not on this machine: no data folder beside the checkout"
        )
    table = pq.read_table(HANDBOOK).drop_columns("TX_FRAUD_SCENARIO")
    draw = slices.drawn("scale")
    chosen = draw.sample(range(HANDBOOK_CUSTOMERS), HANDBOOK_CUSTOMERS_CHOSEN)
    table = table.filter(pa.array(np.isin(table["CUSTOMER_ID"].to_numpy(), chosen)))
    n = len(table)
    rng = np.random.default_rng(draw.getrandbits(32))
    early, whole = folder / "early.parquet", folder / "whole.parquet"
    pq.write_table(table.filter(pa.array(rng.random(n) >= LATE_SHARE)), early)
    twice = rng.integers(0, n, int(n * TWICE_SHARE))
    pq.write_table(table.take(pa.array(np.sort(np.concatenate([np.arange(n), twice])))), whole)
    customers = table["CUSTOMER_ID"].to_numpy()

    def event(row: dict) -> Event:
        return Event(
            int(np.datetime64(row["TX_DATETIME"], "ms").astype(np.int64)),
            f"handbook {row['TRANSACTION_ID']}",
            f"terminal {row['TERMINAL_ID']}",
            round(row["TX_AMOUNT"] * 100),
            -1,
        )

    def histories(cards: set[str]) -> Histories:
        wanted = np.array(sorted(int(card) for card in cards))
        rows = table.filter(pa.array(np.isin(customers, wanted))).to_pylist()
        found: Histories = {card: [] for card in cards}
        for row in rows:
            found[f"{row['CUSTOMER_ID']:012}"].append(event(row))
        return found

    times_ms = table["TX_DATETIME"].cast(pa.timestamp("ms")).cast(pa.int64()).to_numpy()
    world = world_of(
        Event(time_ms, "", f"terminal {terminal}", round(amount * 100), -1, None, None, known_ms)
        for time_ms, terminal, amount, known_ms in zip(
            times_ms.tolist(),
            table["TERMINAL_ID"].to_pylist(),
            table["TX_AMOUNT"].to_pylist(),
            np.where(table["TX_FRAUD"].to_numpy() == 1, times_ms + LABEL_DELAY_MS, NEVER).tolist(),
            strict=True,
        )
    )
    sample = table.take(pa.array(rng.integers(0, n, SAMPLE))).to_pylist()
    points = [(f"{row['CUSTOMER_ID']:012}", event(row)) for row in sample]
    return Source(early, whole, n, histories, {}, points, world)


def of_generator(folder: Path) -> Source:
    path, early, whole = (folder / f"{name}.csv" for name in ("all", "early", "whole"))
    rng = slices.drawn("generated scale")
    seed = str(rng.getrandbits(31))
    size = ("--rows", str(GENERATED_ROWS), "--days", "120", "--seed", seed)
    made = run_tally("synth", "-o", path, *size, data=folder)
    assert made.returncode == 0, made.stderr
    with (
        path.open(newline="") as file,
        early.open("w", newline="") as first,
        whole.open("w", newline="") as second,
    ):
        lines = iter(file)
        header = next(lines)
        first.write(header)
        second.write(header)
        for line in lines:
            if rng.random() >= LATE_SHARE:
                first.write(line)
            second.write(line * (2 if rng.random() < TWICE_SHARE else 1))
    cards = read(path)
    everything = [(card, event) for card, seen in cards.items() for event, _ in seen]
    holders = {card: seen[0][1] for card, seen in cards.items()}
    return Source(
        *(early, whole, GENERATED_ROWS),
        lambda chosen: {card: [event for event, _ in cards[card]] for card in chosen},
        *(holders, rng.choices(everything, k=SAMPLE)),
        world_of(event for _, event in everything),
    )


SOURCES = [of_handbook, of_generator]
ON_SPARK = SOURCES if slices.IS_WHOLE else SOURCES[slices.drawn("Spark").randrange(4) :][:1]
"""Whose rows Spark computes, too: with each second commit those of one, and always a few (test_batch.py)."""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(source, marks=pytest.mark.xdist_group(f"scale, {source.__name__}"))
        for source in SOURCES
    ],
)
def fed(request: pytest.FixtureRequest, folder: Path) -> Iterator[tuple[Stack, Source, bool]]:
    """A stack that has had the early payments, a batch run, and then the whole; whether Spark is to
    compute them, too."""
    source = request.param(folder)
    with running(folder / request.param.__name__) as stack:
        for path in (source.early, source.whole):
            loaded = stack.tally("load", "--json", path)
            assert loaded.returncode == 0, loaded.stderr
            assert json.loads(loaded.stdout)["rejected"] == 0
            ran = stack.tally("batch", "run", "--json")
            assert ran.returncode == 0, ran.stderr
        assert json.loads(ran.stdout)["rows_repaired"] > source.rows * LATE_SHARE
        yield stack, source, request.param in ON_SPARK


def question(card: str, event: Event, source: Source) -> Question:
    return Question(
        time_ms=event.time_ms,
        amount_minor=event.amount_minor,
        category=None if event.category < 0 else [None, *CATEGORIES][event.category],
        latitude_udeg=event.latitude_udeg,
        longitude_udeg=event.longitude_udeg,
        holder=source.holders.get(card),
        merchant=event.merchant,
    )


def degrees(value: int | None) -> float | None:
    return None if value is None else value / 1e6


def stored(stack: Stack, ids: list[str]) -> np.ndarray:
    """Rows of features (n, features), in the order of ids."""
    with closing(stack.offline()) as offline:
        rows: dict[str, list[float]] = dict(
            offline.sql.execute(
                "SELECT transaction_id, feature_values FROM features WHERE transaction_id = ANY(%s)",
                (ids,),
            ).fetchall()
        )
        whole = offline.sql.execute(
            "SELECT count(*) = (SELECT count(*) FROM transactions) FROM features"
        ).fetchone()
    assert whole == (True,)
    return np.array([rows[name] for name in ids])


def test_every_path_gives_the_oracles_bits(fed):
    stack, source, is_on_spark = fed
    questions = [question(card, event, source) for card, event in source.points]
    histories = source.histories({card for card, _ in source.points})
    expected = [
        [
            answer(feature, histories[card], q, retention=False, world=source.world)
            for feature in CATALOG
        ]
        for (card, _), q in zip(source.points, questions, strict=True)
    ]
    want = np.array([[np.nan if value is None else value for value, _ in row] for row in expected])
    statuses = np.array([[int(status) for _, status in row] for row in expected])

    def same(got: np.ndarray, what: str, where: np.ndarray | None = None) -> None:
        equal = (got.view(np.int64) == want.view(np.int64)) | (np.isnan(got) & np.isnan(want))
        wrong = ~equal if where is None else ~equal & where
        named = {NAMES[column] for column in np.nonzero(wrong)[1]}
        assert not wrong.any(), f"{what}: {int(wrong.sum())} values differ, of {sorted(named)}"

    points = pa.table(
        {
            "card": [card for card, _ in source.points],
            "event_time": pa.array([q.time_ms for q in questions], pa.timestamp("ms", "UTC")),
            "amount": [(q.amount_minor or 0) / 100 for q in questions],
            "merchant": [q.merchant for q in questions],
            "category": pa.array([q.category for q in questions], pa.string()),
            "merchant_latitude": pa.array(
                [degrees(q.latitude_udeg) for q in questions], pa.float64()
            ),
            "merchant_longitude": pa.array(
                [degrees(q.longitude_udeg) for q in questions], pa.float64()
            ),
        }
    )
    with tally.Client(stack.address) as client:
        historical = client.historical(points, NAMES)
        same(np.column_stack([historical[name].to_numpy() for name in NAMES]), "historical")
        assert (np.array(historical["statuses"].to_pylist()) == statuses).all()
        online = client.online(
            [
                tally.Row(
                    card=row["card"],
                    at=q.time_ms,
                    amount=row["amount"],
                    merchant=row["merchant"],
                    category=row["category"],
                    merchant_latitude=row["merchant_latitude"],
                    merchant_longitude=row["merchant_longitude"],
                )
                for row, q in zip(points.to_pylist(), questions, strict=True)
            ],
            NAMES,
        )
    # Online flags what is before its ledgers; all else is the same.
    kept = online.statuses != RETENTION_FLAG
    assert kept.mean() > 0.2
    same(online.values, "online", kept)
    assert (online.statuses == statuses)[kept].all()
    ids = [event.transaction_id for _, event in source.points]
    same(stored(stack, ids), "batch, local")
    if not is_on_spark:
        return
    with closing(stack.offline()) as offline:
        offline.sql.execute("TRUNCATE features")
    ran = stack.tally("batch", "run", "--from", "2018-01-01", "--engine", "spark")
    assert ran.returncode == 0, ran.stderr
    same(stored(stack, ids), "batch, Spark")
