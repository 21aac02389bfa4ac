"""Runs of the batch job: which days, in which parts, on which engine, and what came of it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path

import features
import stores
from batch_job.engines import Engine
from batch_job.exact import Part
from stores.conditions import IDS_END
from stores.errors import NotReadyError
from stores.merchants import FACTS_LOCK, FACTS_TIMEOUT_S, refresh
from stores.postgres import OfflineStore
from stores.runs import BatchRuns

PART_ROWS = 100_000
"""Transactions in a part, about: what is done again, for each worker, when a run is killed."""
READ_PER_ROW = 10
"""Records of histories that are read in the time in which one row is computed and written, about."""
PARTS_MAX = 4_096
REPORT_INTERVAL_S = 0.5
LOCK = "batch run"


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """What a run came to."""

    run_id: str
    engine: str
    from_time: datetime
    to_time: datetime
    rows_computed: int
    rows_new: int
    """Of these, those that had no features yet."""
    rows_repaired: int
    """Those whose features were others: events came late, or the definitions have changed."""
    seconds: float


Report = Callable[[int, int, int], None]
"""Told (parts done, parts in all, rows computed)."""


def run(
    postgres_url: str,
    engine: Engine,
    today: date | None,
    days: tuple[datetime, datetime] | None = None,
    report: Report = lambda done, parts, rows: None,
    report_facts: Callable[[int, int], None] = lambda done, months: None,
    publish: Callable[[], None] = lambda: None,
) -> RunOutcome | None:
    """Brings the facts of merchants up to date, computes exact features of all transactions of some days,
    and writes what differs.

    Args:
        postgres_url: the offline store; its schema is up to date.
        engine: where it is computed.
        today: the day through which facts are valid then, as for `refresh`.
        days: from one instant to before another; by default from the first day that something came in
            of since the last run; all, where that was of another catalogue or code.
        report: told how far it has come.
        report_facts: told (months done, months in all) of the facts of merchants.
        publish: called once these are up to date, to hand them to the online store.

    Returns:
        What came of it; None where there is nothing to do.

    Raises:
        LockedError: another run is under way.
        StoreError: Postgres does not do its part. The same run again goes on with what is missing.
    """
    began_s = time.monotonic()
    with (
        OfflineStore(postgres_url) as offline,
        offline.locked(LOCK, shared=False, timeout_s=1.0),
        BatchRuns(postgres_url) as runs,
    ):
        if not offline.has_current_records:
            text = "postgres is of another version: `tally up` or `tally load` mends it"
            raise NotReadyError("postgres", text)
        with offline.locked(FACTS_LOCK, shared=False, timeout_s=FACTS_TIMEOUT_S):
            refresh(offline, today, report_facts)
        publish()
        code = code_fingerprint()
        chosen = days or runs.days_to_compute(code)
        if chosen is None:
            return None
        wanted = min(max(_work(runs, chosen) // PART_ROWS, engine.workers), PARTS_MAX)
        run_id, n_parts, done = runs.begin(
            engine.name, chosen, wanted, code, is_following=days is None
        )
        parts = [part for part in _parts(run_id, n_parts, chosen) if part.number not in done]
        try:
            _compute(engine, postgres_url, parts, lambda: report(*_progress(runs, run_id, n_parts)))
        except BaseException:
            runs.add_seconds(run_id, time.monotonic() - began_s)
            raise
        seconds = time.monotonic() - began_s
        computed, new, repaired, total_s = runs.end(run_id, engine.name, seconds)
    return RunOutcome(run_id, engine.name, *chosen, computed, new, repaired, round(total_s, 3))


def _work(runs: BatchRuns, days: tuple[datetime, datetime]) -> int:
    """About how much there is to do, in rows that are computed and written."""
    from_ms, before_ms = _bounds_ms(days)
    read = runs.rows((None, before_ms))
    return runs.rows((from_ms, before_ms)) + read // READ_PER_ROW


def _bounds_ms(days: tuple[datetime, datetime]) -> tuple[int, int]:
    from_ms, before_ms = (-(-round(day.timestamp() * 1e6) // 1000) for day in days)
    return from_ms, before_ms


def _compute(
    engine: Engine, postgres_url: str, parts: list[Part], report: Callable[[], None]
) -> None:
    """Has the engine compute parts, and reports meanwhile."""
    if not parts:
        return
    with ThreadPoolExecutor(1, "engine") as thread:
        future = thread.submit(engine.run, postgres_url, parts)
        while wait([future], timeout=REPORT_INTERVAL_S).not_done:
            report()
        future.result()
        report()


def _progress(runs: BatchRuns, run_id: str, n_parts: int) -> tuple[int, int, int]:
    done, rows = runs.progress(run_id)
    return done, n_parts, rows


def _parts(run_id: str, n: int, days: tuple[datetime, datetime]) -> list[Part]:
    """Spans of card ids of the same width: ids are uniform."""
    from_ms, before_ms = _bounds_ms(days)
    bounds = [IDS_END * i // n for i in range(n + 1)]
    return [Part(run_id, i, bounds[i], bounds[i + 1], from_ms, before_ms) for i in range(n)]


def code_fingerprint() -> str:
    """A digest (16 hex digits) of the sources that decide what is computed and written."""
    digest = hashlib.sha256()
    packages = (Path(str(features.__file__)), Path(str(stores.__file__)), Path(__file__))
    for source in sorted(path for package in packages for path in package.parent.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]
