"""Instants, and ranges of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from google.protobuf.timestamp_pb2 import Timestamp

from tally import taking
from tally.v1 import feature_service_pb2 as pb

if TYPE_CHECKING:
    from datetime import datetime

    import numpy as np

Instant: TypeAlias = "datetime | int | np.datetime64"
"""A datetime with a time zone, such as pandas' Timestamp; or milliseconds since 1970-01-01 UTC; or numpy's
datetime64, which is UTC."""


def to_ms(instant: Instant, field: str = "instant") -> int:
    """Milliseconds since 1970-01-01 UTC, rounded down.

    Args:
        instant: the instant.
        field: names it in errors.

    Raises:
        TypeError: it is of another type.
        ValueError: a datetime without a time zone, which could mean any instant of a day.
    """
    return taking.micros(field, instant) // 1_000


def to_timestamp(instant: Instant, field: str = "instant") -> Timestamp:
    """The instant as a message, to the microsecond.

    Raises:
        TypeError, ValueError: as `to_ms`.
    """
    micros = taking.micros(field, instant)
    return Timestamp(seconds=micros // 1_000_000, nanos=micros % 1_000_000 * 1_000)


@dataclass(frozen=True, slots=True)
class TimeRange:
    """All transactions from an instant to before another; None is no bound."""

    start: Instant | None = None
    end: Instant | None = None

    def __post_init__(self) -> None:
        self.to_message()  # says now what is wrong with it

    def to_message(self) -> pb.TimeRange:
        """As the contract has it."""
        return pb.TimeRange(
            start_time=None if self.start is None else to_timestamp(self.start, "start"),
            end_time=None if self.end is None else to_timestamp(self.end, "end"),
        )
