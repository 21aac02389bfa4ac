"""Merchants: what each one took on every day, and how much of it turned out to be fraud.

A daily feature of a merchant is computed from whole days, as they were known when a day D began:

    volume of w days       payments of the days [D - w, D)
    risk of w days         payments of the days [D - 7 - w, D - 7), and the frauds among them whose
                           label was known before D

Labels come late: what is younger than LABEL_DELAY_DAYS would look innocent, and is left out. Of n payments
with f frauds, where all merchants together had N and F in the same days,

    risk = (f + K F / N) / (n + K) = (f N + K F) / ((n + K) N)

with K = RISK_PRIOR_TXNS: a merchant of few payments is near the mean (additive smoothing toward the prior,
as in D. Micci-Barreca, SIGKDD Explorations 3(1), 2001). Both products are exact integers; each is rounded
to float64 once, then divided.

Days are in UTC, numbered since 1970-01-01. Facts are kept as records, of a merchant by (day, known_day):
one of a day's payments, which has known_day = day, and one for each later day on which frauds of it became
known. What is known of a fraud earlier than risk counts it makes no difference, so that known_day is then
LABEL_DELAY_DAYS + 1 behind the day.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from features.catalog import DAY_DELAY_MS, DAY_MS, LABEL_DELAY_DAYS, MERCHANT_WINDOW_DAYS

MERCHANT_VERSION = 2
MERCHANT_DAY = np.dtype(
    [("day", "<u2"), ("known_day", "<u2"), ("count", "<u4"), ("amount_minor", "<i8")]
)
"""One record: payments of a day and their total amount; or, where known_day is another day, frauds among
them, with no amount."""

NEVER = -(2**31)
"""A day before all days."""
MERCHANT_MISSING = -1
"""The position of a merchant that was not given."""
DAYS_MAX = max(MERCHANT_WINDOW_DAYS) + LABEL_DELAY_DAYS
"""How far back from D a feature looks."""
DAYS_KEPT = DAYS_MAX + 1
"""Days, up to its newest, of which the online store keeps a merchant's facts."""

_HEADER = struct.Struct("<BBxxi")  # version, record size, kept_from_day
_POPULATION_HEADER = struct.Struct("<BBxxiiiQ")
_CHANGING = struct.Struct("<BBxxiQ")  # version, no record size, bytes of what is new, publication
MERCHANT_FORMAT = (
    *(MERCHANT_VERSION, MERCHANT_DAY.descr, DAYS_KEPT),
    *(_HEADER.format, _POPULATION_HEADER.format, _CHANGING.format),
)
"""What the bytes of facts mean, as the online store keeps them."""

MerchantDays = npt.NDArray[np.void]
Int64Array = npt.NDArray[np.int64]

N_WINDOWS = len(MERCHANT_WINDOW_DAYS)
_POPULATION_COLUMNS = 2 * N_WINDOWS
MERCHANT_TOTALS = 4 * N_WINDOWS
"""For each window: payments, their amount, payments that risk counts, frauds among these."""


def day_valid_from_ms(day: int) -> int:
    """The instant from which the features of day D are valid."""
    return day * DAY_MS + DAY_DELAY_MS


@dataclass(frozen=True, slots=True)
class Population:
    """What risk needs of all merchants together, and how far the facts go."""

    first_day: int
    """The day D of the first row of `totals`."""
    totals: Int64Array
    """(n_days, 6) as of each D from first_day on: payments that risk counts, for each window, and the frauds
    among them. There are none at any other D."""
    kept_from_day: int
    """The first day of which facts are kept; NEVER where all are."""
    through_day: int
    """The last D that facts are complete for; NEVER where they were never computed."""
    publication: int = 0
    """With which publication it came to the online store; 0 outside of it."""

    @classmethod
    def none(cls) -> Population:
        """Of facts that were never computed."""
        return cls(0, np.zeros((0, _POPULATION_COLUMNS), np.int64), NEVER, NEVER)

    @classmethod
    def of(cls, records: MerchantDays, kept_from_day: int, through_day: int) -> Population:
        """From the records (n,) of all merchants together, in any order."""
        if not len(records):
            nothing = np.zeros((0, _POPULATION_COLUMNS), np.int64)
            return cls(0, nothing, kept_from_day, through_day)
        days = records["day"].astype(np.int64)
        known = records["known_day"].astype(np.int64)
        first = int(days.min()) + LABEL_DELAY_DAYS + 1
        n_days = int(days.max()) + DAYS_MAX + 1 - first
        changes = np.zeros((n_days + 1, _POPULATION_COLUMNS), np.int64)
        is_fraud = known != days
        counts = records["count"].astype(np.int64)
        for w, length in enumerate(MERCHANT_WINDOW_DAYS):
            begins = np.maximum(days + LABEL_DELAY_DAYS + 1, known)
            ends = days + LABEL_DELAY_DAYS + length + 1
            counted = begins < ends
            columns = w + np.where(is_fraud, N_WINDOWS, 0)[counted]
            np.add.at(changes, (begins[counted] - first, columns), counts[counted])
            np.add.at(changes, (ends[counted] - first, columns), -counts[counted])
        totals = np.cumsum(changes, axis=0)[:n_days]
        return cls(first, np.ascontiguousarray(totals), kept_from_day, through_day)

    def to_bytes(self) -> bytes:
        """As the online store keeps it."""
        header = _POPULATION_HEADER.pack(
            *(MERCHANT_VERSION, _POPULATION_COLUMNS),
            *(self.first_day, self.kept_from_day, self.through_day, self.publication),
        )
        return header + self.totals.astype("<i8").tobytes()

    @classmethod
    def from_bytes(cls, value: bytes | None) -> Population:
        """What `to_bytes` made; `none` for None.

        Raises:
            ValueError: it is of another version.
        """
        if value is None:
            return cls.none()
        if value[:2] != bytes([MERCHANT_VERSION, _POPULATION_COLUMNS]):
            raise ValueError(f"facts of merchants begin with {value[:2]!r}: not a known version")
        _, _, first_day, *rest = _POPULATION_HEADER.unpack_from(value)
        totals = np.frombuffer(value, "<i8", offset=_POPULATION_HEADER.size)
        return cls(first_day, totals.reshape(-1, _POPULATION_COLUMNS), *rest)


@dataclass(frozen=True, slots=True)
class Merchants:
    """Many merchants' facts, concatenated."""

    records: MerchantDays
    """(n_records,) of MERCHANT_DAY, by merchant and then by (day, known_day)."""
    offsets: Int64Array
    """(n_merchants + 1,): merchant i has records[offsets[i]:offsets[i + 1]]."""
    kept_from_day: Int64Array
    """(n_merchants,) the first day of which facts are kept; NEVER where all are."""
    population: Population

    def __len__(self) -> int:
        return len(self.kept_from_day)

    @classmethod
    def none(cls) -> Merchants:
        """No merchant, and facts that were never computed."""
        return cls.from_records([], NEVER, Population.none())

    @classmethod
    def from_records(
        cls, parts: Sequence[MerchantDays], kept_from_day: int, population: Population
    ) -> Merchants:
        """Concatenates records, each part those of one merchant, in order."""
        offsets = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        records = np.concatenate([np.empty(0, MERCHANT_DAY), *parts])
        return cls(records, offsets, np.full(len(parts), kept_from_day, np.int64), population)

    @classmethod
    def from_bytes(cls, values: Sequence[bytes | None], population: Population) -> Merchants:
        """Concatenates merchants as the online store keeps them; None for one without any facts.

        Args:
            values: of each merchant, read at one instant with the population.
            population: says which facts count where they are changing.

        Raises:
            ValueError: one is of another version.
        """
        found = (settled(value, population.publication) for value in values)
        stored = [_NO_MERCHANT if value is None else value for value in found]
        if not {value[:2] for value in stored} <= {_NO_MERCHANT[:2]}:
            raise ValueError("facts of a merchant are not of a known version")
        sizes = np.array([0, *[len(value) - _HEADER.size for value in stored]], np.int64)
        kept = [_HEADER.unpack_from(value)[2] for value in stored]
        body = b"".join([memoryview(value)[_HEADER.size :] for value in stored])
        return cls(
            np.frombuffer(body, MERCHANT_DAY),
            sizes.cumsum() // MERCHANT_DAY.itemsize,
            np.array(kept, np.int64),
            population,
        )


_NO_MERCHANT = _HEADER.pack(MERCHANT_VERSION, MERCHANT_DAY.itemsize, NEVER)


def kept_online(
    records: MerchantDays, kept_from_day: int, through_day: int
) -> tuple[MerchantDays, int]:
    """What the online store keeps of records (n,) in order: those before through_day, and of these
    DAYS_KEPT days up to the newest; and the first day that is kept, NEVER where all are."""
    days = records["day"].astype(np.int64)
    records = records[: np.searchsorted(days, through_day)]
    days = days[: len(records)]
    if not len(records):
        return records, kept_from_day
    first = int(np.searchsorted(days, days[-1] - DAYS_KEPT, side="right"))
    if first == 0:
        return records, kept_from_day
    return records[first:], max(kept_from_day, int(days[-1]) - DAYS_KEPT + 1)


def encode_merchant(records: MerchantDays, kept_from_day: int) -> bytes:
    """A merchant as the online store keeps it."""
    header = _HEADER.pack(MERCHANT_VERSION, MERCHANT_DAY.itemsize, kept_from_day)
    return header + records.tobytes()


def changing(publication: int, new: bytes | None, old: bytes | None) -> bytes:
    """A merchant as the online store keeps it while facts are published: facts of many merchants and
    those of all together cannot be replaced at once, and whoever reads must not see some of each.

    Args:
        publication: with the population of this number, and no other, `new` counts.
        new: as `encode_merchant` made it; None for no facts.
        old: what counts until then.
    """
    new, old = new or b"", old or b""
    return _CHANGING.pack(MERCHANT_VERSION, 0, len(new), publication) + new + old


def settled(value: bytes | None, publication: int) -> bytes | None:
    """Which facts of a merchant count beside the population of a publication."""
    if value is None or value[1] != 0:
        return value
    _, _, new_bytes, of_publication = _CHANGING.unpack_from(value)
    middle = _CHANGING.size + new_bytes
    is_new = of_publication == publication
    return (value[_CHANGING.size : middle] if is_new else value[middle:]) or None
