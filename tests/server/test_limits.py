"""What callers can cost: how long they may be silent, how much they may send, and who is refused first."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import grpc
import psutil
import pyarrow as pa
import pytest
import tally
from google.rpc import error_details_pb2, status_pb2
from tally.v1 import admin_service_pb2 as admin_pb
from tally.v1 import feature_service_pb2 as pb
from tally.v1.admin_service_pb2_grpc import AdminServiceStub
from tally.v1.feature_service_pb2_grpc import FeatureServiceStub

from server.response import field
from server.workers import HUNG_S
from tests.batch_job.test_load import new_card
from tests.server.own_server import OwnServer, Relay, own_server, stopped

TOKEN = "a-token-for-tests"
WITH_TOKEN = (("authorization", f"Bearer {TOKEN}"),)
SCHEMA = pa.schema([("card", pa.string()), ("event_time", pa.timestamp("ms", "UTC"))])
HEADER = pb.GetHistoricalFeaturesRequest(
    header=pb.HistoricalHeader(schema=SCHEMA.serialize().to_pybytes(), features=["amt"])
)
METHOD = "/tally.v1.FeatureService/"
FIRST_MESSAGE_S, IDLE_S, UNTAKEN_S, WHOLE_S = 1.0, 1.5, 2.0, 4.0


@pytest.fixture(scope="module")
def relay(stack) -> Iterator[Relay]:
    """The line between the server and Postgres."""
    to = urlsplit(stack.settings.store_urls()[1])
    relay = Relay(str(to.hostname), to.port or 5432)
    yield relay
    relay.stop()


@pytest.fixture(scope="module")
def server(stack, relay, tmp_path_factory) -> Iterator[OwnServer]:
    """A server with short limits and a token, whose line to Postgres can hang."""
    url = urlsplit(stack.settings.store_urls()[1])
    user = url.netloc.rpartition("@")[0]
    postgres = url._replace(netloc=f"{user}@127.0.0.1:{relay.port}").geturl()
    with own_server(
        stack,
        tmp_path_factory.mktemp("limits"),
        TALLY_TOKEN=TOKEN,
        TALLY_POSTGRES_URL=postgres,
        TALLY_BULK_FIRST_MESSAGE_S=str(FIRST_MESSAGE_S),
        TALLY_BULK_IDLE_S=str(IDLE_S),
        TALLY_BULK_UNTAKEN_S=str(UNTAKEN_S),
        TALLY_BULK_DEADLINE_S=str(WHOLE_S),
    ) as server:
        yield server


@pytest.fixture
def channel(server) -> Iterator[grpc.Channel]:
    options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(server.address, options) as channel:
        yield channel


def info_of(error: grpc.RpcError) -> error_details_pb2.ErrorInfo:
    trailing: dict[str, Any] = dict(cast("Any", error.trailing_metadata()))
    status = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    return info


def status(channel: grpc.Channel) -> admin_pb.GetStatusResponse:
    return AdminServiceStub(channel).GetStatus(
        admin_pb.GetStatusRequest(), metadata=WITH_TOKEN, timeout=5
    )


def held(
    channel: grpc.Channel, *messages: pb.GetHistoricalFeaturesRequest
) -> tuple[Any, threading.Event]:
    """A historical call that sends these messages and then is silent."""
    over = threading.Event()

    def sent() -> Iterator[pb.GetHistoricalFeaturesRequest]:
        yield from messages
        over.wait(60)

    return FeatureServiceStub(channel).GetHistoricalFeatures(sent(), metadata=WITH_TOKEN), over


def ended(call: Any) -> grpc.RpcError:
    """The error that a call ends with, whatever it answers before."""
    with pytest.raises(grpc.RpcError) as caught:
        for _ in call:
            pass
    return caught.value


def export(channel: grpc.Channel) -> Any:
    spec = pb.ExportSpec(kind=pb.EXPORT_KIND_LABELS)
    return FeatureServiceStub(channel).Export(pb.ExportRequest(spec=spec), metadata=WITH_TOKEN)


def is_served(channel: grpc.Channel) -> bool:
    """Whether there is a place for a call; it is free again at the end."""
    first, *_ = export(channel)
    return bool(first.HasField("header"))


# --- silent callers -------------------------------------------------------------------------


def test_callers_who_send_nothing_keep_nobody_out_and_are_ended(channel):
    silent = [held(channel) for _ in range(8)]  # twice as many as there are places
    assert is_served(channel)
    for call, over in silent:
        error = ended(call)
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert (info_of(error).reason, dict(info_of(error).metadata)) == ("IDLE", {"limit_s": "1"})
        over.set()


def test_callers_who_send_a_header_and_then_nothing_are_ended_and_leave_their_places(channel):
    silent = [held(channel, HEADER) for _ in range(4)]
    for call, _ in silent:
        assert next(call).HasField("header")
    with pytest.raises(grpc.RpcError) as caught:
        next(export(channel))
    assert info_of(caught.value).reason == "OVERLOADED"
    for call, over in silent:
        assert info_of(ended(call)).reason == "IDLE"
        over.set()
    assert is_served(channel)


def test_a_call_ends_at_its_deadline_while_nothing_is_answered(server, channel, relay):
    # It waits for Postgres, which hangs: no answer, at which a deadline could be looked at.
    began = time.monotonic()
    relay.hang()
    try:
        error = ended(export(channel))
    finally:
        relay.flow()
    assert (error.code(), info_of(error).reason) == (
        grpc.StatusCode.DEADLINE_EXCEEDED,
        "DEADLINE",
    )
    assert WHOLE_S - 0.1 < time.monotonic() - began < WHOLE_S + 10


def test_the_caller_of_an_answer_that_is_not_taken_is_ended_with_a_reason(stack, channel):
    # Answers of a megabyte each, of which the window takes some; then nobody reads.
    card = new_card()
    schema = SCHEMA.append(pa.field("padding", pa.string()))
    header = pb.HistoricalHeader(schema=schema.serialize().to_pybytes(), features=["amt"])
    times = pa.array([0], schema.field("event_time").type)
    batch = pa.record_batch([pa.array([card]), times, pa.array(["x" * 1_000_000])], schema)
    points = pb.GetHistoricalFeaturesRequest(points=batch.serialize().to_pybytes())
    messages = [pb.GetHistoricalFeaturesRequest(header=header), *[points] * 30]
    call, over = held(channel, *messages)
    began = time.monotonic()
    assert next(call).HasField("header")
    time.sleep(UNTAKEN_S + 1)  # what is tested is that nothing is read for so long
    error = ended(call)
    over.set()
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert info_of(error).reason == "IDLE"
    assert "taken" in (error.details() or "")
    assert time.monotonic() - began < WHOLE_S + 10


# --- many calls at once ---------------------------------------------------------------------


@pytest.mark.parametrize("connections", [1, 10])
def test_of_thousands_of_calls_at_once_each_is_answered_or_refused_with_a_reason(
    stack, connections
):
    calls = 3_000  # the framework's own guard begins at a thousand
    request = pb.GetOnlineFeaturesRequest(
        rows=[pb.FeatureRow(card=new_card(), event_time_ms=0)] * 10
    )

    async def outcomes() -> Counter[str]:
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = [grpc.aio.insecure_channel(stack.address, options) for _ in range(connections)]
        stubs = [FeatureServiceStub(channel) for channel in channels]

        async def one(number: int) -> str:
            try:
                await stubs[number % connections].GetOnlineFeatures(request, timeout=60)
            except grpc.RpcError as error:
                narrow = tally.errors.from_rpc_error(error)
                return f"{narrow.reason}, to be tried again: {bool(narrow.retry_after_ms)}"
            return "answered"

        found = Counter(await asyncio.gather(*map(one, range(calls))))
        for channel in channels:
            await channel.close()
        return found

    found = asyncio.run(outcomes())
    assert set(found) <= {"answered", "OVERLOADED, to be tried again: True"}
    assert found["answered"] >= 500


# --- what a message may hold ----------------------------------------------------------------

MESSAGE_BYTES = (4 << 20) - 64


def many(number: int, around: bytes = b"") -> bytes:
    """As many empty elements of a field as a message holds."""
    element = field(number, around)
    return element * (MESSAGE_BYTES // len(element))


FULL_MESSAGES = {
    "rows": ("GetOnlineFeatures", many(1)),
    "features": ("GetOnlineFeatures", many(2)),
    "freshness, again and again": ("GetOnlineFeatures", many(3)),
    "fields of another version": ("GetOnlineFeatures", b"\x78\x00" * (MESSAGE_BYTES // 2)),
    "card ids": ("Export", field(1, many(3)[:-8])),
    "card ids in many specs": ("Export", many(1, field(3, b""))),
    "features of a header": ("GetHistoricalFeatures", field(1, many(3)[:-8])),
}


def refused(channel: grpc.Channel, method: str, data: bytes, token: Any) -> grpc.RpcError:
    open_: Any = channel
    calls: dict[str, Callable[[], Any]] = {
        "GetOnlineFeatures": lambda: open_.unary_unary(METHOD + method)(data, metadata=token),
        "Export": lambda: next(open_.unary_stream(METHOD + method)(data, metadata=token)),
        "GetHistoricalFeatures": lambda: next(
            open_.stream_stream(METHOD + method)(iter([data]), metadata=token)
        ),
    }
    with pytest.raises(grpc.RpcError) as caught:
        calls[method]()
    return caught.value


@pytest.mark.parametrize(("token", "reason"), [(WITH_TOKEN, "INVALID_REQUEST"), ((), "BAD_TOKEN")])
def test_messages_full_of_empty_elements_cost_the_worker_little(channel, token, reason):
    worker = psutil.Process(status(channel).worker_pid)
    Path(f"/proc/{worker.pid}/clear_refs").write_text("5")  # the peak is counted from here
    before = peak_bytes(worker.pid)
    for _ in range(4):
        for method, data in FULL_MESSAGES.values():
            assert info_of(refused(channel, method, data, token)).reason == reason
    # A message, a copy of it in the framework, and what the allocator keeps; they were 570 MB.
    assert peak_bytes(worker.pid) - before < 80 << 20


def peak_bytes(pid: int) -> int:
    (line,) = [
        line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmHWM" in line
    ]
    return int(line.split()[1]) * 1024


def test_without_a_token_a_request_is_not_looked_into(channel):
    for method in ("GetOnlineFeatures", "Export", "GetHistoricalFeatures"):
        assert info_of(refused(channel, method, b"\xff\xff\xff", ())).reason == "BAD_TOKEN"
        assert (
            info_of(refused(channel, method, b"\xff\xff\xff", WITH_TOKEN)).reason
            == "MALFORMED_PAYLOAD"
        )


def test_reflection_asks_for_the_token_and_health_does_not(channel):
    open_: Any = channel
    reflect = open_.stream_stream("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")
    with pytest.raises(grpc.RpcError) as caught:
        next(reflect(iter([b"\xff"])))
    assert info_of(caught.value).reason == "BAD_TOKEN"
    with pytest.raises(grpc.RpcError) as caught:
        next(reflect(iter([b"\x0a" + b"\xff" * 20_000]), metadata=WITH_TOKEN))
    assert info_of(caught.value).reason == "MESSAGE_TOO_LARGE"
    assert open_.unary_unary("/grpc.health.v1.Health/Check")(b"") == b"\x08\x01"


# --- hung stores and workers ----------------------------------------------------------------


def test_status_calls_share_one_look_and_one_connection(server, relay, channel):
    status(channel)
    before = relay.connections

    async def flood() -> set[int]:
        async with grpc.aio.insecure_channel(server.address) as channel:
            admin: Any = AdminServiceStub(channel)
            answers = await asyncio.gather(
                *(
                    admin.GetStatus(admin_pb.GetStatusRequest(), metadata=WITH_TOKEN)
                    for _ in range(500)
                )
            )
            return {answer.offline_store.state for answer in answers}

    assert admin_pb.STORE_STATE_SERVING in asyncio.run(flood())
    assert relay.connections == before


def test_status_says_within_a_second_that_postgres_hangs_and_then_that_it_does_not(relay, channel):
    status(channel)
    relay.hang()
    try:
        began = time.monotonic()
        time.sleep(1.1)  # what was seen last is good for a second
        asked = time.monotonic()
        answer = status(channel)
        assert (
            time.monotonic() - asked < 3
        )  # its limit is less than a second, on a machine that is idle
        assert answer.offline_store.state == admin_pb.STORE_STATE_UNREACHABLE
        assert "no answer" in answer.offline_store.detail
        assert answer.online_store.state != admin_pb.STORE_STATE_UNREACHABLE
        assert answer.complete_through_ms >= -1
    finally:
        relay.flow()
    while status(channel).offline_store.state != admin_pb.STORE_STATE_SERVING:
        assert time.monotonic() - began < 15
        time.sleep(0.05)


def test_a_worker_that_is_stopped_is_found_within_three_seconds_and_replaced(server, channel):
    worker = psutil.Process(status(channel).worker_pid)
    began = time.monotonic()
    with stopped(worker.pid):
        worker.wait(15)
    assert time.monotonic() - began > HUNG_S - 0.5
    while True:
        with grpc.insecure_channel(server.address) as another:
            try:
                replaced_by = status(another).worker_pid
                break
            except grpc.RpcError:
                assert time.monotonic() - began < 60
    assert replaced_by != worker.pid
    assert os.getpgid(replaced_by) == os.getpgid(server.process.pid)
    said = [line for line in server.log.read_text().splitlines() if "no sign of life" in line]
    assert [json.loads(line)["pid"] for line in said] == [worker.pid]
    # By the parent's own looks, which a machine that is busy delays.
    assert json.loads(said[0])["silent_s"] < 3


def test_a_parent_that_was_itself_stopped_replaces_nobody(server, channel):
    before = status(channel).worker_pid
    with stopped(server.process.pid):
        time.sleep(HUNG_S + 1)  # what is tested is that so much time passes
    time.sleep(0.5)
    assert status(channel).worker_pid == before


# --- metrics --------------------------------------------------------------------------------


def test_silent_connections_to_the_metrics_port_take_no_threads_and_keep_no_scrape_out(server):
    parent = psutil.Process(server.process.pid)
    threads = parent.num_threads()
    host, _, port = server.metrics.rpartition(":")
    with ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(socket.create_connection((host, int(port)), timeout=5))
        with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=5) as response:
            assert b"grpc_server_started_total" in response.read()
        assert parent.num_threads() <= threads
