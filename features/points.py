"""Points: the (card, instant) pairs asked about, with what is known of the payment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from features.merchants import MERCHANT_MISSING
from features.positions import POSITION_MISSING

AMOUNT_MISSING = -(2**63)
"""An int64 amount that stands for 'not given'."""
CATEGORY_MISSING = -1
"""A category code that stands for 'not given'."""
CATEGORY_UNKNOWN = 0
"""A category code that stands for 'not in the vocabulary'."""

AMOUNT_MINOR_MAX = 10**12
"""The largest amount either way, in minor units: sums of 9 million of them stay exact."""
MINOR_PER_UNIT = 100.0
MINOR_ERROR_MAX = 1e-6
MINOR_ERROR_SHARE_MAX = 4 * 2.0**-52
"""How far an amount of currency units times 100 may be from a whole number: a little, and as share
of it the noise of decimal text read as float64."""
MS_PER_HOUR = 3_600_000.0
EVENT_TIME_MS_MAX = 4_102_444_800_000
"""The year 2100: the last instant that can be asked about or recorded."""


@dataclass(frozen=True, slots=True)
class Points:
    """(n,) contiguous columns; every one but the first two may hold its 'missing' value anywhere."""

    card_index: npt.NDArray[np.int64]
    """Which ledger, from 0."""
    time_ms: npt.NDArray[np.int64]
    """The instant, in milliseconds since 1970-01-01 UTC, 0 to EVENT_TIME_MS_MAX."""
    amount_minor: npt.NDArray[np.int64]
    """The payment's amount in minor units, or AMOUNT_MISSING."""
    category: npt.NDArray[np.int16]
    """Its category's code, CATEGORY_UNKNOWN or CATEGORY_MISSING."""
    latitude_udeg: npt.NDArray[np.int32]
    """The merchant's latitude in micro-degrees, or POSITION_MISSING."""
    longitude_udeg: npt.NDArray[np.int32]
    """The merchant's longitude in micro-degrees, or POSITION_MISSING."""
    merchant_index: npt.NDArray[np.int64]
    """Which of the merchants, from 0, or MERCHANT_MISSING."""

    def __len__(self) -> int:
        return len(self.time_ms)

    @property
    def columns(self) -> tuple[npt.NDArray[Any], ...]:
        """All columns."""
        return (
            *(self.card_index, self.time_ms, self.amount_minor, self.category),
            *(self.latitude_udeg, self.longitude_udeg, self.merchant_index),
        )

    @classmethod
    def at(
        cls,
        card_index: npt.ArrayLike,
        time_ms: npt.ArrayLike,
        *,
        amount_minor: npt.ArrayLike | None = None,
        category: npt.ArrayLike | None = None,
        latitude_udeg: npt.ArrayLike | None = None,
        longitude_udeg: npt.ArrayLike | None = None,
        merchant_index: npt.ArrayLike | None = None,
    ) -> Points:
        """Makes points; columns that are left out are missing everywhere."""
        times = np.ascontiguousarray(time_ms, dtype=np.int64)

        def column(values: npt.ArrayLike | None, dtype: npt.DTypeLike, missing: int) -> npt.NDArray:  # type: ignore[type-arg]
            if values is None:
                return np.full(len(times), missing, dtype=dtype)
            return np.ascontiguousarray(values, dtype=dtype)

        return cls(
            card_index=np.ascontiguousarray(card_index, dtype=np.int64),
            time_ms=times,
            amount_minor=column(amount_minor, np.int64, AMOUNT_MISSING),
            category=column(category, np.int16, CATEGORY_MISSING),
            latitude_udeg=column(latitude_udeg, np.int32, POSITION_MISSING),
            longitude_udeg=column(longitude_udeg, np.int32, POSITION_MISSING),
            merchant_index=column(merchant_index, np.int64, MERCHANT_MISSING),
        )

    def take(self, index: npt.NDArray[np.int64] | slice) -> Points:
        """The points at these positions, in that order."""
        return Points(
            self.card_index[index],
            self.time_ms[index],
            self.amount_minor[index],
            self.category[index],
            self.latitude_udeg[index],
            self.longitude_udeg[index],
            self.merchant_index[index],
        )
