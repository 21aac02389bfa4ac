"""One meaning: `as_of`, the server, `tally get` and the oracle agree on real and generated rows."""

from __future__ import annotations

import csv
import json
import math
import random
from collections import defaultdict
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path

import numpy as np
import pytest
import tally
from tally.generator import Generator, default_plan

from features import CATALOG, RETENTION_MS, Ledgers, Status, as_of, merge_ledger
from features.catalog import CATEGORY_CODES, WINDOWS, Source
from tests import slices
from tests.conftest import Stack
from tests.oracle import Event, Holder, Question, answer
from tests.strategies import to_points, to_records

POINTS = 300
POINTS_BY_COMMAND = 6
GENERATED_ROWS = slices.of(200_000, 40_000)
LABEL_DELAY_MS = 7 * 86_400_000
"""When the files' labels are taken to have become known."""


Cards = dict[str, list[tuple[Event, Holder]]]
"""By card number: its events, each with what it says of the holder."""


def read(path: Path) -> Cards:
    """The rows of a file by card, in plain Python: events, and their holder."""
    cards: Cards = defaultdict(list)
    with path.open(newline="") as file:
        for values in csv.DictReader(file):
            at = datetime.fromisoformat(values["trans_date_trans_time"]).replace(tzinfo=UTC)
            event = Event(
                time_ms=round(at.timestamp() * 1000),
                transaction_id=values["trans_num"],
                merchant=values["merchant"].removeprefix("fraud_"),
                amount_minor=round(float(values["amt"]) * 100),
                category=CATEGORY_CODES.get(values["category"], 0),
                latitude_udeg=round(float(values["merch_lat"]) * 1e6),
                longitude_udeg=round(float(values["merch_long"]) * 1e6),
            )
            if values.get("is_fraud") == "1":
                event = replace(event, fraud_known_ms=event.time_ms + LABEL_DELAY_MS)
            holder = Holder(
                (round(float(values["lat"]) * 1e6), round(float(values["long"]) * 1e6)),
                values["gender"],
                date.fromisoformat(values["dob"]),
                int(values["city_pop"]),
            )
            cards[values["cc_num"]].append((event, holder))
    return cards


def draw(cards: Cards, n: int) -> list[tuple[str, Question]]:
    """Random points: at a transaction, at a window's edge behind one, between, long after. They are of no
    merchant: in a stack that tests share, merchants are shared as well."""
    rng = random.Random(7)
    names = sorted(cards)
    categories = list(CATEGORY_CODES)
    points = []
    for _ in range(n):
        card = rng.choice(names)
        event, holder = rng.choice(cards[card])
        first_seen = min(e.time_ms for e, _ in cards[card])
        shift = rng.choice(
            [
                0,
                1,
                rng.randrange(RETENTION_MS),
                90 * 86_400_000,
                *(w + d for _, w in WINDOWS for d in (0, 1)),
            ]
        )
        t = event.time_ms + shift
        points.append(
            (
                card,
                Question(
                    time_ms=t,
                    amount_minor=rng.choice([event.amount_minor, rng.randrange(100, 100_000)]),
                    category=rng.choice(categories),
                    latitude_udeg=(event.latitude_udeg or 0) + rng.randrange(1_000_000),
                    longitude_udeg=event.longitude_udeg,
                    holder=holder if t >= first_seen else None,
                ),
            )
        )
    return points


def row(card: str, question: Question) -> tally.Row:
    assert question.amount_minor is not None
    assert question.latitude_udeg is not None
    assert question.longitude_udeg is not None
    return tally.Row(
        card=card,
        at=question.time_ms,
        amount=question.amount_minor / 100,
        category=question.category,
        merchant_latitude=question.latitude_udeg / 1e6,
        merchant_longitude=question.longitude_udeg / 1e6,
    )


def assert_equal(
    got: float | None, status: str, want: float | None, want_status: Status, what: str
) -> None:
    assert status == want_status.name, what
    if want is None:
        assert got is None or math.isnan(got), what
    else:
        assert np.float64(got).tobytes() == np.float64(want).tobytes(), f"{what}: {got} {want}"


def load_all(stack: Stack, files: list[Path]) -> None:
    """Loads files, none of whose rows is rejected."""
    for path in files:
        loaded = stack.tally("load", "--json", path)
        assert loaded.returncode == 0, loaded.stderr
        outcome = json.loads(loaded.stdout)
        assert outcome["rejected"] == 0
        assert outcome["read"] == sum(len(h) for h in read(path).values())


def cards_of(files: list[Path]) -> Cards:
    """The rows of files by card."""
    cards: Cards = defaultdict(list)
    for path in files:
        for card, history in read(path).items():
            cards[card].extend(history)
    return cards


def compare(stack: Stack, cards: Cards, points: int = POINTS) -> None:
    """Compares all four ways of asking about cards, at random points, to the last bit."""
    asked = draw(cards, points)
    with tally.Client(stack.address) as client:
        served = client.online([row(card, question) for card, question in asked])
    names = sorted({card for card, _ in asked})
    ledgers = Ledgers.from_bytes(
        [merge_ledger(None, to_records([seen[0] for seen in cards[name]])) for name in names]
    )
    computed = as_of(ledgers, to_points([(names.index(card), q) for card, q in asked]))
    for i, (card, question) in enumerate(asked):
        known = [seen[0] for seen in cards[card]]
        commanded = by_command(stack, card, question) if i < POINTS_BY_COMMAND else None
        exceptions = served.exceptions(i)
        for j, feature in enumerate(CATALOG):
            want, status = answer(feature, known, question)
            what = f"{feature.name} at {question}"
            assert_equal(
                float(served.values[i, j]),
                exceptions.get(feature.name, "PRESENT"),
                want,
                status,
                what,
            )
            if feature.source not in (Source.PROFILE, Source.PROFILE_AND_REQUEST):
                # The core has no profiles here.
                core = Status(computed.statuses[i, j]).name
                assert_equal(float(computed.values[i, j]), core, want, status, what)
            if commanded is not None:
                got = commanded["statuses"].get(feature.name, "PRESENT")
                assert_equal(commanded["features"][feature.name], got, want, status, what)


def by_command(stack: Stack, card: str, question: Question) -> dict:
    """What `tally get --json` prints."""
    at = np.datetime_as_string(np.datetime64(question.time_ms, "ms"), timezone="UTC")
    asked = row(card, question)
    result = stack.tally(
        *("get", card, "--json", "--at", str(at), "--amount", str(asked.amount)),
        *("--category", str(asked.category), "--merchant-lat", repr(asked.merchant_latitude)),
        *("--merchant-long", repr(asked.merchant_longitude)),
    )
    assert result.returncode == 0, result.stderr
    printed: dict = json.loads(result.stdout)
    return printed


def test_real_rows(stack, kaggle_files):
    load_all(stack, kaggle_files)
    compare(stack, cards_of(kaggle_files))


@pytest.mark.sliced
@pytest.mark.budget(slices.of(60, 30), "many rows are loaded, and the oracle looks at them plainly")
def test_generated_rows(stack, tmp_path):
    path = tmp_path / "generated.csv"
    seed = str(slices.drawn("generated rows").getrandbits(31))
    made = stack.tally("synth", "-o", path, "--rows", str(GENERATED_ROWS), "--seed", seed)
    assert made.returncode == 0, made.stderr
    load_all(stack, [path])
    compare(stack, cards_of([path]))


def test_generated_fraud_has_every_family_and_the_same_seed_the_same_bytes(tmp_path):
    plan = replace(default_plan(20_000, seed=3), fraud_share=0.05)
    texts = ["".join(text for text, _ in Generator(plan).chunks()) for _ in range(2)]
    assert texts[0] == texts[1]
    rows = list(csv.reader(texts[0].splitlines()))
    frauds = [r for r in rows if r[-1] == "1"]
    assert len(rows) == 20_000
    assert 0.03 < len(frauds) / len(rows) < 0.06
    assert sum(float(r[5]) > 500 for r in frauds) > 100  # jumps
    assert sum(abs(float(r[14]) - float(r[-2])) > 5 for r in frauds) > 100  # travel
    assert sum(r[1][11:13] < "05" for r in frauds) > 100  # bursts by night
