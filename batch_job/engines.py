"""Where the parts of a run are computed: on this machine's cores, or on Spark's executors.

An engine takes the parts of a run and has `batch_job.exact.compute` called once for each, wherever that
is. It knows nothing of features; the parts know nothing of engines.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver
from typing import Any, Protocol

from batch_job.exact import Part, compute
from stores.errors import StoreError
from stores.lifeline import follow_parent


class Engine(Protocol):
    """Something that computes parts."""

    name: str
    """As run records have it."""
    workers: int
    """Parts that are computed at the same time, about."""

    def run(self, postgres_url: str, parts: Sequence[Part]) -> None:
        """Computes all parts, and returns when they are done.

        Raises:
            StoreError: Postgres does not do its part. Parts that are done stay done.
        """
        ...


class LocalEngine:
    """Processes of this machine, one for each core."""

    name = "local"

    def __init__(self, workers: int | None = None) -> None:
        """Has the workers' modules imported while whoever asks does something else: it takes a second."""
        self.workers = workers or os.cpu_count() or 1
        # Workers are forks of a process that does nothing but import, once, and has no threads.
        self._context = multiprocessing.get_context("forkserver")
        if self.workers > 1:
            self._context.set_forkserver_preload([compute.__module__])
            forkserver.ensure_running()

    def run(self, postgres_url: str, parts: Sequence[Part]) -> None:
        """As Engine.run."""
        if self.workers == 1 or len(parts) == 1:
            for part in parts:
                compute(postgres_url, part)
            return
        others = frozenset(multiprocessing.active_children())
        with ProcessPoolExecutor(
            min(self.workers, len(parts)),
            mp_context=self._context,
            # Whoever is killed leaves nobody behind who waits for more parts.
            initializer=follow_parent,
        ) as pool:
            try:
                for future in as_completed(_submitted(pool, postgres_url, parts)):
                    future.result()
            except BrokenProcessPool as error:
                # The pool does not end a worker that was starting while it broke, and its shutdown would
                # wait for it for ever.
                for worker in multiprocessing.active_children():
                    if worker not in others:
                        worker.terminate()
                raise StoreError(_KILLED) from error
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise


_KILLED = (
    "a worker was killed, perhaps for want of memory: run again, which goes on with the parts that are "
    "missing"
)


def _submitted(
    pool: ProcessPoolExecutor, postgres_url: str, parts: Sequence[Part]
) -> list[Future[Any]]:
    """Hands all parts to a pool.

    Raises:
        BrokenProcessPool: a worker was killed, perhaps while others were still being started.
    """
    try:
        futures = [pool.submit(compute, postgres_url, part) for part in parts]
        # A submit that races with the break may be lost without an error: one more then raises.
        pool.submit(int)
        return futures
    except OSError as error:  # the pool closes what it starts workers by, beneath this call
        raise BrokenProcessPool from error
