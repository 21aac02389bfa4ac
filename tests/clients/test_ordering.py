"""Points go out by card, some at a time, and their answers come back where the points are."""

from __future__ import annotations

import gc
import itertools
import queue
import threading
from collections.abc import Iterator, Sequence

import google_crc32c
import grpc
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tally import ordering
from tally.errors import CorruptedError, InvalidRequestError, Violation
from tally.historical import Answers, Question
from tally.ordering import Ordering, placing
from tally.v1 import feature_service_pb2 as pb

BATCH_ROWS = 3
POINTS = pa.schema([("card", pa.string()), ("number", pa.int64()), ("blob", pa.string())])
ANSWERS = pa.schema(
    [
        *POINTS,
        pa.field("twice", pa.float64(), nullable=False),
        pa.field("statuses", pa.list_(pa.uint8(), 2), nullable=False),
    ]
)

pieces = st.lists(st.lists(st.sampled_from(["a", "b", "c", None]), max_size=9), max_size=8)


@pytest.fixture(autouse=True)
def few_rows_are_many(monkeypatch):
    monkeypatch.setattr(ordering, "BATCH_ROWS", BATCH_ROWS)


def points_of(cards: Sequence[Sequence[str | None]], bytes_each: int = 1) -> list[pa.RecordBatch]:
    numbers = itertools.count()
    batches = []
    for some in cards:
        rows = [{"card": card, "number": next(numbers), "blob": "x" * bytes_each} for card in some]
        batches.append(pa.RecordBatch.from_pylist(rows, POINTS))
    return batches


def answered(batch: pa.RecordBatch) -> pa.RecordBatch:
    """What a server would say of points."""
    numbers = batch.column(1).to_numpy()
    flat = pa.array(np.stack([numbers, numbers + 1], 1).reshape(-1).astype(np.uint8))
    columns = [*batch.columns, pa.array(numbers * 2.0)]
    columns.append(pa.FixedSizeListArray.from_arrays(flat, type=ANSWERS.field("statuses").type))
    return pa.RecordBatch.from_arrays(columns, schema=ANSWERS)


@given(cards=pieces, rows_together=st.integers(1, 20), cut=st.integers(1, 5))
def test_answers_come_back_in_the_order_of_the_points(cards, rows_together, cut):
    batches = points_of(cards)
    order = Ordering(POINTS, iter(batches), rows_together)
    place = placing(order, ANSWERS)
    sent: list[pa.RecordBatch] = []
    got: list[pa.RecordBatch] = []
    for batch in order.sent():
        sent.append(batch)
        whole = answered(batch)
        for begin in range(0, len(whole), cut):  # whatever the server makes of batches
            got += place(whole.slice(begin, cut))
    assert all(0 < len(batch) <= BATCH_ROWS for batch in sent)
    expected = pa.Table.from_batches(map(answered, batches), ANSWERS)
    assert pa.Table.from_batches(got, ANSWERS).equals(expected)
    assert not order.unanswered


@given(cards=pieces, rows_together=st.integers(1, 20))
def test_cards_follow_one_another_within_a_part(cards, rows_together):
    order = Ordering(POINTS, iter(points_of(cards)), rows_together)
    sent = pa.Table.from_batches(order.sent(), POINTS)["card"].to_pylist()
    begin = 0
    for part in order.unanswered:
        some = sent[begin : begin + part.n_rows]
        changes = sum(before != after for before, after in itertools.pairwise(some))
        if part.n_rows > BATCH_ROWS:
            assert changes == len(set(some)) - 1
        begin += part.n_rows
    assert begin == len(sent)


@given(cards=pieces, rows_together=st.integers(1, 20), data=st.data())
def test_a_refusal_names_the_row_of_the_points(cards, rows_together, data):
    order = Ordering(POINTS, iter(points_of(cards)), rows_together)
    sent = list(order.sent())
    if not sent:
        return
    message = data.draw(st.integers(0, len(sent) - 1))
    row = data.draw(st.integers(0, len(sent[message]) - 1))
    field = f"points[{message}].amount[{row}]"
    told = order.of_points(
        InvalidRequestError(
            f"{field}: is wrong (and 1 more)",
            code=grpc.StatusCode.INVALID_ARGUMENT,
            violations=(Violation(field, "is wrong"), Violation("header.schema", "as well")),
        )
    )
    number = sent[message].column(1)[row].as_py()
    assert [v.field for v in told.violations] == [f"amount[{number}]", "header.schema"]
    assert str(told) == f"amount[{number}]: is wrong (and 1 more)"


def test_one_thread_sends_while_another_places():
    n_parts, per_part = 300, 6
    order = Ordering(POINTS, iter(points_of([["a", "b"] * 3] * n_parts)), per_part)
    place = placing(order, ANSWERS)
    way: queue.SimpleQueue[pa.RecordBatch | None] = queue.SimpleQueue()

    def send() -> None:
        for batch in order.sent():
            way.put(batch)
        way.put(None)

    sender = threading.Thread(target=send)
    sender.start()
    numbers: list[int] = []
    while (batch := way.get()) is not None:
        for answer in place(answered(batch)):
            numbers += answer.column(1).to_pylist()
    sender.join()
    assert numbers == list(range(n_parts * per_part))


def test_what_can_be_read_is_sent_before_it_is_said_that_more_cannot():
    def breaking() -> Iterator[pa.RecordBatch]:
        yield from points_of([["a", "b"], ["c"]])
        raise OSError("the disk is gone")

    sent: list[pa.RecordBatch] = []
    order = Ordering(POINTS, breaking(), 100)
    with pytest.raises(OSError, match="the disk is gone"):
        sent.extend(order.sent())
    assert sum(len(batch) for batch in sent) == 3


def responses(batches: list[pa.RecordBatch]) -> Iterator[pb.GetHistoricalFeaturesResponse]:
    """What a server sends."""
    header = pb.HistoricalResponseHeader(schema=ANSWERS.serialize().to_pybytes())
    yield pb.GetHistoricalFeaturesResponse(header=header)
    for batch in batches:
        data = batch.serialize().to_pybytes()
        crc = google_crc32c.value(data)
        message = pb.ArrowBatch(data=data, row_count=len(batch), crc32c=crc)
        yield pb.GetHistoricalFeaturesResponse(batch=message)


def asked(n: int) -> tuple[Question, list[pa.RecordBatch]]:
    """A call about n points, a few together, and the batches that were sent."""
    points = pa.Table.from_batches(points_of([["a", "b", "c"] * (n // 3)]), POINTS)
    question = Question.about(points, [], None, 8)
    assert question.ordering is not None
    return question, list(question.ordering.sent())


def test_whoever_takes_one_batch_and_then_the_others_gets_them_all():
    question, sent = asked(30)
    answers = Answers(question, responses([answered(batch) for batch in sent]))
    numbers = next(iter(answers)).column(1).to_pylist()
    for batch in answers:
        numbers += batch.column(1).to_pylist()
    assert numbers == list(range(30))


def test_answers_that_nobody_wants_any_more_end_at_once():
    question, sent = asked(30)
    ended: list[bool] = []

    def told() -> Iterator[pb.GetHistoricalFeaturesResponse]:
        try:
            yield from responses([answered(batch) for batch in sent])
        finally:
            ended.append(True)

    answers = Answers(question, told())
    next(iter(answers))
    gc.disable()
    try:
        del answers
        assert ended == [True]
    finally:
        gc.enable()


def test_too_few_and_too_many_answers_are_told():
    question, sent = asked(30)
    with pytest.raises(CorruptedError, match="before its last point"):
        list(Answers(question, responses([answered(batch) for batch in sent[:-1]])))
    question, sent = asked(30)
    with pytest.raises(CorruptedError, match="more answers than points"):
        list(Answers(question, responses([answered(batch) for batch in [*sent, sent[0]]])))


def test_answers_in_order_are_not_waited_for():
    order = Ordering(POINTS, iter(points_of([["a"] * 4 + ["b"] * 4])), 100)
    place = placing(order, ANSWERS)
    for batch in order.sent():
        assert [len(answer) for answer in place(answered(batch))] == [len(batch)]


def test_much_text_is_not_put_in_order_at_once(monkeypatch):
    monkeypatch.setattr(ordering, "BYTES_TOGETHER", 1_000)
    batches = points_of([["a", "b"], ["a", "b"], ["a"]], bytes_each=300)
    order = Ordering(POINTS, iter(batches), 100)
    assert sum(len(batch) for batch in order.sent()) == 5
    assert [part.n_rows for part in order.unanswered] == [4, 1]


def test_what_cannot_be_put_in_order_goes_as_it_is():
    views = pa.array([str(i) for i in range(8)], pa.string_view())
    table = pa.table({"card": ["a", "b"] * 4, "text": views})
    order = Ordering(table.schema, iter(table.to_batches()), 100)
    sent = pa.Table.from_batches(order.sent(), table.schema)
    assert sent.equals(table)


def test_points_with_much_beside_them_go_in_smaller_batches(monkeypatch):
    monkeypatch.setattr(ordering, "BATCH_BYTES_MAX", 1_000)
    order = Ordering(POINTS, iter(points_of([["a", "b", "a", "b"]], bytes_each=600)), 100)
    sent = list(order.sent())
    assert [batch.column(0).to_pylist() for batch in sent] == [["a"], ["a"], ["b"], ["b"]]
