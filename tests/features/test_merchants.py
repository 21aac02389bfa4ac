"""Daily features of merchants against the naive oracle, and their edges drawn one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features import CATALOG, MERCHANT_DAY, Ledgers, Merchants, Points, Population, Status, as_of
from features.catalog import DAY_DELAY_MS, DAY_MS, LABEL_DELAY_DAYS, Source
from features.merchants import (
    DAYS_KEPT,
    MERCHANT_MISSING,
    NEVER,
    MerchantDays,
    encode_merchant,
    kept_online,
)
from tests.oracle import Payment, Question, World, answer

FEATURES = [feature for feature in CATALOG if feature.source is Source.MERCHANT]
NAMES = [feature.name for feature in FEATURES]
FIRST_DAY = 18_262  # 2020-01-01
MERCHANTS = ["corner shop", "airline", "casino"]
THROUGH_DAY = FIRST_DAY + 80


def days_of(payments: Iterable[Payment]) -> MerchantDays:
    """Records of payments, from their definition."""
    counts: Counter[tuple[int, int]] = Counter()
    amounts: Counter[tuple[int, int]] = Counter()
    for payment in payments:
        day = payment.time_ms // DAY_MS
        counts[day, day] += 1
        amounts[day, day] += payment.amount_minor
        if payment.fraud_known_ms is not None:
            known = max(payment.fraud_known_ms // DAY_MS + 1, day + LABEL_DELAY_DAYS + 1)
            counts[day, known] += 1
    rows = [(*key, counts[key], amounts[key]) for key in sorted(counts)]
    return np.array(rows, MERCHANT_DAY)


def facts_of(world: World) -> Merchants:
    everything = [p for some in world.of_merchant.values() for p in some]
    population = Population.of(days_of(everything), NEVER, world.through_day)
    parts = [days_of(world.of_merchant.get(name, [])) for name in MERCHANTS]
    return Merchants.from_records(parts, NEVER, population)


def online_facts_of(world: World) -> Merchants:
    """The same as the online store keeps it."""
    everything = [p for some in world.of_merchant.values() for p in some]
    through = world.through_day
    population = Population.of(*kept_online(days_of(everything), NEVER, through), through)
    values = [
        encode_merchant(*kept_online(days_of(world.of_merchant.get(name, [])), NEVER, through))
        for name in MERCHANTS
    ]
    return Merchants.from_bytes(values, Population.from_bytes(population.to_bytes()))


def ask(facts: Merchants, asked: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    points = Points.at(
        [0] * len(asked), [t for _, t in asked], merchant_index=[merchant for merchant, _ in asked]
    )
    answers = as_of(Ledgers.from_bytes([None]), points, FEATURES, merchants=facts)
    return answers.values, answers.statuses


edges = st.sampled_from([0, 1, -1, DAY_DELAY_MS, DAY_DELAY_MS - 1, DAY_MS - 1])
days = st.integers(0, 90)
times_ms = st.builds(lambda day, edge: (FIRST_DAY + day) * DAY_MS + edge, days, edges)


@st.composite
def payments(draw: st.DrawFn) -> Payment:
    time_ms = draw(times_ms)
    delay = draw(st.one_of(st.none(), st.integers(0, 60)))
    known = None if delay is None else (time_ms // DAY_MS + delay) * DAY_MS + draw(edges)
    return Payment(draw(st.sampled_from(MERCHANTS)), time_ms, draw(st.integers(-99, 10**6)), known)


worlds = st.builds(World, st.lists(payments(), max_size=60), st.just(THROUGH_DAY))
asked_points = st.lists(
    st.tuples(st.integers(MERCHANT_MISSING, len(MERCHANTS) - 1), times_ms), min_size=1, max_size=10
)


@given(worlds, asked_points)
@settings(max_examples=300, deadline=None)
def test_whole_facts_equal_the_oracle_to_the_last_bit(world: World, asked):
    values, statuses = ask(facts_of(world), asked)
    for row, (merchant, t) in enumerate(asked):
        name = None if merchant == MERCHANT_MISSING else MERCHANTS[merchant]
        for column, feature in enumerate(FEATURES):
            want, status = answer(feature, None, Question(t, merchant=name), world=world)
            what = f"{feature.name} of {name} at {t}"
            assert statuses[row, column] == status, what
            value = values[row, column]
            assert np.isnan(value) if want is None else value == want, what


@given(worlds, asked_points)
@settings(max_examples=200, deadline=None)
def test_what_is_kept_online_is_right_or_flagged(world: World, asked):
    values, statuses = ask(facts_of(world), asked)
    online, online_statuses = ask(online_facts_of(world), asked)
    kept = online_statuses != Status.BEFORE_HISTORY
    assert (online_statuses == statuses)[kept].all()
    assert np.array_equal(online[kept], values[kept], equal_nan=True)
    # Whoever asks about now is never refused.
    now = [(merchant, THROUGH_DAY * DAY_MS + DAY_DELAY_MS) for merchant in range(3)]
    assert (ask(online_facts_of(world), now)[1] != Status.BEFORE_HISTORY).all()


def risk_of(facts: Merchants, t: int, name: str = "merchant_risk_1_day") -> float | Status:
    values, statuses = ask(facts, [(0, t)])
    column = NAMES.index(name)
    status = Status(statuses[0, column])
    return float(values[0, column]) if status is Status.PRESENT else status


def one_fraud(known_ms: int) -> Merchants:
    """The corner shop's only payment, on the first day, is known to be fraud at an instant."""
    return facts_of(World([Payment("corner shop", FIRST_DAY * DAY_MS, 100, known_ms)], THROUGH_DAY))


COUNTED_DAY = FIRST_DAY + LABEL_DELAY_DAYS + 1


def test_a_label_counts_for_the_days_that_begin_after_it():
    at = COUNTED_DAY * DAY_MS + DAY_DELAY_MS
    assert risk_of(one_fraud(COUNTED_DAY * DAY_MS - 1), at) == 1.0
    assert risk_of(one_fraud(COUNTED_DAY * DAY_MS), at) == 0.0


def test_a_payment_counts_for_risk_a_week_after_its_day():
    facts = one_fraud(FIRST_DAY * DAY_MS)
    at = COUNTED_DAY * DAY_MS + DAY_DELAY_MS
    assert risk_of(facts, at - DAY_MS) is Status.EMPTY_WINDOW
    assert risk_of(facts, at) == 1.0
    assert risk_of(facts, at + DAY_MS) is Status.EMPTY_WINDOW
    assert risk_of(facts, at + DAY_MS, "merchant_risk_7_days") == 1.0


def test_a_day_is_read_from_the_instant_on_at_which_it_is_valid():
    facts = one_fraud(FIRST_DAY * DAY_MS)
    valid_from = (FIRST_DAY + 1) * DAY_MS + DAY_DELAY_MS
    count = NAMES.index("merchant_txn_count_1_day")
    values, _ = ask(facts, [(0, valid_from - 1), (0, valid_from), (0, valid_from + DAY_MS)])
    assert values[:, count].tolist() == [0, 1, 0]


def test_days_that_were_not_computed_are_said_to_be():
    facts = facts_of(World([], THROUGH_DAY))
    last = (THROUGH_DAY + 1) * DAY_MS + DAY_DELAY_MS - 1
    _, statuses = ask(facts, [(0, last), (0, last + 1)])
    assert Status.NOT_COMPUTED not in statuses[0].tolist()
    assert set(statuses[1].tolist()) == {Status.NOT_COMPUTED}
    assert set(ask(Merchants.none(), [(MERCHANT_MISSING, last)])[1][0].tolist()) == {
        Status.MISSING_INPUT
    }


def test_a_merchant_of_few_payments_is_near_the_mean():
    shop = [Payment("corner shop", FIRST_DAY * DAY_MS, 100, FIRST_DAY * DAY_MS)]
    casino = [Payment("casino", FIRST_DAY * DAY_MS, 100) for _ in range(99)]
    facts = facts_of(World(shop + casino, THROUGH_DAY))
    risk = risk_of(facts, COUNTED_DAY * DAY_MS + DAY_DELAY_MS)
    assert risk == (1 * 100 + 20 * 1) / ((1 + 20) * 100)


def test_facts_before_what_is_kept_are_flagged():
    payment = Payment("corner shop", FIRST_DAY * DAY_MS, 100)
    late = Payment("corner shop", (FIRST_DAY + DAYS_KEPT) * DAY_MS, 100)
    facts = online_facts_of(World([payment, late], THROUGH_DAY))
    count = NAMES.index("merchant_txn_count_30_days")
    day = FIRST_DAY + 1 + 30
    _, statuses = ask(facts, [(0, d * DAY_MS + DAY_DELAY_MS) for d in (day - 1, day)])
    assert statuses[:, count].tolist() == [Status.BEFORE_HISTORY, Status.PRESENT]


def test_bytes_of_another_version_are_refused():
    with pytest.raises(ValueError, match="known version"):
        Population.from_bytes(b"\x09\x06" + bytes(30))
    with pytest.raises(ValueError, match="known version"):
        Merchants.from_bytes([b"\x09\x10" + bytes(6)], Population.none())


def test_a_merchant_that_is_not_there_is_refused():
    with pytest.raises(IndexError):
        ask(Merchants.none(), [(0, 0)])
