"""Errors of calls."""

from __future__ import annotations

import pickle

import grpc
from tally.errors import CorruptedError, InvalidRequestError, Violation


def test_an_error_comes_whole_out_of_another_process():
    refused = InvalidRequestError(
        "amount[3]: is wrong",
        code=grpc.StatusCode.INVALID_ARGUMENT,
        reason="INVALID_REQUEST",
        metadata={"violations": "1"},
        violations=(Violation("amount[3]", "is wrong"),),
        retry_after_ms=7,
    )
    for error in (refused, CorruptedError("batch 2 was damaged")):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))
