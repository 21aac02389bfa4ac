"""The worker processes: spawned, watched by a sign of life, replaced, drained.

    worker's event loop ──beat, every BEAT_INTERVAL_S──▶ shared number ◀──looked at by the parent

Silence is counted in the parent's own looks, each for so long as looks are apart at the most. So a
machine that sleeps, or a parent that was itself stopped, adds one look and no more. What a silence
means depends on the worker:

- stopped by a signal, or waiting with all its threads: it hangs, and is replaced after HUNG_S;
- a thread of it runs, or waits for a processor or a disk: bulk work may hold the interpreter, or the
  machine is overloaded. It is replaced after BUSY_S.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from ctypes import c_uint64
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import structlog
from prometheus_client.multiprocess import mark_process_dead

from server.settings import ServerSettings

LOOK_INTERVAL_S = 0.1
LOOK_COUNTS_S_MAX = 3 * LOOK_INTERVAL_S
"""What one look adds to a silence at the most."""
BEAT_INTERVAL_S = 0.25
HUNG_S = 2.0
BUSY_S = 10.0
START_S = 120.0
"""Time to the first beat: imports, and the core's compilation where it is the first."""
HUNG_CPU_SHARE_MAX = 0.1
"""A worker that used more of a processor than this while it was silent is busy."""
RESTART_PAUSE_S = 1.0
"""Before a worker is replaced that did not live long."""
LONG_LIFE_S = 10.0
STARTS_MAX = 3
"""Workers that end before any has served; then the server gives up."""
DRAIN_MARGIN_S = 5.0

MEMORY_SETTINGS = {
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": str(8 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(32 << 20),
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}
"""Of a worker: what large batches took is given back, and not kept for each thread and each library."""

log = structlog.get_logger()


class WorkersError(Exception):
    """Workers end before they serve."""


def run_worker(settings: ServerSettings, beats: Any) -> None:
    """A worker's main function, in its own process; `beats` is the number that its loop counts up."""
    from server.worker import serve
    from stores.lifeline import follow_parent

    follow_parent()
    serve(settings, beats)


@dataclass(slots=True)
class Silence:
    """How long a worker has given no sign of life, and what it did meanwhile."""

    pid: int
    beats: int = 0
    seconds: float = 0.0
    cpu_s_before: float = 0.0

    def look(self, beats: int, passed_s: float) -> None:
        """Takes in the count of beats, so long after the last look."""
        if beats != self.beats:
            self.beats, self.seconds = beats, 0.0
        elif self.seconds == 0.0:
            self.seconds, self.cpu_s_before = min(passed_s, LOOK_COUNTS_S_MAX), cpu_s(self.pid)
        else:
            self.seconds += min(passed_s, LOOK_COUNTS_S_MAX)

    @property
    def is_too_long(self) -> bool:
        """Whether the worker is to be replaced."""
        if self.seconds < HUNG_S:
            return False
        states = thread_states(self.pid)
        if states and set(states) <= {"T"}:
            return True
        if self.beats == 0:
            return self.seconds >= START_S
        used_s = cpu_s(self.pid) - self.cpu_s_before
        is_busy = not set(states) <= set("STIZ") or used_s > HUNG_CPU_SHARE_MAX * self.seconds
        return self.seconds >= BUSY_S or not is_busy


def thread_states(pid: int) -> list[str]:
    """The states of a process's threads, by the kernel's letters; none where it is gone."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/stat"):
        try:
            found.append(path.read_text().rpartition(")")[2].split()[0])
        except OSError:
            continue  # it ended in between
    return found


def cpu_s(pid: int) -> float:
    """Processor time that a process has used; 0 where it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class _Worker:
    """One worker, from its start to its end."""

    def __init__(self, settings: ServerSettings) -> None:
        for name, value in MEMORY_SETTINGS.items():
            os.environ.setdefault(name, value)
        context: Any = multiprocessing.get_context("spawn")
        self._beats = context.RawValue(c_uint64, 0)
        self.process: BaseProcess = context.Process(
            target=run_worker, args=(settings, self._beats), daemon=True
        )
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid
        self._began_s = time.monotonic()
        self._silence = Silence(self.pid)

    def look(self, passed_s: float) -> bool:
        """Whether it lives; one that hangs is killed."""
        if not self.process.is_alive():
            log.error("a worker ended", pid=self.pid, status=self.process.exitcode)
            return False
        self._silence.look(self._beats.value, passed_s)
        if not self._silence.is_too_long:
            return True
        seconds = round(self._silence.seconds, 1)
        log.error("a worker gives no sign of life: it is killed", pid=self.pid, silent_s=seconds)
        self.process.kill()
        self.process.join()
        return False

    @property
    def has_served(self) -> bool:
        """Whether its event loop ever ran."""
        return bool(self._beats.value)

    @property
    def lived_long(self) -> bool:
        """Whether it may be replaced at once."""
        return time.monotonic() - self._began_s >= LONG_LIFE_S


class Workers:
    """The worker processes of a server."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._stopping = False
        self._workers: list[_Worker | None] = [None] * settings.workers
        self._starts_at_s = [0.0] * settings.workers
        """When a worker that is not there is started, by time.monotonic()."""
        self._has_served = False
        self._failed_starts = 0

    def run(self) -> None:
        """Spawns the workers and replaces those that end or hang, until SIGTERM or SIGINT.

        Raises:
            WorkersError: they end before any of them has served.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        last_s = time.monotonic()
        try:
            while not self._stopping:
                now_s = time.monotonic()
                for place in range(len(self._workers)):
                    self._keep(place, now_s, now_s - last_s)
                last_s = now_s
                wait([w.process.sentinel for w in self._workers if w], LOOK_INTERVAL_S)
        finally:
            self._stop()

    def _keep(self, place: int, now_s: float, passed_s: float) -> None:
        """Sees to it that a place has a worker that lives."""
        worker = self._workers[place]
        if worker is None:
            if now_s >= self._starts_at_s[place]:
                self._workers[place] = _Worker(self._settings)
            return
        self._has_served = self._has_served or worker.has_served
        if worker.look(passed_s) or self._stopping:
            return
        mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]
        self._workers[place] = None
        self._starts_at_s[place] = now_s + (0.0 if worker.lived_long else RESTART_PAUSE_S)
        self._failed_starts += 1
        if not self._has_served and self._failed_starts >= STARTS_MAX:
            raise WorkersError(f"{self._failed_starts} workers ended before one served: see above")

    def _on_signal(self, number: int, frame: object) -> None:
        self._stopping = True

    def _stop(self) -> None:
        processes = [worker.process for worker in self._workers if worker is not None]
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + self._settings.drain_s + DRAIN_MARGIN_S
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
