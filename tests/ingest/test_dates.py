"""Dates in numbers are read in the order that the file settles, and in no other."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from features import CardKey
from ingest.dates import DateOrder, FileDates, dated_rows
from ingest.files import read_file
from ingest.kaggle import convert
from tests.batch_job.kaggle_rows import row, write

NOW = datetime(2026, 1, 1, tzinfo=UTC)
CARD_ID = CardKey(b"a secret of some length" * 2).card_id
LAG_S = 2_557 * 86_400
"""By which `unix_time` is behind the local time in the public files."""
DAY, MONTH = DateOrder.DAY_FIRST, DateOrder.MONTH_FIRST
FORMS = {
    (DAY, True): "{0:%d}{1}{0:%m}{1}{0:%Y} {0:%H:%M}",
    (MONTH, True): "{0:%m}{1}{0:%d}{1}{0:%Y} {0:%H:%M}",
    (DAY, False): "{0.day}{1}{0.month}{1}{0:%y} {0.hour}:{0:%M}",
    (MONTH, False): "{0.month}{1}{0.day}{1}{0:%y} {0.hour}:{0:%M}",
}


def read(
    path: Path,
    times: list[str],
    unix_times: list[object] | None = None,
    order: DateOrder | None = None,
) -> tuple[list[datetime], list[str]]:
    """The times that a file's rows are stored with, and the reasons and details of those rejected."""
    unix_times = unix_times or [""] * len(times)
    rows = [
        row(trans_num=f"t{i}", trans_date_trans_time=time, unix_time=unix_time)
        for i, (time, unix_time) in enumerate(zip(times, unix_times, strict=True))
    ]
    write(path, rows)
    dates = FileDates(order, lambda: dated_rows(read_file(path)))
    taken: list[datetime] = []
    rejected: list[str] = []
    for batch in read_file(path):
        facts = convert(batch.table, CARD_ID, NOW, dates)
        taken += facts.transactions["event_time"].to_pylist()
        rejected += [f"{problem.reason}: {problem.detail}" for problem in facts.problems]
    return taken, rejected


def unix_time(instant: datetime) -> int:
    return int(instant.timestamp()) - LAG_S


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.csv"


def test_unix_time_settles_the_order_of_a_file(path):
    instants = [datetime(2024, 2, day, 9, 5, 30, tzinfo=UTC) for day in range(1, 13)]
    times = [FORMS[DAY, True].format(instant, "/") for instant in instants]
    assert read(path, times, [unix_time(instant) for instant in instants]) == (instants, [])


def test_one_unix_time_settles_it_for_the_rows_that_have_none(path):
    times = ["08/02/2024 09:05", "09/02/2024 09:05", "10/02/2024 09:05"]
    unix_times = ["", "", unix_time(datetime(2024, 2, 10, 9, 5, tzinfo=UTC))]
    taken, rejected = read(path, times, unix_times)
    assert [instant.month for instant in taken] == [2, 2, 2]
    assert rejected == []


@pytest.mark.parametrize("separator", "/-.")
def test_a_day_above_12_settles_it_wherever_it_stands_in_the_file(path, separator):
    times = [f"{day:02}{separator}02{separator}2024 09:05" for day in range(8, 18)]
    taken, rejected = read(path, times)
    assert [(instant.month, instant.day) for instant in taken] == [(2, day) for day in range(8, 18)]
    assert rejected == []


@pytest.mark.parametrize(
    ("times", "unix_times"),
    [
        (["13/02/2024 09:05", "02/13/2024 09:05", "01/02/2024 09:05"], None),
        (
            ["08/02/2024 09:05", "08/02/2024 09:05"],
            [
                unix_time(datetime(2024, 2, 8, 9, 5, tzinfo=UTC)),
                unix_time(datetime(2024, 8, 2, 9, 5, tzinfo=UTC)),
            ],
        ),
        (
            ["08/02/2024 09:05", "02/13/2024 09:05"],
            [unix_time(datetime(2024, 2, 8, 9, 5, tzinfo=UTC)), ""],
        ),
    ],
)
def test_a_file_that_contradicts_itself_is_rejected_with_the_lines_that_do(path, times, unix_times):
    taken, rejected = read(path, times, unix_times)
    assert taken == []
    assert len(rejected) == len(times)
    for reason in rejected:
        assert reason.startswith("AMBIGUOUS_DATE: the file contradicts itself: line ")
        assert "--date-order" in reason


def test_what_nothing_settles_is_rejected_with_what_to_do_and_the_rest_goes_on(path):
    times = ["08/02/2024 09:05", "2024-02-08 09:05:00", "03/03/2024 09:05", "1.2.24 9:05"]
    taken, rejected = read(path, times)
    assert [(t.month, t.day) for t in taken] == [
        (2, 8),
        (3, 3),
    ]  # of one number there is one reading
    assert all(
        "AMBIGUOUS_DATE: it could be two dates" in r and "--date-order" in r for r in rejected
    )
    assert len(rejected) == 2


@pytest.mark.parametrize(("order", "month"), [(DAY, 2), (MONTH, 8)])
def test_the_caller_may_say_the_order(path, order, month):
    taken, rejected = read(path, ["08/02/2024 09:05"], order=order)
    assert [instant.month for instant in taken] == [month]
    assert rejected == []


def test_a_row_that_proves_the_caller_wrong_is_rejected(path):
    times = ["08/02/2024 09:05", "13/02/2024 09:05", "08/02/2024 09:05"]
    february = unix_time(datetime(2024, 2, 8, 9, 5, tzinfo=UTC))
    taken, rejected = read(path, times, [february, "", ""], order=MONTH)
    assert [instant.month for instant in taken] == [8]
    assert len(rejected) == 2
    assert all("--date-order is wrong for it" in reason for reason in rejected)


@pytest.mark.parametrize("days", [range(8, 12), [20], [20, 20]])
def test_a_year_of_two_digits_may_be_the_first_number(path, days):
    # The last number varies no less than the first: these may be days of February 2024.
    taken, rejected = read(path, [f"24/02/{day:02} 09:05" for day in days])
    assert taken == []
    assert all("its year may be the first or the last number" in reason for reason in rejected)


@pytest.mark.parametrize("days", [[1, 13], [13], [20, 20]])
def test_a_unix_time_says_that_the_year_is_the_last_number(path, days):
    """Also of a date that is none with its month first."""
    instants = [datetime(2000 + day % 3, 1, day, 9, 5, tzinfo=UTC) for day in days]
    times = [f"{i:%d/%m/%y %H:%M}" for i in instants]
    assert read(path, times, [unix_time(i) for i in instants]) == (instants, [])


@pytest.mark.parametrize(
    "text",
    [
        "45/13/2024 09:05",
        "30/02/2024 09:05",
        "08/02/2024 24:05",
        "08/02-2024 09:05",
        "08/02/2024",
        "0/1/2024 09:05",
    ],
)
def test_what_is_no_date_in_any_order_is_no_time(path, text):
    taken, (reason,) = read(path, [text], order=DAY)
    assert taken == []
    assert reason.startswith("BAD_TIME")


def test_a_pipe_needs_a_unix_time_or_the_caller(path):
    write(path, [row(trans_date_trans_time="13/02/2024 09:05")])
    (batch,) = read_file(path)
    (problem,) = convert(batch.table, CARD_ID, NOW, FileDates()).problems
    assert (problem.reason, "a pipe is read once" in problem.detail) == ("AMBIGUOUS_DATE", True)
    facts = convert(batch.table, CARD_ID, NOW, FileDates(DAY))
    assert facts.transactions["event_time"].to_pylist()[0].month == 2


@given(
    days=st.lists(
        st.datetimes(datetime(1978, 1, 1), datetime(2025, 1, 1)), min_size=1, max_size=30
    ),
    order=st.sampled_from([DAY, MONTH]),
    four_digits=st.booleans(),
    separator=st.sampled_from("/-."),
    with_unix_times=st.booleans(),
)
def test_no_date_is_ever_stored_in_another_month(
    tmp_path_factory, days, order, four_digits, separator, with_unix_times
):
    instants = [day.replace(microsecond=0, tzinfo=UTC) for day in days]
    form = FORMS[order, four_digits]
    times = [form.format(instant, separator) for instant in instants]
    unix_times: list[object] = [unix_time(i) if with_unix_times else "" for i in instants]
    path = tmp_path_factory.mktemp("dates") / "a.csv"
    taken, rejected = read(path, times, unix_times)
    kept = instants if with_unix_times else [i.replace(second=0) for i in instants]
    needs_order = [i for i in instants if i.day != i.month]
    proof = [i for i in needs_order if with_unix_times or i.day > 12]
    if proof and not (order is DAY and not four_digits and not with_unix_times):
        assert (taken, rejected) == (kept, [])
    elif not proof:
        assert taken == [i for i in kept if i.day == i.month]
        assert len(rejected) == len(needs_order)
    else:  # a short year may be thought to be the first number, which costs rows and moves none
        assert set(taken) <= set(kept)
        assert len(taken) + len(rejected) == len(kept)


def test_an_event_settles_its_own_date_or_is_rejected(path):
    def alone(time: str, unix: object = "") -> object:
        write(path, [row(trans_date_trans_time=time, unix_time=unix)])
        (batch,) = read_file(path)
        facts = convert(batch.table, CARD_ID, NOW)
        return (
            facts.problems[0].reason
            if facts.problems
            else facts.transactions["event_time"][0].as_py()
        )

    february = datetime(2024, 2, 8, 9, 5, tzinfo=UTC)
    assert alone("08/02/2024 09:05", unix_time(february)) == february
    assert alone("08/02/2024 09:05", int((february + timedelta(seconds=7)).timestamp())) == (
        february + timedelta(seconds=7)
    )
    assert alone("13/02/2024 09:05") == datetime(2024, 2, 13, 9, 5, tzinfo=UTC)
    assert alone("08/02/2024 09:05") == "AMBIGUOUS_DATE"
