"""The offline half: training sets, exports, syncs and batch runs, each beside what it is compared with."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import psycopg
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import tally
from tally.ordering import in_order_of_cards

from batch_job.exact import ROWS_TOGETHER
from features import CATALOG, Points, as_of
from features.catalog import WINDOWS
from ingest.kaggle import MERCHANT_PREFIX
from stores.arrow import TRANSACTIONS
from stores.connections import bulk_connection
from stores.feature_rows import FeatureRows, binary_rows, copy_blocks
from stores.history import History
from stores.merchants import refresh
from stores.publishing import publish_merchants
from stores.settings import read_stack_file
from tests.bench.report import Report
from tests.conftest import Stack, running

ROWS = 2_000_000
CARDS = 20_000
DAYS = 180
POINTS = 1_000_000
FEATURES = 40
DAY_MS = 86_400_000
SERVER_MB_MAX = "<= 500"
GROWTH_SHARES = (4, 1)
"""Of the transactions: how the batch job grows from a quarter to all."""
RAW_DAYS = 90
"""Whose feature rows are copied for comparison."""
SQL_SHARE = 10
"""One card in so many is computed by the SQL query, which takes its time."""


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
    """Points at random instants of random cards and merchants of a file."""
    file = pacsv.read_csv(
        path,
        convert_options=pacsv.ConvertOptions(
            include_columns=["cc_num", "merchant"], column_types={"cc_num": pa.string()}
        ),
    )
    cards, merchants = file["cc_num"].unique(), file["merchant"].unique()
    merchants = pc.utf8_slice_codeunits(merchants, len(MERCHANT_PREFIX))
    rng = np.random.default_rng(6)
    begin_ms = int(np.datetime64("2024-01-01", "ms").astype(int))
    times_ms = begin_ms + rng.integers(0, DAYS * DAY_MS, POINTS)
    return pa.table(
        {
            "card": cards.take(pa.array(rng.integers(0, len(cards), POINTS))),
            "event_time": pa.array(times_ms, pa.timestamp("ms", "UTC")),
            "amount": rng.integers(100, 50_000, POINTS) / 100,
            "merchant": merchants.take(pa.array(rng.integers(0, len(merchants), POINTS))),
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
            seconds += timed(lambda a=asked, le=ledgers, pr=profiles: as_of(  # type: ignore[misc]
                le, a, CATALOG[:FEATURES], pr
            ))  # fmt: skip
    return seconds


def timed(work: Callable[[], object]) -> float:
    """How many seconds something takes."""
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


def consumed(items: Iterable[object]) -> None:
    """Takes all that is there."""
    for _ in items:
        pass


def run(report: Report, folder: Path) -> None:
    """Measures, in a stack of its own."""
    path = folder / "history.csv"
    with running(folder / "histories") as stack:
        size = ("--rows", str(ROWS), "--cards", str(CARDS), "--days", str(DAYS), "--seed", "60")
        for command in (("synth", "-o", path, *size), ("load", path)):
            done = stack.tally(*command)
            assert done.returncode == 0, done.stderr
        facts(report, stack)
        training_sets(report, stack, path)
        exports(report, stack)
        syncs(report, stack)
        batch_runs(report, stack)


def facts(report: Report, stack: Stack) -> None:
    """Facts of merchants, computed anew and with nothing to do."""
    report.section(f"Facts of merchants, of {ROWS:,} transactions")
    with closing(stack.offline()) as offline:
        today = datetime.now(UTC).date()
        whole, again = (timed(lambda: refresh(offline, today)) for _ in range(2))
    publish_s = timed(lambda: published(stack))
    report.add("facts of merchants, all anew", ROWS / whole, "rows/s")
    report.add("facts of merchants, nothing to do", again, "s")
    report.add("facts of merchants, to Redis", publish_s, "s")


def published(stack: Stack) -> None:
    with closing(stack.offline()) as offline, closing(stack.online()) as online:
        publish_merchants(offline, online)


def watched(stack: Stack) -> Memory:
    return Memory(read_stack_file(stack.data)["processes"]["server"])


def training_sets(report: Report, stack: Stack, path: Path) -> None:
    """GetHistoricalFeatures, the core alone, and what people do without."""
    report.section(f"Training sets: {POINTS:,} points, {FEATURES} features, {ROWS:,} transactions")
    points = drawn(path)
    ordered, _ = in_order_of_cards(points)
    names = [feature.name for feature in CATALOG[:FEATURES]]
    with tally.Client(stack.address) as client:
        client.historical(points.slice(0, 1_000), names)
        with watched(stack) as memory:
            seconds = min(
                timed(lambda: consumed(client.historical_batches(ordered, names))) for _ in range(2)
            )
            whole = timed(lambda: client.historical(points, names))
            every = timed(lambda: consumed(client.historical_batches(ordered)))
    report.add("GetHistoricalFeatures over loopback", POINTS / seconds, "rows/s", ">= 500,000")
    report.add(f"the same, all {len(CATALOG)} features", POINTS / every, "rows/s")
    report.add("client.historical, points in random order", POINTS / whole, "rows/s")
    report.add("the core alone", POINTS / core_seconds(stack, points), "rows/s")
    report.add(
        "pandas merge_asof of values at each payment", POINTS / merged(stack, points), "rows/s"
    )
    report.add("SQL window query in Postgres, 25 features", sql_rows_per_s(stack), "rows/s")
    report.add("historical: most memory of the server", memory.peak_mb, "MB", SERVER_MB_MAX)


def merged(stack: Stack, points: pa.Table) -> float:
    """How long pandas takes to put precomputed values beside points; they are as of the last payment,
    not as of the point."""
    with tally.Client(stack.address) as client:
        export = client.export("features")
        table = pa.Table.from_batches([batch for batch, _ in export], export.schema)
    columns = ["card_id", "event_time", *(feature.name for feature in CATALOG[:FEATURES])]
    values = table.select(columns).to_pandas()
    key = stack.card_key
    cards = {card: key.card_id(card) for card in points["card"].unique().to_pylist()}
    asked = pd.DataFrame(
        {
            "card_id": [cards[card] for card in points["card"].to_pylist()],
            "event_time": points["event_time"].cast(table["event_time"].type).to_pandas(),
        }
    )
    codes = {card: code for code, card in enumerate(sorted(set(values["card_id"])))}
    for frame in (values, asked):
        frame["card_id"] = frame["card_id"].map(codes).fillna(-1).astype("int64")
    values = values.sort_values("event_time")

    def merge() -> None:
        pd.merge_asof(
            asked.sort_values("event_time"),
            values,
            on="event_time",
            by="card_id",
            allow_exact_matches=False,
        )

    return timed(merge)


def sql_rows_per_s(stack: Stack) -> float:
    """The window features of some cards' payments by SQL, in floating point."""
    bound = bytes([256 // SQL_SHARE])
    aggregates = ", ".join(
        f"{of} OVER w{i}"
        for i, _ in enumerate(WINDOWS)
        for of in (
            *("count(*)", "sum(amount_minor)", "avg(amount_minor)"),
            *("stddev_pop(amount_minor)", "max(amount_minor)"),
        )
    )
    windows = ", ".join(
        f"w{i} AS (PARTITION BY card_id ORDER BY event_time RANGE BETWEEN "
        f"interval '{ms} milliseconds' PRECEDING AND interval '1 millisecond' PRECEDING)"
        for i, (_, ms) in enumerate(WINDOWS)
    )
    query = f"SELECT {aggregates} FROM transactions WHERE card_id < %s WINDOW {windows}"
    with psycopg.connect(stack.settings.store_urls()[1]) as sql:
        began_s = time.perf_counter()
        rows = len(sql.execute(query.encode(), (bound,)).fetchall())
        return rows / (time.perf_counter() - began_s)


def exports(report: Report, stack: Stack) -> None:
    """Exports beside raw COPY of the same rows."""
    report.section(f"Exports of {ROWS:,} transactions")
    columns = ", ".join(TRANSACTIONS.names)
    raw, ours = [], []
    with tally.Client(stack.address) as client, watched(stack) as memory:
        for _ in range(3):  # in turns: the machine is not always the same
            raw.append(timed(lambda: copied(stack, f"SELECT {columns} FROM transactions")))
            ours.append(timed(lambda: consumed(client.export("transactions"))))
        features_s = timed(lambda: consumed(client.export("features")))
        labels_s = timed(lambda: consumed(client.export("labels")))
    report.add("Export of transactions", ROWS / min(ours), "rows/s")
    report.add("raw binary COPY of the same rows", ROWS / min(raw), "rows/s")
    report.add("Export against raw COPY", min(raw) / min(ours), "ratio", ">= 0.7")
    report.add("Export of all features", ROWS / features_s, "rows/s")
    report.add("Export of labels", ROWS / labels_s, "rows/s")
    report.add("exports: most memory of the server", memory.peak_mb, "MB", SERVER_MB_MAX)


def copied(stack: Stack, query: str) -> None:
    """Reads a query's rows by binary COPY, and does nothing with them."""
    command = f"COPY ({query}) TO STDOUT (FORMAT BINARY)".encode()
    url = stack.settings.store_urls()[1]
    with psycopg.connect(url) as sql, sql.cursor() as cursor, cursor.copy(command) as copy:
        consumed(copy)


def syncs(report: Report, stack: Stack) -> None:
    """Redis rebuilt from nothing, and looked through when there is nothing to do."""
    report.section(f"Sync of {ROWS:,} transactions, {CARDS:,} cards")
    with (
        closing(stack.online()) as online,
        tally.Client(stack.address) as client,
        watched(stack) as memory,
    ):
        seconds = []
        for _ in range(3):
            online.redis.flushall()
            seconds.append(timed(lambda: consumed(client.sync())))
        again = timed(lambda: consumed(client.sync()))
    report.add("Sync, rebuild", ROWS / min(seconds), "rows/s", ">= 300,000")
    report.add("Sync, nothing to do", ROWS / again, "rows/s")
    report.add("sync: most memory of the server", memory.peak_mb, "MB", SERVER_MB_MAX)


def batch_runs(report: Report, stack: Stack) -> None:
    """Batch runs into empty tables, beside raw COPY of the same rows; and how they grow."""
    report.section(f"Batch runs, all {len(CATALOG)} features written to Postgres")
    url = stack.settings.store_urls()[1]
    rates: dict[str, list[float]] = {"local": [], "spark": []}
    for engine, found in rates.items():
        for share in GROWTH_SHARES:
            with psycopg.connect(url, autocommit=True) as sql:
                sql.execute("TRUNCATE features")
                sql.execute("CHECKPOINT")  # what others wrote is on the disk
            end = np.datetime64("2024-01-01") + np.timedelta64(DAYS // share, "D")
            days = ("--from", "2024-01-01", "--to", str(end))
            done = stack.tally("batch", "run", "--engine", engine, "--json", *days)
            assert done.returncode == 0, done.stderr
            outcome = json.loads(done.stdout)
            assert outcome["rows_new"] == outcome["rows_computed"] > 0
            found.append(outcome["rows_computed"] / outcome["seconds"])
    raw = raw_features_rows_per_s(url, os.cpu_count() or 1)
    quarter, whole = rates["local"]
    report.add("raw COPY of feature rows, one connection a core", raw, "rows/s")
    report.add("batch run, local", whole, "rows/s")
    report.add("batch run, local, against raw COPY", whole / raw, "ratio")
    report.add("batch run, spark", rates["spark"][-1], "rows/s")
    report.add("spark against local", rates["spark"][-1] / whole, "ratio", ">= 0.5")
    report.add("local: four times the rows, rate against a quarter", whole / quarter, "ratio")


def raw_features_rows_per_s(url: str, connections: int) -> float:
    """The feature rows of RAW_DAYS, made into what COPY takes beforehand, copied into a table of their
    own with its index by several connections at once, in batches as the job's: the speed at which
    Postgres takes them."""
    with bulk_connection(url) as connection, connection.cursor() as cursor:
        cursor.execute(
            "SELECT event_time, transaction_id, feature_values FROM features "
            f"WHERE event_time < '2024-01-01'::timestamptz + interval '{RAW_DAYS} days'"
        )
        table = cursor.fetch_arrow_table().combine_chunks()
    values = table["feature_values"].chunk(0).flatten().to_numpy().reshape(len(table), -1)
    times = table["event_time"].cast(pa.int64()).to_numpy()
    shuffled = np.random.default_rng(7).permutation(len(table))
    batches = []
    for begin in range(0, len(table), ROWS_TOGETHER):
        rows = shuffled[begin : begin + ROWS_TOGETHER]
        rows = rows[np.argsort(times[rows])]
        batches.append([bytes(block) for block in binary_rows(FeatureRows(table, values, rows))])

    def copy(some: list[list[bytes]]) -> None:
        with psycopg.connect(url, autocommit=True) as sql, sql.cursor() as cursor:
            cursor.execute("SET synchronous_commit = off")
            for batch in some:
                copy_blocks(cursor, "raw_features", batch)

    with psycopg.connect(url, autocommit=True) as sql:
        sql.execute("DROP TABLE IF EXISTS raw_features")
        sql.execute("CREATE TABLE raw_features (LIKE features INCLUDING ALL)")
        sql.execute("CHECKPOINT")
        with ThreadPoolExecutor(connections) as pool:
            shares = [batches[i::connections] for i in range(connections)]
            seconds = timed(lambda: list(pool.map(copy, shares)))
        sql.execute("DROP TABLE raw_features")
    return len(table) / seconds
