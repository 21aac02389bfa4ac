"""The offline store: every fact ever accepted, in Postgres. Plain SQL, bulk writes by ADBC.

A transaction is accepted once. `transaction_ids` decides which rows of a batch are new; the rest
are compared with what is stored under their id, and are duplicates where nothing differs and
conflicts where anything does. All of a batch happens in one transaction.

Batches that are wholly new, as in a first load, are copied straight into the tables; the first id
that is known undoes that, and the batch is staged and compared. Twice as fast for new rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import resources
from typing import Any

import adbc_driver_manager as adbc
import numpy as np
import numpy.typing as npt
import psycopg
import pyarrow as pa
import pyarrow.compute as pc
from psycopg import sql

from features import CATALOG, CATALOG_FINGERPRINT, Feature
from features.ledger import RECORD_FORMAT
from stores.arrow import LABELS, PROFILES, TRANSACTIONS, to_ms, with_records
from stores.conditions import instant
from stores.connections import Connected, bulk_connection, reported, stated
from stores.errors import CardKeyMismatchError, LockedError
from stores.feature_rows import FeatureTable

ONLINE_STORE_LOCK = "online store"
"""Shared by all who apply events or compute features; held alone by whoever needs both stores so, such as to
rebuild or to erase."""
SCHEMA = "schema"
"""Held alone by whoever brings the schema up to date."""
LOCK_TIMEOUT_S = 30.0
UNIQUE_VIOLATION = "23505"

_VIEW_COLUMNS = ("event_time", "transaction_id", "computed_at")
"""Of the view of features, before the features."""

_STAGE = """
CREATE TEMP TABLE staged (
    card_id bytea, event_time timestamptz, transaction_id text COLLATE "C", amount_minor bigint,
    merchant text, category text, merchant_latitude double precision,
    merchant_longitude double precision, is_fraud boolean, label_time timestamptz, record bytea,
    row_number int
) ON COMMIT DELETE ROWS
"""

_STAGE_LABELS = """
CREATE TEMP TABLE staged_labels (
    transaction_id text COLLATE "C", is_fraud boolean, label_time timestamptz, row_number int
) ON COMMIT DELETE ROWS
"""

_ACCEPT_LABELS = """
INSERT INTO labels (transaction_id, is_fraud, label_time)
SELECT DISTINCT ON (transaction_id) transaction_id, is_fraud, label_time FROM staged_labels
ORDER BY transaction_id, row_number ON CONFLICT DO NOTHING
"""

_LABEL_CONFLICTS = """
SELECT s.row_number FROM staged_labels s JOIN labels l USING (transaction_id)
WHERE (s.is_fraud, s.label_time) IS DISTINCT FROM (l.is_fraud, l.label_time)
"""

_PROGRESS = """
INSERT INTO stream_progress AS p (topic, partition, next_offset, append_time)
VALUES (%s, %s, %s, to_timestamp(%s / 1000.0))
ON CONFLICT (topic, partition) DO UPDATE SET
    next_offset = excluded.next_offset, append_time = excluded.append_time, updated_at = now()
WHERE excluded.next_offset > p.next_offset
"""

_STAGE_RECORDS = """
CREATE TEMP TABLE staged_records (
    card_id bytea, event_time timestamptz, transaction_id text COLLATE "C", record bytea
) ON COMMIT DELETE ROWS
"""

_PUT_RECORDS = """
UPDATE transactions t SET record = s.record FROM staged_records s
WHERE (t.card_id, t.event_time, t.transaction_id) = (s.card_id, s.event_time, s.transaction_id)
"""

_STAGE_PROFILES = f"""
CREATE TEMP TABLE staged_profiles ON COMMIT DELETE ROWS
AS SELECT {", ".join(PROFILES.names)} FROM profiles WITH NO DATA
"""

_ACCEPT = """
WITH accepted AS (
    -- In one order everywhere, lest two loads of one file wait for each other.
    INSERT INTO transaction_ids SELECT transaction_id, event_time FROM staged
    ORDER BY transaction_id ON CONFLICT DO NOTHING RETURNING transaction_id
), written AS (
    INSERT INTO transactions (card_id, event_time, transaction_id, amount_minor, merchant, category,
           merchant_latitude, merchant_longitude, record)
    SELECT card_id, event_time, transaction_id, amount_minor, merchant, category,
           merchant_latitude, merchant_longitude, record
    FROM staged JOIN accepted USING (transaction_id)
    RETURNING 1
)
SELECT count(*) FROM written
"""

# Index look-ups into one partition each, whatever the planner thinks of an unanalysed table.
_CONFLICTS = """
SELECT s.row_number FROM staged s LEFT JOIN transactions t
    ON t.card_id = s.card_id AND t.event_time = s.event_time
    AND t.transaction_id = s.transaction_id AND t.amount_minor = s.amount_minor
    AND t.merchant = s.merchant AND t.category IS NOT DISTINCT FROM s.category
    AND t.merchant_latitude IS NOT DISTINCT FROM s.merchant_latitude
    AND t.merchant_longitude IS NOT DISTINCT FROM s.merchant_longitude
LEFT JOIN labels l ON l.transaction_id = s.transaction_id
WHERE t.transaction_id IS NULL
    OR (s.is_fraud, s.label_time) IS DISTINCT FROM (l.is_fraud, l.label_time)
    AND s.is_fraud IS NOT NULL AND l.is_fraud IS NOT NULL
"""

_LABELS = """
INSERT INTO labels (transaction_id, is_fraud, label_time)
SELECT transaction_id, is_fraud, label_time FROM staged
WHERE is_fraud IS NOT NULL AND row_number <> ALL ($1::int[]) ON CONFLICT DO NOTHING
"""

# Rows are never changed (see 0004_snapshots.sql): the earliest of a content counts.
_PROFILES = f"""
INSERT INTO profiles ({", ".join(PROFILES.names)})
SELECT * FROM staged_profiles s WHERE NOT EXISTS (
    SELECT 1 FROM profiles p
    WHERE p.card_id = s.card_id AND p.content = s.content AND p.valid_from <= s.valid_from)
ORDER BY card_id, content, valid_from ON CONFLICT DO NOTHING
"""


@dataclass(frozen=True, slots=True)
class Accepted:
    """What became of a batch."""

    written: int
    """Rows that were new."""
    conflicts: npt.NDArray[np.int64]
    """Positions of rows whose id is known with another content; they were not applied."""


def migrate(url: str) -> None:
    """Brings the schema up to date; several processes may call it at once.

    Raises:
        StoreUnavailableError: Postgres cannot be reached.
        LockedError: another process has been at it for too long.
    """
    with OfflineStore(url) as store, store.locked(SCHEMA, shared=False):
        _apply_migrations(url)


def _apply_migrations(url: str) -> None:
    """Applies what is missing. A process that is killed here leaves nothing half done and nothing locked: each
    migration is one transaction with the note that it was applied, and the lock is the caller's.

    The migration tool's own way notes it later, and locks by a row, which stays when its process is killed.
    """
    import yoyo  # takes a tenth of a second, and only few processes bring schemas up to date

    scheme, rest = stated(url).split("://", 1)
    backend = yoyo.get_backend(f"{scheme}+psycopg://{rest}")
    try:
        with (
            reported(),
            resources.as_file(resources.files("stores").joinpath("migrations")) as folder,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore", DeprecationWarning)  # of the tool's own making
            backend.break_lock()  # of a process of an earlier version, which was killed
            for migration in backend.to_apply(yoyo.read_migrations(str(folder))):
                with backend.transaction():
                    migration.process_steps(backend, "apply")
                    backend.mark_one(migration)
    finally:
        backend.connection.close()


class OfflineStore(Connected):
    """Reads and writes facts. One thread at a time."""

    def __init__(self, url: str) -> None:
        """Connects at once; arguments and errors as those of Connected."""
        super().__init__(url)
        self.features = FeatureTable(self.sql)
        self._bulk: Any = None
        self._months: set[tuple[int, int]] = set()
        self._expects_new_rows = True

    def close(self) -> None:
        """Gives the connections back, whatever state they are in."""
        with suppress(adbc.Error, psycopg.Error):
            if self._bulk is not None:
                self._bulk.close()
        super().close()

    def adopt_card_key(self, fingerprint: str) -> None:
        """Remembers the card key at first, and insists on it from then on.

        Raises:
            CardKeyMismatchError: the database was written under another key.
        """
        with reported(), self.sql.transaction():
            self.sql.execute(
                "INSERT INTO installation (card_key_fingerprint) VALUES (%s) ON CONFLICT DO NOTHING",
                (fingerprint,),
            )
        self.check_card_key(fingerprint)

    def check_card_key(self, fingerprint: str) -> None:
        """Raises CardKeyMismatchError where the database was written under another key."""
        with reported():
            row = self.sql.execute("SELECT card_key_fingerprint FROM installation").fetchone()
        if row is not None and row[0] != fingerprint:
            raise CardKeyMismatchError("postgres", row[0], fingerprint)

    @contextmanager
    def locked(
        self, name: str, *, shared: bool, timeout_s: float = LOCK_TIMEOUT_S
    ) -> Iterator[None]:
        """Holds a lock between processes by name. Gone with the connection.

        Args:
            name: of the lock.
            shared: whether others may share it.
            timeout_s: how long it is waited for. Whoever waits for it alone holds up who would
                share it.

        Raises:
            LockedError: somebody else has held it for so long.
        """
        suffix = "_shared" if shared else ""
        key = f"tally {name}"
        with reported():
            try:
                self.sql.execute(f"SET lock_timeout = {round(timeout_s * 1000)}")
                self.sql.execute(f"SELECT pg_advisory_lock{suffix}(hashtext(%s))", (key,))
            except psycopg.errors.LockNotAvailable:
                raise LockedError(name, timeout_s) from None
            finally:
                with suppress(psycopg.Error):
                    self.sql.execute("SET lock_timeout = 0")
        try:
            yield
        finally:
            # Where the connection is gone, so is the lock; what went wrong matters more.
            with suppress(psycopg.Error):
                self.sql.execute(f"SELECT pg_advisory_unlock{suffix}(hashtext(%s))", (key,))

    def ensure_partitions(self, times_ms: npt.NDArray[np.int64]) -> None:
        """Makes the partitions of the months that instants (n,) are in."""
        months = np.unique(times_ms.astype("datetime64[ms]").astype("datetime64[M]").astype(int))
        for number in months.tolist():
            month = (1970 + number // 12, number % 12 + 1)
            if month not in self._months:
                following = (month[0] + month[1] // 12, month[1] % 12 + 1)
                for table in ("transactions", "features"):
                    self._make_partition(table, month, following)
                self._months.add(month)

    def _make_partition(
        self, table: str, month: tuple[int, int], following: tuple[int, int]
    ) -> None:
        name = f"{table}_{month[0]:04}_{month[1]:02}"
        bounds = [f"{year:04}-{number:02}-01 00:00:00+00" for year, number in (month, following)]
        with reported(), self.sql.transaction():
            # Two loaders may want the same month at once.
            self.sql.execute("SELECT pg_advisory_xact_lock(hashtext('tally partitions'))")
            if self.sql.execute("SELECT to_regclass(%s)", (name,)).fetchone() == (None,):
                # Attached, and not made as a partition, which would wait for whoever reads the table,
                # such as a historical call, and have everybody else wait behind it.
                self.sql.execute(f"CREATE TABLE {name} (LIKE {table} INCLUDING ALL)")
                self.sql.execute(
                    f"ALTER TABLE {table} ATTACH PARTITION {name} "
                    f"FOR VALUES FROM ('{bounds[0]}') TO ('{bounds[1]}')"
                )

    def _bulk_connection(self) -> Any:
        if self._bulk is None:
            self._bulk = bulk_connection(self.url)
            with self._bulk.cursor() as cursor:
                cursor.execute(_STAGE)
                cursor.execute(_STAGE_PROFILES)
                cursor.execute(_STAGE_LABELS)
                cursor.execute(_STAGE_RECORDS)
                # A crash of the machine may undo the last commits. Files are then loaded again, and
                # the stream's progress, committed after them and waited for, has them in the log.
                cursor.execute("SET synchronous_commit = off")
                cursor.execute("SET enable_hashjoin = off")
                cursor.execute("SET enable_mergejoin = off")
            self._bulk.commit()
        return self._bulk

    def accept(self, batch: pa.Table) -> Accepted:
        """Writes what is new of a batch, with its labels; all of it or, on an error, nothing.

        Args:
            batch: of TRANSACTIONS and LABELS, with RECORD_COLUMN, each transaction id once.

        Raises:
            StoreUnavailableError, StoreError.
        """
        self.ensure_partitions(to_ms(batch["event_time"]))
        if self._expects_new_rows and self._write_if_new(batch):
            return Accepted(len(batch), np.empty(0, dtype=np.int64))
        accepted = self._write_what_is_new(batch)
        self._expects_new_rows = accepted.written == len(batch)
        return accepted

    def _write_if_new(self, batch: pa.Table) -> bool:
        """Copies a batch into the tables; False, and nothing written, where any row is known."""
        # In the order of their indexes the rows of a batch touch each page once.
        ids = batch.select(["transaction_id", "event_time", *LABELS.names])
        ids = ids.take(pc.sort_indices(ids["transaction_id"]))
        labels = ids.filter(pc.is_valid(ids["is_fraud"]))
        parts = (
            ("transaction_ids", ids.select(["transaction_id", "event_time"])),
            ("transactions", batch.select([*TRANSACTIONS.names, "record"])),
            ("labels", labels.select(["transaction_id", *LABELS.names])),
        )
        return self._copy_if_new(parts)

    def _copy_if_new(self, parts: Sequence[tuple[str, pa.Table]]) -> bool:
        """Copies rows into tables; False, and nothing written, where any is there already."""
        with reported():
            connection = self._bulk_connection()
            try:
                with connection.cursor() as cursor, _rolled_back_on_error(connection):
                    for table, rows in parts:
                        cursor.adbc_ingest(table, rows, mode="append")
                    connection.commit()
            except adbc.Error as error:
                if error.sqlstate == UNIQUE_VIOLATION:
                    return False
                raise
        return True

    def _write_what_is_new(self, batch: pa.Table) -> Accepted:
        """Stages a batch, writes the rows that are new, and compares the others."""
        numbered = batch.append_column(
            "row_number", pa.array(np.arange(len(batch), dtype=np.int32))
        )
        with reported():
            connection = self._bulk_connection()
            with connection.cursor() as cursor, _rolled_back_on_error(connection):
                cursor.adbc_ingest("staged", numbered, mode="append", temporary=True)
                cursor.execute("SET LOCAL enable_hashjoin = on")
                cursor.execute(_ACCEPT)
                written = int(cursor.fetchone()[0])
                conflicts = np.empty(0, dtype=np.int64)
                if written < len(batch):
                    cursor.execute("SET LOCAL enable_hashjoin = off")
                    cursor.execute(_CONFLICTS)
                    conflicts = cursor.fetch_arrow_table()["row_number"].to_numpy().astype(np.int64)
                cursor.execute(_LABELS.replace("$1", f"'{{{','.join(map(str, conflicts))}}}'"))
                connection.commit()
        return Accepted(written, conflicts)

    def put_profiles(self, profiles: pa.Table) -> None:
        """Adds profiles of PROFILES, (card_id, content) unique; the earliest valid_from stays."""
        with self._staged("staged_profiles", profiles) as cursor:
            cursor.execute(_PROFILES)

    @contextmanager
    def _staged(self, table: str, rows: pa.Table) -> Iterator[Any]:
        """A cursor that sees rows in a temporary table; all of it is committed at the end, or none."""
        with reported():
            connection = self._bulk_connection()
            with connection.cursor() as cursor, _rolled_back_on_error(connection):
                cursor.adbc_ingest(table, rows, mode="append", temporary=True)
                yield cursor
                connection.commit()

    def read(self, query: str) -> Iterator[pa.RecordBatch]:
        """The rows of a query as Arrow batches, in one snapshot."""
        with reported(), bulk_connection(self.url) as connection, connection.cursor() as cursor:
            cursor.execute(query)
            yield from cursor.fetch_record_batch()

    def read_all(self, query: str) -> pa.Table:
        """The rows of a query, of which there are few; of its columns also where there is none."""
        with reported(), bulk_connection(self.url) as connection, connection.cursor() as cursor:
            cursor.execute(query)
            return cursor.fetch_arrow_table()

    def begin_load(self, load_id: str, description: str) -> None:
        """Records that a load begins, or begins again."""
        with reported():
            self.sql.execute(
                "INSERT INTO loads (load_id, description) VALUES (%s, %s) "
                "ON CONFLICT (load_id) DO UPDATE SET started_at = now(), finished_at = NULL",
                (load_id, description),
            )

    def end_load(self, load_id: str, newest_ms: int, counts: dict[str, int]) -> None:
        """Records what a load came to: counts of read, loaded, duplicates and rejected rows."""
        with reported():
            self.sql.execute(
                "UPDATE loads SET finished_at = now(), newest_event_time = to_timestamp(%s), "
                "rows_read = %s, rows_loaded = %s, rows_duplicate = %s, rows_rejected = %s "
                "WHERE load_id = %s",
                (
                    newest_ms / 1000 if newest_ms >= 0 else None,
                    counts["read"],
                    counts["loaded"],
                    counts["duplicates"],
                    counts["rejected"],
                    load_id,
                ),
            )

    def tidy(self) -> None:
        """Notes which pages all can see, so that histories are read from the index alone, and what the
        planner should know. Postgres would do so by itself, a while later."""
        with reported():
            self.sql.execute("VACUUM (ANALYZE, SKIP_LOCKED) transactions, transaction_ids, labels")

    def abandon_loads(self, description: str) -> list[str]:
        """Gives up unfinished loads of a description; returns their ids. What they wrote stays."""
        with reported():
            rows = self.sql.execute(
                "DELETE FROM loads WHERE finished_at IS NULL AND description = %s RETURNING load_id",
                (description,),
            ).fetchall()
        return [load_id for (load_id,) in rows]

    def unfinished_loads(self) -> list[tuple[str, str]]:
        """(load id, description) of loads that began and have not ended."""
        with reported():
            return self.sql.execute(
                "SELECT load_id, description FROM loads WHERE finished_at IS NULL ORDER BY 1"
            ).fetchall()

    def newest_finished_ms(self) -> int:
        """The newest event time of all finished loads, in ms; -1 where there is none."""
        with reported():
            row = self.sql.execute(
                "SELECT max(newest_event_time) FROM loads WHERE finished_at IS NOT NULL"
            ).fetchone()
        assert row is not None
        return -1 if row[0] is None else round(row[0].timestamp() * 1000)

    @property
    def has_current_records(self) -> bool:
        """Whether the records kept beside transactions are of this version's format."""
        with reported():
            row = self.sql.execute("SELECT record_format FROM installation").fetchone()
        return row == (RECORD_FORMAT,)

    def refresh_records(self, report: Callable[[int], None] = lambda rows: None) -> None:
        """Computes the records of all transactions anew, while nothing else writes.

        Args:
            report: told how many have been written so far.
        """
        columns = ", ".join(TRANSACTIONS.names)
        rows = 0
        for batch in self.read(f"SELECT {columns} FROM transactions"):
            recorded = with_records(pa.Table.from_batches([batch]).cast(TRANSACTIONS))
            staged = recorded.select(["card_id", "event_time", "transaction_id", "record"])
            with self._staged("staged_records", staged) as cursor:
                cursor.execute(_PUT_RECORDS)
            rows += len(batch)
            report(rows)
        with reported():
            self.sql.execute("UPDATE installation SET record_format = %s", (RECORD_FORMAT,))
        if rows:
            self.tidy()

    def has_transactions(self) -> bool:
        """Whether any transaction was ever accepted."""
        with reported():
            return self.sql.execute("SELECT 1 FROM transaction_ids LIMIT 1").fetchone() is not None

    def refresh_feature_view(self, features: tuple[Feature, ...] = CATALOG) -> None:
        """Makes the view that names the columns of `features`, of rows of this catalogue alone.

        It is replaced and never dropped: views that customers built upon it stay, and so do their grants.
        Postgres lets such a view grow at its end only, so columns keep the places that they have, new
        features come last, and a feature that is no longer in the catalogue is null.
        """
        places = {feature.name: f"feature_values[{i}]" for i, feature in enumerate(features, 1)}
        with reported(), self.sql.transaction():
            self.sql.execute("SELECT pg_advisory_xact_lock(hashtext('tally view'))")
            known = self.sql.execute(
                "SELECT obj_description(to_regclass('named_features'), 'pg_class')"
            ).fetchone()
            if known == (CATALOG_FINGERPRINT,):
                return
            former = self.sql.execute(
                "SELECT attname FROM pg_attribute WHERE attrelid = to_regclass('named_features') "
                "AND attnum > %s AND NOT attisdropped ORDER BY attnum",
                (len(_VIEW_COLUMNS),),
            ).fetchall()
            names = list(dict.fromkeys([*(name for (name,) in former), *places]))
            columns = [
                sql.SQL("{} AS {}").format(
                    sql.SQL(places.get(name, "NULL::double precision")), sql.Identifier(name)
                )
                for name in names
            ]
            self.sql.execute(
                sql.SQL(
                    "CREATE OR REPLACE VIEW named_features AS SELECT {} FROM features "
                    "WHERE catalog_fingerprint = {}"
                ).format(
                    sql.SQL(", ").join([*map(sql.Identifier, _VIEW_COLUMNS), *columns]),
                    sql.Literal(CATALOG_FINGERPRINT),
                )
            )
            self.sql.execute(
                sql.SQL("COMMENT ON VIEW named_features IS {}").format(
                    sql.Literal(CATALOG_FINGERPRINT)
                )
            )

    def cards_following(self, card_ids: Sequence[bytes]) -> list[bytes]:
        """The cards whose ids come next after those given, or are these, each once, in order; behind
        the last comes the first."""
        first = "SELECT card_id FROM transactions {where} ORDER BY card_id LIMIT 1"
        following = first.format(where="WHERE card_id >= given.card_id")
        with reported():
            rows = self.sql.execute(
                f"SELECT DISTINCT coalesce(({following}), ({first.format(where='')})) AS card_id "
                "FROM unnest(%s::bytea[]) AS given(card_id) "
                "WHERE EXISTS (SELECT 1 FROM transactions) ORDER BY 1",
                (list(card_ids),),
            ).fetchall()
        return [card_id for (card_id,) in rows]

    def all_cards(self) -> Iterator[bytes]:
        """The cards of all transactions, in order, in one snapshot."""
        for batch in self.read("SELECT DISTINCT card_id FROM transactions ORDER BY 1"):
            yield from batch["card_id"].to_pylist()

    def known_cards(self, card_ids: Sequence[bytes]) -> list[bytes]:
        """Those of these cards that have a transaction, or had one."""
        with reported():
            rows = self.sql.execute(
                "SELECT given.card_id FROM unnest(%s::bytea[]) AS given(card_id) WHERE EXISTS ("
                "SELECT 1 FROM transactions t WHERE t.card_id = given.card_id) OR EXISTS ("
                "SELECT 1 FROM dropped d WHERE d.card_id = given.card_id)",
                (list(card_ids),),
            ).fetchall()
        return [card_id for (card_id,) in rows]

    def stays_out(self) -> tuple[int | None, bool]:
        """What is not taken in again: (the instant before which all was dropped, in ms, or None;
        whether any card was erased)."""
        with reported():
            row = self.sql.execute(
                "SELECT history_from, EXISTS (SELECT FROM erasures) FROM installation"
            ).fetchone()
        begin, has_erasures = row or (None, False)
        return None if begin is None else round(begin.timestamp() * 1000), has_erasures

    def cards_changed_since(self, time_us: int) -> list[bytes]:
        """The cards with a transaction that was ingested at or after an instant."""
        with reported():
            rows = self.sql.execute(
                f"SELECT DISTINCT card_id FROM transactions WHERE ingested_at >= {instant(time_us)}"
            ).fetchall()
        return [card_id for (card_id,) in rows]

    # --- the stream -------------------------------------------------------------------------

    def accept_labels(self, labels: pa.Table) -> npt.NDArray[np.int64]:
        """Writes labels that are new, of LABEL_EVENTS; a label may come before its transaction.

        Returns:
            Positions (n,) of those whose transaction has another label: the first one stays.
        """
        numbered = labels.append_column("row_number", pa.array(np.arange(len(labels), dtype="i4")))
        with self._staged("staged_labels", numbered) as cursor:
            cursor.execute(_ACCEPT_LABELS)
            cursor.execute(_LABEL_CONFLICTS)
            rows = cursor.fetch_arrow_table()["row_number"].to_numpy()
        return np.sort(rows.astype(np.int64))

    def advance_stream(self, progress: dict[tuple[str, int], tuple[int, int]]) -> None:
        """Records that everything before an offset is in both stores.

        Args:
            progress: (topic, partition) -> (next offset, append time of the last event in ms).
        """
        # This commit is waited for, and with it the batch's before it (see _bulk_connection).
        rows = [(*where, *reached) for where, reached in sorted(progress.items())]
        with reported(), self.sql.transaction(), self.sql.cursor() as cursor:
            cursor.executemany(_PROGRESS, rows)

    def stream_progress(self) -> dict[tuple[str, int], tuple[int, int]]:
        """What `advance_stream` has recorded."""
        with reported():
            rows = self.sql.execute(
                "SELECT topic, partition, next_offset, append_time FROM stream_progress"
            ).fetchall()
        return {
            (topic, partition): (offset, round(time.timestamp() * 1000))
            for topic, partition, offset, time in rows
        }


@contextmanager
def _rolled_back_on_error(connection: Any) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with suppress(adbc.Error):  # where the connection is gone, why it went matters more
            connection.rollback()
        raise
