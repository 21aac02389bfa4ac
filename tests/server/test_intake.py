"""Counting elements on the wire: the counts are those of the parser, whatever the bytes are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tally.v1 import feature_service_pb2 as pb

from server.errors import CallError
from server.intake import (
    OTHER_FIELDS_MAX,
    REPEATED_MAX,
    MalformedError,
    Plan,
    bounded_parser,
    count_elements,
    plan_of,
)
from server.response import field, varint

ROOT = Path(__file__).resolve().parents[2]
PLANS: dict[Any, Plan] = {
    request: Plan.of(request.DESCRIPTOR)
    for request in (
        pb.GetOnlineFeaturesRequest,
        pb.GetHistoricalFeaturesRequest,
        pb.ExportRequest,
        pb.SyncRequest,
    )
}


def parsed_counts(message: Message, plan: Plan) -> dict[str, int]:
    """The elements of each repeated field of a message, by its path."""
    found = {}
    for path in paths(plan):
        *outer, name = path.split(".")
        inner = message
        for step in outer:
            inner = getattr(inner, step)
        if len(getattr(inner, name)):
            found[path] = len(getattr(inner, name))
    return found


def paths(plan: Plan) -> list[str]:
    inner = [path for nested in plan.nested.values() for path in paths(nested)]
    return [path for path, _ in plan.repeated.values()] + inner


def scalar(number: int) -> st.SearchStrategy[bytes]:
    """A field that is neither text nor a message."""
    return st.one_of(
        st.integers(0, 2**64 - 1).map(lambda x: varint(number << 3) + varint(x)),
        st.binary(min_size=8, max_size=8).map(lambda x: varint(number << 3 | 1) + x),
        st.binary(min_size=4, max_size=4).map(lambda x: varint(number << 3 | 5) + x),
    )


numbers = st.integers(1, 9) | st.integers(1, 2**29 - 1)
fields = st.recursive(
    numbers.flatmap(scalar) | st.builds(field, numbers, st.binary(max_size=3)),
    lambda inner: st.one_of(
        st.builds(field, numbers, st.lists(inner, max_size=4).map(b"".join)),
        st.tuples(numbers, st.lists(inner, max_size=3)).map(
            lambda group: varint(group[0] << 3 | 3) + b"".join(group[1]) + varint(group[0] << 3 | 4)
        ),
    ),
    max_leaves=12,
)
"""Fields as they stand on the wire, nested and in groups, of our numbers and of others."""
wires = st.lists(fields, max_size=8).map(b"".join)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """Such bytes, cut off or with a byte changed."""
    wire = bytearray(draw(wires))
    if wire and draw(st.booleans()):
        wire[draw(st.integers(0, len(wire) - 1))] = draw(st.integers(0, 255))
    return bytes(wire[: draw(st.integers(0, len(wire)))] if draw(st.booleans()) else wire)


@given(st.sampled_from(list(PLANS)), wires | mutated() | st.binary(max_size=12))
@example(pb.GetOnlineFeaturesRequest, b"\x0a\x00\x8a\x00\x00")  # a tag longer than it need be
@example(pb.GetOnlineFeaturesRequest, b"\x0a\x80\x00")  # and a length
@example(pb.GetOnlineFeaturesRequest, b"\x0b\x0a\x00\x0c\x0a\x00")  # a group of a message's number
@example(pb.ExportRequest, field(1, field(3, b"")) * 3)  # one spec in three parts
@settings(max_examples=200)
def test_what_is_counted_on_the_wire_is_what_the_parser_makes(request, wire):
    plan = PLANS[request]
    try:
        counts: dict[str, int] | None = count_elements(wire, plan)
    except MalformedError:
        counts = None
    try:
        message = request.FromString(wire)
    except DecodeError:
        return  # the parser is stricter: it looks into texts, too
    assert counts is not None, "refused, though it is a message"
    made = parsed_counts(message, plan)
    if members_of_oneofs(wire, request) <= 1:
        assert counts == made
    else:  # they take each other's place, and what was made for the first is gone
        assert all(counts[path] >= count for path, count in made.items())


def members_of_oneofs(wire: bytes, request: type[Message]) -> int:
    """How many members of its oneofs a message has had."""
    unknown: Any = UnknownFieldSet(Empty.FromString(wire))
    sent = {found.field_number for found in unknown}
    return len(sent & {f.number for one in request.DESCRIPTOR.oneofs for f in one.fields})


@pytest.mark.parametrize("name", REPEATED_MAX)
def test_each_limit_is_kept_to_the_element(name):
    request, number, around = {
        "rows": (pb.GetOnlineFeaturesRequest, 1, 0),
        "features": (pb.GetOnlineFeaturesRequest, 2, 0),
        "card_ids": (pb.ExportRequest, 3, 1),
    }[name.rpartition(".")[2]]
    if "Historical" in name:
        request, number, around = pb.GetHistoricalFeaturesRequest, 3, 1
    limit = REPEATED_MAX[name]

    def of(count: int) -> bytes:
        elements = field(number, b"") * count
        return field(around, elements) if around else elements

    assert list(count_elements(of(limit), PLANS[request]).values()) == [limit]
    with pytest.raises(CallError, match=f"at most {limit:,} elements"):
        count_elements(of(limit + 1), PLANS[request])


def test_fields_that_are_not_counted_are_bounded_as_well():
    plan = PLANS[pb.GetOnlineFeaturesRequest]
    most = plan.elements_max + OTHER_FIELDS_MAX
    assert count_elements(b"\x78\x00" * most, plan) == {}
    with pytest.raises(CallError, match="more fields"):
        count_elements(b"\x78\x00" * (most + 1), plan)


def test_small_messages_go_to_the_parser_at_once():
    seen = []
    parse = bounded_parser(lambda data: seen.append(data), 1 << 20, Plan({1: ("rows", 0)}, {}, 1))
    parse(field(1, b"") * 10)
    assert len(seen) == 1
    with pytest.raises(CallError, match="at most 0 elements"):
        parse(field(1, b"") * 100_000)
    assert len(seen) == 1


def test_every_repeated_field_of_every_request_has_the_limit_of_its_annotation(tmp_path):
    # A repeated field without a limit raises where its method is registered, and here.
    image = tmp_path / "contract.binpb"
    buf = Path(sys.executable).parent / "buf"
    subprocess.run([buf, "build", ROOT / "protos", "-o", image], check=True)
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(image.read_bytes()).file:
        pool.Add(file)
    rules: Any = pool.FindExtensionByName("buf.validate.field")
    message_factory.GetMessageClass(pool.FindMessageTypeByName("buf.validate.FieldRules"))
    for service in ("tally.v1.FeatureService", "tally.v1.AdminService"):
        for method in pool.FindServiceByName(service).methods:
            plan_of(f"/{service}/{method.name}")
    for name, limit in REPEATED_MAX.items():
        annotated = pool.FindFieldByName(name)
        options: Any = message_factory.GetMessageClass(
            pool.FindMessageTypeByName("google.protobuf.FieldOptions")
        ).FromString(annotated.GetOptions().SerializeToString())
        assert options.Extensions[rules].repeated.max_items == limit, name
