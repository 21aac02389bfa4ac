"""Records of batch runs, in Postgres."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import UTC, datetime

from features import CATALOG_FINGERPRINT
from stores.conditions import Range, during
from stores.connections import Connected, reported

_BEGIN = """
INSERT INTO batch_runs
    (run_id, engine, from_time, to_time, parts, catalog_fingerprint, code_fingerprint, is_following)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s)
"""
# Not where facts of merchants have changed since: parts that are done were computed with others.
_UNFINISHED = """
SELECT run_id, parts FROM batch_runs r WHERE finished_at IS NULL
    AND NOT EXISTS (SELECT FROM fact_runs
        WHERE computed_at > r.started_at AND affected_from < r.to_time)
    AND (from_time, to_time, catalog_fingerprint, code_fingerprint, is_following)
        = (%s, %s, %s, %s, %s)
ORDER BY started_at DESC LIMIT 1
"""
_END = """
UPDATE batch_runs r SET finished_at = now(), engine = %s, seconds = coalesce(seconds, 0) + %s,
    rows_computed = p.computed, rows_new = p.new, rows_repaired = p.repaired
FROM (SELECT coalesce(sum(rows_computed), 0) AS computed, coalesce(sum(rows_new), 0) AS new,
             coalesce(sum(rows_repaired), 0) AS repaired FROM batch_parts WHERE run_id = %s) p
WHERE r.run_id = %s RETURNING rows_computed, rows_new, rows_repaired, seconds
"""
# What came in that the last run that followed may not have seen, whenever it happened; and to the newest of
# all. Facts are refreshed before a run begins: it has seen what they had.
# A run of days that were named says nothing of what came in of others.
# Runs before one of another catalogue or code do not count: since then, rows may be of that one, or were never
# computed by this one. Everything is computed again then.
_CHANGED = """
WITH others AS (
    SELECT coalesce(max(started_at), '-infinity') AS started_at FROM batch_runs
    WHERE (catalog_fingerprint, code_fingerprint) <> (%(catalog)s, %(code)s)
), last AS (
    SELECT coalesce(max(r.started_at), '-infinity') AS started_at FROM batch_runs r, others o
    WHERE finished_at IS NOT NULL AND is_following AND r.started_at > o.started_at
), affected AS (
    SELECT coalesce(min(affected_from), 'infinity') AS from_time FROM fact_runs, last
    WHERE computed_at >= started_at
), seen AS (
    SELECT (SELECT snapshot FROM fact_runs WHERE computed_at < started_at AND snapshot IS NOT NULL
        ORDER BY fact_run_id DESC LIMIT 1) AS snapshot FROM last
)
SELECT date_trunc('day', min(event_time) FILTER (WHERE snapshot IS NULL
           OR NOT pg_visible_in_snapshot(ingested_xid, snapshot) OR event_time >= from_time), 'UTC'),
       date_trunc('day', max(event_time), 'UTC') + interval '1 day'
FROM transactions, affected, seen
"""
_LATEST = """
SELECT run_id, engine, from_time, to_time, started_at, finished_at, rows_computed, rows_new,
       rows_repaired, seconds, catalog_fingerprint, code_fingerprint
FROM batch_runs ORDER BY started_at DESC LIMIT %s
"""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What is known of a run."""

    run_id: str
    engine: str
    from_time: datetime
    to_time: datetime
    started_at: datetime
    finished_at: datetime | None
    rows_computed: int | None
    rows_new: int | None
    rows_repaired: int | None
    seconds: float | None
    catalog_fingerprint: str
    code_fingerprint: str


class BatchRuns(Connected):
    """Reads and writes them. One thread at a time."""

    def begin(
        self,
        engine: str,
        days: tuple[datetime, datetime],
        parts: int,
        code: str,
        *,
        is_following: bool,
    ) -> tuple[str, int, set[int]]:
        """Begins a run, or goes on with the last one of the same days and code that was cut off.

        Args:
            engine: its name.
            days: from one instant to before another.
            parts: how many there are, of a new run.
            code: the fingerprint of what computes.
            is_following: whether the days are those of `days_to_compute`, and not named.

        Returns:
            (run id, parts, the numbers of those that are done).
        """
        with reported():
            row = self.sql.execute(
                _UNFINISHED, (*days, CATALOG_FINGERPRINT, code, is_following)
            ).fetchone()
            if row is not None:
                run_id, known_parts = row
                done = self.sql.execute(
                    "SELECT part FROM batch_parts WHERE run_id = %s", (run_id,)
                ).fetchall()
                return run_id, known_parts, {number for (number,) in done}
            run_id = secrets.token_hex(8)
            values = (run_id, engine, *days, parts, CATALOG_FINGERPRINT, code, is_following)
            self.sql.execute(_BEGIN, values)
        return run_id, parts, set()

    def note_part(self, run_id: str, part: int, computed: int, new: int, repaired: int) -> None:
        """Notes that a part is done; what was counted first counts."""
        with reported():
            self.sql.execute(
                "INSERT INTO batch_parts VALUES (%s, %s, %s, %s, %s) ON CONFLICT DO NOTHING",
                (run_id, part, computed, new, repaired),
            )

    def progress(self, run_id: str) -> tuple[int, int]:
        """(parts done, rows computed) so far."""
        with reported():
            row = self.sql.execute(
                "SELECT count(*), coalesce(sum(rows_computed), 0) FROM batch_parts WHERE run_id = %s",
                (run_id,),
            ).fetchone()
        assert row is not None
        return int(row[0]), int(row[1])

    def add_seconds(self, run_id: str, seconds: float) -> None:
        """Counts time that a run took before it was cut off."""
        with reported():
            self.sql.execute(
                "UPDATE batch_runs SET seconds = coalesce(seconds, 0) + %s WHERE run_id = %s",
                (seconds, run_id),
            )

    def end(self, run_id: str, engine: str, seconds: float) -> tuple[int, int, int, float]:
        """Ends a run, all of whose parts are done.

        Returns:
            (rows computed, new, repaired, seconds in all).
        """
        with reported():
            row = self.sql.execute(_END, (engine, seconds, run_id, run_id)).fetchone()
        assert row is not None
        computed, new, repaired, total_s = row
        return int(computed), int(new), int(repaired), float(total_s)

    def days_to_compute(self, code: str) -> tuple[datetime, datetime] | None:
        """From the first day that something came in of since the last run, or that facts of merchants
        have changed of, to behind the newest; None where nothing did. A late event changes features of
        what came up to 30 days after it. All days, where the last run was of another catalogue or code.

        Args:
            code: the fingerprint of what computes now.
        """
        with reported():
            row = self.sql.execute(
                _CHANGED, {"catalog": CATALOG_FINGERPRINT, "code": code}
            ).fetchone()
        if row is None or row[0] is None:
            return None
        return row[0].astimezone(UTC), row[1].astimezone(UTC)

    def rows(self, within: Range) -> int:
        """About how many transactions there are in a range of event times, as far as the planner knows."""
        with reported():
            query = f"EXPLAIN (FORMAT JSON) SELECT FROM transactions WHERE true{during(within)}"
            row = self.sql.execute(query.encode()).fetchone()
        assert row is not None
        return int(row[0][0]["Plan"]["Plan Rows"])

    def latest(self, n: int) -> list[RunRecord]:
        """The latest runs, the newest first."""
        with reported():
            return [RunRecord(*row) for row in self.sql.execute(_LATEST, (n,)).fetchall()]
