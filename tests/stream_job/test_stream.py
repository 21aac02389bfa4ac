"""The stream for real: Kafka, Flink, its Python workers and both stores, and what is killed of them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from stream_job.publish import Publisher
from stream_job.settings import StreamSettings
from tests.batch_job.test_load import assert_online_is_what_offline_says
from tests.conftest import TALLY, Stack, run_tally, started

STREAM = {"TALLY_STREAM_OFF": "false"}
ROWS = 3_000
KILLED_ROWS = 6_000
APPLIED_WITHIN_S = 120.0


@pytest.fixture(scope="module")
def streaming(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack with the stream, for all tests here."""
    data = tmp_path_factory.mktemp("streaming")
    try:
        yield started(data, **STREAM)
    finally:
        run_tally("down", data=data)


def status(stack: Stack) -> dict:
    report: dict = json.loads(stack.tally("status", "--json").stdout)
    return report


def wait_for(what: str, holds: Callable[[], bool], within_s: float = APPLIED_WITHIN_S) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {within_s} s"
        time.sleep(0.2)


def is_applied(stack: Stack, since_s: float) -> bool:
    """Whether all that was published before an instant is in both stores, and the store says so."""
    report = status(stack)
    stream = report.get("stream")
    if not isinstance(stream, dict) or stream["lag_events"] or report["online_store"] != "serving":
        return False
    return bool(stream["complete_through_ms"] / 1000 > since_s)


def publish(stack: Stack, path: Path, *options: str) -> dict:
    result = stack.tally("publish", "--json", path, *options)
    assert result.returncode == 0, result.stderr
    outcome: dict = json.loads(result.stdout)
    return outcome


def made(stack: Stack, path: Path, rows: int, seed: int) -> Path:
    result = stack.tally("synth", "-o", path, "--rows", str(rows), "--seed", str(seed))
    assert result.returncode == 0, result.stderr
    return path


def count(stack: Stack, table: str) -> int:
    offline = stack.offline()
    try:
        row = offline.sql.execute(f"SELECT count(*) FROM {table}").fetchone()
    finally:
        offline.close()
    assert row is not None
    return int(row[0])


def test_what_is_published_is_in_both_stores_once_however_often_it_comes(streaming, tmp_path):
    path = made(streaming, tmp_path / "a.csv", ROWS, seed=21)
    outcome = publish(streaming, path)
    assert (outcome["events"], outcome["labels"], outcome["unreadable"]) == (ROWS, ROWS, 0)
    publish(streaming, path)
    wait_for("applied", lambda: is_applied(streaming, time.time() - 1))
    assert [count(streaming, t) for t in ("transactions", "labels", "features")] == [ROWS] * 3
    assert_online_is_what_offline_says(streaming)


def test_the_store_is_complete_through_now_while_nothing_comes(streaming):
    before = status(streaming)["stream"]["complete_through_ms"]
    time.sleep(1)
    after = status(streaming)["stream"]
    assert (after["state"], after["lag_events"]) == ("running", 0)
    assert after["complete_through_ms"] >= before + 500


def test_one_bad_event_is_kept_and_the_rest_goes_on(streaming):
    settings = StreamSettings(data=streaming.data)
    publisher = Publisher(settings, streaming.card_key)
    card = "4000777712341234"
    broken = b"\xffno protobuf of " + card.encode()
    publisher.send("transactions", b"k", broken)
    publisher.send("transactions", b"k", None)
    wait_for("applied", lambda: is_applied(streaming, time.time() - 1))

    def listed() -> list[dict]:
        result = streaming.tally("dead-letters", "list", "--json")
        return [json.loads(line) for line in result.stdout.splitlines()]

    wait_for("dead letters", lambda: len(listed()) == 2)
    reasons = {letter["reason"]: letter["number"] for letter in listed()}
    assert set(reasons) == {"NOT_PROTOBUF", "EMPTY"}
    shown = streaming.tally("dead-letters", "show", str(reasons["NOT_PROTOBUF"])).stdout
    assert "************1234" in shown
    assert card not in shown
    # Published again it is refused again, and nothing stops.
    assert streaming.tally("dead-letters", "replay", str(reasons["NOT_PROTOBUF"])).returncode == 0
    wait_for("a third letter", lambda: len(listed()) == 3)


def processes(stack: Stack) -> dict[str, psutil.Process]:
    """The processes that can be killed, by name; the Python worker is Java's child."""
    known = {
        name: psutil.Process(pid)
        for name, pid in status(stack)["processes"].items()
        if psutil.pid_exists(pid)  # it may be about to be started again
    }
    below = known["stream"].children(recursive=True) if "stream" in known else []
    workers = [p for p in below if "beam_boot" in " ".join(p.cmdline()) and "python" in p.name()]
    return known | ({"worker": workers[-1]} if workers else {})


def test_nothing_is_lost_or_doubled_whatever_is_killed(streaming, tmp_path):
    path = made(streaming, tmp_path / "b.csv", KILLED_ROWS, seed=22)
    already = count(streaming, "transactions")
    publishing = subprocess.Popen(
        [TALLY, "publish", path, "--rate", "400"],
        env=os.environ | {"TALLY_DATA": str(streaming.data)},
        stderr=subprocess.DEVNULL,
    )
    rng = random.Random(22)
    names = ["worker", "postgres", "stream", "valkey", "kafka"]
    rng.shuffle(names)
    for name in names:
        time.sleep(rng.uniform(1.5, 3.0))
        victim = processes(streaming).get(name)
        if victim is not None:
            victim.send_signal(signal.SIGKILL)
    assert publishing.wait(120) == 0
    wait_for("applied", lambda: is_applied(streaming, time.time() - 1))
    rows = already + KILLED_ROWS
    assert [count(streaming, t) for t in ("transactions", "labels", "features")] == [rows] * 3
    assert_online_is_what_offline_says(streaming)


def test_it_goes_on_from_its_checkpoint_with_another_parallelism(streaming, tmp_path):
    already = count(streaming, "transactions")
    run_tally("down", data=streaming.data)
    more = {**STREAM, "TALLY_STREAM_PARALLELISM": "2"}
    again = started(streaming.data, **more)
    path = made(again, tmp_path / "c.csv", ROWS, seed=23)
    publish(again, path)
    wait_for("applied", lambda: is_applied(again, time.time() - 1))
    assert count(again, "transactions") == already + ROWS
    assert_online_is_what_offline_says(again)
