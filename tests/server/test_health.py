"""Health and reflection, as gRPC's own clients use them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from tally.v1 import feature_service_pb2 as pb
from tally.v1.feature_service_pb2_grpc import FeatureServiceStub

from tests.batch_job.test_load import new_card

SERVICES = ("tally.v1.FeatureService", "tally.v1.AdminService")
VERSIONS = ("v1", "v1alpha")


@pytest.fixture
def channel(stack) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(stack.address) as channel:
        yield channel


@pytest.mark.parametrize("service", ["", *SERVICES])
def test_health_can_be_watched(channel, service):
    watch = health_pb2_grpc.HealthStub(channel).Watch(
        health_pb2.HealthCheckRequest(service=service), timeout=10
    )
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()


def test_a_service_that_is_not_there_is_unknown_to_a_watch_and_not_found_by_a_check(channel):
    health = health_pb2_grpc.HealthStub(channel)
    nobody = health_pb2.HealthCheckRequest(service="nobody.v1.Nothing")
    watch = health.Watch(nobody, timeout=10)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    watch.cancel()
    with pytest.raises(grpc.RpcError) as caught:
        health.Check(nobody)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("service", "answers"), [(SERVICES[0], True), ("nobody.v1.Nothing", False)]
)
def test_grpcs_own_health_checking_connects_where_the_service_serves(stack, service, answers):
    config = {
        "loadBalancingConfig": [{"round_robin": {}}],
        "healthCheckConfig": {"serviceName": service},
    }
    options = [
        ("grpc.service_config", json.dumps(config)),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    request = pb.GetOnlineFeaturesRequest(rows=[pb.FeatureRow(card=new_card())])
    with grpc.insecure_channel(stack.address, options) as channel:
        call = FeatureServiceStub(channel).GetOnlineFeatures
        if answers:
            assert call(request, timeout=10).known == [False]
        else:
            with pytest.raises(grpc.RpcError) as caught:
                call(request, timeout=2)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


# --- reflection -----------------------------------------------------------------------------


def reflect(channel: Any, version: str, *requests: Any) -> list[Any]:
    method = f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
    call = channel.stream_stream(
        method,
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    return list(call(iter(requests), timeout=10))


def symbols_of(file: descriptor_pb2.FileDescriptorProto) -> Iterator[str]:
    """All names that a file declares."""
    for service in file.service:
        yield f"{file.package}.{service.name}"
        yield from (f"{file.package}.{service.name}.{method.name}" for method in service.method)
    for message in file.message_type:
        yield f"{file.package}.{message.name}"
        yield from (f"{file.package}.{message.name}.{field.name}" for field in message.field)
        yield from (f"{file.package}.{message.name}.{one.name}" for one in message.oneof_decl)
    for enum in file.enum_type:
        yield f"{file.package}.{enum.name}"
        yield from (f"{file.package}.{value.name}" for value in enum.value)


@pytest.mark.parametrize("version", VERSIONS)
def test_reflection_finds_every_symbol_of_every_service_by_its_file(channel, version):
    (listed,) = reflect(channel, version, reflection_pb2.ServerReflectionRequest(list_services=""))
    services = [service.name for service in listed.list_services_response.service]
    others = {"grpc.health.v1.Health", *(f"grpc.reflection.{v}.ServerReflection" for v in VERSIONS)}
    assert set(services) == {*SERVICES, *others}
    for name in services:
        (answer,) = reflect(
            channel, version, reflection_pb2.ServerReflectionRequest(file_containing_symbol=name)
        )
        files = list(
            map(
                descriptor_pb2.FileDescriptorProto.FromString,
                answer.file_descriptor_response.file_descriptor_proto,
            )
        )
        for file in files:
            symbols = list(symbols_of(file))
            asked = [
                reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol)
                for symbol in symbols
            ]
            for symbol, found in zip(symbols, reflect(channel, version, *asked), strict=True):
                first = found.file_descriptor_response.file_descriptor_proto[0]
                described = descriptor_pb2.FileDescriptorProto.FromString(first)
                assert described.name == file.name, symbol


@pytest.mark.parametrize("version", VERSIONS)
def test_reflection_does_not_find_what_is_not_there(channel, version):
    names = ["tally.v1.FeatureService.GetFeature", "tally.v1.Nothing", "nothing", ""]
    asked = [reflection_pb2.ServerReflectionRequest(file_containing_symbol=name) for name in names]
    answers = reflect(channel, version, *asked)
    codes = [answer.error_response.error_code for answer in answers]
    assert codes == [grpc.StatusCode.NOT_FOUND.value[0]] * len(names)
