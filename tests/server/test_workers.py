"""Signs of life: which silence is a hang, of real processes, by the parent's looks and not by clocks."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from server.workers import (
    BUSY_S,
    HUNG_S,
    LOOK_COUNTS_S_MAX,
    LOOK_INTERVAL_S,
    START_S,
    Silence,
)
from tests.server.own_server import stopped

SLEEPS = "import sys, time; print(flush=True); time.sleep(600)"
SPINS = "import sys; print(flush=True)\nwhile True: pass"


@contextmanager
def process(code: str) -> Iterator[psutil.Process]:
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            child.stdout.readline()
            found = psutil.Process(child.pid)
            while code == SLEEPS and found.status() != psutil.STATUS_SLEEPING:
                time.sleep(0.01)
            yield found
        finally:
            child.kill()


def silent_until_replaced(silence: Silence, at_most_s: float) -> float:
    """Seconds of silence, in looks at the usual interval, until a worker is to be replaced."""
    beats = silence.beats
    for look in range(1, round(at_most_s / LOOK_INTERVAL_S)):
        silence.look(beats, LOOK_INTERVAL_S)
        if silence.is_too_long:
            return look * LOOK_INTERVAL_S
    return at_most_s


def test_a_stopped_worker_is_replaced_soon_even_while_it_starts():
    with process(SPINS) as worker, stopped(worker.pid):
        for beats in (0, 7):
            silence = Silence(worker.pid, beats=beats)
            assert silent_until_replaced(silence, 60) == pytest.approx(HUNG_S, abs=0.2)


def test_a_worker_whose_threads_all_wait_is_replaced_soon():
    with process(SLEEPS) as worker:
        silence = Silence(worker.pid, beats=7)
        assert silent_until_replaced(silence, 60) == pytest.approx(HUNG_S, abs=0.2)


def test_a_busy_worker_gets_more_time_and_not_for_ever():
    with process(SPINS) as worker:
        silence = Silence(worker.pid, beats=7)
        assert silent_until_replaced(silence, 60) == pytest.approx(BUSY_S, abs=0.2)


def test_a_worker_that_waits_for_the_stores_as_it_starts_gets_the_time_that_starting_takes():
    with process(SLEEPS) as worker:
        silence = Silence(worker.pid)
        assert silent_until_replaced(silence, 300) == pytest.approx(START_S, abs=0.2)


def test_a_beat_ends_the_silence():
    with process(SLEEPS) as worker:
        silence = Silence(worker.pid)
        for beat in range(100):
            silence.look(beat, LOOK_INTERVAL_S)
            for _ in range(10):
                silence.look(beat, LOOK_INTERVAL_S)
            assert not silence.is_too_long


def test_a_machine_that_slept_counts_as_one_look():
    with process(SLEEPS) as worker:
        silence = Silence(worker.pid, beats=7)
        silence.look(7, LOOK_INTERVAL_S)
        silence.look(7, 3_600.0)
        assert silence.seconds <= 2 * LOOK_COUNTS_S_MAX
        assert not silence.is_too_long
