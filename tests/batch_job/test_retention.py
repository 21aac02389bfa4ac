"""Retention: old months are gone, what needs them is flagged, and all else is answered as before."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import tally
from tally.v1 import feature_service_pb2 as pb

from features import CATALOG
from stores.errors import LockedError
from stores.history import History
from stores.redis_store import ledger_key
from stores.retention import prune
from stream_job.applier import Applier, Batch
from stream_job.settings import StreamSettings
from tests.conftest import Stack, run_tally, running
from tests.parity.test_parity import load_all

ROWS = 8_000
HORIZON = datetime(2024, 3, 1, tzinfo=UTC)
NAMES = [feature.name for feature in CATALOG]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Payments of five months; every eighth card pays in the first two months alone."""
    folder = tmp_path_factory.mktemp("rows")
    path = folder / "rows.csv"
    size = ("--rows", str(ROWS), "--cards", "80", "--days", "150", "--seed", "95")
    made = run_tally("synth", "-o", path, *size, data=folder)
    assert made.returncode == 0, made.stderr
    with path.open(newline="") as file:
        header, *lines = csv.reader(file)
    when, card = header.index("trans_date_trans_time"), header.index("cc_num")
    early = set(sorted({line[card] for line in lines})[::8])
    kept = [line for line in lines if line[card] not in early or line[when] < "2024-02-20"]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *kept])
    return path


@pytest.fixture(scope="module")
def own(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running(tmp_path_factory.mktemp("retention") / "data") as stack:
        load_all(stack, [rows])
        yield stack


def points(client: tally.Client):
    """All payments, and the same cards a while after each, as points."""
    table = client.historical(tally.TimeRange(), ["amt"])
    return table.select(
        ["card_id", "event_time", "transaction_id", "amount", "merchant_latitude",
         "merchant_longitude"]
    )  # fmt: skip


def test_whoever_reads_is_not_waited_for_long(own, monkeypatch):
    """Others who want to read would wait behind it."""
    monkeypatch.setattr("stores.retention.READERS_TIMEOUT_S", 1)
    with History(own.settings.store_urls()[1]) as history, closing(own.offline()) as offline:
        next(history.spans())
        with pytest.raises(LockedError, match="to be dropped"):
            prune(offline, HORIZON)
        assert len(next(history.spans()).card_ids) > 0
    with tally.Client(own.address) as client:
        assert len(points(client)) > ROWS / 2


def test_old_months_are_dropped_and_what_needs_them_is_flagged(own, rows):
    with tally.Client(own.address) as client, closing(own.online()) as online:
        assert own.tally("batch", "run").returncode == 0
        asked = points(client)
        before = client.historical(asked, NAMES)
        export = client.export("transactions", batch_rows=10)
        _, cursor = next(iter(export))
        with closing(own.offline()) as offline:
            rows_before = dict(
                offline.sql.execute(
                    "SELECT transaction_id, feature_values::text FROM features "
                    "WHERE event_time >= %s", (HORIZON,)
                ).fetchall()
            )  # fmt: skip
        newest = {
            card: online.read([ledger_key(card)])[0] for card in sorted(online.cards_with_ledgers())
        }
        pruned = own.tally("batch", "prune", "--before", "2024-03-20", "--yes", "--json")
        assert pruned.returncode == 0, pruned.stderr
        outcome = json.loads(pruned.stdout)
        assert outcome["months"] == 2
        left = points(client)
        assert len(left) == len(asked) - outcome["transactions"]
        assert min(left["event_time"].to_pylist()) >= HORIZON
        with pytest.raises(tally.CursorExpiredError):
            client.resume_export(cursor)
        after = client.historical(asked, NAMES)
        compare(before, after)
        # A card that pays on has the ledger that it had; one that does not has what is left of it.
        for card, ledger in newest.items():
            assert ledger is not None
            (now,) = online.read([ledger_key(card)])
            assert now is not None
            assert now == ledger or len(now) < len(ledger)
        assert own.tally("verify", "--all").returncode == 0
        # Rebuilt, Redis holds the same; and it knows the cards of which nothing is left.
        held = {card: online.read([ledger_key(card)])[0] for card in newest}
        online.redis.flushall()
        assert own.tally("sync").returncode == 0
        assert {card: online.read([ledger_key(card)])[0] for card in newest} == held
        gone = [card for card in newest if len(held[card] or b"") == 16]
        assert gone
        (answer,) = client.online([tally.Row(card_id=gone[0], at=HORIZON)], NAMES).to_json_rows(
            ["x"]
        )
        assert answer["known"]
        assert answer["statuses"]["txn_count_last_30_days"] == "BEFORE_HISTORY"
        # Rows of features that were whole stay as they were, whatever is run again.
        assert own.tally("batch", "run", "--from", "2024-01-01").returncode == 0
        with closing(own.offline()) as offline:
            found = offline.sql.execute("SELECT transaction_id, feature_values::text FROM features")
            assert dict(found.fetchall()) == rows_before


def compare(before, after) -> None:
    """All that is not flagged is as it was; what is flagged would have needed what is gone."""
    statuses = np.array(after["statuses"].to_pylist())
    was = np.array(before["statuses"].to_pylist())
    flagged = statuses == pb.FEATURE_STATUS_BEFORE_HISTORY
    assert 0.05 < flagged.mean() < 0.9
    times = after["event_time"].to_numpy().astype("datetime64[ms]").astype(np.int64)
    horizon_ms = round(HORIZON.timestamp() * 1000)
    for column, feature in enumerate(CATALOG):
        same = ~flagged[:, column]
        one, two = before[feature.name].to_numpy(), after[feature.name].to_numpy()
        assert np.array_equal(one[same], two[same], equal_nan=True), feature.name
        assert (statuses[same, column] == was[same, column]).all(), feature.name
        if feature.window_ms:
            needs_old = times - feature.window_ms < horizon_ms
            assert needs_old[flagged[:, column]].all(), feature.name


def test_what_is_brought_again_stays_out(own, rows):
    again = own.tally("load", "--json", rows)
    outcome = json.loads(again.stdout)
    assert outcome["kept_out"] > 1_000
    assert (outcome["loaded"], outcome["rejected"]) == (0, 0)
    with rows.open(newline="") as file:
        old = [row for row in csv.DictReader(file) if row["trans_date_trans_time"] < "2024-03"]
    values = [json.dumps(row).encode() for row in old[:500]]
    applier = Applier(StreamSettings(data=own.data, stream_format="kaggle"))
    n = len(values)
    assert (
        applier.apply(Batch(["transactions"] * n, [0] * n, range(n), [0] * n, values)) == [None] * n
    )
    applier.close()
    with closing(own.offline()) as offline:
        rows_left = offline.sql.execute(
            "SELECT count(*) FROM transactions WHERE event_time < %s", (HORIZON,)
        ).fetchone()
    assert rows_left == (0,)
    assert own.tally("verify", "--all").returncode == 0


def test_a_setting_has_every_run_do_it(own):
    assert own.tally("batch", "prune", "--yes").returncode == 2
    done = own.tally("batch", "run", "--from", "2024-01-01", TALLY_HISTORY_DAYS="71")
    assert done.returncode == 0, done.stderr
    assert "dropped 3 months" in done.stderr
    with closing(own.offline()) as offline:
        assert offline.sql.execute("SELECT count(*) FROM transactions").fetchone() == (0,)
    assert own.tally("batch", "run", TALLY_HISTORY_DAYS="61").returncode == 1
