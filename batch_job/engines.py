"""Where the parts of a run are computed: on this machine's cores, or on Spark's executors.

An engine takes the parts of a run and has `batch_job.exact.compute` called once for each, wherever that
is. It knows nothing of features; the parts know nothing of engines.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Protocol

from batch_job.exact import Part, compute
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
        self.workers = workers or os.cpu_count() or 1

    def run(self, postgres_url: str, parts: Sequence[Part]) -> None:
        """As Engine.run."""
        if self.workers == 1 or len(parts) == 1:
            for part in parts:
                compute(postgres_url, part)
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(
            min(self.workers, len(parts)),
            mp_context=context,
            # Whoever is killed leaves nobody behind who waits for more parts.
            initializer=follow_parent,
            initargs=(os.getpid(),),
        ) as pool:
            futures = [pool.submit(compute, postgres_url, part) for part in parts]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
