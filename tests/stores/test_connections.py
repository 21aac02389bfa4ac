"""What is stored does not depend on the environment, nor on defaults of a role."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from urllib.parse import urlsplit

import psycopg
import pytest
import yoyo

from stores.connections import STATED, bulk_connection, stated
from stores.postgres import OfflineStore
from tests.batch_job.kaggle_rows import row, write
from tests.batch_job.test_load import new_card, new_id

ODD_DEFAULTS = {
    "client_encoding": "LATIN1",
    "DateStyle": "German",
    "TimeZone": "Asia/Tokyo",
    "search_path": "pg_catalog",
    "extra_float_digits": "-15",
    "bytea_output": "escape",
    "statement_timeout": "1ms",
    "default_transaction_isolation": "serializable",
    "default_transaction_read_only": "on",
    "synchronous_commit": "off",
    "standard_conforming_strings": "off",
}
EXPECTED = {
    name: value.replace("\\", "").replace("ISO,MDY", "ISO, MDY") for name, value in STATED.items()
} | {"client_encoding": "UTF8", "search_path": "public"}

HOSTILE = {
    "PGCLIENTENCODING": "LATIN1",
    "PGDATESTYLE": "German",
    "PGTZ": "Asia/Tokyo",
    "PGOPTIONS": "-c search_path=pg_catalog -c statement_timeout=1",
    "PGHOST": "192.0.2.1",
    "PGHOSTADDR": "192.0.2.1",
    "PGPORT": "1",
    "PGUSER": "another",
    "PGDATABASE": "another",
    "PGSERVICE": "another",
    "PGSSLMODE": "require",
    "PGSSLROOTCERT": "system",
    "PGGSSENCMODE": "require",
    "PGCHANNELBINDING": "require",
    "PGREQUIREAUTH": "none",
    "PGTARGETSESSIONATTRS": "standby",
    "PGCONNECT_TIMEOUT": "nonsense",
    "PGMINPROTOCOLVERSION": "nonsense",
}


@pytest.fixture
def odd_url(stack):
    """The URL of a role whose sessions begin with other settings than the code relies on."""
    role, password = f"odd_{secrets.token_hex(4)}", secrets.token_hex(8)
    url = stack.settings.store_urls()[1]
    with psycopg.connect(url, autocommit=True) as sql:
        sql.execute(f"CREATE ROLE {role} SUPERUSER LOGIN PASSWORD '{password}'")
        for name, value in ODD_DEFAULTS.items():
            sql.execute(f"ALTER ROLE {role} SET {name} = '{value}'")
        yield url.replace(urlsplit(url).netloc.split("@")[0], f"{role}:{password}")
        sql.execute(f"DROP ROLE {role}")


def test_every_kind_of_connection_states_what_it_relies_on(odd_url):
    with psycopg.connect(odd_url) as plain:
        assert plain.execute("SHOW DateStyle").fetchone() == ("German, DMY",)  # the role is odd
    scheme, rest = stated(odd_url).split("://", 1)
    migrations = yoyo.get_backend(f"{scheme}+psycopg://{rest}")
    store = OfflineStore(odd_url)
    try:
        with bulk_connection(odd_url) as bulk, bulk.cursor() as cursor:
            for name, expected in EXPECTED.items():
                query = f"SELECT current_setting('{name}')"
                cursor.execute(query)
                shown = [
                    store.sql.execute(query).fetchone(),
                    migrations.execute(query).fetchone(),
                    cursor.fetchone(),
                ]
                assert shown == [(expected,)] * 3, name
    finally:
        store.close()
        migrations.connection.close()


def test_the_url_may_say_where_tables_are_and_nothing_that_changes_meaning():
    url = "postgresql://u@h/d?options=-c%20search_path%3Dours%20-c%20DateStyle%3DGerman&sslmode=require"
    parameters = psycopg.conninfo.conninfo_to_dict(stated(url))
    settings = dict(
        part.split("=", 1)
        for part in str(parameters["options"]).replace("\\ ", " ").split("-c ")[1:]
    )
    assert settings["search_path"].strip() == "ours"
    assert settings["DateStyle"].strip() == "ISO,MDY"
    assert parameters["sslmode"] == "require"


def test_parameters_of_a_url_are_read_as_libpq_reads_them():
    url = "postgresql://h/d?password=a+b%20c&sslrootcert="
    parameters = psycopg.conninfo.conninfo_to_dict(stated(url))
    assert (parameters["password"], parameters["sslrootcert"]) == ("a+b c", "")


def test_no_variable_of_libpq_reaches_a_connection(stack, tmp_path):
    # The list is the library's own.
    known = {
        option.envvar.decode() for option in psycopg.pq.Conninfo.get_defaults() if option.envvar
    }
    odd = {name: "nonsense" for name in known if name not in ("PGPASSWORD", "PGPASSFILE")} | HOSTILE
    code = (
        "import sys\n"
        "from stores.connections import bulk_connection\n"
        "from stores.postgres import OfflineStore, migrate\n"
        "migrate(sys.argv[1])\n"
        "with OfflineStore(sys.argv[1]) as store, bulk_connection(sys.argv[1]) as bulk:\n"
        "    print(store.sql.execute('SHOW client_encoding').fetchone()[0])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, stack.settings.store_urls()[1]],
        env=os.environ | odd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "UTF8\n"), done.stderr


def test_names_of_merchants_are_stored_as_they_are_in_a_foreign_environment(stack, tmp_path):
    card = new_card()
    merchants = ["Café Noël", "Ресторан", "食堂"]
    rows = [row(cc_num=card, trans_num=new_id(), merchant=name) for name in merchants]
    path = write(tmp_path / "a.csv", rows)
    done = stack.tally("load", path, **HOSTILE)
    assert done.returncode == 0, done.stderr
    with stack.offline() as store:
        found = store.sql.execute(
            "SELECT merchant FROM transactions WHERE card_id = %s", (stack.card_key.card_id(card),)
        ).fetchall()
    assert sorted(name for (name,) in found) == sorted(merchants)
    again = stack.tally("load", "--json", path)
    assert '"duplicates": 3' in again.stdout


def test_an_address_that_does_not_answer_is_named_with_the_connections_own_error():
    with pytest.raises(Exception, match="refused") as raised:
        OfflineStore("postgresql://nobody@127.0.0.1:1/none")
    assert "127.0.0.1" in str(raised.value)
