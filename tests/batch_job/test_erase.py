"""Erasing a card: everything of it is gone, its past stays out, and a receipt shows it."""

from __future__ import annotations

import csv
import json
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import tally

from features import CardKey
from stores.erasure import Eraser, Receipt
from stores.errors import StoreError
from stores.redis_store import ledger_key, profile_key
from stream_job.applier import Applier, Batch
from stream_job.settings import StreamSettings
from tests.conftest import Stack
from tests.contents import contents

TABLES = ("transactions", "profiles")


@pytest.fixture
def rows(stack: Stack, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A file of payments of ten cards, loaded; other tests' files have other cards."""
    path = tmp_path / "rows.csv"
    seed = str(5_000 + sum(request.node.name.encode()))
    size = ("--rows", "1000", "--cards", "10", "--days", "60", "--seed", seed)
    assert stack.tally("synth", "-o", path, *size).returncode == 0
    assert stack.tally("load", path).returncode == 0
    return path


def card_of(rows: Path) -> str:
    with rows.open(newline="") as file:
        return str(next(csv.DictReader(file))["cc_num"])


def count_of(rows: Path, card: str) -> int:
    with rows.open(newline="") as file:
        return sum(row["cc_num"] == card for row in csv.DictReader(file))


def erase(stack: Stack, card: str, folder: Path) -> tuple[dict, Path]:
    result = stack.tally("erase", card, "--yes")
    assert result.returncode == 0, result.stderr
    assert card not in result.stdout + result.stderr
    assert stack.card_key.card_id(card).hex() not in result.stdout
    path = folder / "receipt.json"
    path.write_text(result.stdout)
    return json.loads(result.stdout), path


def left(stack: Stack, card: str) -> dict[str, int]:
    """What there is of a card."""
    card_id = stack.card_key.card_id(card)
    with closing(stack.offline()) as offline, closing(stack.online()) as online:
        found = {
            table: len(
                offline.sql.execute(
                    f"SELECT FROM {table} WHERE card_id = %s".encode(), (card_id,)
                ).fetchall()
            )
            for table in TABLES
        }
        held = online.read([ledger_key(card_id), profile_key(card_id)])
    return found | {"redis": sum(value is not None for value in held)}


NOTHING = {"transactions": 0, "profiles": 0, "redis": 0}


def check(stack: Stack, receipt: Path) -> tuple[int, dict]:
    result = stack.tally("erase", "--check", receipt, "--json")
    return result.returncode, json.loads(result.stdout or "{}")


def test_everything_of_a_card_is_gone_and_nothing_of_others(stack, client, rows, tmp_path):
    card = card_of(rows)
    assert stack.tally("batch", "run", "--from", "2024-01-01").returncode == 0
    everyone = contents(stack)
    others = set(everyone.ledgers) - {stack.card_key.card_id(card)}
    before = contents(stack, others)
    export = client.export("transactions", batch_rows=10)
    _, cursor = next(iter(export))
    with rows.open(newline="") as file:
        ids = [row["trans_num"] for row in csv.DictReader(file) if row["cc_num"] == card]
    receipt, path = erase(stack, card, tmp_path)
    n = count_of(rows, card)
    removed = receipt["removed"]
    assert removed["transactions"] == removed["transaction_ids"] == removed["features"] == n
    assert (removed["labels"], removed["redis"]) == (n, 2)
    assert left(stack, card) == NOTHING
    with closing(stack.offline()) as offline:
        for table in ("transaction_ids", "labels", "features"):
            query = f"SELECT count(*) FROM {table} WHERE transaction_id = ANY(%s)"
            assert offline.sql.execute(query.encode(), (ids,)).fetchone() == (0,)
    assert not client.online([tally.Row(card=card, at=datetime(2024, 3, 1, tzinfo=UTC))]).known[0]
    assert contents(stack, others).differences(before) == []
    with pytest.raises(tally.CursorExpiredError):
        client.resume_export(cursor)
    assert check(stack, path) == (0, {"looked_at": check(stack, path)[1]["looked_at"], "wrong": []})


def test_its_past_stays_out_and_its_future_does_not(stack, rows, tmp_path):
    card = card_of(rows)
    _, path = erase(stack, card, tmp_path)
    again = stack.tally("load", "--json", rows)
    outcome = json.loads(again.stdout)
    n = count_of(rows, card)
    assert outcome["kept_out"] == n
    assert outcome["duplicates"] == 1_000 - n
    assert outcome["rejected"] == 0
    with rows.open(newline="") as file:
        mine = [row for row in csv.DictReader(file) if row["cc_num"] == card]
    values = [json.dumps(row).encode() for row in mine]
    labels = [
        json.dumps(
            {
                "transaction_id": row["trans_num"],
                "is_fraud": 0,
                "label_time": "2024-03-01T00:00:00Z",
            }
        ).encode()
        for row in mine
    ]
    applier = Applier(StreamSettings(data=stack.data, stream_format="kaggle"))
    topics = ["transactions"] * n + ["labels"] * n
    letters = applier.apply(Batch(topics, [7] * 2 * n, range(2 * n), [0] * 2 * n, values + labels))
    assert letters == [None] * 2 * n  # a dead letter would keep what was erased
    assert left(stack, card) == NOTHING
    assert check(stack, path)[0] == 0
    now = datetime.now(UTC) + timedelta(seconds=1)
    later = mine[0] | {"trans_num": "a new beginning", "trans_date_trans_time": f"{now:%F %T}"}
    later |= {"unix_time": str(int(now.timestamp()))}
    letters = applier.apply(
        Batch(["transactions"], [7], [2 * n], [0], [json.dumps(later).encode()])
    )
    applier.close()
    assert letters == [None]
    assert left(stack, card)["transactions"] == 1
    assert check(stack, path)[0] == 0
    with closing(stack.offline()) as offline:
        offline.sql.execute("DELETE FROM stream_progress WHERE partition = 7")


def test_what_is_left_or_comes_back_is_found(stack, rows, tmp_path):
    card = card_of(rows)
    card_id = stack.card_key.card_id(card)
    with closing(stack.online()) as online, closing(stack.offline()) as offline:
        (ledger,) = online.read([ledger_key(card_id)])
        ids = offline.sql.execute(
            "SELECT transaction_id, event_time FROM transactions WHERE card_id = %s", (card_id,)
        ).fetchall()
        _, path = erase(stack, card, tmp_path)
        online.put_whole([(ledger_key(card_id), ledger)])
        status, found = check(stack, path)
        assert (status, found["wrong"]) == (1, ["redis has transactions of the card"])
        online.redis.delete(ledger_key(card_id))
        offline.sql.execute("INSERT INTO transaction_ids VALUES (%s, %s)", ids[0])
        status, found = check(stack, path)
        assert (status, found["wrong"]) == (1, ["transaction_ids has 1 erased transactions"])
        offline.sql.execute("DELETE FROM transaction_ids WHERE transaction_id = %s", ids[0][:1])
        assert check(stack, path)[0] == 0
        receipt = json.loads(path.read_text())
        offline.sql.execute(
            "DELETE FROM erased_transactions WHERE receipt_id = %s", (receipt["receipt_id"],)
        )
        offline.sql.execute("DELETE FROM erasures WHERE receipt_id = %s", (receipt["receipt_id"],))
        status, found = check(stack, path)
        assert status == 1
        assert "tombstone" in found["wrong"][0]


def test_a_receipt_that_was_changed_is_refused(stack, rows, tmp_path):
    _, path = erase(stack, card_of(rows), tmp_path)
    receipt = json.loads(path.read_text())
    receipt["removed"]["transactions"] += 1
    path.write_text(json.dumps(receipt))
    refused = stack.tally("erase", "--check", path)
    assert refused.returncode == 1
    assert "was changed" in refused.stderr
    path.write_text("[]")
    assert "no receipt" in stack.tally("erase", "--check", path).stderr
    with pytest.raises(StoreError, match="another card key"):
        Receipt.read(json.dumps(receipt), CardKey(b"another secret, long enough for all"))


def test_a_card_that_nobody_knows_is_kept_out_all_the_same(stack, tmp_path):
    receipt, path = erase(stack, "4999999900001111", tmp_path)
    assert set(receipt["removed"].values()) <= {0, receipt["removed"]["exports"]}
    assert check(stack, path)[0] == 0
    assert stack.tally("erase", "4x", "--yes").returncode == 2
    assert stack.tally("erase").returncode == 2


def test_an_erasure_that_stopped_between_the_stores_is_done_again(stack, rows):
    """Postgres has erased, Redis has not: doing it again, or a sync, removes the rest."""
    card_id = stack.card_key.card_id(card_of(rows))
    with closing(stack.online()) as online, closing(stack.offline()) as offline:
        eraser = Eraser(offline, online, stack.card_key)
        eraser._erase(card_id)
        assert online.read([ledger_key(card_id)])[0] is not None
        receipt = eraser.erase(card_id)
        assert receipt.removed["redis"] == 2
        assert receipt.removed["transactions"] == 0
        assert replace(receipt, seal="") != receipt
        *_, (_, wrong) = eraser.check(receipt)
        assert wrong == []
