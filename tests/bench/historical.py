"""Training sets: GetHistoricalFeatures over loopback, beside the core alone on the same points."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.csv as pacsv
import tally

from features import CATALOG, Points, as_of
from stores.history import History
from stores.settings import read_stack_file
from tests.bench.report import Report
from tests.conftest import Stack, run_tally, started

ROWS = 2_000_000
CARDS = 20_000
DAYS = 180
POINTS = 1_000_000
FEATURES = 40
DAY_MS = 86_400_000


class Memory:
    """The most memory that the server takes while it is watched, in MB."""

    def __init__(self, pid: int) -> None:
        process = psutil.Process(pid)
        self._family = [process, *process.children(recursive=True)]
        self._is_over = threading.Event()
        self.peak_mb = 0.0

    def __enter__(self) -> Memory:
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(0.02):
            used = max(member.memory_info().rss for member in self._family)
            self.peak_mb = max(self.peak_mb, used / 1e6)


def drawn(path: Path) -> pa.Table:
    """Points at random instants of random cards of a file."""
    cards = pacsv.read_csv(
        path,
        convert_options=pacsv.ConvertOptions(
            include_columns=["cc_num"], column_types={"cc_num": pa.string()}
        ),
    )["cc_num"].unique()
    rng = np.random.default_rng(6)
    begin_ms = int(np.datetime64("2024-01-01", "ms").astype(int))
    times_ms = begin_ms + rng.integers(0, DAYS * DAY_MS, POINTS)
    return pa.table(
        {
            "card": cards.take(pa.array(rng.integers(0, len(cards), POINTS))),
            "event_time": pa.array(times_ms, pa.timestamp("ms", "UTC")),
            "amount": rng.integers(100, 50_000, POINTS) / 100,
        }
    )


def core_seconds(stack: Stack, points: pa.Table) -> float:
    """How long `as_of` alone takes for the same points, the histories being there."""
    key = stack.card_key
    encoded = points["card"].combine_chunks().dictionary_encode()
    ids = [key.card_id(card) for card in encoded.dictionary.to_pylist()]
    order = np.argsort(encoded.indices.to_numpy(), kind="stable")
    numbers = encoded.indices.to_numpy()[order].astype(np.int64)
    times_ms = points["event_time"].cast(pa.int64()).to_numpy()[order]
    minor = np.rint(points["amount"].to_numpy()[order] * 100).astype(np.int64)
    seconds = 0.0
    with History(stack.settings.store_urls()[1]) as history:
        for begin, end, ledgers, profiles in history.read(ids):
            first, last = np.searchsorted(numbers, [begin, end])
            asked = Points.at(
                numbers[first:last] - begin,
                times_ms[first:last],
                amount_minor=minor[first:last],
            )
            began_s = time.perf_counter()
            as_of(ledgers, asked, CATALOG[:FEATURES], profiles)
            seconds += time.perf_counter() - began_s
    return seconds


def run(report: Report, folder: Path) -> None:
    """Measures, in a stack of its own."""
    report.section(f"Training sets: {POINTS:,} points, {FEATURES} features, {ROWS:,} transactions")
    data = folder / "histories"
    try:
        measure(report, started(data), folder)
    finally:
        run_tally("down", data=data)


def measure(report: Report, stack: Stack, folder: Path) -> None:
    """Loads, and asks."""
    path = folder / "history.csv"
    size = ("--rows", str(ROWS), "--cards", str(CARDS), "--days", str(DAYS), "--seed", "60")
    for command in (("synth", "-o", path, *size), ("load", path)):
        done = stack.tally(*command)
        assert done.returncode == 0, done.stderr
    points = drawn(path)
    names = [feature.name for feature in CATALOG[:FEATURES]]
    server = read_stack_file(stack.data)["processes"]["server"]
    with tally.Client(stack.address) as client:
        client.historical(points.slice(0, 1_000), names)
        with Memory(server) as memory:
            began_s = time.perf_counter()
            answer = client.historical(points, names)
            seconds = time.perf_counter() - began_s
    assert len(answer) == POINTS
    report.add("GetHistoricalFeatures over loopback", POINTS / seconds, "rows/s", ">= 500,000")
    report.add("the core alone", POINTS / core_seconds(stack, points), "rows/s")
    report.add("most memory of the server", memory.peak_mb, "MB", "<= 500")
