"""Tally's client: features of cards, as of any instant, from the feature service.

import tally

with tally.Client("127.0.0.1:7600") as client:
    answer = client.online([tally.Row(card="4111111111111111", amount=12.5)])
    print(answer.to_dicts()[0]["txn_count_last_10_min"])

A name is imported from its module when it is first asked for, so that `tally --help` need not load gRPC.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_NAMES_OF_MODULES = {
    "client": ("AsyncClient", "Client"),
    "config": ("ClientConfig", "KeepAliveConfig", "RetryConfig", "TlsConfig"),
    "errors": (
        "CardKeyMismatchError",
        "ClientStateError",
        "CorruptedError",
        "CursorExpiredError",
        "DeadlineError",
        "InternalError",
        "InvalidRequestError",
        "NotServedError",
        "OverloadedError",
        "StaleError",
        "TallyError",
        "UnauthenticatedError",
        "UnavailableError",
        "Violation",
    ),
    "instants": ("TimeRange",),
    "results": ("OnlineFeatures",),
    "rows": ("Row",),
}
_MODULES = {name: module for module, names in _NAMES_OF_MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Imports what the package offers, once, when it is first asked for."""
    if name in _NAMES_OF_MODULES:
        return import_module(f"{__name__}.{name}")
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The names that the package offers, imported or not."""
    return [*globals(), *_MODULES]
