"""GetOnlineFeatures against a bare echo of the same sizes, in turns; and bytes per card."""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from tally.v1 import feature_service_pb2 as pb

from features import PROFILE_RECORD, make_records, merchant_key
from features.catalog import CATEGORIES, DAY_MS, WINDOWS
from features.ledger import sort_unique
from stores.redis_store import OnlineStore, ledger_key
from tests.bench.report import Report
from tests.conftest import Stack

CARDS = 2_000
RECORDS_PER_CARD = 150
START_MS = 1_704_067_200_000
NOW_MS = START_MS + 30 * DAY_MS
PAIRS = 3
SECONDS = 4.0
METHOD = "/tally.v1.FeatureService/GetOnlineFeatures"

FEATURES = [
    *(f"{name}_last_{suffix}" for name in ("txn_count", "sum_amt", "avg_amt", "std_amt", "max_amt") for suffix, _ in WINDOWS),
    "seconds_since_last_txn", "distinct_merchants_last_24_hours", "amt_zscore_last_30_days",
    "speed_from_last_merchant_kmh", "txn_count_same_category_last_7_days",
    "amt", "distance_to_merchant", "hour_of_day", "day_of_week", "is_night",
]  # fmt: skip
"""35 features, as a scoring system asks for them."""


def fill(stack: Stack) -> list[str]:
    """Gives CARDS cards a month of payments and a home; returns their numbers."""
    rng = np.random.default_rng(5)
    numbers = [f"4{10**14 + 7_919 * i}" for i in range(CARDS)]
    ids = [stack.card_key.card_id(number) for number in numbers]
    merchants = np.array([merchant_key(f"m{i}") for i in range(700)], dtype=np.uint64)
    online = stack.online()

    def ledger() -> bytes:
        n = RECORDS_PER_CARD
        records = make_records(
            time_ms=START_MS + rng.integers(0, 30 * DAY_MS, n),
            transaction=rng.integers(0, 2**63, n, dtype=np.uint64),
            merchant=merchants[rng.integers(0, 700, n)],
            amount_minor=rng.integers(100, 50_000, n),
            category=rng.integers(1, 15, n),
            latitude_udeg=rng.integers(30_000_000, 45_000_000, n),
            longitude_udeg=rng.integers(-120_000_000, -75_000_000, n),
        )
        return sort_unique(records).tobytes()

    profile = np.zeros(1, dtype=PROFILE_RECORD)
    profile["latitude_udeg"], profile["longitude_udeg"] = 40_000_000, -90_000_000
    online.append((card_id, ledger()) for card_id in ids)
    online.put_profiles((card_id, profile.tobytes()) for card_id in ids)
    online.close()
    return numbers


def requests(numbers: list[str], rows: int, count: int) -> list[bytes]:
    """Serialised requests of `rows` rows over random cards."""
    rng = random.Random(9)
    return [
        pb.GetOnlineFeaturesRequest(
            features=FEATURES,
            rows=[
                pb.FeatureRow(
                    card=rng.choice(numbers),
                    event_time_ms=NOW_MS,
                    amount=rng.randrange(100, 50_000) / 100,
                    category=rng.choice(CATEGORIES),
                    merchant="some merchant",
                    merchant_latitude=40.5,
                    merchant_longitude=-90.25,
                )
                for _ in range(rows)
            ],
        ).SerializeToString()
        for _ in range(count)
    ]


@contextmanager
def echo_server(response: Path) -> Iterator[str]:
    """A bare echo; yields its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.bench.echo", str(response)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield f"127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.kill()
        process.wait()


def drive(address: str, method: str, file: Path, in_flight: int) -> dict[str, float]:
    """One run of the closed loop, in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.closed_loop", address, method, str(file)]
    result = subprocess.run(
        [*command, str(in_flight), str(SECONDS)], capture_output=True, text=True, check=True
    )
    outcome: dict[str, float] = json.loads(result.stdout)
    return outcome


def in_turns(
    stack: Stack, folder: Path, numbers: list[str], rows: int, in_flight: int
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Runs of the echo and of the server, in turns."""
    made = requests(numbers, rows, 200)
    asked, answered = folder / f"requests-{rows}", folder / f"response-{rows}"
    asked.write_text("\n".join(request.hex() for request in made))
    with grpc.insecure_channel(stack.address) as channel:
        call: Any = channel.unary_unary(METHOD)
        answered.write_bytes(call(made[0]))
    echoes, ours = [], []
    with echo_server(answered) as address:
        for _ in range(PAIRS):
            echoes.append(drive(address, "/bench.Echo/Echo", asked, in_flight))
            ours.append(drive(stack.address, METHOD, asked, in_flight))
    return echoes, ours


def middle(runs: list[dict[str, float]], name: str) -> float:
    """The median of a figure over runs."""
    return statistics.median(run[name] for run in runs)


def ratio(ours: list[dict[str, float]], echoes: list[dict[str, float]], name: str) -> float:
    """The median of a figure's ratio, pair by pair."""
    return statistics.median(a[name] / b[name] for a, b in zip(ours, echoes, strict=True))


def run(report: Report, stack: Stack, folder: Path) -> None:
    """Measures."""
    report.section("GetOnlineFeatures, one worker, 35 features, 150 records a card")
    numbers = fill(stack)
    echoes, ours = in_turns(stack, folder, numbers, 1, 32)
    report.add("1 row, 32 in flight: bare echo", middle(echoes, "calls_per_s"), "calls/s")
    report.add("1 row, 32 in flight", middle(ours, "calls_per_s"), "calls/s")
    report.add("1 row, 32 in flight: p99", middle(ours, "p99_ms"), "ms")
    report.add(
        "1 row, 32 in flight, against the echo",
        ratio(ours, echoes, "calls_per_s"),
        "ratio",
        ">= 0.7",
    )
    echoes, ours = in_turns(stack, folder, numbers, 1, 1)
    report.add("1 row, one caller: bare echo p50", middle(echoes, "p50_ms"), "ms")
    report.add("1 row, one caller: p50", middle(ours, "p50_ms"), "ms")
    report.add(
        "1 row, one caller: p50 against the echo", ratio(ours, echoes, "p50_ms"), "ratio", "<= 2"
    )
    echoes, ours = in_turns(stack, folder, numbers, 100, 4)
    report.add("100 rows, 4 in flight", middle(ours, "calls_per_s") * 100, "rows/s", ">= 150,000")
    report.add("100 rows: bare echo", middle(echoes, "calls_per_s") * 100, "rows/s")
    bytes_per_card(report, stack.online(), stack.card_key.card_id(numbers[0]))


def bytes_per_card(report: Report, online: OnlineStore, card_id: bytes) -> None:
    """What a card takes in Redis, against answers written down as 50 doubles in a hash."""
    report.section("Memory of one card in Redis")
    key = b"bench:hash"
    online.redis.hset(key, mapping={f"txn_count_last_{i}_min": str(0.1 * i) for i in range(50)})
    hashed = online.redis.memory_usage(key)
    online.redis.delete(key)
    ledger = online.redis.memory_usage(ledger_key(card_id))
    online.close()
    report.add(
        f"ledger of {RECORDS_PER_CARD} records, any window at any time", float(ledger or 0), "bytes"
    )
    report.add("50 doubles in a hash, true for one instant", float(hashed or 0), "bytes")
