"""Server reflection, v1 and v1alpha, which differ in their names alone.

The library has v1alpha only: v1 is described by the same file under the other package, and its messages
are the same on the wire. Nor does the runtime's pool of descriptors find a method by its name: methods
are found by their services.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from grpc_reflection.v1alpha import reflection, reflection_pb2

V1ALPHA_SERVICE = "grpc.reflection.v1alpha.ServerReflection"
V1_SERVICE = "grpc.reflection.v1.ServerReflection"
_V1_FILE = "grpc/reflection/v1/reflection.proto"


class Reflection(reflection.aio.ReflectionServicer):  # type: ignore[misc]
    """Describes services, their files and whatever is in these."""

    def _file_containing_symbol(self, request: Any, fully_qualified_name: str) -> Any:
        service, _, method = fully_qualified_name.rpartition(".")
        try:
            if method in self._pool.FindServiceByName(service).methods_by_name:
                fully_qualified_name = service
        except KeyError:
            pass  # a symbol of another kind
        return super()._file_containing_symbol(request, fully_qualified_name)


def register_reflection(server: Any, services: Sequence[str]) -> None:
    """Registers both versions, which describe these services and themselves."""
    _describe_v1()
    servicer = Reflection([*services, V1_SERVICE, V1ALPHA_SERVICE])
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    for service in (V1_SERVICE, V1ALPHA_SERVICE):
        server.add_registered_method_handlers(service, {"ServerReflectionInfo": handler})


def _describe_v1() -> None:
    """Adds v1's file to the runtime's pool; once more is the same as once."""
    file = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(file)
    text = text_format.MessageToString(file).replace("reflection.v1alpha", "reflection.v1")
    described = text_format.Parse(text, descriptor_pb2.FileDescriptorProto())
    described.name = _V1_FILE
    descriptor_pool.Default().Add(described)
