"""Features of the instant alone. All instants are UTC, in milliseconds since 1970-01-01."""

from __future__ import annotations

from features.catalog import DAY_MS, HOUR_MS, NIGHT_BEGINS_HOUR, NIGHT_ENDS_HOUR
from features.compiled import compiled

_EPOCH_DAY_OF_WEEK = 3
"""1970-01-01 was a Thursday; Monday is 0."""


@compiled("int64(int64)", inline=True)
def hour_of_day(time_ms: int) -> int:
    """Hour, 0 to 23."""
    return time_ms // HOUR_MS % 24


@compiled("int64(int64)", inline=True)
def day_of_week(time_ms: int) -> int:
    """Day, Monday 0 to Sunday 6."""
    return (time_ms // DAY_MS + _EPOCH_DAY_OF_WEEK) % 7


@compiled("boolean(int64)", inline=True)
def is_night(time_ms: int) -> bool:
    """Whether the instant lies from NIGHT_BEGINS_HOUR to NIGHT_ENDS_HOUR."""
    hour = time_ms // HOUR_MS % 24
    return hour >= NIGHT_BEGINS_HOUR or hour < NIGHT_ENDS_HOUR
