"""Dates in numbers, such as 08/02/2024 09:05, of which the order of day and month must be known.

The order belongs to a file, not to a row. It is settled by what the caller says (`--date-order`), or by
the rows: a `unix_time` that fits one order only, or a day above 12, which stands in one place and in no
row of the file in the other. Dates of a file whose order is not settled, or whose rows contradict one
another, are rejected: read in the wrong order they would be stored in another month.

Separators are `/`, `-` and `.`; years have two digits (1969 to 2068) or four. A date whose day and month
are the same number needs no order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

UNIX_TIME_LAGS_S = (2_557 * 86_400, 0)
"""How far `unix_time` is behind the local time of the row: in Kaggle's files, and in corrected ones."""
CENTURY_PIVOT = 69
"""Two-digit years from here on are of the 20th century, as for POSIX."""
WITHIN_S = 60
"""A spreadsheet drops seconds: a `unix_time` within the minute fits."""
WHAT_TO_DO = "say which with --date-order day-first or month-first"

_PATTERN = (
    r"^(?P<a>\d{1,2})(?P<s>[/.-])(?P<b>\d{1,2})(?P<t>[/.-])(?P<y>\d{4}|\d{2})[ T]+"
    r"(?P<hour>\d{1,2}):(?P<minute>\d{2})(?::(?P<second>\d{2}))?$"
)
_UNIX_TIME = r"^\d{1,12}(\.0*)?$"

Instants = npt.NDArray[np.int64]
"""(n,) seconds since 1970-01-01, as the local time reads; NO_INSTANT where there is none."""
NO_INSTANT = np.iinfo(np.int64).min
Mask = npt.NDArray[np.bool_]


class DateOrder(StrEnum):
    """Which of day and month stands first."""

    DAY_FIRST = "day-first"
    MONTH_FIRST = "month-first"

    @classmethod
    def parse(cls, text: str) -> DateOrder:
        """The order that a person names: day-first or dmy, month-first or mdy.

        Raises:
            ValueError: it is neither.
        """
        names = {"dmy": cls.DAY_FIRST, "mdy": cls.MONTH_FIRST}
        plain = text.lower().replace("_", "-")
        return names.get(plain) or cls(plain)


@dataclass(frozen=True, slots=True)
class Settled:
    """The order of a file's dates, or why there is none."""

    order: DateOrder | None
    why_not: str = ""
    """What is wrong with a date that needs an order, where `order` is None."""


@dataclass(slots=True)
class Evidence:
    """What rows say of the order: the line of the first row that fits one order only."""

    day_first: int | None = None
    month_first: int | None = None
    by_unix_time: bool = False
    """Whether a `unix_time` said so, and not only a day above 12."""
    _first_places: set[int] = field(default_factory=set)
    _last_places: set[int] = field(default_factory=set)
    """Of dates with two-digit years: a year varies less than a day does."""

    def add(self, dates: NumericDates, lines: npt.NDArray[np.int64]) -> None:
        """Adds rows (n,), whose lines in the file are `lines`."""
        for name, mask in (("day_first", dates.only_day), ("month_first", dates.only_month)):
            if getattr(self, name) is None and mask.any():
                setattr(self, name, int(lines[np.flatnonzero(mask)[0]]))
        self.by_unix_time |= bool(dates.by_unix_time.any())
        self._first_places |= set(dates.first[dates.has_short_year].tolist())
        self._last_places |= set(dates.year[dates.has_short_year].tolist())

    def settled(self) -> Settled:
        """What follows from it."""
        if self.day_first is not None and self.month_first is not None:
            return Settled(
                None,
                f"the file contradicts itself: line {self.day_first} fits day/month only and line "
                f"{self.month_first} month/day only; {WHAT_TO_DO}",
            )
        if self.month_first is not None:
            return Settled(DateOrder.MONTH_FIRST)
        if self.day_first is None:
            return Settled(
                None,
                "it could be two dates, and neither unix_time nor a day above 12 says for the file "
                f"whether the day or the month stands first; {WHAT_TO_DO}",
            )
        if not self.by_unix_time and 0 < len(self._first_places) <= len(self._last_places):
            return Settled(None, f"its year may be the first or the last number; {WHAT_TO_DO}")
        return Settled(DateOrder.DAY_FIRST)


class NumericDates:
    """The numeric dates among texts, read both ways.

    Attributes, each (n,):
        found: whether the text is such a date.
        first, year: its first and its last number; has_short_year: whether that has two digits.
        day_first, month_first: Instants of both readings, with the seconds that `unix_time` keeps.
        only_day, only_month: whether one reading alone is possible, or fits `unix_time`.
        by_unix_time: whether `unix_time` fits one reading and not the other.
        is_same: whether both readings are the same date.
    """

    def __init__(self, texts: pa.Array, unix_times: pa.Array) -> None:
        """Reads texts (n,); unix_times (n,) are texts too, seconds since 1970 or anything else."""
        parts = pc.extract_regex(texts, _PATTERN)
        same_separator = pc.equal(pc.struct_field(parts, "s"), pc.struct_field(parts, "t"))
        self.found: Mask = pc.fill_null(same_separator, False).to_numpy(False)
        self.first, second = self._numbers(parts, "a"), self._numbers(parts, "b")
        self.year = self._numbers(parts, "y")
        year_digits = pc.fill_null(pc.utf8_length(pc.struct_field(parts, "y")), 0)
        self.has_short_year: Mask = self.found & (year_digits.to_numpy(False) == 2)
        century = np.where(self.year >= CENTURY_PIVOT, 1900, 2000)
        years = np.where(self.has_short_year, self.year + century, self.year)
        clock_s = self._clock_s(parts)
        keeps_minute_only = self.found & (
            pc.equal(pc.fill_null(pc.struct_field(parts, "second"), ""), "").to_numpy(False)
        )
        unix_s = _unix_times(unix_times)
        self.day_first, day_fits = self._read(
            (years, second, self.first), clock_s, unix_s, keeps_minute_only
        )
        self.month_first, month_fits = self._read(
            (years, self.first, second), clock_s, unix_s, keeps_minute_only
        )
        self.is_same: Mask = self.found & (self.first == second)
        can_day, can_month = self.day_first != NO_INSTANT, self.month_first != NO_INSTANT
        self.by_unix_time: Mask = ~self.is_same & (day_fits != month_fits)
        self.only_day: Mask = (can_day & ~can_month) | (self.by_unix_time & day_fits)
        self.only_month: Mask = (can_month & ~can_day) | (self.by_unix_time & month_fits)

    def _numbers(self, parts: pa.Array, name: str) -> npt.NDArray[np.int64]:
        texts = pc.fill_null(pc.struct_field(parts, name), "")
        filled = pc.if_else(pc.equal(texts, ""), "0", texts)
        numbers: npt.NDArray[np.int64] = filled.cast(pa.int64()).to_numpy(False)
        return numbers

    def _clock_s(self, parts: pa.Array) -> Instants:
        """Seconds since midnight; NO_INSTANT where there is no such time."""
        hour, minute, second = (self._numbers(parts, n) for n in ("hour", "minute", "second"))
        right = self.found & (hour < 24) & (minute < 60) & (second < 60)
        return np.where(right, hour * 3_600 + minute * 60 + second, NO_INSTANT)

    @staticmethod
    def _read(
        date: tuple[Instants, Instants, Instants],
        clock_s: Instants,
        unix_s: Instants,
        keeps_minute_only: Mask,
    ) -> tuple[Instants, Mask]:
        """Instants of one reading (year, month, day), and which of them `unix_time` fits."""
        year, month, day = date
        whole_months = (year - 1970) * 12 + month - 1
        start = whole_months.astype("datetime64[M]").astype("datetime64[D]")
        following = (whole_months + 1).astype("datetime64[M]").astype("datetime64[D]")
        days = (following - start).astype(np.int64)
        right = (clock_s != NO_INSTANT) & (month >= 1) & (month <= 12) & (day >= 1) & (day <= days)
        day_s = (start.astype(np.int64) + day - 1) * 86_400
        instants = np.where(right, day_s + np.where(right, clock_s, 0), NO_INSTANT)
        fits = np.zeros(len(instants), dtype=np.bool_)
        dropped_s = np.zeros(len(instants), dtype=np.int64)
        for lag_s in UNIX_TIME_LAGS_S:
            since_s = np.where(right & (unix_s != NO_INSTANT), unix_s + lag_s - instants, -1)
            within = (since_s >= 0) & (since_s < np.where(keeps_minute_only, WITHIN_S, 1))
            dropped_s = np.where(within & ~fits, since_s, dropped_s)
            fits |= within
        return np.where(right, instants + dropped_s, NO_INSTANT), fits

    def read(self, settled: Settled) -> tuple[Instants, Mask]:
        """Instants in a file's order, and the dates that it does not settle: their order is not known,
        or they fit the other one only."""
        if settled.order is None:
            taken = self.is_same
            return np.where(taken, self.day_first, NO_INSTANT), self._possible & ~taken
        by_day = settled.order is DateOrder.DAY_FIRST
        contrary = self.only_month if by_day else self.only_day
        instants = self.day_first if by_day else self.month_first
        return np.where(contrary, NO_INSTANT, instants), contrary

    def read_each(self) -> tuple[Instants, Mask]:
        """Instants of dates each of which must settle its own order, and those that do not."""
        instants = np.where(self.only_day | self.is_same, self.day_first, NO_INSTANT)
        instants = np.where(self.only_month, self.month_first, instants)
        return instants, self._possible & (instants == NO_INSTANT)

    @property
    def _possible(self) -> Mask:
        possible: Mask = (self.day_first != NO_INSTANT) | (self.month_first != NO_INSTANT)
        return possible


def _unix_times(texts: pa.Array) -> Instants:
    """Whole seconds; NO_INSTANT where a text is none."""
    matched = pc.match_substring_regex(texts, _UNIX_TIME)
    digits = pc.if_else(matched, pc.replace_substring_regex(texts, r"\.0*$", ""), "-1")
    seconds = digits.cast(pa.int64()).to_numpy(False)
    return np.where(seconds >= 0, seconds, NO_INSTANT)


Dated = Iterable[tuple[pa.Array, pa.Array, npt.NDArray[np.int64]]]
"""Of rows of a file: texts of their times and of their `unix_time`, and their lines."""


class FileDates:
    """The order of one file's dates, found when the first of them is met."""

    def __init__(
        self, given: DateOrder | None = None, rows: Callable[[], Dated] | None = None
    ) -> None:
        """Takes what is known.

        Args:
            given: what the caller says; nothing else is looked at then.
            rows: reads the whole file; None for what can be read once only, such as a pipe, of which
                the first rows must settle the order by their `unix_time`.
        """
        self._rows = rows
        self._settled = None if given is None else Settled(given)

    def settle(self, dates: NumericDates) -> Settled:
        """The order, or why there is none.

        Args:
            dates: the rows that were met first.
        """
        if self._settled is None:
            evidence = Evidence()
            if self._rows is not None:
                for texts, unix_times, lines in self._rows():
                    evidence.add(NumericDates(texts, unix_times), lines)
                self._settled = evidence.settled()
            else:
                evidence.add(dates, np.zeros(len(dates.found), np.int64))
                self._settled = evidence.settled()
                why_not = None
                if not evidence.by_unix_time:
                    why_not = "a pipe is read once, and no unix_time says its order"
                elif self._settled.order is None:
                    why_not = "the rows of the pipe contradict one another"
                if why_not:
                    self._settled = Settled(None, f"{why_not}; {WHAT_TO_DO}")
        return self._settled


CONTRARY = "it fits the other order of day and month only, or its unix_time does: --date-order is wrong for it"
UNSETTLED_ALONE = "it could be two dates, and its unix_time does not say which: send times as 2020-06-21T12:14:25Z"


def read_times(
    texts: pa.Array, unix_times: pa.Array, dates: FileDates | None
) -> tuple[list[datetime | None], Mask, str]:
    """Times (n,) in any of the forms that can be distinguished: ISO 8601, or numeric dates.

    Args:
        texts: (n,) of the times, UTC where they name no zone.
        unix_times: (n,) texts.
        dates: of the file; None for events, each of which settles its own order.

    Returns:
        times without a zone, None where there is none; which of these are dates whose order is not
        settled; and what is wrong with them.
    """
    numeric = NumericDates(texts, unix_times)
    detail = UNSETTLED_ALONE
    if dates is None or not numeric.found.any():
        instants, unsettled = numeric.read_each()
    else:
        settled = dates.settle(numeric)
        instants, unsettled = numeric.read(settled)
        detail = settled.why_not or CONTRARY
    in_seconds = instants.astype("datetime64[s]").tolist()
    times = [
        (None if instant == NO_INSTANT else moment) if is_numeric else _iso_time(text)
        for text, is_numeric, instant, moment in zip(
            texts.to_pylist(), numeric.found.tolist(), instants.tolist(), in_seconds, strict=True
        )
    ]
    return times, unsettled, detail


def _iso_time(text: str) -> datetime | None:
    try:
        instant = datetime.fromisoformat(text)
        return instant.astimezone(UTC).replace(tzinfo=None) if instant.tzinfo else instant
    except (ValueError, OverflowError):
        return None


def dated_rows(batches: Iterable[Any]) -> Dated:
    """The times of a file's batches (ingest.files.TextBatch), for FileDates."""
    for batch in batches:
        columns = [
            pc.utf8_trim_whitespace(batch.table[name].combine_chunks())
            if name in batch.table.column_names
            else pa.array([""] * len(batch.table), pa.string())
            for name in ("trans_date_trans_time", "unix_time")
        ]
        texts, unix_times = (
            c.chunk(0) if isinstance(c, pa.ChunkedArray) and c.num_chunks else c for c in columns
        )
        if len(texts):
            yield texts, unix_times, batch.lines
