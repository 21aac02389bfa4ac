"""Tally's client: features of cards, as of any instant, from the feature service.

import tally

with tally.Client("127.0.0.1:7600") as client:
    answer = client.online([tally.Row(card="4111111111111111", amount=12.5)])
    print(answer.to_dicts()[0]["txn_count_last_10_min"])
"""

from tally.client import AsyncClient, Client
from tally.config import ClientConfig, KeepAliveConfig, RetryConfig, TlsConfig
from tally.errors import (
    CardKeyMismatchError,
    ClientStateError,
    CorruptedError,
    CursorExpiredError,
    DeadlineError,
    InternalError,
    InvalidRequestError,
    NotServedError,
    OverloadedError,
    StaleError,
    TallyError,
    UnauthenticatedError,
    UnavailableError,
    Violation,
)
from tally.instants import TimeRange
from tally.results import OnlineFeatures
from tally.rows import Row

__all__ = [
    "AsyncClient",
    "CardKeyMismatchError",
    "Client",
    "ClientConfig",
    "ClientStateError",
    "CorruptedError",
    "CursorExpiredError",
    "DeadlineError",
    "InternalError",
    "InvalidRequestError",
    "KeepAliveConfig",
    "NotServedError",
    "OnlineFeatures",
    "OverloadedError",
    "RetryConfig",
    "Row",
    "StaleError",
    "TallyError",
    "TimeRange",
    "TlsConfig",
    "UnauthenticatedError",
    "UnavailableError",
    "Violation",
]
