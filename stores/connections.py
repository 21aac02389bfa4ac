"""Connections to Postgres: one for statements, by psycopg, and one for Arrow in bulk, by ADBC."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import adbc_driver_manager as adbc
import psycopg

from stores.closing import Closing
from stores.errors import DataRefusedError, NotReadyError, StoreError, StoreUnavailableError

CONNECT_TIMEOUT_S = 5
DATA_EXCEPTIONS = "22"
"""The class of errors that the data cause: they will be refused again."""
_UNDEFINED_TABLE = "42P01"
_NO_SCHEMA = "postgres has no schema yet: `tally load` or `tally up` makes it"
BATCH_BYTES = 2 << 20
"""About what a batch takes that is read: what comes next is made while one is used."""


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
            self.sql = psycopg.connect(url, autocommit=True, connect_timeout=CONNECT_TIMEOUT_S)

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

    mark = "&" if "?" in url else "?"
    return adbc_driver_postgresql.dbapi.connect(f"{url}{mark}connect_timeout={CONNECT_TIMEOUT_S}")
