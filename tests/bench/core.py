"""How many points a second the core computes."""

from __future__ import annotations

import time

import numpy as np

from features import CATALOG, Feature, Ledgers, Points, as_of, make_records
from features.catalog import DAY_MS, Aggregate
from features.ledger import record_times_ms
from tests.bench.report import Report

RECORDS = 1_000_000
CARDS = 10_000
REPEATS = 3
START_MS = 1_577_836_800_000

WINDOW_AGGREGATES = (
    Aggregate.COUNT,
    Aggregate.SUM,
    Aggregate.MEAN,
    Aggregate.STD,
    Aggregate.MAX,
)
WINDOW_FEATURES = tuple(f for f in CATALOG if f.aggregate in WINDOW_AGGREGATES)


def ledgers(records: int = RECORDS, cards: int = CARDS) -> Ledgers:
    """Random ledgers of a month."""
    rng = np.random.default_rng(1)
    merchants = rng.integers(0, 2**63, 700, dtype=np.uint64)
    made = make_records(
        time_ms=START_MS + rng.integers(0, 31 * DAY_MS, records),
        transaction=rng.integers(0, 2**63, records, dtype=np.uint64),
        merchant=merchants[rng.integers(0, 700, records)],
        amount_minor=rng.integers(100, 50_000, records),
        category=rng.integers(1, 15, records),
        latitude_udeg=rng.integers(30_000_000, 45_000_000, records),
        longitude_udeg=rng.integers(-120_000_000, -75_000_000, records),
    )
    return Ledgers.from_columns(rng.integers(0, cards, records), made, cards)


def points_at_records(of: Ledgers) -> Points:
    """One point at each record, as a training set has them."""
    return Points.at(
        np.repeat(np.arange(len(of)), np.diff(of.offsets)),
        record_times_ms(of.records),
        amount_minor=of.records["amount_minor"],
        category=of.records["stamp"] & np.uint64(0xFFFF),
        latitude_udeg=of.records["latitude_udeg"],
        longitude_udeg=of.records["longitude_udeg"],
    )


def _points_per_s(of: Ledgers, points: Points, features: tuple[Feature, ...]) -> float:
    best = float("inf")
    for _ in range(REPEATS):
        begin = time.perf_counter()
        as_of(of, points, features)
        best = min(best, time.perf_counter() - begin)
    return len(points) / best


def run(report: Report) -> None:
    """Measures."""
    report.section("The core, one thread")
    of = ledgers()
    points = points_at_records(of)
    report.add(
        f"as_of, {len(WINDOW_FEATURES)} window features, {RECORDS:,} records",
        _points_per_s(of, points, WINDOW_FEATURES),
        "points/s",
        ">= 2,000,000",
    )
    report.add(
        f"as_of, all {len(CATALOG)} features", _points_per_s(of, points, CATALOG), "points/s"
    )
    shuffled = points.take(np.random.default_rng(2).permutation(len(points)))
    report.add(
        "as_of, 25 window features, points in random order",
        _points_per_s(of, shuffled, WINDOW_FEATURES),
        "points/s",
    )
