"""Instants, and ranges of them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from tally.v1 import feature_service_pb2 as pb

Instant = datetime | int
"""A datetime with a time zone, or milliseconds since 1970-01-01 UTC."""


def to_ms(instant: Instant) -> int:
    """Milliseconds since 1970-01-01 UTC, rounded down.

    Raises:
        ValueError: a datetime without a time zone, which could mean any instant of a day.
    """
    if isinstance(instant, int):
        return instant
    if instant.tzinfo is None:
        raise ValueError(f"{instant.isoformat()} has no time zone; use datetime(..., tzinfo=UTC)")
    since = instant - datetime(1970, 1, 1, tzinfo=UTC)
    return since.days * 86_400_000 + since.seconds * 1_000 + since.microseconds // 1_000


def to_timestamp(instant: Instant) -> Timestamp:
    """The instant as a message; a datetime to the microsecond.

    Raises:
        ValueError: as `to_ms`.
    """
    ms = to_ms(instant)
    micros = instant.microsecond % 1_000 if isinstance(instant, datetime) else 0
    return Timestamp(seconds=ms // 1_000, nanos=(ms % 1_000) * 1_000_000 + micros * 1_000)


@dataclass(frozen=True, slots=True)
class TimeRange:
    """All transactions from an instant to before another; None is no bound."""

    start: Instant | None = None
    end: Instant | None = None

    def to_message(self) -> pb.TimeRange:
        """As the contract has it."""
        return pb.TimeRange(
            start_time=None if self.start is None else to_timestamp(self.start),
            end_time=None if self.end is None else to_timestamp(self.end),
        )
