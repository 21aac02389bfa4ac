"""What is written as COPY's own bytes is read again as it was."""

from __future__ import annotations

import numpy as np
import psycopg
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features import CATALOG, CATALOG_FINGERPRINT
from stores import feature_rows
from stores.arrow import TIME
from stores.errors import DataRefusedError
from stores.feature_rows import FeatureRows, FeatureTable, binary_rows, copy_blocks

N = len(CATALOG)
YEAR_1_US, YEAR_9999_US = -62_135_596_800_000_000, 253_402_300_799_999_999
ids = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=40)


@pytest.fixture
def sql(stack):
    """A connection with a table like that of features, which is gone with it."""
    with psycopg.connect(stack.settings.store_urls()[1], autocommit=True) as connection:
        connection.execute("CREATE TEMP TABLE features (LIKE public.features INCLUDING ALL)")
        yield connection


def rows_of(times_us, transaction_ids, values, positions=None) -> FeatureRows:
    transactions = pa.table(
        {
            "event_time": pa.array(times_us, pa.int64()).cast(TIME),
            "transaction_id": pa.array(transaction_ids, pa.string()),
        }
    )
    if positions is None:
        positions = np.arange(len(transaction_ids))
    return FeatureRows(
        transactions, np.asarray(values).reshape(-1, N), np.asarray(positions, dtype=np.int64)
    )


def read(sql) -> dict:
    """transaction id -> (time in µs, fingerprint, the values' bytes)"""
    found = sql.execute(
        "SELECT transaction_id, (extract(epoch FROM event_time) * 1000000)::bigint, "
        "catalog_fingerprint, feature_values FROM features"
    ).fetchall()
    return {row[0]: (row[1], row[2], np.array(row[3], dtype=np.float64).tobytes()) for row in found}


@settings(max_examples=60)
@given(data=st.data())
def test_rows_come_back_bit_for_bit(stack, data):
    chosen = data.draw(st.lists(ids, min_size=1, max_size=30, unique=True))
    times = [data.draw(st.integers(YEAR_1_US, YEAR_9999_US)) for _ in chosen]
    number = st.floats(width=64).map(lambda value: np.nan if value != value else value)
    values = [[data.draw(number)] * N for _ in chosen]
    for row, many in enumerate(values):
        many[data.draw(st.integers(0, N - 1))] = -0.0 if row % 2 else float(row)
    positions = data.draw(st.permutations(range(len(chosen))))[: data.draw(st.integers(0, 30))]
    rows = rows_of(times, chosen, values, positions)
    with psycopg.connect(stack.settings.store_urls()[1], autocommit=True) as sql:
        sql.execute("CREATE TEMP TABLE features (LIKE public.features INCLUDING ALL)")
        with sql.cursor() as cursor:
            copy_blocks(cursor, "features", binary_rows(rows))
        assert read(sql) == {
            chosen[at]: (times[at], CATALOG_FINGERPRINT, np.array(values[at]).tobytes())
            for at in positions
        }


def test_a_slice_of_a_column_and_many_blocks(sql, monkeypatch):
    monkeypatch.setattr(feature_rows, "_BLOCK_ROWS", 7)
    n = 100
    names = [f"{row:0{1 + row % 3}}é" for row in range(n)]
    values = np.arange(n * N, dtype=np.float64).reshape(n, N)
    whole = rows_of(range(n), names, values)
    part = FeatureRows(whole.transactions.slice(40, 50), values[40:90], np.arange(50)[::-1])
    with sql.cursor() as cursor:
        copy_blocks(cursor, "features", binary_rows(part))
    assert read(sql) == {
        names[row]: (row, CATALOG_FINGERPRINT, values[row].tobytes()) for row in range(40, 90)
    }


def test_of_one_transaction_the_first_row_counts_and_what_is_there_stays(sql):
    table = FeatureTable(sql)
    zero, one, two = (np.full(N, float(number)) for number in range(3))
    assert table.put_if_missing(rows_of([5], ["there"], [zero]), likely_new=True) == 1
    rows = rows_of([5, 6, 6, 7], ["there", "twice", "twice", "ö"], [one, one, two, two])
    assert table.put_if_missing(rows, likely_new=True) == 2
    assert {name: row[2] for name, row in read(sql).items()} == {
        "there": zero.tobytes(),
        "twice": one.tobytes(),
        "ö": two.tobytes(),
    }


def test_exact_rows_take_the_place_of_those_that_differ(sql):
    table = FeatureTable(sql)
    zero, one, nan = (np.full(N, number) for number in (0.0, 1.0, np.nan))
    names, times = ["same", "other", "nan"], [1, 2, 3]
    assert table.put_exact(rows_of(times, names, [zero, zero, nan]), likely_new=True) == (3, 0)
    written = sql.execute("SELECT ctid FROM features WHERE transaction_id <> 'other'").fetchall()
    rows = rows_of([*times, 4], [*names, "new"], [zero, one, nan, one])
    assert table.put_exact(rows, likely_new=True) == (1, 1)
    assert read(sql)["other"][2] == one.tobytes()
    # What is the same, an unknown value among it, was not written again.
    again = sql.execute(
        "SELECT ctid FROM features WHERE transaction_id NOT IN ('other', 'new')"
    ).fetchall()
    assert again == written


def test_what_postgres_will_never_take_is_told_from_what_it_does_not_take_now(sql):
    rows = rows_of([1], ["a\0b"], [np.zeros(N)])
    with pytest.raises(DataRefusedError):
        FeatureTable(sql).put_exact(rows, likely_new=True)
    assert read(sql) == {}
