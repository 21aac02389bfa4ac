"""A wall clock that jumps: nothing waits for it, and no worker is taken for hung by it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tally

from tests.batch_job.test_load import new_card
from tests.server.own_server import OwnServer, own_server

HOUR_MS = 3_600_000
LIBRARIES = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib")


@pytest.fixture(scope="module")
def clock(tmp_path_factory) -> Path:
    """The file that says how far the server's wall clock is off."""
    path: Path = tmp_path_factory.mktemp("clock") / "offset"
    path.write_text("+0")
    return path


@pytest.fixture(scope="module")
def server(stack, clock, tmp_path_factory) -> Iterator[OwnServer]:
    found = [Path(folder) / "faketime" / "libfaketime.so.1" for folder in LIBRARIES]
    library = next((path for path in found if path.exists()), None)
    if library is None:
        pytest.skip("no libfaketime on this machine (Debian's package faketime)")
    with own_server(
        stack,
        tmp_path_factory.mktemp("server"),
        LD_PRELOAD=str(library),
        FAKETIME_TIMESTAMP_FILE=str(clock),
        FAKETIME_NO_CACHE="1",
        FAKETIME_DONT_FAKE_MONOTONIC="1",
        TALLY_DRAIN_S="0",
    ) as server:
        yield server


@pytest.mark.budget(20, "libfaketime reads a file at each look at the clock")
def test_calls_are_answered_by_the_same_worker_however_the_clock_jumps(server, clock):
    config = tally.ClientConfig(deadline_ms=5_000)
    with tally.Client(server.address, config) as client:
        worker = client.status().worker_pid
        labels = sum(len(rows) for rows, _ in client.export("labels"))
        for offset, off_ms in (("+1h", HOUR_MS), ("-1h", -HOUR_MS), ("+400d", 9_600 * HOUR_MS)):
            clock.write_text(offset)
            answer = client.online([tally.Row(card=new_card())], ["amt"])
            off_by_ms = int(answer.as_of_ms[0]) - time.time_ns() // 1_000_000 - off_ms
            assert (
                abs(off_by_ms) < 5_000
            )  # a row without an instant is asked about now, by that clock
            assert sum(len(rows) for rows, _ in client.export("labels")) == labels
            status = client.status()
            assert status.worker_pid == worker
            assert 0 < status.uptime_seconds < 3_600
        clock.write_text("+0")
        assert client.status().worker_pid == worker
    assert "no sign of life" not in server.log.read_text()
