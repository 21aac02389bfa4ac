"""What goes wrong in another process is told in this one."""

from __future__ import annotations

import pickle

import adbc_driver_manager as adbc
import pytest

from batch_job.engines import LocalEngine
from batch_job.exact import Part
from deploy.processes import free_port
from stores.connections import reported
from stores.errors import (
    CardKeyMismatchError,
    DataRefusedError,
    LockedError,
    StoreError,
    StoreUnavailableError,
)


@pytest.mark.parametrize(
    "error",
    [
        StoreError("a"),
        DataRefusedError("b"),
        StoreUnavailableError("postgres", "no answer"),
        LockedError("batch run", 30.0),
        CardKeyMismatchError("redis", "0123456789", "abcdef"),
    ],
)
def test_an_error_comes_whole_out_of_another_process(error):
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_why_a_worker_gave_up_is_told():
    nobody = f"postgresql://postgres@127.0.0.1:{free_port()}/postgres"
    parts = [Part("0", number, number, number + 1, 0, 1) for number in range(3)]
    with pytest.raises(StoreUnavailableError, match=r"postgres cannot be reached: .*refused"):
        LocalEngine(workers=2).run(nobody, parts)


def test_a_message_has_no_query():
    text = "IO: it is gone\n\nQuery was: SELECT 1\nFROM x\n. SQLSTATE: 57P01"
    with pytest.raises(StoreUnavailableError) as caught, reported():
        raise adbc.OperationalError(text, status_code=adbc.AdbcStatusCode.IO)
    assert str(caught.value) == "postgres cannot be reached: IO: it is gone SQLSTATE: 57P01"
