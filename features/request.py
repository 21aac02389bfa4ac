"""Features of the payment being scored and its instant alone. All instants are UTC."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

from features.catalog import DAY_MS, HOUR_MS, NIGHT_BEGINS_HOUR, NIGHT_ENDS_HOUR
from features.geo import POSITION_MISSING
from features.points import Points

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
Instants = TypeVar("Instants", int, Int64Array)
"""One instant, or (n,) of them, in milliseconds since 1970-01-01 UTC."""

_EPOCH_DAY_OF_WEEK = 3
"""1970-01-01 was a Thursday; Monday is 0."""


def hour_of_day(time_ms: Instants) -> Instants:
    """Hour, 0 to 23."""
    return time_ms // HOUR_MS % 24


def day_of_week(time_ms: Instants) -> Instants:
    """Day, Monday 0 to Sunday 6."""
    return (time_ms // DAY_MS + _EPOCH_DAY_OF_WEEK) % 7


def is_night(time_ms: Instants) -> bool | BoolArray:
    """Whether the instant lies from NIGHT_BEGINS_HOUR to NIGHT_ENDS_HOUR."""
    hours = hour_of_day(time_ms)
    return (hours >= NIGHT_BEGINS_HOUR) | (hours < NIGHT_ENDS_HOUR)


def has_position(points: Points) -> BoolArray:
    """Whether (n,) both coordinates of the merchant are given."""
    given: BoolArray = (points.latitude_udeg != POSITION_MISSING) & (
        points.longitude_udeg != POSITION_MISSING
    )
    return given
