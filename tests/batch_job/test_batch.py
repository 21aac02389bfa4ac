"""The batch job: exact features of every transaction, on any engine, whatever came late or was killed."""

from __future__ import annotations

import csv
import json
import multiprocessing
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tally

import batch_job.exact
from batch_job.engines import LocalEngine
from batch_job.run import LOCK, run
from features import CATALOG, CATALOG_FINGERPRINT, CATEGORIES
from stores.erasure import Eraser
from stores.errors import LockedError, StoreError
from stream_job.applier import Applier, Batch
from stream_job.settings import StreamSettings
from tests import slices
from tests.conftest import ROOT, Stack, run_tally, running
from tests.oracle import Question, answer, world_of
from tests.parity.test_parity import Cards, cards_of, load_all

ROWS = 8_000
CARDS = 80
LATE_SHARE = 0.05
KILLS = slices.of(20, 4)
SAMPLE = 200
NAMES = [feature.name for feature in CATALOG]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A file of payments, and one with those that come late."""
    folder = tmp_path_factory.mktemp("rows")
    path, early, late = (folder / f"{name}.csv" for name in ("all", "early", "late"))
    size = ("--rows", str(ROWS), "--cards", str(CARDS), "--days", "90", "--seed", "91")
    made = run_tally("synth", "-o", path, *size, data=folder)
    assert made.returncode == 0, made.stderr
    with path.open(newline="") as file:
        header, *lines = csv.reader(file)
    rng = random.Random(91)
    is_late = [rng.random() < LATE_SHARE for _ in lines]
    for target, wanted in ((early, False), (late, True)):
        with target.open("w", newline="") as file:
            kept = [line for line, of in zip(lines, is_late, strict=True) if of == wanted]
            csv.writer(file).writerows([header, *kept])
    return early, late


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack of its own: every transaction is computed."""
    with running(tmp_path_factory.mktemp("batch") / "data") as stack:
        yield stack


@pytest.fixture
def cards(files: tuple[Path, Path]) -> Cards:
    return cards_of(list(files))


def stored(stack: Stack) -> dict[str, list[float]]:
    """Every row of features, by transaction."""
    with closing(stack.offline()) as offline:
        rows = offline.sql.execute(
            "SELECT transaction_id, catalog_fingerprint, feature_values FROM features"
        ).fetchall()
    assert {fingerprint for _, fingerprint, _ in rows} <= {CATALOG_FINGERPRINT}
    return {transaction: values for transaction, _, values in rows}


def exact(stack: Stack) -> dict[str, list[float]]:
    """The same from a historical call."""
    with tally.Client(stack.address) as client:
        table = client.historical(tally.TimeRange())
    values = np.column_stack([table[name].to_numpy() for name in NAMES]).tolist()
    return dict(zip(table["transaction_id"].to_pylist(), values, strict=True))


def assert_exact(stack: Stack) -> None:
    got, want = stored(stack), exact(stack)
    assert got.keys() == want.keys()
    for transaction, values in want.items():
        assert np.array_equal(got[transaction], values, equal_nan=True), transaction


def batch(stack: Stack, *arguments: str, **environment: str) -> dict | None:
    result = stack.tally("batch", "run", "--json", *arguments, **environment)
    assert result.returncode == 0, result.stderr
    outcome: dict | None = json.loads(result.stdout)
    return outcome


def forget_features(stack: Stack) -> None:
    with closing(stack.offline()) as offline:
        offline.sql.execute("TRUNCATE features")


def test_there_is_nothing_to_do_at_first(own):
    assert batch(own) is None


def test_every_row_is_exact_and_what_came_late_is_repaired(own, files, cards):
    early, late = files
    load_all(own, [early])
    # A few days that are named do not make the others done.
    few = batch(own, "--from", "2024-03-01", "--to", "2024-03-02")
    assert few is not None
    assert few["rows_new"] > 0
    forget_features(own)
    first = batch(own)
    assert first is not None
    assert first["rows_new"] == first["rows_computed"] == len(stored(own))
    assert_exact(own)
    assert batch(own) is None
    load_all(own, [late])
    second = batch(own, "--workers", "1")
    assert second is not None
    assert first["rows_new"] + second["rows_new"] == ROWS
    assert second["rows_repaired"] > 1_000
    assert_exact(own)
    again = batch(own, "--from", "2024-01-01")
    assert again is not None
    assert (again["rows_new"], again["rows_repaired"]) == (0, 0)
    listed = json.loads(own.tally("batch", "list", "--json").stdout)
    assert [record["rows_repaired"] for record in listed] == [0, second["rows_repaired"], 0, 0]
    assert len({record["code_fingerprint"] for record in listed}) == 1


def test_the_oracle_says_the_same(own, cards):
    got = stored(own)
    world = world_of(event for history in cards.values() for event, _ in history)
    rng = random.Random(5)
    for _ in range(SAMPLE):
        history = cards[rng.choice(sorted(cards))]
        event, holder = rng.choice(history)
        known = [e for e, _ in history]
        categories = [None, *CATEGORIES]
        question = Question(
            *(event.time_ms, event.amount_minor, categories[event.category]),
            *(event.latitude_udeg, event.longitude_udeg, holder, event.merchant),
        )
        for column, feature in enumerate(CATALOG):
            want, _ = answer(feature, known, question, retention=False, world=world)
            value = got[event.transaction_id][column]
            assert np.isnan(value) if want is None else value == want, feature.name


def test_some_days_alone(own):
    before = stored(own)
    with closing(own.offline()) as offline:
        offline.sql.execute("UPDATE features SET feature_values = '{1,2}'")
    outcome = batch(own, "--from", "2024-02-01", "--to", "2024-02-11T12:00:00Z")
    assert outcome is not None
    damaged = [transaction for transaction, values in stored(own).items() if values == [1, 2]]
    assert outcome["rows_repaired"] == outcome["rows_computed"] == ROWS - len(damaged)
    with closing(own.offline()) as offline:
        rows = offline.sql.execute(
            "SELECT count(*) FROM transactions WHERE event_time >= '2024-02-01+00' "
            "AND event_time < '2024-02-11 12:00+00'"
        ).fetchone()
    assert rows == (outcome["rows_computed"],)
    batch(own, "--from", "2024-01-01")
    assert {k: str(v) for k, v in stored(own).items()} == {k: str(v) for k, v in before.items()}


FOREIGN = {
    **dict.fromkeys(("SPARK_HOME", "SPARK_CONF_DIR", "JAVA_HOME", "CLASSPATH"), "/nonexistent"),
    **dict.fromkeys(("JAVA_TOOL_OPTIONS", "_JAVA_OPTIONS", "SPARK_SUBMIT_OPTS"), "-XX:+NoSuch"),
    "PYSPARK_SUBMIT_ARGS": "--nonesuch",
    "PYSPARK_PYTHON": "/nonexistent",
    "SPARK_LOCAL_IP": "192.0.2.1",
    "HADOOP_CONF_DIR": "/nonexistent",
    "PYTHONOPTIMIZE": "2",
    "TMPDIR": "/nonexistent",
    "TZ": "America/New_York",
    "LC_ALL": "no_SUCH.LOCALE",
    "http_proxy": "http://127.0.0.1:9",
}
"""What may be set for another Spark."""


@pytest.mark.budget(40, "Spark starts")
def test_spark_leaves_the_same_rows_whatever_the_environment_says_of_another_spark(own):
    forget_features(own)
    outcome = batch(own, "--from", "2024-01-01", "--engine", "spark", **FOREIGN)
    assert outcome is not None
    assert outcome["engine"] == "spark"
    assert outcome["rows_new"] == ROWS
    assert_exact(own)


def test_what_the_stream_wrote_on_arrival_is_repaired(files, tmp_path):
    """Events in any order, some twice: on arrival, features are of what had arrived."""
    with running(tmp_path / "data") as stack:
        values = []
        for path in files:
            with path.open(newline="") as file:
                values += [json.dumps(row).encode() for row in csv.DictReader(file)]
        rng = random.Random(6)
        values += rng.choices(values, k=int(len(values) * 0.05))
        rng.shuffle(values)
        applier = Applier(StreamSettings(data=stack.data, stream_format="kaggle"))
        for begin in range(0, len(values), 500):
            some = values[begin : begin + 500]
            n = len(some)
            applier.apply(
                Batch(["transactions"] * n, [0] * n, range(begin, begin + n), [0] * n, some)
            )
        applier.close()
        assert len(stored(stack)) == ROWS
        outcome = batch(stack)
        assert outcome is not None
        assert outcome["rows_new"] == 0
        assert outcome["rows_repaired"] > ROWS / 2
        assert_exact(stack)


@pytest.mark.sliced
@pytest.mark.budget(slices.of(240, 40), "a process is started and killed KILLS times")
def test_a_run_that_is_killed_goes_on_and_ends_the_same(own):
    forget_features(own)
    rng = slices.drawn("batch run")
    killed, in_the_middle = 0, 0
    while killed < KILLS or in_the_middle <= KILLS / 4:
        behind = rng.randrange(ROWS // 4)
        until = number_of(own, "features") + behind
        process = subprocess.Popen(
            [sys.executable, "-c", RUN_IN_MANY_PARTS, own.settings.store_urls()[1]], cwd=ROOT
        )
        while process.poll() is None and number_of(own, "features") < until:
            time.sleep(0.002)
        # The workers see for themselves that nobody waits for them.
        process.kill()
        if process.wait() == 0:  # it was faster
            forget_features(own)
            continue
        killed += 1
        in_the_middle += 0 < parts_done(own) < PARTS
        if rng.random() < 0.5:
            forget_some(own, rng)
    assert in_the_middle > KILLS / 4
    days = ("--from", "2024-01-01", "--to", "2024-05-01")
    outcome = batch(own, *days)
    assert outcome is not None
    # Some rows were taken away after their part was done: another run writes them.
    batch(own, *days)
    assert_exact(own)


PARTS = 20
RUN_IN_MANY_PARTS = f"""
import sys
from datetime import UTC, datetime
import batch_job.run
from batch_job.engines import LocalEngine

batch_job.run.PART_ROWS = {ROWS // PARTS}
days = datetime(2024, 1, 1, tzinfo=UTC), datetime(2024, 5, 1, tzinfo=UTC)
batch_job.run.run(sys.argv[1], LocalEngine(2), None, days)
"""


def number_of(stack: Stack, table: str) -> int:
    with closing(stack.offline()) as offline:
        row = offline.sql.execute(f"SELECT count(*) FROM {table}".encode()).fetchone()
    assert row is not None
    return int(row[0])


def parts_done(stack: Stack) -> int:
    """Of the run that is under way."""
    with closing(stack.offline()) as offline:
        row = offline.sql.execute(
            "SELECT count(*) FROM batch_parts JOIN batch_runs USING (run_id) "
            "WHERE finished_at IS NULL AND parts >= %s", (PARTS - 1,)
        ).fetchone()  # fmt: skip
    assert row is not None
    return int(row[0])


def forget_some(stack: Stack, rng: random.Random) -> None:
    with closing(stack.offline()) as offline:
        offline.sql.execute(f"DELETE FROM features WHERE random() < {rng.random()}")


def test_two_runs_do_not_run_at_once(own):
    with (
        closing(own.offline()) as offline,
        offline.locked(LOCK, shared=False),
        pytest.raises(LockedError),
    ):
        run(own.settings.store_urls()[1], LocalEngine(1), None)


def test_wrong_usage_is_refused(own):
    for arguments in (
        ("--to", "2024-01-01"),
        ("--from", "2024-02-01", "--to", "2024-01-01"),
        ("--from", "yesterday"),
        ("--master", "local[1]"),
        ("--engine", "spark", "--workers", "2"),
    ):
        assert own.tally("batch", "run", *arguments).returncode == 2, arguments


def test_an_engine_that_fails_leaves_a_run_to_go_on_with(own):
    class Failing(LocalEngine):
        def run(self, postgres_url, parts):
            super().run(postgres_url, parts[:1])
            raise StoreError("the machine is tired")

    url = own.settings.store_urls()[1]
    days = datetime(2024, 1, 1, tzinfo=UTC), datetime(2024, 5, 1, tzinfo=UTC)
    seen: list[tuple[int, int, int]] = []
    with pytest.raises(StoreError, match="tired"):
        run(url, Failing(4), None, days)
    outcome = run(url, LocalEngine(1), None, days, lambda *progress: seen.append(progress))
    assert outcome is not None
    assert outcome.rows_computed == ROWS
    assert seen[-1][:2] == (4, 4)


def test_a_worker_that_is_killed_is_told(own, monkeypatch):
    monkeypatch.setattr("batch_job.run.PART_ROWS", 100)
    days = datetime(2024, 1, 1, tzinfo=UTC), datetime(2024, 4, 30, tzinfo=UTC)
    url = own.settings.store_urls()[1]
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run, url, LocalEngine(2), None, days)
        while not (workers := multiprocessing.active_children()):
            assert not future.done()
            time.sleep(0.001)
        workers[0].kill()
        with pytest.raises(StoreError, match="run again"):
            future.result(60)
    outcome = run(url, LocalEngine(2), None, days)
    assert outcome is not None
    assert outcome.rows_computed == ROWS


def test_a_run_ends_when_a_worker_is_killed_while_another_starts(own, monkeypatch):
    """The pool ends the workers it knows, and would wait for one that comes behind them."""
    monkeypatch.setattr("batch_job.run.PART_ROWS", 100)
    is_breaking = threading.Event()
    begun: list[Any] = []
    worker: Any = ForkServerProcess
    start, terminate = worker.start, worker.terminate

    def started(self: Any) -> None:
        start(self)  # now it lives, and the pool does not know it yet
        begun.append(self)
        if len(begun) == 2:
            begun[0].kill()
            assert is_breaking.wait(10)

    def terminated(self: Any) -> None:
        is_breaking.set()
        terminate(self)

    monkeypatch.setattr(worker, "start", started)
    monkeypatch.setattr(worker, "terminate", terminated)
    days = datetime(2024, 1, 1, tzinfo=UTC), datetime(2024, 4, 30, tzinfo=UTC)
    with pytest.raises(StoreError, match="run again"):
        run(own.settings.store_urls()[1], LocalEngine(2), None, days)
    assert len(begun) == 2
    assert not any(each.is_alive() for each in begun)


def test_who_erases_waits_for_the_part_that_has_read_the_card(own, monkeypatch):
    """Or its rows would come back out of the part's snapshot."""
    with closing(own.offline()) as offline, closing(own.online()) as online:
        card_id = next(offline.all_cards())
        has_read, may_go_on, is_erased = (threading.Event() for _ in range(3))
        compute_rows = batch_job.exact._computed

        def slowly(*arguments):
            has_read.set()
            assert may_go_on.wait(60)
            yield from compute_rows(*arguments)

        monkeypatch.setattr(batch_job.exact, "_computed", slowly)
        url = own.settings.store_urls()[1]
        days = datetime(2024, 1, 1, tzinfo=UTC), datetime(2024, 5, 1, tzinfo=UTC)

        def erase() -> None:
            with closing(own.offline()) as mine:
                Eraser(mine, online, own.card_key).erase(card_id)
                is_erased.set()

        with ThreadPoolExecutor(2) as pool:
            running_it = pool.submit(run, url, LocalEngine(1), None, days)
            assert has_read.wait(60)
            erasing = pool.submit(erase)
            assert not is_erased.wait(0.5)
            may_go_on.set()
            for each in (erasing, running_it):
                each.result(60)
        query = (
            "SELECT count(*) FROM features LEFT JOIN transaction_ids USING (transaction_id) WHERE"
        )
        row = offline.sql.execute(f"{query} transaction_ids.event_time IS NULL".encode()).fetchone()
        assert row == (0,)
