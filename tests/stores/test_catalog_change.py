"""After an upgrade with another catalogue every row comes back into view, and views of customers stay."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta

import psycopg
import pyarrow as pa
import pytest

from batch_job.engines import LocalEngine
from batch_job.run import run
from features import CATALOG, CATALOG_FINGERPRINT
from stores.arrow import LABELS, TRANSACTIONS, with_records
from stores.postgres import OfflineStore, migrate
from stores.runs import BatchRuns

DAYS = [datetime(2024, 1, 1, tzinfo=UTC) + timedelta(days=7 * i) for i in range(4)]


@pytest.fixture
def url(stack) -> Iterator[str]:
    """A database of its own, with one payment a week, all computed by this version."""
    shared = stack.settings.store_urls()[1]
    name = f"catalog_{secrets.token_hex(4)}"
    with psycopg.connect(shared, autocommit=True) as sql:
        sql.execute(f"CREATE DATABASE {name}")
        own = f"{shared.rpartition('/')[0]}/{name}"
        migrate(own)
        with OfflineStore(own) as store:
            store.adopt_card_key(stack.card_key.fingerprint)
            store.refresh_records()
            store.refresh_feature_view()
            store.accept(payments(DAYS))
        assert computed(own) == len(DAYS)
        yield own
        sql.execute(f"DROP DATABASE {name} WITH (FORCE)")


def payments(times: list[datetime]) -> pa.Table:
    rows = [
        {
            "card_id": bytes(16),
            "event_time": time,
            "transaction_id": time.isoformat(),
            "amount_minor": 100,
            "merchant": "m",
        }
        for time in times
    ]
    return with_records(pa.Table.from_pylist(rows, pa.schema([*TRANSACTIONS, *LABELS])))


def computed(url: str, days: tuple[datetime, datetime] | None = None) -> int:
    """How many rows a run computes."""
    outcome = run(url, LocalEngine(1), date(2024, 3, 1), days)
    return 0 if outcome is None else outcome.rows_computed


def in_view(url: str) -> int:
    with psycopg.connect(url) as sql:
        row = sql.execute("SELECT count(*) FROM named_features").fetchone()
    assert row is not None
    return int(row[0])


def pretend(url: str, *, column: str, what: str) -> None:
    """Has the runs so far, and what they wrote, be of another version."""
    with psycopg.connect(url, autocommit=True) as sql:
        sql.execute(f"UPDATE batch_runs SET {column} = %s", (what,))
        if column == "catalog_fingerprint":
            sql.execute("UPDATE features SET catalog_fingerprint = %s", (what,))


def test_a_run_of_the_same_catalogue_and_code_computes_what_is_new_alone(url):
    assert computed(url) == 0
    with OfflineStore(url) as store:
        store.accept(payments([DAYS[-1] + timedelta(days=40)]))
    assert computed(url) == 1


@pytest.mark.parametrize("column", ["catalog_fingerprint", "code_fingerprint"])
def test_a_run_after_one_of_another_catalogue_or_code_computes_every_row(url, column):
    pretend(url, column=column, what="another")
    if column == "catalog_fingerprint":
        assert in_view(url) == 0
    assert computed(url) == len(DAYS)
    assert in_view(url) == len(DAYS)
    assert computed(url) == 0


def test_days_that_another_catalogue_computed_since_count_too(url):
    """
        ours, all days      another's, one day     ours
    ────────●──────────────────────●────────────────●────▶ runs
    """
    with BatchRuns(url) as runs:
        runs.begin("local", (DAYS[0], DAYS[1]), 1, "another code", is_following=False)
    assert computed(url) == len(DAYS)


def test_a_run_that_was_cut_off_under_another_catalogue_is_no_run_of_this_one(url):
    pretend(url, column="catalog_fingerprint", what="another")
    with psycopg.connect(url, autocommit=True) as sql:
        sql.execute("UPDATE batch_runs SET finished_at = NULL")
    assert computed(url) == len(DAYS)


def test_views_that_customers_built_stay_and_see_the_new_catalogue(url):
    first, last = CATALOG[0].name, CATALOG[-1].name
    analyst = f"analyst_{secrets.token_hex(4)}"
    with psycopg.connect(url, autocommit=True) as sql:
        # An earlier catalogue: in another order, without the last feature, with one that is gone.
        sql.execute("DROP VIEW named_features")
        columns = ", ".join(
            f'feature_values[{i}] AS "{f.name}"' for i, f in enumerate(CATALOG[-2::-1], 1)
        )
        sql.execute(
            "CREATE VIEW named_features AS SELECT event_time, transaction_id, computed_at, "
            f"feature_values[1] AS gone, {columns} FROM features WHERE catalog_fingerprint = 'another'"
        )
        sql.execute("COMMENT ON VIEW named_features IS 'another'")
        sql.execute(
            "CREATE VIEW of_a_customer AS SELECT transaction_id, gone, "
            f"{first} AS mine FROM named_features"
        )
        sql.execute(f"CREATE ROLE {analyst}; GRANT SELECT ON named_features TO {analyst}")
        try:
            with OfflineStore(url) as store:
                store.refresh_feature_view()
            rows = sql.execute(
                f'SELECT c.gone, c.mine, n."{first}", n."{last}", f.feature_values[1], '
                f"f.feature_values[{len(CATALOG)}] FROM of_a_customer c "
                "JOIN named_features n USING (transaction_id) "
                "JOIN features f USING (transaction_id)"
            ).fetchall()
            assert len(rows) == len(DAYS)
            for gone, mine, first_named, last_named, first_value, last_value in rows:
                assert gone is None
                assert repr(mine) == repr(first_named) == repr(first_value)
                assert repr(last_named) == repr(last_value)
            privileges = sql.execute(
                f"SELECT has_table_privilege('{analyst}', 'named_features', 'SELECT')"
            )
            assert privileges.fetchone() == (True,)
            comment = sql.execute("SELECT obj_description('named_features'::regclass, 'pg_class')")
            assert comment.fetchone() == (CATALOG_FINGERPRINT,)
        finally:
            sql.execute(f"DROP OWNED BY {analyst}; DROP ROLE {analyst}")
