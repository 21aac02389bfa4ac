"""The core: what a feature means, and how it is computed. No I/O and no clock, but that importing it
compiles it and keeps the machine code beside it.

`as_of` is the only place where a window is computed. Whatever needs a feature calls it, so that the
same card at the same instant gives the same bits.
"""

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
