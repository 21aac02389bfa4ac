"""`tally verify` finds what differs, says where, and is not misled by what is on its way."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

import pytest
import tally

from batch_job.verify import Verifier
from features import CATALOG
from features.ledger import HEADER, RECORD
from stores.errors import StoreError
from stores.redis_store import ledger_key, profile_key
from stream_job.applier import Applier
from stream_job.settings import StreamSettings
from tests.batch_job.kaggle_rows import row, write
from tests.batch_job.test_load import load, new_card, new_id
from tests.conftest import Stack, running
from tests.stream_job.test_applier import batch, payments, published

PAYMENTS = 12


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack of its own: all that is in it is verified again and again."""
    with running(tmp_path_factory.mktemp("verified") / "data") as stack:
        yield stack


@pytest.fixture
def damaged(stack, tmp_path):
    """A card's ledger key, its true ledger, and a way to put another; the true one is put back."""
    card = new_card()
    rows = [
        row(cc_num=card, trans_num=new_id(), trans_date_trans_time=f"2024-03-01 10:{i:02}:00")
        for i in range(PAYMENTS)
    ]
    load(stack, write(tmp_path / "a.csv", rows))
    online = stack.online()
    key = ledger_key(stack.card_key.card_id(card))
    (ledger,) = online.read([key])
    assert ledger is not None
    yield key, ledger, online.redis
    online.redis.set(key, ledger)
    online.close()


def verified(stack: Stack) -> tuple[int, dict]:
    result = stack.tally("verify", "--all", "--json")
    assert result.stdout, result.stderr
    return result.returncode, json.loads(result.stdout)


def test_all_is_well(stack, damaged):
    status, outcome = verified(stack)
    assert (status, outcome["mismatches"], outcome["examples"]) == (0, {}, [])
    assert outcome["values"] == outcome["points"] * len(CATALOG)


def test_a_payment_that_redis_lacks_is_found_in_the_features_that_it_changes(
    stack, damaged, monkeypatch
):
    # Instants two minutes behind payments: each sees the first payment, and one more.
    monkeypatch.setattr("batch_job.verify._EDGES_MS", (120_000,))
    key, ledger, redis = damaged
    redis.set(key, ledger[: HEADER.size] + ledger[HEADER.size + RECORD.itemsize :])
    status, outcome = verified(stack)
    assert status == 1
    assert outcome["mismatches"]["ledger"] == 1
    assert "txn_count_last_30_days" in outcome["mismatches"]
    assert "amt" not in outcome["mismatches"]
    example = next(e for e in outcome["examples"] if e["what"] == "txn_count_last_30_days")
    assert float(example["served"]) == float(example["expected"]) - 1
    assert key == ledger_key(bytes.fromhex(example["card_id"]))


def test_a_ledger_and_a_profile_that_are_gone_are_found(stack, damaged):
    key, _, redis = damaged
    profile = profile_key(key[2:-2])
    kept = redis.get(profile)
    redis.delete(key, profile)
    try:
        status, outcome = verified(stack)
    finally:
        redis.set(profile, kept)
    assert status == 1
    assert (outcome["mismatches"]["ledger"], outcome["mismatches"]["profile"]) == (1, 1)
    assert "distance_to_merchant" in outcome["mismatches"]


def test_a_card_whose_payment_is_between_the_stores_is_looked_at_again(stack, damaged):
    key, ledger, redis = damaged
    redis.set(key, ledger[: -RECORD.itemsize])  # as while the stream has yet to append it
    offline, online = stack.offline(), stack.online()
    try:
        with tally.Client(stack.address) as client:
            outcome = Verifier(
                offline, online, client, sleep=lambda _: redis.set(key, ledger)
            ).verify(None, stack.card_key.probe_id)
    finally:
        offline.close()
        online.close()
    assert outcome.mismatches == {}
    assert outcome.looked_at_again == 1


def test_a_sample_is_of_so_many_cards_at_most_and_the_same_by_its_seed(stack, damaged):
    offline, online = stack.offline(), stack.online()
    try:
        with tally.Client(stack.address) as client:
            chosen = [Verifier(offline, online, client, seed=s)._choose(5) for s in (1, 1)]
            outcome = Verifier(offline, online, client, seed=1).verify(5, stack.card_key.probe_id)
            everyone = list(offline.all_cards())
            at_random = {
                c for s in range(30) for c in offline.cards_following([bytes([s * 8 + 7]) * 16])
            }
            none_behind = offline.cards_following([b"\xff" * 16])
    finally:
        offline.close()
        online.close()
    assert chosen[0] == chosen[1]
    assert 0 < outcome.cards == len(chosen[0]) <= 5
    assert outcome.seed == 1
    assert at_random <= set(everyone)
    assert none_behind == everyone[:1]  # behind the last comes the first


def test_a_ledger_of_a_card_that_postgres_does_not_know_is_found(stack, damaged):
    _, ledger, redis = damaged
    orphan, probe = b"\x01" * 16, stack.card_key.probe_id
    redis.set(ledger_key(orphan), ledger)
    redis.set(ledger_key(probe), ledger)
    try:
        status, outcome = verified(stack)
    finally:
        redis.delete(ledger_key(orphan), ledger_key(probe))
    assert status == 1
    assert outcome["mismatches"] == {"ledger": 1}
    assert outcome["examples"][0]["card_id"] == orphan.hex()


def test_a_ledger_that_is_none_is_found_and_the_rest_goes_on(stack, damaged, tmp_path):
    key, _, redis = damaged
    load(stack, write(tmp_path / "b.csv", [row(cc_num=new_card(), trans_num=new_id())]))
    redis.set(key, b"junk")
    status, outcome = verified(stack)
    assert status == 1
    assert outcome["mismatches"]["ledger"] == 1
    assert outcome["cards"] > 1


def test_a_card_without_a_profile(stack):
    applier = Applier(StreamSettings(data=stack.data, stream_format="tally"))
    event = payments(1, random.Random(1))[0]
    applier.apply(batch([published(new_card(), event)]))
    applier.close()
    assert verified(stack)[0] == 0


def test_what_a_store_says_of_itself_beside_an_unfinished_load_is_no_difference(stack):
    # A card without a profile lacks facts, and may get them from the load.
    applier = Applier(StreamSettings(data=stack.data, stream_format="tally"))
    applier.apply(batch([published(new_card(), payments(1, random.Random(2))[0])]))
    applier.close()
    offline, online = stack.offline(), stack.online()
    name = new_id()
    try:
        offline.begin_load(name, "unfinished.csv")
        online.begin_load(name, "unfinished.csv")
        assert verified(stack)[0] == 0
        with tally.Client(stack.address) as client:
            assert client.online([tally.Row(card=new_card())]).complete_through_ms[0] == -1
    finally:
        offline.abandon_loads("unfinished.csv")
        online.end_load(name, -1)
        offline.close()
        online.close()


def test_another_card_key_is_refused(stack, damaged, tmp_path):
    other = tmp_path / "other.key"
    other.write_text("another secret, long enough for a key")
    result = stack.tally("verify", TALLY_CARD_KEY_FILE=str(other))
    assert result.returncode == 1
    assert "card key" in result.stderr


def test_a_store_that_does_not_claim_to_be_right_is_not_verified(stack, damaged):
    offline, online = stack.offline(), stack.online()
    value = online.redis.get("{tally}now")
    online.redis.delete("{tally}now")
    try:
        with (
            tally.Client(stack.address) as client,
            pytest.raises(StoreError, match="does not claim"),
        ):
            Verifier(offline, online, client).verify(5, stack.card_key.probe_id)
    finally:
        online.redis.set("{tally}now", value)
        offline.close()
        online.close()
