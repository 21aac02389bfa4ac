"""The stream for real: Kafka, Flink, its Python workers and both stores, and what is killed of them."""

from __future__ import annotations

import gzip
import json
import os
import pwd
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import psutil
import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # they are exported
    AdminClient,
    ConfigResource,
    NewTopic,
)
from tally.v1 import events_pb2

from stores.errors import StoreError
from stream_job.dead_letters import LETTER_BYTES_MAX
from stream_job.kafka import client_settings
from stream_job.publish import Publisher
from stream_job.settings import StreamSettings
from stream_job.topics import make_topics
from tests import slices
from tests.batch_job.test_load import (
    assert_online_is_what_offline_says,
    new_card,
    new_id,
)
from tests.conftest import Stack, of_living, run_tally, running, started
from tests.stream_job.chaos import VICTIMS, Chaos
from tests.stream_job.watching import (
    APPLIED_WITHIN_S,
    is_probed,
    metric,
    processes,
    status,
    wait_for,
    wait_until_applied,
)

STREAM = {"TALLY_STREAM_OFF": "false"}
ROWS = 3_000
KILLED_ROWS = slices.of(6_000, 2_400)
VICTIMS_CHOSEN = slices.of(len(VICTIMS), 2)
KILLED_RATE = 400.0
STUCK_WITHIN_S = 5.0
TABLES = ("transactions", "labels", "features")


@pytest.fixture(scope="module")
def streaming(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack with the stream, for all tests here."""
    with running(tmp_path_factory.mktemp("streaming"), **STREAM) as stack:
        yield stack


def publish(stack: Stack, path: Path, *options: str) -> dict:
    result = stack.tally("publish", "--json", path, *options)
    assert result.returncode == 0, result.stderr
    outcome: dict = json.loads(result.stdout)
    return outcome


def made(stack: Stack, path: Path, rows: int, seed: int) -> Path:
    result = stack.tally("synth", "-o", path, "--rows", str(rows), "--seed", str(seed))
    assert result.returncode == 0, result.stderr
    return path


def count(stack: Stack, table: str) -> int:
    offline = stack.offline()
    try:
        row = offline.sql.execute(f"SELECT count(*) FROM {table}").fetchone()
    finally:
        offline.close()
    assert row is not None
    return int(row[0])


def listed(stack: Stack) -> list[dict]:
    """All dead letters."""
    result = stack.tally("dead-letters", "list", "--json")
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_what_is_published_is_in_both_stores_once_however_often_it_comes(streaming, tmp_path):
    path = made(streaming, tmp_path / "a.csv", ROWS, seed=21)
    before = [count(streaming, t) for t in TABLES]
    outcome = publish(streaming, path)
    assert (outcome["events"], outcome["labels"], outcome["unreadable"]) == (ROWS, ROWS, 0)
    packed = tmp_path / "compressed"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert publish(streaming, packed)["events"] == ROWS
    wait_until_applied(streaming)
    assert [count(streaming, t) for t in TABLES] == [rows + ROWS for rows in before]
    assert_online_is_what_offline_says(streaming)


def test_the_store_is_complete_through_now_while_nothing_comes(streaming):
    wait_for("the job runs", lambda: is_probed(streaming))
    # Not even a probe comes to `labels`; one may be on its way to the other topic.
    before = status(streaming)["stream"]["complete_through_ms"]

    def advances() -> bool:
        after = status(streaming)["stream"]
        assert after["state"] in ("running", "behind")
        return bool(after["complete_through_ms"] >= before + 500)

    wait_for("it advances", advances)


def test_nothing_of_the_whole_stack_listens_beyond_this_machine(streaming):
    wait_for("the job runs, with its workers", lambda: is_probed(streaming))
    found = [
        (name, connection.laddr)
        for _, (name, connections) in of_living(
            family(streaming), lambda member: (member.name(), member.net_connections("inet"))
        )
        for connection in connections
        # Of UDP, all that is bound takes what comes.
        if connection.status == psutil.CONN_LISTEN or connection.type is socket.SOCK_DGRAM
    ]
    assert {"java", "postgres"} < {name for name, _ in found}
    beyond = [(name, at) for name, at in found if not is_loopback(at.ip)]
    assert beyond == []


def is_loopback(address: str) -> bool:
    parsed = ip_address(address)
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback


@pytest.mark.budget(
    60, "some dozen attacks on each of a dozen ports, most of which wait for an answer"
)
def test_another_user_of_the_machine_runs_nothing_reads_no_event_and_ends_no_job(streaming):
    if os.geteuid() != 0:
        pytest.skip("only root can try the doors as another user")
    wait_for("the job runs, with its workers", lambda: is_probed(streaming))
    ports, sockets = set(), set()
    for _, (inet, unix) in of_living(
        family(streaming), lambda m: (m.net_connections("inet"), m.net_connections("unix"))
    ):
        ports |= {c.laddr.port for c in inet if c.status == psutil.CONN_LISTEN}
        sockets |= {c.laddr for c in unix if c.laddr}
    assert len(ports) >= 8, "each of these has one: stores, Kafka, server, watch, Java"
    assert [path for path in sockets if "fnapi" in path], "Beam's servers"
    intruder = subprocess.run(
        [sys.executable, "-m", "tests.stream_job.intruder", str(pwd.getpwnam("nobody").pw_uid)],
        input=json.dumps({"ports": sorted(ports), "sockets": sorted(sockets)}),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert intruder.returncode == 0, intruder.stderr
    assert json.loads(intruder.stdout) == []


def test_the_stacks_secret_is_in_no_log_on_no_command_line_and_not_shown(streaming):
    secret = (streaming.data / "stack.secret").read_text().strip()
    logs = list((streaming.data / "logs").iterdir())
    assert "kafka.log" in {path.name for path in logs}
    assert [path for path in logs if secret in path.read_text(errors="replace")] == []
    lines = of_living(family(streaming), psutil.Process.cmdline)
    shown = [" ".join(line) for _, line in lines]
    config = streaming.tally("config", "--json").stdout
    assert json.loads(config)["kafka_user"] == "tally"
    shown += [config, streaming.tally("status", "--json").stdout, streaming.tally("up").stdout]
    assert [line for line in shown if secret in line] == []


def family(stack: Stack) -> list[psutil.Process]:
    """All processes of a stack."""
    supervisor = psutil.Process(status(stack)["supervisor_pid"])
    return [supervisor, *supervisor.children(recursive=True)]


def test_one_bad_event_is_kept_and_the_rest_goes_on(streaming):
    settings = StreamSettings(data=streaming.data)
    publisher = Publisher(settings, streaming.card_key)
    card = "4000777712341234"
    broken = b"\xffno protobuf of " + card.encode()
    before = len(listed(streaming))
    publisher.send("transactions", b"k", broken)
    publisher.send("transactions", b"k", None)
    wait_until_applied(streaming)
    wait_for("dead letters", lambda: len(listed(streaming)) == before + 2)
    reasons = {letter["reason"]: letter["number"] for letter in listed(streaming)[before:]}
    assert set(reasons) == {"NOT_PROTOBUF", "EMPTY"}
    shown = streaming.tally("dead-letters", "show", str(reasons["NOT_PROTOBUF"])).stdout
    assert "************1234" in shown
    assert card not in shown
    # Published again it is refused again, and nothing stops.
    assert streaming.tally("dead-letters", "replay", str(reasons["NOT_PROTOBUF"])).returncode == 0
    wait_for("a third letter", lambda: len(listed(streaming)) == before + 3)


def transaction(**changed: object) -> bytes:
    """A published transaction, with some fields changed."""
    fields: dict = {
        "transaction_id": new_id(),
        "card": new_card(),
        "event_time_ms": int(time.time() * 1000) - 60_000,
        "amount_minor": 1234,
        "merchant": "Kirlin",
        "category": "travel",
    }
    return events_pb2.Transaction(**fields | changed).SerializeToString()


def test_poison_ends_where_it_should_and_the_rest_is_unaffected(streaming):
    first, name = transaction(), new_id()
    label = events_pb2.Label(transaction_id=name, is_fraud=True)
    label.label_time.GetCurrentTime()
    no_time = events_pb2.Label(transaction_id=name, is_fraud=True)
    sent: list[tuple[str, bytes | None, str | None]] = [
        ("transactions", b"\xff" * 9, "NOT_PROTOBUF"),
        ("transactions", first[:-3], "NOT_PROTOBUF"),
        ("transactions", None, "EMPTY"),
        ("transactions", transaction(merchant=""), "MISSING_FIELD"),
        ("transactions", transaction(merchant_latitude=float("nan")), "BAD_POSITION"),
        ("transactions", transaction(amount_minor=-500), None),
        ("transactions", transaction(amount_minor=10**15), "AMOUNT_OUT_OF_RANGE"),
        ("transactions", transaction(card="4" * 19), None),
        ("transactions", transaction(card="4" * 20), "BAD_CARD"),
        ("transactions", transaction(category="no such category"), None),
        ("transactions", transaction(event_time_ms=0), None),
        ("transactions", transaction(event_time_ms=4_102_444_800_000), "TIME_OUT_OF_RANGE"),
        ("transactions", b"x" * 1_000_000, "TOO_LARGE"),
        ("labels", label.SerializeToString(), None),  # before its transaction
        ("transactions", transaction(transaction_id=name), None),
        ("labels", no_time.SerializeToString(), "BAD_TIME"),
        ("transactions", transaction(transaction_id=name), "CONFLICT"),  # of another card
    ]
    before, known = len(listed(streaming)), count(streaming, "transactions")
    publisher = Publisher(StreamSettings(data=streaming.data), streaming.card_key)
    for topic, value, _ in sent:
        publisher.send(topic, b"one partition: in this order", value)
    wait_until_applied(streaming)
    wanted = [reason for _, _, reason in sent if reason]
    wait_for("letters", lambda: len(listed(streaming)) == before + len(wanted))
    letters = listed(streaming)[before:]
    assert sorted(letter["reason"] for letter in letters) == sorted(wanted)
    by_reason = {letter["reason"]: letter for letter in letters}
    assert by_reason["BAD_TIME"]["topic"] == "labels"
    assert all(letter["offset"] >= 0 and letter["detail"] for letter in letters)
    good = sum(topic == "transactions" and reason is None for topic, _, reason in sent)
    assert count(streaming, "transactions") == known + good
    offline = streaming.offline()
    query = "SELECT is_fraud FROM labels WHERE transaction_id = %s"
    assert offline.sql.execute(query, (name,)).fetchall() == [(True,)]
    offline.close()
    # All that was refused is kept to the last byte, also what is large.
    large = by_reason["TOO_LARGE"]["number"]
    assert streaming.tally("dead-letters", "replay", str(large)).returncode == 0
    wait_for("it again", lambda: listed(streaming)[-1]["reason"] == "TOO_LARGE")
    assert "1,000,000 bytes" in listed(streaming)[-1]["detail"]


def test_what_a_producer_takes_back_is_not_applied_and_its_marks_are_not_waited_for(streaming):
    login = client_settings(StreamSettings(data=streaming.data))
    producer = Producer(login | {"transactional.id": "t"})
    producer.init_transactions()
    kept, taken_back = new_id(), new_id()
    for name, end in (
        (kept, producer.commit_transaction),
        (taken_back, producer.abort_transaction),
    ):
        producer.begin_transaction()
        for partition in range(4):
            value = transaction(transaction_id=f"{name} {partition}")
            producer.produce("transactions", value, partition=partition)
        producer.flush()
        end()
    wait_until_applied(streaming)
    offline = streaming.offline()
    query = "SELECT transaction_id FROM transactions WHERE transaction_id LIKE ANY(%s) ORDER BY 1"
    rows = offline.sql.execute(query, ([f"{kept} %", f"{taken_back} %"],)).fetchall()
    offline.close()
    assert [name for (name,) in rows] == [f"{kept} {partition}" for partition in range(4)]


def test_a_file_that_was_loaded_can_be_published_as_if_it_happened_now(streaming, tmp_path):
    path = made(streaming, tmp_path / "e.csv", 500, seed=25)
    loaded = streaming.tally("load", "--json", path)
    assert json.loads(loaded.stdout)["loaded"] == 500
    letters, before = len(listed(streaming)), count(streaming, "transactions")
    outcome = publish(streaming, path, "--shift-to-now")
    assert outcome["events"] == 500
    wait_until_applied(streaming)
    assert count(streaming, "transactions") == before + 500
    assert len(listed(streaming)) == letters
    offline = streaming.offline()
    (newest,) = offline.sql.execute("SELECT max(event_time) FROM transactions").fetchone() or (
        None,
    )
    offline.close()
    assert newest is not None
    assert abs(newest.timestamp() - time.time()) < APPLIED_WITHIN_S


def test_a_message_that_is_no_letter_and_a_failed_message_end_nothing(streaming):
    settings = StreamSettings(data=streaming.data)
    publisher = Publisher(settings, streaming.card_key)
    letters = len(listed(streaming))
    publisher.send("dead-letter", b"k", b"garbage")
    publisher.send("dead-letter", b"k", None)
    publisher.send("transactions", b"k", b"\xff")
    wait_for("a letter behind them", lambda: len(listed(streaming)) > letters)
    shown = streaming.tally("dead-letters", "list")
    assert "no dead letter of ours" in shown.stderr
    with pytest.raises(StoreError):
        publisher.send("transactions", b"k", b"x" * (5 << 20))
    publisher.send("transactions", b"k", transaction())  # it failed once, and not for ever
    other = streaming.tally(
        "dead-letters", "show", str(listed(streaming)[-1]["number"]), TALLY_CARD_KEY="k" * 40
    )
    assert other.returncode == 1
    assert "another card key" in other.stderr


def test_topics_that_are_there_are_adapted_or_refused(streaming):
    def settings(**changed: Any) -> StreamSettings:
        return StreamSettings(data=streaming.data, **changed)

    client = AdminClient(client_settings(settings()))
    for made_before in client.create_topics(
        [NewTopic(name, 1, 1) for name in ("small-letters", "of-producers")]
    ).values():
        made_before.result(10)
    make_topics(settings(dead_letter_topic="small-letters"))
    resource = ConfigResource(ConfigResource.Type.TOPIC, "small-letters")
    (options,) = client.describe_configs([resource]).values()
    assert int(options.result(10)["max.message.bytes"].value) == LETTER_BYTES_MAX
    with pytest.raises(StoreError, match="LogAppendTime"):
        make_topics(settings(transactions_topic="of-producers"))


def test_preparing_what_is_ready_changes_nothing(streaming):
    before = status(streaming)["online_store"]
    result = streaming.tally("prepare")
    assert result.returncode == 0, result.stderr
    assert "the topics are ready" in result.stderr
    assert status(streaming)["online_store"] == before == "serving"


def test_freshness_is_probed_and_the_probe_leaves_no_trace_in_postgres(streaming):
    wait_for("a probe", lambda: metric(streaming, "tally_stream_freshness_seconds_count") > 2)
    assert 0 < status(streaming)["stream"]["fresh_after_ms"] < APPLIED_WITHIN_S * 1000
    offline = streaming.offline()
    rows = offline.sql.execute(
        "SELECT 1 FROM transactions WHERE card_id = %s", (streaming.card_key.probe_id,)
    ).fetchall()
    offline.close()
    assert rows == []


def test_a_stuck_job_is_told_within_five_seconds_and_the_store_claims_no_more(streaming):
    wait_until_applied(streaming)
    job = status(streaming)["processes"]["stream"]
    os.killpg(job, signal.SIGSTOP)
    try:
        publisher = Publisher(StreamSettings(data=streaming.data), streaming.card_key)
        publisher.send("transactions", b"k", transaction())
        sent_s = time.monotonic()
        wait_for("stuck", lambda: metric(streaming, "tally_stream_stuck") == 1)
        assert time.monotonic() - sent_s < STUCK_WITHIN_S
        assert status(streaming)["stream"]["state"] == "stuck"
        before = status(streaming)
        time.sleep(1)
        after = status(streaming)
        assert after["stream"]["complete_through_ms"] == before["stream"]["complete_through_ms"]
        assert after["complete_through"] == before["complete_through"]
    finally:
        os.killpg(job, signal.SIGCONT)
    wait_until_applied(streaming)
    assert metric(streaming, "tally_stream_stuck") == 0


@pytest.mark.budget(60, "a job is taken to hang after half a minute, and another starts")
def test_a_job_that_hangs_is_started_again(streaming):
    wait_until_applied(streaming)
    hung = status(streaming)["processes"]["stream"]
    os.killpg(hung, signal.SIGSTOP)
    wait_for("another job", lambda: status(streaming)["processes"].get("stream", hung) != hung)
    wait_until_applied(streaming)
    # Flink's own files are in the stack's folder, and those that the other left are gone.
    assert len(list(streaming.data.glob("flink/temporary-*/minicluster_*"))) == 1


@pytest.mark.budget(20, "Postgres is killed and comes back beneath a load")
def test_a_store_that_is_away_is_waited_for_in_the_worker_itself(streaming, tmp_path):
    """A batch is tried again where it is; Flink, which would begin again at a checkpoint, is not told."""
    wait_until_applied(streaming)
    (log,) = (streaming.data / "logs").glob("flink-*-python-*.log")  # of a user, on a machine
    before = log.stat().st_size
    processes(streaming)["postgres"].send_signal(signal.SIGKILL)
    publish(streaming, made(streaming, tmp_path / "d.csv", ROWS, seed=24))
    wait_until_applied(streaming)
    with log.open() as file:
        file.seek(before)
        since = file.read()
    assert "a store does not take a batch" in since
    assert "switched from RUNNING to FAILED" not in since


@pytest.mark.sliced
@pytest.mark.budget(slices.of(70, 45), "parts of the stream are killed, and come back, one by one")
def test_nothing_is_lost_or_doubled_whatever_is_killed(streaming, tmp_path):
    draw = slices.drawn("stream")
    victims = draw.sample(VICTIMS, VICTIMS_CHOSEN)
    seed = draw.getrandbits(31)
    with Chaos(tmp_path, streaming) as chaos:
        kills = chaos.random_kills(seed, victims)
        outcome = chaos.round(seed, rows=KILLED_ROWS, rate=KILLED_RATE, kills=kills)
    assert sorted(outcome.killed) == sorted(victims)
    assert outcome.differences == []


@pytest.mark.budget(30, "Kafka and Flink start a second time")
def test_it_goes_on_from_its_checkpoint_with_another_parallelism(streaming, tmp_path):
    already = count(streaming, "transactions")
    run_tally("down", data=streaming.data)
    more = {**STREAM, "TALLY_STREAM_PARALLELISM": "3"}
    again = started(streaming.data, **more)
    path = made(again, tmp_path / "c.csv", ROWS, seed=23)
    publish(again, path)
    wait_until_applied(again)
    assert count(again, "transactions") == already + ROWS
    assert_online_is_what_offline_says(again)
