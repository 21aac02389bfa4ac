"""The embedded stack: up, found again, down, and nothing left behind, however it ends."""

from __future__ import annotations

import json
import os
import secrets
import signal
import stat
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import tally
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st

from deploy.processes import CLIENT_PORTS, SERVER_PORTS_FROM, free_port
from server.metrics import FLUSH_INTERVAL_S, LATENCY_BUCKETS_S, Metrics
from tests.batch_job.kaggle_rows import row, write
from tests.batch_job.test_load import load, new_card, new_id
from tests.commands import TALLY
from tests.conftest import Stack, running, started, stopped_at_the_end, with_database


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The data folder of `own_stack`."""
    folder = tmp_path_factory.mktemp("own") / "data"
    with_database(folder)
    with stopped_at_the_end(folder):
        yield folder


@pytest.fixture
def own_stack(data: Path) -> Stack:
    """A stack that a test may break: however the one before it left it, it is up and serves."""
    stack = started(data)
    assert eventually(lambda: online_state(stack) == "serving")
    return stack


@pytest.fixture(scope="module")
def with_token(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack that asks for a token."""
    with running(tmp_path_factory.mktemp("token") / "data", TALLY_TOKEN="the right one") as stack:
        yield stack


def eventually(holds: Callable[[], bool], within_s: float = 20.0) -> bool:
    deadline = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def description(stack: Stack) -> dict:
    content: dict = json.loads((stack.data / "stack.json").read_text())
    return content


def family(stack: Stack) -> list[psutil.Process]:
    supervisor = psutil.Process(description(stack)["supervisor_pid"])
    return [supervisor, *supervisor.children(recursive=True)]


def online_state(stack: Stack) -> str:
    status = json.loads(stack.tally("status", "--json").stdout)
    return str(status.get("online_store", status.get("server")))


def test_a_second_up_says_that_it_is_up(stack):
    again = stack.tally("up", "--json")
    assert again.returncode == 0
    assert "already up" in again.stderr
    assert json.loads(again.stdout)["grpc"] == stack.address


def test_secrets_are_their_owners_only(stack):
    for name in ("card.key", "stack.secret", "stack.json", "valkey/valkey.conf"):
        mode = stat.S_IMODE((stack.data / name).stat().st_mode)
        assert mode == 0o600, name
    shown = stack.tally("status", "--json").stdout + stack.tally("config").stdout
    assert (stack.data / "stack.secret").read_text() not in shown
    assert (stack.data / "card.key").read_text().strip() not in shown


def test_down_ends_every_process_and_keeps_the_data(own_stack, tmp_path):
    card = new_card()
    load(own_stack, write(tmp_path / "a.csv", [row(cc_num=card, trans_num=new_id())]))
    processes = family(own_stack)
    assert len(processes) > 4
    assert own_stack.tally("down").returncode == 0
    assert not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert own_stack.tally("status").returncode == 3
    again = started(own_stack.data)
    with tally.Client(again.address) as client:
        answer = client.online([tally.Row(card=card)])
    assert answer.known[0]
    assert answer.complete_through_ms[0] > 0


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_child_survives_the_supervisor(own_stack, how):
    supervisor, *children = family(own_stack)
    supervisor.send_signal(how)
    assert eventually(lambda: not any(p.is_running() for p in children))
    assert own_stack.tally("status").returncode == 3


def test_a_killed_process_is_started_again(own_stack):
    for name in ("server", "postgres"):
        before = description(own_stack)["processes"]
        os.kill(before[name], signal.SIGKILL)
        assert eventually(lambda: description(own_stack)["processes"] != before)  # noqa: B023
        assert eventually(lambda: online_state(own_stack) == "serving")


def test_an_online_store_that_lost_its_data_says_so_and_is_rebuilt_to_the_same_bytes(
    own_stack, tmp_path
):
    rows = [
        row(cc_num=card, trans_num=new_id(), trans_date_trans_time=f"2024-0{month}-01 10:00:00")
        for card in [new_card() for _ in range(20)]
        for month in (1, 2, 3)
    ]
    load(own_stack, write(tmp_path / "a.csv", rows))
    with own_stack.online().redis as redis:
        before = {key: redis.get(key) for key in redis.keys("{c*") if isinstance(key, bytes)}
        redis.flushall()
        with tally.Client(own_stack.address) as client:
            answer = client.online([tally.Row(card=rows[0]["cc_num"])], ["txn_count_last_30_days"])
            assert answer.complete_through_ms[0] == -1
            assert answer.exceptions(0) == {"txn_count_last_30_days": "STORE_INCOMPLETE"}
        # Loading anything into the wiped store would make it look complete: it is rebuilt first.
        extra = write(tmp_path / "b.csv", [row(cc_num=new_card(), trans_num=new_id())])
        load(own_stack, extra)
        after = {key: redis.get(key) for key in before}
    assert len(before) >= 40
    assert after == before
    assert online_state(own_stack) == "serving"


def test_a_killed_online_store_comes_back_whole(own_stack, tmp_path):
    card = new_card()
    load(own_stack, write(tmp_path / "a.csv", [row(cc_num=card, trans_num=new_id())]))
    os.kill(description(own_stack)["processes"]["valkey"], signal.SIGKILL)

    def whole() -> bool:
        try:
            with tally.Client(own_stack.address) as client:
                answer = client.online([tally.Row(card=card)])
        except tally.UnavailableError:
            return False
        return bool(answer.known[0]) and answer.complete_through_ms[0] > 0

    assert eventually(whole)


def test_without_redis_calls_fail_at_once_and_never_with_zeros(own_stack):
    valkey = psutil.Process(description(own_stack)["processes"]["valkey"])
    supervisor = psutil.Process(description(own_stack)["supervisor_pid"])
    supervisor.suspend()  # so that it is not started again
    try:
        valkey.kill()
        config = tally.ClientConfig(retry=tally.RetryConfig(max_attempts=1))
        with tally.Client(own_stack.address, config) as client:
            begin = time.monotonic()
            with pytest.raises(tally.UnavailableError) as caught:
                client.online([tally.Row(card="4111111111111111")])
            assert time.monotonic() - begin < 1.5
            assert caught.value.reason == "ONLINE_STORE_UNAVAILABLE"
            assert caught.value.retry_after_ms
            assert client.status().offline_store.state == 1
    finally:
        supervisor.resume()


def test_another_card_key_is_refused_by_every_process(own_stack, tmp_path):
    load(own_stack, write(tmp_path / "a.csv", [row(cc_num=new_card(), trans_num=new_id())]))
    own_stack.tally("down")
    other = {"TALLY_CARD_KEY": secrets.token_hex(16)}
    up = own_stack.tally("up", **other)
    assert up.returncode == 1
    assert "was written under the card key" in up.stderr
    assert "Traceback" not in up.stderr
    again = started(own_stack.data)
    refused = again.tally("load", tmp_path / "a.csv", **other)
    assert refused.returncode == 1
    assert "was written under the card key" in refused.stderr


def test_a_token_is_asked_for_where_one_is_set(with_token):
    for token, allowed in (("the right one", True), ("a wrong one", False), (None, False)):
        with tally.Client(with_token.address, tally.ClientConfig(token=token)) as client:
            if allowed:
                assert client.catalog().features
            else:
                with pytest.raises(tally.UnauthenticatedError):
                    client.catalog()
    with grpc.insecure_channel(with_token.address) as channel:
        health: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert health(b"")  # a probe has no token
        export: Any = channel.unary_stream("/tally.v1.FeatureService/Export")
        with pytest.raises(grpc.RpcError) as refused:
            list(export(b""))
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        with pytest.raises(grpc.RpcError) as empty:
            list(export(b"", metadata=(("authorization", "Bearer the right one"),)))
        assert empty.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # it was looked at


def test_whoever_waits_for_a_worker_that_is_killed_is_told(own_stack, tmp_path):
    path = tmp_path / "rows.csv"
    assert own_stack.tally("synth", "-o", path, "--rows", "100000").returncode == 0
    assert own_stack.tally("load", path).returncode == 0
    with tally.Client(own_stack.address) as client:
        answers = iter(client.historical_batches(tally.TimeRange()))
        next(answers)
        os.kill(client.status().worker_pid, signal.SIGKILL)
        with pytest.raises(tally.UnavailableError, match="the server went away: ask again"):
            list(answers)
    assert eventually(lambda: online_state(own_stack) == "serving")


def test_up_works_after_the_supervisor_was_killed(own_stack):
    processes = family(own_stack)
    os.kill(processes[0].pid, signal.SIGKILL)
    assert eventually(lambda: not any(process.is_running() for process in processes))
    assert (own_stack.data / "stack.json").exists()
    again = own_stack.tally("up", "--json")
    assert again.returncode == 0, again.stderr
    assert online_state(own_stack) == "serving"


def test_a_file_that_is_no_data_leaves_the_store_complete(own_stack, tmp_path):
    load(own_stack, write(tmp_path / "a.csv", [row(cc_num=new_card(), trans_num=new_id())]))
    (tmp_path / "README.md").write_text("# no data")
    assert own_stack.tally("load", tmp_path / "README.md").returncode != 0
    with tally.Client(own_stack.address) as client:
        assert client.status().unfinished_loads == []
        assert client.status().complete_through_ms > 0


def test_an_unfinished_load_can_be_abandoned(own_stack, tmp_path):
    path = tmp_path / "gone.csv"
    assert own_stack.tally("synth", "-o", path, "--rows", "200000").returncode == 0
    environment = os.environ | {"TALLY_DATA": str(own_stack.data)}
    process = subprocess.Popen(
        [TALLY, "load", path], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    with tally.Client(own_stack.address) as client:
        assert eventually(lambda: client.status().unfinished_loads == ["gone.csv"])
        process.kill()
        process.wait()
        wrong = own_stack.tally("load", "--abandon", "other.csv")
        assert wrong.returncode != 0
        assert "gone.csv" in wrong.stderr
        assert own_stack.tally("load", "--abandon", "gone.csv").returncode == 0
        assert client.status().unfinished_loads == []


def test_an_open_port_without_a_token_is_refused(stack):

    result = subprocess.run(
        [sys.executable, "-m", "server"],
        env=os.environ | {"TALLY_DATA": str(stack.data), "TALLY_LISTEN": "0.0.0.0:7600"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 2
    assert "TALLY_TOKEN" in result.stderr


def scraped(stack, name, **labels):
    """One sample of the metrics page."""
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(stack.metrics, timeout=5) as response:
        families = text_string_to_metric_families(response.read().decode())
    samples = [sample for family in families for sample in family.samples]
    return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())


def test_metrics_count_every_call_under_the_conventional_names(stack, client):
    method = {"grpc_method": "GetOnlineFeatures"}
    figures = {
        "grpc_server_started_total": method,
        "grpc_server_handled_total": {**method, "grpc_code": "OK"},
        "grpc_server_handling_seconds_count": method,
        "tally_online_rows_total": {},
    }

    def scrape() -> list[float]:
        return [scraped(stack, name, **labels) for name, labels in figures.items()]

    time.sleep(2 * FLUSH_INTERVAL_S)  # what came before is in
    before = scrape()
    for _ in range(7):
        client.online([tally.Row(card="4111111111111111")] * 3)
    wanted = [figure + gain for figure, gain in zip(before, (7, 7, 7, 21), strict=True)]
    assert eventually(lambda: scrape() == wanted), (scrape(), wanted)


@given(st.lists(st.floats(0, 20), max_size=30))
def test_observing_all_at_once_is_observing_each(amounts):
    metrics, alone = Metrics(), Metrics()
    together = metrics.handling_seconds.labels("unary", "s", "m")
    one_by_one = alone.handling_seconds.labels("unary", "s", "m")
    together.observe_all([*amounts, *LATENCY_BUCKETS_S])
    for amount in [*amounts, *LATENCY_BUCKETS_S]:
        one_by_one.observe(amount)

    def buckets(of):
        return [s.value for f in of.registry.collect() for s in f.samples if "_bucket" in s.name]

    assert buckets(metrics) == buckets(alone)


def test_reflection_asks_for_the_token_too(with_token):
    with grpc.insecure_channel(with_token.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = [reflection_pb2.ServerReflectionRequest(list_services="")]
        with pytest.raises(grpc.RpcError) as refused:
            list(stub.ServerReflectionInfo(iter(asked)))
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        token = [("authorization", "Bearer the right one")]
        (answer,) = stub.ServerReflectionInfo(iter(asked), metadata=token)
    services = [service.name for service in answer.list_services_response.service]
    assert "tally.v1.FeatureService" in services


def test_an_empty_token_is_no_token(stack):
    result = subprocess.run(
        [sys.executable, "-m", "server"],
        env=os.environ | {"TALLY_DATA": str(stack.data), "TALLY_TOKEN": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 2
    assert "TALLY_TOKEN" in result.stderr


def test_free_ports_are_none_that_clients_are_given():
    above = int(CLIENT_PORTS.read_text().split()[0])
    ports = {free_port() for _ in range(50)}
    assert len(ports) > 40
    assert all(SERVER_PORTS_FROM <= port < max(above, SERVER_PORTS_FROM + 1_000) for port in ports)
