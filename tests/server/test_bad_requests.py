"""Requests that break a rule: refused with the code, the reason and the path of the field."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import grpc
import protovalidate
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given, settings
from hypothesis import strategies as st
from tally.v1 import feature_service_pb2 as pb
from tally.v1.feature_service_pb2_grpc import FeatureServiceStub

from features import CardKey
from server.errors import CallError
from server.query import parse_online

CARD = "4111111111111111"
NAN = float("nan")


def row(**values) -> pb.FeatureRow:
    return pb.FeatureRow(**({"card": CARD} | values))


def rows(*given: pb.FeatureRow, **rest) -> pb.GetOnlineFeaturesRequest:
    return pb.GetOnlineFeaturesRequest(rows=given, **rest)


STALE = pb.FreshnessPolicy(complete_through_at_least_ms=-1)

BAD = {
    "empty": (rows(), "rows", "INVALID_REQUEST"),
    "10,001 rows": (rows(*[row()] * 10_001), "rows", "INVALID_REQUEST"),
    "no subject": (rows(pb.FeatureRow()), "rows[0].subject", "INVALID_REQUEST"),
    "letters in the card": (rows(row(), row(card="4111x11111")), "rows[1].card", "INVALID_REQUEST"),
    "digits of another script": (rows(row(card="٤١١١١١١١")), "rows[0].card", "INVALID_REQUEST"),
    "short card": (rows(row(card="4111111")), "rows[0].card", "INVALID_REQUEST"),
    "long card": (rows(row(card="4" * 20)), "rows[0].card", "INVALID_REQUEST"),
    "empty card": (rows(pb.FeatureRow(card="")), "rows[0].card", "INVALID_REQUEST"),
    "short card id": (rows(pb.FeatureRow(card_id=b"x")), "rows[0].card_id", "INVALID_REQUEST"),
    "NaN amount": (rows(row(amount=NAN)), "rows[0].amount", "INVALID_REQUEST"),
    "infinite amount": (rows(row(amount=float("inf"))), "rows[0].amount", "INVALID_REQUEST"),
    "huge amount": (rows(row(amount=1e11)), "rows[0].amount", "INVALID_REQUEST"),
    "third of a cent": (rows(row(amount=0.003)), "rows[0].amount", "INVALID_REQUEST"),
    "year 9999": (rows(row(event_time_ms=253_402_300_799_000)), "rows[0].event_time_ms", "INVALID_REQUEST"),
    "before 1970": (rows(row(event_time_ms=-1)), "rows[0].event_time_ms", "INVALID_REQUEST"),
    "latitude": (rows(row(merchant_latitude=90.1)), "rows[0].merchant_latitude", "INVALID_REQUEST"),
    "NaN longitude": (rows(row(merchant_longitude=NAN)), "rows[0].merchant_longitude", "INVALID_REQUEST"),
    "long merchant": (rows(row(merchant="m" * 257)), "rows[0].merchant", "INVALID_REQUEST"),
    "long category": (rows(row(category="c" * 65)), "rows[0].category", "INVALID_REQUEST"),
    "unknown feature": (rows(row(), features=["amt", "txn_count_last_10_mins"]), "features[1]", "UNKNOWN_FEATURE"),
    "feature twice": (rows(row(), features=["amt", "amt"]), "features", "INVALID_REQUEST"),
    "too many features": (rows(row(), features=["amt"] * 1_001), "features", "INVALID_REQUEST"),
    "bad freshness": (rows(row(), freshness=STALE), "freshness.complete_through_at_least_ms", "INVALID_REQUEST"),
    "message over the limit": (rows(*[row(merchant="m" * 250)] * 10_000, features=["x" * 3_000_000]), "request", "MESSAGE_TOO_LARGE"),
}  # fmt: skip


def details(
    error: grpc.RpcError,
) -> tuple[error_details_pb2.ErrorInfo, error_details_pb2.BadRequest]:
    trailing: dict[str, Any] = dict(cast("Any", error.trailing_metadata()))
    status = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert status.details[0].Unpack(info)
    for detail in status.details[1:]:
        detail.Unpack(bad)
    return info, bad


@pytest.fixture(scope="module")
def stub(stack):
    with grpc.insecure_channel(stack.address) as channel:
        yield FeatureServiceStub(channel)


@pytest.mark.parametrize("what", BAD)
def test_a_bad_request_is_refused_with_the_path_of_its_field(stub, what):
    request, field, reason = BAD[what]
    with pytest.raises(grpc.RpcError) as caught:
        stub.GetOnlineFeatures(request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    info, bad = details(caught.value)
    assert (info.domain, info.reason) == ("tally.fraud", reason)
    assert [violation.field for violation in bad.field_violations] == [field]
    for digits in (CARD, "4111x11111", "4" * 20):
        assert digits not in str(caught.value.details())


def test_bytes_that_are_no_message_are_refused(stack):
    with grpc.insecure_channel(stack.address) as channel:
        call: Any = channel.unary_unary("/tally.v1.FeatureService/GetOnlineFeatures")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"\xff\xff\xff")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details(caught.value)[0].reason == "MALFORMED_PAYLOAD"


def test_every_field_at_fault_is_named(stub):
    with pytest.raises(grpc.RpcError) as caught:
        stub.GetOnlineFeatures(rows(row(card="x", amount=NAN), row(event_time_ms=-1)))
    info, bad = details(caught.value)
    assert info.metadata["violations"] == "3"
    assert [v.field for v in bad.field_violations] == [
        "rows[0].card",
        "rows[0].amount",
        "rows[1].event_time_ms",
    ]


def test_a_near_name_is_suggested(stub):
    with pytest.raises(grpc.RpcError) as caught:
        stub.GetOnlineFeatures(rows(row(), features=["txn_count_last_10_mins"]))
    assert details(caught.value)[0].metadata["did_you_mean"] == "txn_count_last_10_min"


# --- the annotations in the contract say the same -------------------------------------------


@pytest.fixture(scope="module")
def annotated_request(tmp_path_factory):
    """GetOnlineFeaturesRequest with its annotations, built from the contract's sources."""
    import subprocess
    import sys

    root = Path(__file__).resolve().parents[2]
    image = tmp_path_factory.mktemp("contract") / "contract.binpb"
    buf = Path(sys.executable).parent / "buf"
    subprocess.run([buf, "build", root / "protos", "-o", image], check=True)
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(image.read_bytes()).file:
        pool.Add(file)
    found = pool.FindMessageTypeByName("tally.v1.GetOnlineFeaturesRequest")
    return message_factory.GetMessageClass(found)


numbers = st.one_of(st.floats(), st.sampled_from([0.0, 90.0, -90.0, 180.0, 1e10, -1e10, 1e10 + 1]))
rows_of_any_kind = st.builds(
    pb.FeatureRow,
    card=st.from_regex(r"[0-9]{7,20}|[a-z]{0,3}", fullmatch=True),
    event_time_ms=st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1), st.sampled_from([0, 4_102_444_800_000, 4_102_444_800_001])),
    amount=st.one_of(st.none(), numbers.map(lambda x: x if x != x or abs(x) > 1e11 else float(round(x)))),
    merchant=st.one_of(st.none(), st.text(max_size=3), st.just("é" * 256), st.just("m" * 257)),
    category=st.one_of(st.none(), st.text(max_size=3), st.just("c" * 65)),
    merchant_latitude=st.one_of(st.none(), numbers),
    merchant_longitude=st.one_of(st.none(), numbers),
)  # fmt: skip


@given(st.lists(rows_of_any_kind, max_size=4))
@settings(max_examples=300)
def test_the_server_refuses_just_what_the_annotations_refuse(annotated_request, drawn):
    request = pb.GetOnlineFeaturesRequest(rows=drawn)
    wire = request.SerializeToString()
    try:
        protovalidate.validate(annotated_request.FromString(wire))
        allowed = True
    except protovalidate.ValidationError:
        allowed = False
    try:
        parse_online(request, CardKey(b"0" * 16), 0)
        accepted = True
    except CallError:
        accepted = False
    assert accepted == allowed
