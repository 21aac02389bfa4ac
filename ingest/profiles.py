"""From the card holder's columns to profiles. What is unreadable here is unknown, no more: it says
nothing of the payment."""

from __future__ import annotations

from datetime import date, datetime
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from features.positions import UDEG_PER_DEGREE
from ingest.kaggle import HOLDER, Facts, floats, or_null, to_micro
from stores.arrow import PROFILES

_SEPARATOR = "\x1f"
_NOTHING = "\x00"


def profiles_of(facts: Facts, without: npt.NDArray[np.int64]) -> pa.Table:
    """The card holders' profiles, of PROFILES: each (card, content) once, from its earliest instant.
    A transaction that says nothing of the holder makes none, whatever others of its batch say.

    Args:
        facts: of one batch.
        without: (n,) positions of its transactions that were refused.
    """
    says_something = np.zeros(len(facts.transactions), dtype=bool)
    for column in facts.holders.values():
        says_something |= pc.not_equal(column, "").to_numpy(False)
    says_something[without] = False
    kept = pa.array(np.flatnonzero(says_something))
    if not len(kept):
        return PROFILES.empty_table()
    nothing = pa.array([""] * len(kept), pa.string())
    texts = [
        facts.holders[name].take(kept) if name in facts.holders else nothing for name in HOLDER
    ]
    cards, times = (
        facts.transactions[name].combine_chunks().take(kept) for name in ("card_id", "event_time")
    )
    first = _first_of_each(cards, pc.binary_join_element_wise(*texts, _SEPARATOR), times)
    gender, job, city, state, zip_code, born, latitude, longitude, population = (
        text.take(first) for text in texts
    )
    known = pc.is_in(gender, pa.array(["F", "M"]))
    parsed = [
        pc.if_else(known, gender, None),
        _dates(born),
        or_null(job),
        _home(latitude, 90),
        _home(longitude, 180),
        or_null(city),
        or_null(state),
        or_null(zip_code),
        _counts(population),
    ]
    profiles = pa.table(
        [cards.take(first), _contents(parsed), times.take(first), *parsed], schema=PROFILES
    )
    # One content may be spelled in several ways.
    return profiles.take(
        _first_of_each(
            *(profiles[name].combine_chunks() for name in ("card_id", "content", "valid_from"))
        )
    )


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
    degrees = floats(texts)
    return to_micro(np.where(np.abs(degrees) <= limit, degrees, np.nan))


def _counts(texts: pa.Array) -> pa.Array:
    """Numbers of people; null where there are none."""
    counts = floats(texts)
    wrong = ~((counts >= 0) & (counts < 2**31))
    return pa.array(np.where(wrong, 0, counts).astype(np.int32), mask=wrong)


def _dates(texts: pa.Array) -> pa.Array:
    """Birth dates; null where there are none."""
    try:
        return or_null(texts).cast(pa.date32())
    except pa.ArrowInvalid:
        return pa.array([_date(text) for text in texts.to_pylist()], pa.date32())


def _date(text: str) -> date | None:
    try:
        return datetime.fromisoformat(text).date()
    except ValueError:
        return None
