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
from datetime import UTC, date, datetime, timedelta
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from features.geo import POSITION_MISSING, UDEG_PER_DEGREE, to_udeg
from features.points import AMOUNT_MINOR_MAX, MINOR_ERROR_MAX, MINOR_ERROR_SHARE_MAX
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

MERCHANT_PREFIX = "fraud_"

CardId = Callable[[str], bytes]

_CARD = re.compile(r"[0-9]{8,19}\Z", re.ASCII)
_CARD_AS_FLOAT = re.compile(r"([0-9]{8,16})\.0*\Z", re.ASCII)
_SCIENTIFIC = re.compile(r"[0-9.,]+[eE][+-]?[0-9]+\Z", re.ASCII)
_FLOAT_EXACT_MAX = 2**53
_SPREADSHEET_DATES = ("%m/%d/%y %H:%M", "%m/%d/%Y %H:%M")
_SPREADSHEET_DATES_WITH_SECONDS = ("%m/%d/%y %H:%M:%S", "%m/%d/%Y %H:%M:%S")


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


def convert(table: pa.Table, card_id: CardId, now: datetime) -> Facts:
    """The facts in a batch of text columns.

    Args:
        table: as batch_job.files reads it.
        card_id: gives the id of a card number.
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
    cards = _cards(columns, card_id)
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


def _map_texts(texts: pa.Array, convert_text: Callable[[str], Any], kind: pa.DataType) -> pa.Array:
    """Converts each distinct text once."""
    encoded = pc.dictionary_encode(texts)
    values = [convert_text(text) for text in encoded.dictionary.to_pylist()]
    return pa.array(values, kind).take(encoded.indices)


def _cards(columns: _Columns, card_id: CardId) -> pa.Array:
    """Card ids; null where the number is none."""

    def identify(text: str) -> bytes | None:
        if _CARD.match(text):
            return card_id(text)
        as_float = _CARD_AS_FLOAT.match(text)
        is_exact = as_float is not None and int(as_float[1]) <= _FLOAT_EXACT_MAX
        return card_id(as_float[1]) if as_float and is_exact else None

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
    return _floats(texts), texts


def _floats(texts: pa.Array) -> npt.NDArray[np.float64]:
    """Texts as float64 (n,), NaN where one is no number."""
    try:
        filled: npt.NDArray[np.float64] = (
            pc.if_else(pc.equal(texts, ""), "nan", texts).cast(pa.float64()).to_numpy()
        )
        return filled
    except pa.ArrowInvalid:
        return np.array([_number(text) for text in texts.to_pylist()])


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
    error = np.abs(amounts * 100 - minor)
    broken = error > MINOR_ERROR_MAX + MINOR_ERROR_SHARE_MAX * np.abs(minor)
    columns.refuse_where(broken, "AMOUNT_NOT_MINOR", "amt", "it is no whole number of hundredths")
    return np.where(large, 0.0, minor).astype(np.int64)


def _merchants(columns: _Columns) -> pa.Array:
    names = _map_texts(
        columns.text("merchant"), lambda text: text.removeprefix(MERCHANT_PREFIX), pa.string()
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

    def read(text: str) -> bool | None:
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
    texts = [columns.text(name).take(rows) for name in _PROFILE_TEXTS]
    cards, times = taken["card_id"].combine_chunks(), taken["event_time"].combine_chunks()
    first = _first_of_each(cards, pc.binary_join_element_wise(*texts, _SEPARATOR), times)
    gender, job, city, state, zip_code, born, latitude, longitude, population = (
        text.take(first) for text in texts
    )
    known = pc.is_in(gender, pa.array(["F", "M"]))
    facts = [
        pc.if_else(known, gender, None),
        _dates(born),
        _or_null(job),
        _home(latitude, 90),
        _home(longitude, 180),
        _or_null(city),
        _or_null(state),
        _or_null(zip_code),
        _counts(population),
    ]
    return pa.table(
        [cards.take(first), _contents(facts), times.take(first), *facts], schema=PROFILES
    )


_PROFILE_TEXTS = ("gender", "job", "city", "state", "zip", "dob", "lat", "long", "city_pop")
_SEPARATOR = "\x1f"
_NOTHING = "\x00"


def _first_of_each(cards: pa.Array, contents: pa.Array, times: pa.Array) -> pa.Array:
    """Positions of the earliest row of each (card, content)."""
    codes = [
        pc.dictionary_encode(column).indices.to_numpy().astype(np.int64)
        for column in (cards, contents)
    ]
    group = codes[0] * (int(codes[1].max()) + 1) + codes[1]
    order = np.lexsort((times.cast(pa.int64()).to_numpy(), group))
    starts = np.ones(len(order), dtype=bool)
    starts[1:] = group[order][1:] != group[order][:-1]
    return pa.array(order[starts])


def _contents(facts: list[pa.Array]) -> pa.Array:
    """Digests (16 bytes) of profiles' facts; positions in micro-degrees, for one text each."""
    texts = [
        (_micro(fact) if pa.types.is_floating(fact.type) else fact).cast(pa.string())
        for fact in facts
    ]
    joined = pc.binary_join_element_wise(
        *texts, _SEPARATOR, null_handling="replace", null_replacement=_NOTHING
    )
    digests = [blake2b(text.encode(), digest_size=16).digest() for text in joined.to_pylist()]
    return pa.array(digests, pa.binary())


def _micro(degrees: pa.Array) -> pa.Array:
    return pc.round(pc.multiply(degrees, float(UDEG_PER_DEGREE))).cast(pa.int32())


def _home(texts: pa.Array, limit: int) -> pa.Array:
    """Degrees to the micro-degree; null where there are none."""
    degrees = _floats(texts)
    return _to_micro(np.where(np.abs(degrees) <= limit, degrees, np.nan))


def _counts(texts: pa.Array) -> pa.Array:
    """Numbers of people; null where there are none."""
    counts = _floats(texts)
    wrong = ~((counts >= 0) & (counts < 2**31))
    return pa.array(np.where(wrong, 0, counts).astype(np.int32), mask=wrong)


def _dates(texts: pa.Array) -> pa.Array:
    """Birth dates; null where there are none."""
    try:
        return _or_null(texts).cast(pa.date32())
    except pa.ArrowInvalid:
        return pa.array([_date(text) for text in texts.to_pylist()], pa.date32())


def _date(text: str) -> date | None:
    try:
        return datetime.fromisoformat(text).date()
    except ValueError:
        return None
