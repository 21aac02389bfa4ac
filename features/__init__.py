"""The core: what a feature means, and how it is computed. No I/O and no clock, but that importing what
computes compiles it and keeps the machine code beside it.

`as_of` is the only place where a window is computed. Whatever needs a feature calls it, so that the
same card at the same instant gives the same bits.

A name is imported from its module when it is first asked for: machine code takes most of a second to
load, and a process that only needs the card key should start without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from features.answers import Answers, as_of
    from features.catalog import (
        CATALOG,
        CATALOG_BY_NAME,
        CATALOG_FINGERPRINT,
        CATEGORIES,
        RETENTION_MS,
        Feature,
        UnknownFeatureError,
        select,
    )
    from features.keys import CardKey, merchant_key, transaction_key
    from features.ledger import (
        LEDGER_RECORDS_MAX,
        RECORD,
        LedgerFormatError,
        Ledgers,
        encode_ledger,
        make_records,
        merge_ledger,
    )
    from features.merchants import MERCHANT_DAY, Merchants, Population
    from features.points import Points
    from features.profile import PROFILE_RECORD, Profiles, encode_profile
    from features.status import Status

__all__ = [
    "CATALOG",
    "CATALOG_BY_NAME",
    "CATALOG_FINGERPRINT",
    "CATEGORIES",
    "LEDGER_RECORDS_MAX",
    "MERCHANT_DAY",
    "PROFILE_RECORD",
    "RECORD",
    "RETENTION_MS",
    "Answers",
    "CardKey",
    "Feature",
    "LedgerFormatError",
    "Ledgers",
    "Merchants",
    "Points",
    "Population",
    "Profiles",
    "Status",
    "UnknownFeatureError",
    "as_of",
    "encode_ledger",
    "encode_profile",
    "make_records",
    "merchant_key",
    "merge_ledger",
    "select",
    "transaction_key",
]

_NAMES_OF_MODULES = {
    "answers": ("Answers", "as_of"),
    "catalog": (
        "CATALOG",
        "CATALOG_BY_NAME",
        "CATALOG_FINGERPRINT",
        "CATEGORIES",
        "RETENTION_MS",
        "Feature",
        "UnknownFeatureError",
        "select",
    ),
    "keys": ("CardKey", "merchant_key", "transaction_key"),
    "ledger": (
        "LEDGER_RECORDS_MAX",
        "RECORD",
        "LedgerFormatError",
        "Ledgers",
        "encode_ledger",
        "make_records",
        "merge_ledger",
    ),
    "merchants": ("MERCHANT_DAY", "Merchants", "Population"),
    "points": ("Points",),
    "profile": ("PROFILE_RECORD", "Profiles", "encode_profile"),
    "status": ("Status",),
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
