"""Histories and questions for property-based tests, dense in ties and window edges."""

from __future__ import annotations

from hypothesis import strategies as st

from features import CATEGORIES, RETENTION_MS, Points, make_records, merchant_key, transaction_key
from features.catalog import CATEGORY_CODES, DAY_DELAY_MS, DAY_MS, HABIT_DAYS, WINDOWS
from features.ledger import Records
from features.points import AMOUNT_MISSING, CATEGORY_MISSING
from features.positions import POSITION_MISSING
from tests.oracle import Event, Question

ORIGIN_MS = 1_577_836_800_000  # 2020-01-01
EDGES_MS = [
    0,
    1,
    -1,
    *(w + d for _, w in WINDOWS for d in (-1, 0, 1)),
    RETENTION_MS - 1,
    RETENTION_MS,
    # Daily features: where a day begins to be valid, and where the days of a habit begin.
    *(edge + d for edge in (DAY_DELAY_MS, HABIT_DAYS * DAY_MS + DAY_DELAY_MS) for d in (-1, 0, 1)),
]

times_ms = st.one_of(
    st.sampled_from([ORIGIN_MS + RETENTION_MS + edge for edge in EDGES_MS]),
    st.integers(ORIGIN_MS, ORIGIN_MS + 3_600_000),
    st.integers(ORIGIN_MS, ORIGIN_MS + 70 * 86_400_000),
)
amounts_minor = st.one_of(
    st.integers(-5_000, 50_000), st.sampled_from([0, 1, 10**12, -(10**12), 10**12 - 1])
)
latitudes = st.one_of(st.none(), st.integers(-90_000_000, 90_000_000))
longitudes = st.one_of(st.none(), st.integers(-180_000_000, 180_000_000))

events = st.builds(
    Event,
    time_ms=times_ms,
    transaction_id=st.integers(0, 10**9).map(str),
    merchant=st.sampled_from([f"merchant {i}" for i in range(6)]),
    amount_minor=amounts_minor,
    category=st.integers(0, 4),
    latitude_udeg=latitudes,
    longitude_udeg=longitudes,
)
histories = st.lists(events, min_size=1, max_size=40, unique_by=lambda e: e.transaction_id)


@st.composite
def questions(draw: st.DrawFn, history: list[Event] | None) -> Question:
    """A question, often right at a transaction or right at a window's edge behind one."""
    if history and draw(st.booleans()):
        event = draw(st.sampled_from(history))
        t = event.time_ms + draw(st.one_of(st.just(0), st.sampled_from(EDGES_MS)))
    else:
        t = draw(times_ms)
    return Question(
        time_ms=t,
        amount_minor=draw(st.one_of(st.none(), amounts_minor)),
        category=draw(st.sampled_from([None, "no such", *CATEGORIES[:5]])),
        latitude_udeg=draw(latitudes),
        longitude_udeg=draw(longitudes),
    )


def to_records(history: list[Event]) -> Records:
    """Packs a history, in its order."""

    def position(value: int | None) -> int:
        return POSITION_MISSING if value is None else value

    return make_records(
        time_ms=[e.time_ms for e in history],
        transaction=[transaction_key(e.transaction_id) for e in history],
        merchant=[merchant_key(e.merchant) for e in history],
        amount_minor=[e.amount_minor for e in history],
        category=[e.category for e in history],
        latitude_udeg=[position(e.latitude_udeg) for e in history],
        longitude_udeg=[position(e.longitude_udeg) for e in history],
    )


def to_points(asked: list[tuple[int, Question]]) -> Points:
    """Packs (card index, question) pairs, in their order."""

    def or_missing(values: list[int | None], missing: int) -> list[int]:
        return [missing if value is None else value for value in values]

    of = [q for _, q in asked]
    return Points.at(
        [card for card, _ in asked],
        [q.time_ms for q in of],
        amount_minor=or_missing([q.amount_minor for q in of], AMOUNT_MISSING),
        category=[
            CATEGORY_MISSING if q.category is None else CATEGORY_CODES.get(q.category, 0)
            for q in of
        ],
        latitude_udeg=or_missing([q.latitude_udeg for q in of], POSITION_MISSING),
        longitude_udeg=or_missing([q.longitude_udeg for q in of], POSITION_MISSING),
    )
