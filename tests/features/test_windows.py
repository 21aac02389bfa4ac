"""`as_of` against the naive oracle, and its edges drawn one by one."""

from __future__ import annotations

import dataclasses
import math
from datetime import date

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import features.answers
from features import (
    CATALOG,
    CATALOG_BY_NAME,
    PROFILE_RECORD,
    Ledgers,
    Points,
    Profiles,
    Status,
    as_of,
    encode_ledger,
    encode_profile,
    merge_ledger,
)
from features.catalog import DAY_MS, MINUTE_MS
from features.points import AMOUNT_MINOR_MAX
from features.profile import NUMBER_MISSING, PROFILE_RECORDS_MAX
from tests.oracle import Event, Holder, Question, answer
from tests.strategies import ORIGIN_MS, histories, questions, to_points, to_records

T = ORIGIN_MS + 40 * DAY_MS


def compute(history: list[Event] | None, asked: list[Question]) -> features.answers.Answers:
    blob = None if history is None else merge_ledger(None, to_records(history))
    return as_of(Ledgers.from_bytes([blob]), to_points([(0, q) for q in asked]))


def value(history: list[Event] | None, name: str, t: int = T, **given: object) -> float | Status:
    """One feature at t: its value, or its status where it has none."""
    answers = compute(history, [Question(t, **given)])  # type: ignore[arg-type]
    column = [f.name for f in CATALOG].index(name)
    status = Status(answers.statuses[0, column])
    return float(answers.values[0, column]) if status is Status.PRESENT else status


def spend(t: int, *, amount_minor: int = 100, merchant: str = "m", category: int = 1) -> Event:
    return Event(t, f"t{t}-{amount_minor}-{merchant}", merchant, amount_minor, category, 0, 0)


def assert_same(
    got: float, got_status: int, want: float | None, want_status: Status, what: str
) -> None:
    assert got_status == want_status, what
    if want is None:
        assert math.isnan(got), what
    else:
        assert np.float64(got).tobytes() == np.float64(want).tobytes(), f"{what}: {got} {want}"


def profile_of(holder: Holder) -> bytes:
    """A profile that holds from the beginning."""
    born = holder.birth_date
    record = np.zeros(1, dtype=PROFILE_RECORD)
    record["latitude_udeg"], record["longitude_udeg"] = holder.home
    record["birth_date_days"] = NUMBER_MISSING if born is None else (born - date(1970, 1, 1)).days
    record["city_pop"] = NUMBER_MISSING if holder.city_pop is None else holder.city_pop
    record["gender"] = ["", "F", "M"].index(holder.gender or "")
    return encode_profile(record)


def check_against_oracle(
    cards: list[list[Event] | None], asked: list[tuple[int, Question]]
) -> None:
    holders = [
        Holder((10_000_000, 20_000_000)),
        Holder((-5_000_000, 0), "F", date(1969, 12, 31), 0),
        Holder((0, 0), "M", date(2020, 1, 3), 8_000_000),
    ]
    profiles_of = [None, *(profile_of(holder) for holder in holders)]
    ledgers = Ledgers.from_bytes(
        [None if card is None else merge_ledger(None, to_records(card)) for card in cards]
    )
    # One card in four has no holder.
    profiles = Profiles.from_bytes([profiles_of[i % 4] for i in range(len(cards))])
    answers = as_of(ledgers, to_points(asked), profiles=profiles)
    for row, (card, question) in enumerate(asked):
        if card % 4:
            question = dataclasses.replace(question, holder=holders[card % 4 - 1])
        for column, feature in enumerate(CATALOG):
            want, status = answer(feature, cards[card], question)
            assert_same(
                answers.values[row, column],
                answers.statuses[row, column],
                want,
                status,
                f"{feature.name} at {question}",
            )


cards_strategy = st.lists(st.one_of(st.none(), histories), min_size=1, max_size=4)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_many_points_of_many_cards_equal_the_oracle_to_the_last_bit(data: st.DataObject):
    cards = data.draw(cards_strategy)
    asked = []
    for _ in range(data.draw(st.integers(1, 12))):
        card = data.draw(st.integers(0, len(cards) - 1))
        asked.append((card, data.draw(questions(cards[card]))))
    check_against_oracle(cards, asked)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_one_point_of_each_card_equals_the_oracle_to_the_last_bit(data: st.DataObject):
    cards = data.draw(cards_strategy)
    check_against_oracle(cards, [(i, data.draw(questions(c))) for i, c in enumerate(cards)])


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_company_and_order_do_not_change_a_bit(data: st.DataObject):
    cards = [data.draw(histories) for _ in range(5)]
    asked = [
        (card, data.draw(questions(cards[card])))
        for card in data.draw(st.lists(st.integers(0, 4), min_size=2, max_size=30))
    ]
    ledgers = Ledgers.from_bytes([merge_ledger(None, to_records(card)) for card in cards])
    together = as_of(ledgers, to_points(asked))
    alone = [as_of(ledgers, to_points([pair])) for pair in asked]
    assert together.values.tobytes() == b"".join(answers.values.tobytes() for answers in alone)
    assert together.statuses.tobytes() == b"".join(answers.statuses.tobytes() for answers in alone)
    assert together.known.tobytes() == b"".join(answers.known.tobytes() for answers in alone)


@given(st.data())
def test_a_subset_of_features_has_the_same_bits(data: st.DataObject):
    history = data.draw(histories)
    asked = [(0, data.draw(questions(history)))]
    names = data.draw(st.lists(st.sampled_from(range(len(CATALOG))), min_size=1, unique=True))
    ledgers = Ledgers.from_bytes([merge_ledger(None, to_records(history))])
    whole = as_of(ledgers, to_points(asked))
    part = as_of(ledgers, to_points(asked), [CATALOG[i] for i in names])
    assert whole.values[:, names].tobytes() == part.values.tobytes()


def test_window_excludes_its_right_edge_and_includes_its_left():
    #      t-10min                 t
    #  ──●────●──────●─────────────●──▶
    #    a    b      c             d      count = 2: b (on the left edge) and c
    edge = T - 10 * MINUTE_MS
    history = [spend(edge - 1), spend(edge), spend(edge + 1), spend(T)]
    assert value(history, "txn_count_last_10_min") == 2


@given(st.data())
def test_what_happens_at_t_or_after_changes_no_bit(data: st.DataObject):
    #           t
    #  ──●──●───○───●──▶      asked live, and asked later
    history = [e for e in data.draw(histories) if ORIGIN_MS <= e.time_ms < ORIGIN_MS + DAY_MS]
    asked = data.draw(questions(history or None))
    asked = dataclasses.replace(asked, time_ms=ORIGIN_MS + DAY_MS)
    after = [
        spend(asked.time_ms + data.draw(st.integers(0, DAY_MS)), amount_minor=i, merchant="later")
        for i in range(data.draw(st.integers(1, 3)))
    ]
    live, later = compute(history or None, [asked]), compute(history + after, [asked])
    assert live.values.tobytes() == later.values.tobytes()
    assert live.statuses.tobytes() == later.statuses.tobytes()
    assert live.known.tobytes() == later.known.tobytes()
    assert live.known[0] == bool(history)


def test_transactions_of_one_instant_do_not_see_each_other():
    #      more than 30 d      t
    #  ●───────────────────────●●●──▶      each asks at t and sees none
    history = [spend(T - 30 * DAY_MS - 1), *(spend(T, merchant=m) for m in "abc")]
    assert value(history, "txn_count_last_30_days") == 0


def test_a_quiet_card_decays_with_no_write():
    #  ──●──────────●─────────●──▶
    #    last       +10 min   +10 min 1 ms
    history = [spend(T)]
    assert value(history, "txn_count_last_10_min", T + 1) == 1
    assert value(history, "txn_count_last_10_min", T + 10 * MINUTE_MS) == 1
    assert value(history, "txn_count_last_10_min", T + 10 * MINUTE_MS + 1) == 0


def test_an_empty_window_has_a_count_and_no_mean():
    history = [spend(T - 2 * DAY_MS)]
    assert value(history, "txn_count_last_1_hour") == 0
    assert value(history, "sum_amt_last_1_hour") == 0
    for name in ("avg", "std", "max"):
        assert value(history, f"{name}_amt_last_1_hour") is Status.EMPTY_WINDOW


def test_an_unknown_card_is_not_a_card_with_zeros():
    assert value(None, "txn_count_last_10_min") is Status.UNKNOWN_CARD
    assert value(None, "seconds_since_last_txn") is Status.UNKNOWN_CARD


def test_a_window_that_begins_before_the_kept_history_is_flagged():
    #   dropped                          newest
    #  ──●───────────●────────────────────●──▶
    #    -32 d       -30 d                0
    history = [spend(T - 32 * DAY_MS), spend(T - 30 * DAY_MS), spend(T)]
    assert value(history, "txn_count_last_30_days", T) == 1
    assert value(history, "txn_count_last_30_days", T - 2 * DAY_MS) is Status.BEFORE_HISTORY
    assert value(history, "txn_count_last_24_hours", T - 2 * DAY_MS) == 0
    assert value(history, "seconds_since_last_txn", T - 31 * DAY_MS) is Status.BEFORE_HISTORY


def test_a_deviation_of_large_amounts_keeps_its_digits():
    # Amounts near the limit that differ by one minor unit: floats would say 0 or nonsense.
    amounts = [AMOUNT_MINOR_MAX, AMOUNT_MINOR_MAX - 1]
    history = [spend(T - 1 - i, amount_minor=a) for i, a in enumerate(amounts)]
    assert value(history, "std_amt_last_10_min") == 0.005


def test_a_zscore_without_deviation_is_undefined():
    history = [spend(T - 1), spend(T - 2)]
    assert value(history, "amt_zscore_last_30_days", amount_minor=100) is Status.UNDEFINED
    assert value(history, "amt_zscore_last_30_days") is Status.MISSING_INPUT


def test_request_features_of_an_unknown_card_are_computed():
    assert value(None, "amt", amount_minor=1234) == 12.34
    assert value(None, "hour_of_day", ORIGIN_MS + 23 * 3_600_000) == 23
    assert value(None, "day_of_week", ORIGIN_MS) == 2  # 2020-01-01 was a Wednesday
    assert value(None, "is_night", ORIGIN_MS) == 1
    assert value(None, "category", category="entertainment") == 1
    assert value(None, "category", category="alchemy") is Status.UNKNOWN_CATEGORY


@pytest.mark.parametrize("merchants", [[2**60, 2**61, 2**60], [7, 8, 7], [2**64 - 1, 0, 2**64 - 1]])
def test_merchants_whose_keys_fall_into_one_slot_are_told_apart(merchants):
    records = to_records([spend(T - 3, merchant="a"), spend(T - 2, merchant="b"), spend(T - 1)])
    records["merchant"] = merchants
    ledgers = Ledgers.from_bytes([encode_ledger(records)])
    feature = CATALOG_BY_NAME["distinct_merchants_last_10_min"]
    answers = as_of(ledgers, Points.at([0, 0, 0], [T, T - 1, T - 2]), [feature])
    assert answers.values[:, 0].tolist() == [2, 2, 1]


@pytest.mark.parametrize("card_index", [-1, 1])
def test_a_point_of_a_card_that_is_not_there_is_refused(card_index):
    with pytest.raises(IndexError, match="points of cards"):
        as_of(Ledgers.from_bytes([None]), Points.at([card_index], [T]))


def test_columns_of_different_lengths_are_refused():
    ledgers = Ledgers.from_bytes([None])
    for points in (Points.at([0], [T, T]), Points.at([0, 0], [T, T], amount_minor=[1])):
        with pytest.raises(ValueError, match="different lengths"):
            as_of(ledgers, points)


def test_columns_that_cannot_be_written_to_are_taken():
    times = np.frombuffer(np.array([T, T]).tobytes(), np.int64)
    cards = np.frombuffer(bytes(16), np.int64)
    assert as_of(Ledgers.from_bytes([None]), Points.at(cards, times)).known.tolist() == [False] * 2


def test_points_need_no_cards_and_no_rows():
    nothing = as_of(Ledgers.from_bytes([]), Points.at([], []))
    assert nothing.values.shape == (0, len(CATALOG))


def test_a_full_profile_says_before_history_of_what_it_dropped_and_another_missing_fact():
    #   v0      v1 … v1024            v0 is dropped where there are 1,025 versions
    #  ──●───────●───────────▶ t
    def status_at(n_versions: int, first_ms: int) -> Status:
        records = np.zeros(n_versions, dtype=PROFILE_RECORD)
        records["valid_from_ms"] = first_ms + np.arange(n_versions)
        records["city_pop"] = np.arange(n_versions)
        records["birth_date_days"] = NUMBER_MISSING
        profiles = Profiles.from_bytes([encode_profile(records)])
        ledgers = Ledgers.from_bytes([merge_ledger(None, to_records([spend(T - 5)]))])
        answers = as_of(
            ledgers,
            to_points([(0, Question(T, latitude_udeg=0, longitude_udeg=0))]),
            profiles=profiles,
        )
        names = [feature.name for feature in CATALOG]
        columns = [names.index(name) for name in ("city_pop", "distance_to_merchant")]
        found = {Status(status) for status in answers.statuses[0, columns]}
        (status,) = found
        return status

    assert status_at(2, T) is Status.PRESENT
    assert status_at(PROFILE_RECORDS_MAX, T) is Status.PRESENT
    assert status_at(PROFILE_RECORDS_MAX + 1, T) is Status.BEFORE_HISTORY
    assert status_at(PROFILE_RECORDS_MAX - 1, T + 1) is Status.MISSING_FACT
    assert status_at(PROFILE_RECORDS_MAX, T + 1) is Status.BEFORE_HISTORY  # it may have dropped one
