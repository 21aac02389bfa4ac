"""One meaning: files and the stream lead to the same stores and the same answers, and to the oracle's,
whatever the order and however often events come."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from stream_job.applier import Applier, Batch
from stream_job.settings import StreamSettings
from tests.conftest import Stack, running
from tests.contents import contents
from tests.parity.test_parity import cards_of, compare

ROWS = 20_000
DAYS = 90  # three retentions: most of a ledger is dropped, and late events come behind its horizon
CARDS = 150
DUPLICATES = 0.05


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stack, Stack]]:
    """Two installations of one card key: for files, and for the stream."""
    folder = tmp_path_factory.mktemp("twins")
    key = folder / "card.key"
    key.write_text("one secret for both of them, long enough")
    shared = {"TALLY_CARD_KEY_FILE": str(key)}
    with (
        running(folder / "files", **shared) as by_file,
        running(folder / "stream", **shared) as by_stream,
    ):
        yield by_file, by_stream


@pytest.fixture(scope="module")
def rows(twins: tuple[Stack, Stack], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with many ties: every third payment is at a full hour."""
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    size = ("--rows", str(ROWS), "--days", str(DAYS), "--cards", str(CARDS), "--seed", "31")
    made = twins[0].tally("synth", "-o", path, *size)
    assert made.returncode == 0, made.stderr
    with path.open(newline="") as file:
        header, *lines = csv.reader(file)
    when = header.index("trans_date_trans_time")
    for line in lines[::3]:
        line[when] = f"{line[when][:13]}:00:00"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *lines])
    return path


@pytest.fixture(scope="module")
def fed(twins: tuple[Stack, Stack], rows: Path) -> tuple[Stack, Stack]:
    """Both, after the same payments: one by a file, one by events in any order, some of them twice."""
    by_file, by_stream = twins
    loaded = by_file.tally("load", "--json", rows)
    assert json.loads(loaded.stdout)["loaded"] == ROWS, loaded.stderr
    with rows.open(newline="") as file:
        values = [json.dumps(row).encode() for row in csv.DictReader(file)]
    rng = random.Random(32)
    values += rng.choices(values, k=int(len(values) * DUPLICATES))
    rng.shuffle(values)
    applier = Applier(StreamSettings(data=by_stream.data, stream_format="kaggle"))
    offset = 0
    while offset < len(values):
        some = values[offset : offset + rng.choice([1, 7, 300, 2_000])]
        n = len(some)
        letters = applier.apply(
            Batch(["transactions"] * n, [0] * n, range(offset, offset + n), [0] * n, some)
        )
        assert letters == [None] * n
        offset += n
    applier.close()
    return by_file, by_stream


def test_files_and_events_leave_the_same_bytes_and_rows(fed):
    by_file, by_stream = (contents(stack) for stack in fed)
    assert len(by_file.ledgers) > CARDS / 2
    # A file is loaded without features: on arrival there are none.
    assert by_file.differences(by_stream, without=("features",)) == []
    assert len(by_stream.tables["features"]) == ROWS


def test_both_answer_as_the_oracle_does(fed, rows):
    for stack in fed:
        compare(stack, cards_of([rows]), points=100)


def test_verify_finds_both_right(fed):
    for stack in fed:
        result = stack.tally("verify", "--all", "--json")
        assert result.returncode == 0, result.stdout
        outcome = json.loads(result.stdout)
        assert outcome["mismatches"] == {}
        assert outcome["cards"] > CARDS / 2
