"""Connections to Postgres: one for statements, by psycopg, and one for Arrow in bulk, by ADBC.

Every connection states what the code relies on (`stated`): the encoding of texts, how dates are written,
the time zone, where tables are found, that nothing ends a statement early. Defaults of a role, a database
or a server do not change what is stored. Nor does the environment: libpq would read some thirty variables
(PGCLIENTENCODING, PGDATESTYLE, PGSSLMODE, PGHOSTADDR, PGOPTIONS, …) by itself, so this module removes them
from the process's environment when it is imported. What a connection needs stands in its URL.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import adbc_driver_manager as adbc
import psycopg

from stores.closing import Closing
from stores.errors import DataRefusedError, NotReadyError, StoreError, StoreUnavailableError

CONNECT_TIMEOUT_S = 5
DATA_EXCEPTIONS = "22"
"""The class of errors that the data cause: they will be refused again."""
_UNDEFINED_TABLE = "42P01"
_NO_SCHEMA = "postgres has no schema yet: `tally load` or `tally up` makes it"
_QUIET = """
SELECT set_config('log_min_messages', 'error', false) FROM pg_roles WHERE rolname = current_user AND rolsuper
"""
"""The driver begins a transaction once more behind each COPY, of which the server would warn in its log
several times a second, so that nothing else is found there. Who may not set this has a log of their own."""
BATCH_BYTES = 2 << 20
"""About what a batch takes that is read: what comes next is made while one is used."""

LIBPQ_VARIABLES_KEPT = frozenset({"PGPASSWORD", "PGPASSFILE"})
"""What may come from the environment: who the caller is, for a URL that has no password."""

STATED = {
    "DateStyle": "ISO,MDY",
    "TimeZone": "UTC",
    "IntervalStyle": "postgres",
    "bytea_output": "hex",
    "extra_float_digits": "1",
    "standard_conforming_strings": "on",
    "default_transaction_isolation": "read\\ committed",
    "default_transaction_read_only": "off",
    # A commit of the stream's progress is waited for; a load says that it does not wait.
    "synchronous_commit": "on",
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "idle_session_timeout": "0",
}
"""Settings of every session, as Postgres's command line has them."""
SEARCH_PATH = "public"
"""Where tables are, unless the URL's own `options` say so."""


def ignore_libpq_environment() -> None:
    """Removes libpq's variables from this process's environment, so that no connection reads them."""
    for name in list(os.environ):
        if name.startswith("PG") and name not in LIBPQ_VARIABLES_KEPT:
            del os.environ[name]


ignore_libpq_environment()


def stated(url: str, connect_timeout_s: int = CONNECT_TIMEOUT_S) -> str:
    """The URL with all that a session relies on.

    Args:
        url: postgresql://user@host:port/database?parameters; what it says of `options` and of time limits
            of connecting stays, but for STATED.
        connect_timeout_s: how long connecting may take.
    """
    parts = urlsplit(url)
    # As libpq reads it: a plus sign is none of a form's spaces, and nothing may be set to nothing.
    given = dict(parse_qsl(parts.query.replace("+", "%2B"), keep_blank_values=True))
    settings = " ".join(f"-c {name}={value}" for name, value in STATED.items())
    options = f"-c search_path={SEARCH_PATH} {given.get('options', '')} {settings}"
    parameters = {
        "connect_timeout": str(connect_timeout_s),
        "application_name": "tally",
        **given,
        "client_encoding": "UTF8",
        "options": " ".join(options.split()),
    }
    return parts._replace(query=urlencode(parameters, quote_via=quote)).geturl()


@contextmanager
def reported() -> Iterator[None]:
    """Turns the drivers' errors into ours."""
    try:
        yield
    except (psycopg.errors.DiskFull, psycopg.errors.OutOfMemory) as error:
        raise StoreError(f"postgres refused: {str(error).strip()}") from error
    except psycopg.OperationalError as error:
        raise StoreUnavailableError("postgres", str(error).strip()) from error
    except psycopg.errors.UndefinedTable as error:
        raise NotReadyError("postgres", _NO_SCHEMA) from error
    except psycopg.DataError as error:
        raise DataRefusedError(f"postgres refused: {str(error).strip()}") from error
    except psycopg.Error as error:
        raise StoreError(f"postgres refused: {str(error).strip()}") from error
    except adbc.OperationalError as error:
        raise StoreUnavailableError("postgres", _without_query(error)) from error
    except OSError as error:  # from a stream of batches that broke off
        raise StoreUnavailableError("postgres", str(error).strip()) from error
    except adbc.Error as error:
        if error.sqlstate == _UNDEFINED_TABLE:
            raise NotReadyError("postgres", _NO_SCHEMA) from error
        text = f"postgres refused: {_without_query(error)}"
        if (error.sqlstate or "").startswith(DATA_EXCEPTIONS):
            raise DataRefusedError(text) from error
        raise StoreError(text) from error


def _without_query(error: adbc.Error) -> str:
    """What the driver says, without the query, which may be long and is ours."""
    return re.sub(r"\s*Query was: .*?(?=SQLSTATE|$)", " ", str(error), flags=re.DOTALL).strip()


class Connected(Closing):
    """Something with a connection of its own. One thread at a time; closed at the end of a `with`."""

    def __init__(self, url: str) -> None:
        """Connects.

        Args:
            url: postgresql://user@host:port/database.

        Raises:
            StoreUnavailableError: Postgres cannot be reached.
        """
        self.url = url
        with reported():
            self.sql = psycopg.connect(stated(url), autocommit=True)

    def close(self) -> None:
        """Gives the connection back, whatever state it is in."""
        with suppress(psycopg.Error):
            self.sql.close()


@contextmanager
def bulk_cursor(connection: Any) -> Iterator[Any]:
    """A cursor of a bulk connection that reads in batches of BATCH_BYTES."""
    with connection.cursor() as cursor:
        hint = {"adbc.postgresql.batch_size_hint_bytes": str(BATCH_BYTES)}
        cursor.adbc_statement.set_options(**hint)
        yield cursor


def bulk_connection(url: str) -> Any:
    """A bulk connection. Imported here, since it takes as long as all else together."""
    import adbc_driver_postgresql.dbapi

    connection = adbc_driver_postgresql.dbapi.connect(stated(url))
    with connection.cursor() as cursor:
        cursor.execute(_QUIET)
    connection.commit()
    return connection
