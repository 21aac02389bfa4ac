"""From the Kaggle format's text to facts. What can be read without guessing is repaired; what
cannot is rejected, with a reason.

Repaired: dates as spreadsheets write them (6/21/20 12:14, with the lost seconds from unix_time
where the two agree), card numbers and amounts as floats (2703186189652095.0), the `fraud_` in front
of every merchant. Rejected: a card number in scientific notation, which has lost its digits; what
is no time, no amount, no position; a time in the future.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import reduce
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from features import CardKey
from features.geo import POSITION_MISSING, UDEG_PER_DEGREE, to_udeg
from features.points import AMOUNT_MINOR_MAX
from stores.arrow import LABELS, PROFILES, TIME, TRANSACTIONS

UNIX_TIME_LAG_S = 2_557 * 86_400
"""unix_time is this far behind trans_date_trans_time, which is the one that counts."""
LABEL_DELAY = timedelta(days=7)
"""When a fraud becomes known, after the event: the file does not say, so a week, as for
chargebacks."""
FUTURE_MAX = timedelta(days=1)
"""How far ahead of the clock a transaction may be."""

TRANSACTION_ID_CHARS_MAX = 64
MERCHANT_CHARS_MAX = 256
CATEGORY_CHARS_MAX = 64
HUNDREDTH_TOLERANCE = 1e-6

MERCHANT_PREFIX = "fraud_"

_CARD = re.compile(r"[0-9]{8,19}\Z", re.ASCII)
_CARD_AS_FLOAT = re.compile(r"([0-9]{8,16})\.0*\Z", re.ASCII)
_SCIENTIFIC = re.compile(r"[0-9.,]+[eE][+-]?[0-9]+\Z", re.ASCII)
_FLOAT_EXACT_MAX = 2**53
_SPREADSHEET_DATES = ("%m/%d/%y %H:%M", "%m/%d/%Y %H:%M")
_SPREADSHEET_DATES_WITH_SECONDS = ("%m/%d/%y %H:%M:%S", "%m/%d/%Y %H:%M:%S")

_PROFILE_TEXTS = ("gender", "job", "city", "state", "zip")


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a row of a batch was not taken."""

    row: int
    """Its position in the batch."""
    reason: str
    field: str
    detail: str


@dataclass(slots=True)
class Facts:
    """What a batch of text says."""

    transactions: pa.Table
    """Of TRANSACTIONS and LABELS: the rows that could be read."""
    rows: npt.NDArray[np.int64]
    """Their positions in the batch."""
    profiles: pa.Table
    """Of PROFILES: each (card, content) once, from its earliest instant here."""
    problems: list[Problem]
    """The rows that could not."""


class _Columns:
    """Conversion of one batch, column by column; a row is out at its first problem."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table.combine_chunks()
        self.problems: dict[int, Problem] = {}

    def text(self, name: str) -> pa.Array:
        """A column's text, trimmed; all empty where the file lacks it."""
        if name not in self.table.column_names:
            return pa.array([""] * len(self.table), pa.string())
        column = self.table[name]
        column = column.chunk(0) if column.num_chunks else pa.array([], pa.string())
        return pc.utf8_trim_whitespace(column)

    def refuse(self, row: int, reason: str, field: str, detail: str) -> None:
        """Puts a row out."""
        self.problems.setdefault(row, Problem(row, reason, field, detail))

    def refuse_where(self, mask: Any, reason: str, field: str, detail: str) -> None:
        """Puts out every row where a mask (numpy or Arrow) holds."""
        flags = mask if isinstance(mask, np.ndarray) else pc.fill_null(mask, True).to_numpy(False)
        for row in np.flatnonzero(flags).tolist():
            self.refuse(row, reason, field, detail)


def convert(table: pa.Table, card_key: CardKey, now: datetime) -> Facts:
    """The facts in a batch of text columns.

    Args:
        table: as batch_job.files reads it.
        card_key: replaces card numbers by ids.
        now: the clock, for times in the future.
    """
    columns = _Columns(table)
    ids = columns.text("trans_num")
    length = pc.utf8_length(ids)
    columns.refuse_where(pc.equal(length, 0), "MISSING_FIELD", "trans_num", "it is empty")
    columns.refuse_where(
        pc.greater(length, TRANSACTION_ID_CHARS_MAX),
        "BAD_TRANSACTION_ID",
        "trans_num",
        f"it has more than {TRANSACTION_ID_CHARS_MAX} characters",
    )
    cards = _cards(columns, card_key)
    times = _times(columns, now)
    amounts = _amounts(columns)
    merchants = _merchants(columns)
    category = columns.text("category")
    columns.refuse_where(
        pc.greater(pc.utf8_length(category), CATEGORY_CHARS_MAX),
        "BAD_CATEGORY",
        "category",
        f"it has more than {CATEGORY_CHARS_MAX} characters",
    )
    latitude = _degrees(columns, "merch_lat", 90)
    longitude = _degrees(columns, "merch_long", 180)
    frauds = _frauds(columns)

    whole = pa.table(
        [
            cards,
            times,
            ids,
            pa.array(amounts),
            merchants,
            _or_null(category),
            latitude,
            longitude,
            frauds,
            pc.if_else(
                pc.is_valid(frauds), pc.add(times, pa.scalar(LABEL_DELAY, pa.duration("us"))), None
            ),
        ],
        names=[*TRANSACTIONS.names, *LABELS.names],
    )
    out = np.zeros(len(table), dtype=bool)
    out[list(columns.problems)] = True
    rows = np.flatnonzero(~out)
    taken = whole.filter(pa.array(~out)) if out.any() else whole
    return Facts(
        taken.cast(pa.schema([*TRANSACTIONS, *LABELS])),
        rows,
        _profiles(columns, taken, rows),
        [columns.problems[row] for row in sorted(columns.problems)],
    )


def _or_null(texts: pa.Array) -> pa.Array:
    return pc.if_else(pc.equal(texts, ""), None, texts)


def _map_texts(
    texts: pa.Array, convert_text: Callable[[int, str], Any], kind: pa.DataType
) -> pa.Array:
    """Converts each distinct text once; the converter gets a row that has it."""
    encoded = pc.dictionary_encode(texts)
    indices = encoded.indices.to_numpy()
    _, first = np.unique(indices, return_index=True)
    values = [
        convert_text(row, text)
        for row, text in zip(first.tolist(), encoded.dictionary.to_pylist(), strict=True)
    ]
    return pa.array(values, kind).take(encoded.indices)


def _cards(columns: _Columns, card_key: CardKey) -> pa.Array:
    """Card ids; null where the number is none."""

    def identify(row: int, text: str) -> bytes | None:
        as_float = _CARD_AS_FLOAT.match(text)
        if as_float and int(as_float[1]) <= _FLOAT_EXACT_MAX:
            text = as_float[1]
        return card_key.card_id(text) if _CARD.match(text) else None

    texts = columns.text("cc_num")
    ids = _map_texts(texts, identify, pa.binary())
    for row in np.flatnonzero(ids.is_null().to_numpy(False)).tolist():
        text = texts[row].as_py()
        if not text:
            columns.refuse(row, "MISSING_FIELD", "cc_num", "it is empty")
        elif _SCIENTIFIC.match(text) or _CARD_AS_FLOAT.match(text):
            detail = "a card number that went through a float has lost its digits"
            columns.refuse(row, "CARD_PRECISION_LOST", "cc_num", detail)
        else:
            columns.refuse(row, "BAD_CARD", "cc_num", "a card number is 8 to 19 digits")
    return ids


def _times(columns: _Columns, now: datetime) -> pa.Array:
    """Event times; null where they cannot be read."""
    texts = columns.text("trans_date_trans_time")
    try:
        times = texts.cast(TIME_LOCAL)
    except pa.ArrowInvalid:
        unix_times = columns.text("unix_time")
        times = pa.array(
            [
                _time(text, unix)
                for text, unix in zip(texts.to_pylist(), unix_times.to_pylist(), strict=True)
            ],
            TIME_LOCAL,
        )
        detail = "it is no time such as 2020-06-21 12:14:25"
        columns.refuse_where(times.is_null(), "BAD_TIME", "trans_date_trans_time", detail)
    times = pc.assume_timezone(times, "UTC")
    earliest = pa.scalar(datetime(1970, 1, 1, tzinfo=UTC), TIME)
    latest = pa.scalar(now + FUTURE_MAX, TIME)
    outside = pc.fill_null(pc.or_(pc.less(times, earliest), pc.greater(times, latest)), False)
    detail = "it is before 1970 or in the future"
    columns.refuse_where(outside, "TIME_OUT_OF_RANGE", "trans_date_trans_time", detail)
    # The ledger counts in milliseconds: finer times would fall together there and not here.
    return pc.floor_temporal(times, unit="millisecond")


TIME_LOCAL = pa.timestamp("us")


def _time(text: str, unix_time: str) -> datetime | None:
    """A time in any of the forms that can be told apart."""
    try:
        instant = datetime.fromisoformat(text)
        return instant.astimezone(UTC).replace(tzinfo=None) if instant.tzinfo else instant
    except ValueError:
        pass
    for form in _SPREADSHEET_DATES_WITH_SECONDS:
        try:
            return datetime.strptime(text, form)
        except ValueError:
            continue
    for form in _SPREADSHEET_DATES:
        try:
            minute = datetime.strptime(text, form)
        except ValueError:
            continue
        return minute + timedelta(seconds=_lost_seconds(minute, unix_time))
    return None


def _lost_seconds(minute: datetime, unix_time: str) -> int:
    """The seconds that a spreadsheet dropped, where unix_time agrees with all it kept."""
    if not unix_time.isdigit():
        return 0
    since = int(unix_time) + UNIX_TIME_LAG_S - int(minute.replace(tzinfo=UTC).timestamp())
    return since if 0 <= since < 60 else 0


def _numbers(columns: _Columns, name: str) -> tuple[npt.NDArray[np.float64], pa.Array]:
    """A column as float64, NaN where it is no number, and its text."""
    texts = columns.text(name)
    try:
        filled = pc.if_else(pc.equal(texts, ""), "nan", texts)
        return filled.cast(pa.float64()).to_numpy(), texts
    except pa.ArrowInvalid:
        return np.array([_number(text) for text in texts.to_pylist()]), texts


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _amounts(columns: _Columns) -> npt.NDArray[np.int64]:
    """Amounts in minor units; 0 where they cannot be read."""
    amounts, _ = _numbers(columns, "amt")
    columns.refuse_where(~np.isfinite(amounts), "BAD_AMOUNT", "amt", "it is no finite number")
    amounts = np.where(np.isfinite(amounts), amounts, 0.0)
    minor = np.rint(amounts * 100)
    large = np.abs(minor) > AMOUNT_MINOR_MAX
    columns.refuse_where(large, "AMOUNT_OUT_OF_RANGE", "amt", "it is beyond 10,000,000,000")
    broken = np.abs(amounts * 100 - minor) > HUNDREDTH_TOLERANCE * np.maximum(1, np.abs(amounts))
    columns.refuse_where(broken, "AMOUNT_NOT_MINOR", "amt", "it is no whole number of hundredths")
    return np.where(large, 0.0, minor).astype(np.int64)


def _merchants(columns: _Columns) -> pa.Array:
    names = _map_texts(
        columns.text("merchant"), lambda _, text: text.removeprefix(MERCHANT_PREFIX), pa.string()
    )
    length = pc.utf8_length(names)
    columns.refuse_where(pc.equal(length, 0), "MISSING_FIELD", "merchant", "it is empty")
    detail = f"it has more than {MERCHANT_CHARS_MAX} characters"
    columns.refuse_where(pc.greater(length, MERCHANT_CHARS_MAX), "BAD_MERCHANT", "merchant", detail)
    return names


def _degrees(columns: _Columns, name: str, limit: int) -> pa.Array:
    """Degrees to the micro-degree; null where the text is empty."""
    degrees, texts = _numbers(columns, name)
    given = pc.not_equal(texts, "").to_numpy(False)
    wrong = given & ~(np.abs(degrees) <= limit)
    columns.refuse_where(wrong, "BAD_POSITION", name, f"it is no number from -{limit} to {limit}")
    return _to_micro(np.where(given & ~wrong, degrees, np.nan))


def _to_micro(degrees: npt.NDArray[np.float64]) -> pa.Array:
    udeg = to_udeg(degrees)
    return pa.array(udeg / UDEG_PER_DEGREE, mask=udeg == POSITION_MISSING)


def _frauds(columns: _Columns) -> pa.Array:
    meaning = {"": None, "0": False, "1": True, "false": False, "true": True}
    meaning |= {"0.0": False, "1.0": True}

    def read(row: int, text: str) -> bool | None:
        return meaning.get(text.lower())

    texts = columns.text("is_fraud")
    frauds = _map_texts(texts, read, pa.bool_())
    wrong = pc.and_(frauds.is_null(), pc.not_equal(texts, ""))
    columns.refuse_where(wrong, "BAD_LABEL", "is_fraud", "it is neither 0 nor 1")
    return frauds


def _profiles(columns: _Columns, taken: pa.Table, rows: npt.NDArray[np.int64]) -> pa.Table:
    """The card holders' facts in the rows taken. What is unreadable here is unknown, no more: it
    says nothing of the payment."""
    if not len(rows) or not {"lat", "long", "gender", "dob"} & set(columns.table.column_names):
        return PROFILES.empty_table()
    texts = {name: columns.text(name).take(rows) for name in (*_PROFILE_TEXTS, "lat", "long")}
    texts |= {name: columns.text(name).take(rows) for name in ("dob", "city_pop")}
    cards, times = taken["card_id"].combine_chunks(), taken["event_time"].combine_chunks()
    # Rows of one card with one content, told by running numbers instead of by text.
    codes = [
        pc.dictionary_encode(column).indices.to_numpy().astype(np.int64)
        for column in texts.values()
    ]
    group = reduce(_paired, codes, pc.dictionary_encode(cards).indices.to_numpy().astype(np.int64))
    since = times.cast(pa.int64()).to_numpy()
    order = np.lexsort((since, group))
    starts = np.ones(len(order), dtype=bool)
    starts[1:] = group[order][1:] != group[order][:-1]
    first = order[starts]  # the earliest row of each group
    values = {name: column.take(first).to_pylist() for name, column in texts.items()}
    built = [
        _profile(*row)
        for row in zip(
            *(values[name] for name in (*_PROFILE_TEXTS, "dob", "lat", "long", "city_pop")),
            strict=True,
        )
    ]
    return pa.table(
        [
            cards.take(first),
            pa.array([_content(profile) for profile in built], pa.binary()),
            times.take(first),
            *(
                pa.array([profile[name] for profile in built], PROFILES.field(name).type)
                for name in PROFILES.names[3:]
            ),
        ],
        schema=PROFILES,
    )


def _paired(a: npt.NDArray[np.int64], b: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """One running number for each pair of running numbers."""
    pairs = a * (int(b.max()) + 1) + b
    numbers: npt.NDArray[np.int64] = np.unique(pairs, return_inverse=True)[1].astype(np.int64)
    return numbers


def _profile(
    gender: str, job: str, city: str, state: str, zip_code: str,
    born: str, latitude: str, longitude: str, population: str,
) -> dict[str, Any]:  # fmt: skip
    try:
        birth_date = datetime.fromisoformat(born).date()
    except ValueError:
        birth_date = None
    home = [_home(latitude, 90), _home(longitude, 180)]
    count = _number(population)
    return {
        "gender": gender if gender in ("F", "M") else None,
        "birth_date": birth_date,
        "job": job or None,
        "home_latitude": home[0],
        "home_longitude": home[1],
        "city": city or None,
        "state": state or None,
        "zip": zip_code or None,
        "city_pop": int(count) if 0 <= count < 2**31 else None,
    }


def _home(text: str, limit: int) -> float | None:
    degrees = _number(text)
    return round(degrees * UDEG_PER_DEGREE) / UDEG_PER_DEGREE if abs(degrees) <= limit else None


def _content(profile: dict[str, Any]) -> bytes:
    """Digest (16 bytes) of a profile's facts."""
    return blake2b(repr(tuple(profile.values())).encode(), digest_size=16).digest()
