"""Features of transactions in Postgres, written as the very bytes that COPY takes.

Rows of one length are put together by numpy, a column at a time: a driver that goes through every
element of every array takes longer than Postgres does. The layout is that of "Binary Format" in the manual's page on COPY, and for the
array that of array_send in Postgres's sources.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import psycopg
import pyarrow as pa
import pyarrow.compute as pc

from features import CATALOG_FINGERPRINT
from stores.arrow import TIME
from stores.connections import reported

_BLOCK_ROWS = 4_096
"""3 MB: what is made of a block is sent while it is in the processor's cache."""
_SIGNATURE = b"PGCOPY\n\xff\r\n\0" + bytes(8)  # no flags, no extension
_TRAILER = b"\xff\xff"
_COLUMNS = "event_time, transaction_id, catalog_fingerprint, feature_values"
_FINGERPRINT = CATALOG_FINGERPRINT.encode()
_POSTGRES_EPOCH_US = 946_684_800_000_000
"""2000-01-01, from which Postgres counts."""
_FLOAT8_OID = 701

# The plans are look-ups by the index, whatever the planner thinks of tables nobody analysed. For the
# durability of commits see OfflineStore._bulk_connection.
_SETTINGS = """
SET LOCAL synchronous_commit = off; SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off
"""

_STAGE = """
CREATE TEMP TABLE IF NOT EXISTS staged_features (
    event_time timestamptz, transaction_id text COLLATE "C", catalog_fingerprint text,
    feature_values double precision[]
) ON COMMIT DELETE ROWS
"""

_ON_ARRIVAL = f"""
WITH put AS (
    INSERT INTO features ({_COLUMNS})
    SELECT * FROM staged_features ON CONFLICT DO NOTHING RETURNING 1
)
SELECT count(*) FROM put
"""

# Exact rows in place of those that differ; what is the same is not written again.
_EXACT = f"""
WITH differing AS MATERIALIZED (
    SELECT s.*, f.transaction_id IS NULL AS is_new FROM staged_features s LEFT JOIN features f
        ON f.event_time = s.event_time AND f.transaction_id = s.transaction_id
    WHERE f.transaction_id IS NULL OR (f.catalog_fingerprint, f.feature_values)
        IS DISTINCT FROM (s.catalog_fingerprint, s.feature_values)
), put AS (
    INSERT INTO features ({_COLUMNS})
    SELECT {_COLUMNS} FROM differing
    ORDER BY event_time, transaction_id
    ON CONFLICT (event_time, transaction_id) DO UPDATE SET
        catalog_fingerprint = excluded.catalog_fingerprint,
        feature_values = excluded.feature_values, computed_at = now()
)
SELECT count(*) FILTER (WHERE is_new), count(*) FILTER (WHERE NOT is_new) FROM differing
"""


@dataclass(frozen=True, slots=True)
class FeatureRows:
    """The features of n transactions, under this catalogue."""

    transactions: pa.Table
    """(m,) with event_time and transaction_id."""
    values: npt.NDArray[np.float64]
    """(m, features of the catalogue): NaN where the status is not PRESENT."""
    positions: npt.NDArray[np.int64]
    """(n,): those of the m that are meant, in their order."""

    def __len__(self) -> int:
        return len(self.positions)


class FeatureTable:
    """Writes the table of features. The partitions of the rows' months are there."""

    def __init__(self, sql: psycopg.Connection) -> None:
        """Takes a connection that commits by itself."""
        self._sql = sql

    def put_if_missing(self, rows: FeatureRows, *, likely_new: bool) -> int:
        """Writes rows; those that are there already stay.

        Args:
            rows: where a transaction comes again, its first row counts.
            likely_new: whether none of them is there, as far as one can tell: half the time.

        Returns:
            How many were new.

        Raises:
            StoreUnavailableError, DataRefusedError, StoreError.
        """
        if likely_new and self._copy_if_new(rows):
            return len(rows)
        with self._staged(rows) as cursor:
            ((new,),) = cursor.execute(_ON_ARRIVAL).fetchall()
        return int(new)

    def put_exact(self, rows: FeatureRows, *, likely_new: bool) -> tuple[int, int]:
        """Writes rows, of each transaction one, in place of others.

        Args:
            rows: as they are to be.
            likely_new: whether none of them is there, as far as one can tell: half the time.

        Returns:
            How many were new, and how many took the place of one that differed.

        Raises:
            StoreUnavailableError, DataRefusedError, StoreError.
        """
        if likely_new and self._copy_if_new(rows):
            return len(rows), 0
        with self._staged(rows) as cursor:
            ((new, repaired),) = cursor.execute(_EXACT).fetchall()
        return int(new), int(repaired)

    def _copy_if_new(self, rows: FeatureRows) -> bool:
        """Copies rows into the table; False, and nothing written, where any is there already."""
        with reported():
            try:
                with self._sql.transaction(), self._sql.cursor() as cursor:
                    cursor.execute(_SETTINGS)
                    copy_blocks(cursor, "features", binary_rows(rows))
            except psycopg.errors.UniqueViolation:
                return False
        return True

    @contextmanager
    def _staged(self, rows: FeatureRows) -> Iterator[psycopg.Cursor]:
        """A cursor that sees rows in a temporary table; all of it is committed at the end, or none."""
        with reported(), self._sql.transaction(), self._sql.cursor() as cursor:
            cursor.execute(f"{_SETTINGS};{_STAGE}")
            copy_blocks(cursor, "staged_features", binary_rows(rows))
            yield cursor


def copy_blocks(cursor: psycopg.Cursor, table: str, blocks: Iterable[bytes | memoryview]) -> None:
    """Copies what `binary_rows` makes into a table that has the columns of `features`.

    Raises:
        psycopg.Error: Postgres does not take it.
    """
    with cursor.copy(f"COPY {table} ({_COLUMNS}) FROM STDIN (FORMAT BINARY)") as copy:
        copy.write(_SIGNATURE)
        for block in blocks:
            copy.write(block)
        copy.write(_TRAILER)


def binary_rows(rows: FeatureRows) -> Iterator[memoryview]:
    """The bytes of rows as COPY takes them, without signature and trailer. Rows of one transaction
    keep their order."""
    times_us = (
        rows.transactions["event_time"].cast(TIME).cast(pa.int64()).to_numpy() - _POSTGRES_EPOCH_US
    )
    ids = rows.transactions["transaction_id"].cast(pa.binary()).combine_chunks()
    id_bytes = pc.binary_length(ids).to_numpy()[rows.positions]
    for begin in range(0, len(rows), _BLOCK_ROWS):
        block = slice(begin, begin + _BLOCK_ROWS)
        for width in np.unique(id_bytes[block]).tolist():
            places = rows.positions[block][id_bytes[block] == width]
            made = np.empty(len(places), _layout(width, rows.values.shape[1]))
            made[:] = _blank(width, rows.values.shape[1])
            made["event_time"] = times_us[places]
            fixed = ids.take(pa.array(places)).cast(pa.binary(width))
            made["transaction_id"] = np.frombuffer(fixed.buffers()[1], np.uint8).reshape(
                len(places), width
            )
            made["feature_values"]["value"] = rows.values[places]
            yield made.view(np.uint8).data


@cache
def _layout(id_bytes: int, n_features: int) -> np.dtype[np.void]:
    """A row whose transaction id has so many bytes. Before each value comes its length in bytes."""
    return np.dtype(
        [
            ("n_columns", ">i2"),
            ("event_time_bytes", ">i4"),
            ("event_time", ">i8"),
            ("transaction_id_bytes", ">i4"),
            ("transaction_id", "u1", (id_bytes,)),
            ("catalog_fingerprint_bytes", ">i4"),
            ("catalog_fingerprint", f"S{len(_FINGERPRINT)}"),
            ("feature_values_bytes", ">i4"),
            ("n_dimensions", ">i4"),
            ("has_nulls", ">i4"),
            ("element_oid", ">u4"),
            ("n_features", ">i4"),
            ("lower_bound", ">i4"),
            ("feature_values", [("bytes", ">i4"), ("value", ">f8")], (n_features,)),
        ]
    )


@cache
def _blank(id_bytes: int, n_features: int) -> npt.NDArray[np.void]:
    """What all rows of a layout have in common."""
    blank = np.zeros(1, _layout(id_bytes, n_features))
    blank["n_columns"] = len(_COLUMNS.split(","))
    blank["event_time_bytes"] = 8
    blank["transaction_id_bytes"] = id_bytes
    blank["catalog_fingerprint_bytes"] = len(_FINGERPRINT)
    blank["catalog_fingerprint"] = _FINGERPRINT
    blank["feature_values_bytes"] = 20 + n_features * (4 + 8)
    blank["n_dimensions"] = 1
    blank["element_oid"] = _FLOAT8_OID
    blank["n_features"] = n_features
    blank["lower_bound"] = 1
    blank["feature_values"]["bytes"] = 8
    return blank
