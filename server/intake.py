"""From the bytes of a message to a request: bounded in bytes and in elements before an object is made.

A message of 4 MiB can hold two million empty rows, and each becomes an object of hundreds of bytes. So
the elements of repeated fields are counted on the wire first. Only in messages above SCAN_BYTES_MIN:
what fits below costs a few megabytes at the most, and is refused once it is parsed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from server.errors import CallError, Violation, invalid
from server.settings import CARDS_MAX, FEATURES_MAX, ROWS_MAX

SCAN_BYTES_MIN = 65_536
OTHER_FIELDS_MAX = 4_096
"""Fields in a scanned message beside the elements of repeated ones, such as those of later versions."""
GROUP_DEPTH_MAX = 100
SIDE_MESSAGE_BYTES_MAX = 16_384
"""Largest message of a service that is not ours: health and reflection ask by short names."""

REPEATED_MAX: Mapping[str, int] = {
    "tally.v1.GetOnlineFeaturesRequest.rows": ROWS_MAX,
    "tally.v1.GetOnlineFeaturesRequest.features": FEATURES_MAX,
    "tally.v1.HistoricalHeader.features": FEATURES_MAX,
    "tally.v1.ExportSpec.card_ids": CARDS_MAX,
}
"""Most elements of each repeated field of requests, as the contract has it."""

_VARINT, _FIXED64, _DELIMITED, _GROUP, _GROUP_END, _FIXED32 = range(6)
_TAG_MAX = 0xFFFF_FFFF
_VARINT_BYTES_MAX = 10


class MalformedError(ValueError):
    """Bytes that are no message."""


@dataclass(slots=True)
class Plan:
    """What is counted in messages of one type."""

    repeated: dict[int, tuple[str, int]] = field(default_factory=dict)
    """Field number -> (path of the field in the request, most elements)."""
    nested: dict[int, Plan] = field(default_factory=dict)
    """Field number of a message field that has repeated fields in it -> what is counted there."""
    elements_max: int = 0
    """Elements of all repeated fields together, those of nested messages too."""

    @classmethod
    def of(
        cls, message: Descriptor, limits: Mapping[str, int] = REPEATED_MAX, path: str = ""
    ) -> Plan:
        """The plan of a message type, whose fields stand under a path such as "spec.".

        Raises:
            KeyError: a repeated field has no limit.
            NotImplementedError: a repeated field of numbers, which may be packed, or one whose elements
                have repeated fields themselves.
        """
        plan = cls()
        for found in message.fields:
            where = path + found.name
            kind = found.message_type
            inner = None if kind is None else cls.of(kind, limits, f"{where}.")
            if found.label == FieldDescriptor.LABEL_REPEATED:  # type: ignore[attr-defined]
                is_text = found.cpp_type == FieldDescriptor.CPPTYPE_STRING
                if (inner is None and not is_text) or (inner and inner.elements_max):
                    raise NotImplementedError(f"{found.full_name} cannot be counted")
                limit = limits[found.full_name]
                plan.repeated[found.number] = where, limit
                plan.elements_max += limit
            elif inner and inner.elements_max:
                plan.nested[found.number] = inner
                plan.elements_max += inner.elements_max
        return plan


def count_elements(data: bytes, plan: Plan) -> dict[str, int]:
    """The elements of each repeated field in a message on the wire, by the field's path.

    Of a `oneof` whose member changes within the message, all that was sent is counted, though a parser
    keeps the last member only: it makes the objects of all.

    Raises:
        MalformedError: it is no message.
        CallError: a field has more elements than allowed, or there are too many fields.
    """
    counts: dict[str, int] = {}
    fields_left = plan.elements_max + OTHER_FIELDS_MAX
    open_parts = [(0, len(data), plan)]
    while open_parts:
        position, end, plan = open_parts.pop()
        while position < end:
            fields_left -= 1
            if fields_left < 0:
                raise _too_many_fields()
            tag, position = _varint(data, position, end)
            number, kind = tag >> 3, tag & 7
            if not 0 < number <= _TAG_MAX >> 3:
                raise MalformedError
            if kind != _DELIMITED:
                position = _skipped(data, position, end, number, kind)
                continue
            length, begin = _varint(data, position, end)
            position = begin + length
            if position > end:
                raise MalformedError
            if number in plan.repeated:
                path, limit = plan.repeated[number]
                counts[path] = count = counts.get(path, 0) + 1
                if count > limit:
                    raise invalid([Violation(path, f"must have at most {limit:,} elements")])
            elif number in plan.nested:
                open_parts.append((position, end, plan))
                position, end, plan = begin, position, plan.nested[number]
    return counts


def _varint(data: bytes, position: int, end: int) -> tuple[int, int]:
    """A number on the wire, and the position behind it."""
    value = shift = 0
    for at in range(position, min(position + _VARINT_BYTES_MAX, end)):
        byte = data[at]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at + 1
        shift += 7
    raise MalformedError


def _skipped(data: bytes, position: int, end: int, number: int, kind: int) -> int:
    """The position behind a field that is neither text nor a message."""
    if kind == _VARINT:
        return _varint(data, position, end)[1]
    if kind in (_FIXED64, _FIXED32):
        position += 8 if kind == _FIXED64 else 4
        if position > end:
            raise MalformedError
        return position
    if kind == _GROUP:
        return _behind_group(data, position, end, number)
    raise MalformedError


def _behind_group(data: bytes, position: int, end: int, number: int) -> int:
    """The position behind a group: no field of ours, but a parser skips it. It is bounded by its bytes,
    since a scan of it makes no objects."""
    open_groups = [number]
    while open_groups:
        tag, position = _varint(data, position, end)
        number, kind = tag >> 3, tag & 7
        if kind == _GROUP_END:
            if open_groups.pop() != number:
                raise MalformedError
        elif kind == _GROUP:
            open_groups.append(number)
            if len(open_groups) > GROUP_DEPTH_MAX:
                raise MalformedError
        elif kind == _DELIMITED:
            length, position = _varint(data, position, end)
            position += length
            if position > end:
                raise MalformedError
        else:
            position = _skipped(data, position, end, number, kind)
    return position


def _too_many_fields() -> CallError:
    return invalid([Violation("request", "has more fields than any request of this type")])


def bounded_parser(
    parse: Callable[[bytes], Any], bytes_max: int, plan: Plan
) -> Callable[[bytes], Any]:
    """What parses a message, within bounds.

    The function raises CallError: MESSAGE_TOO_LARGE, MALFORMED_PAYLOAD, or INVALID_REQUEST where a
    repeated field has too many elements.
    """

    def parsed(data: bytes) -> Any:
        size = len(data)
        if size > bytes_max:
            raise _too_large(size, bytes_max)
        try:
            if size > SCAN_BYTES_MIN and plan.elements_max:
                count_elements(data, plan)
            return parse(data)
        except CallError:
            raise
        except Exception:  # noqa: BLE001 (the parser's own error type is not public)
            raise _malformed() from None

    return parsed


def plan_of(method: str) -> Plan:
    """What is counted in the requests of a method, such as "/tally.v1.FeatureService/Export"."""
    service, name = method.lstrip("/").split("/", 1)
    described = descriptor_pool.Default().FindServiceByName(service)
    return Plan.of(described.methods_by_name[name].input_type)


def _too_large(size: int, bytes_max: int) -> CallError:
    text = f"must have at most {bytes_max:,} bytes; it has {size:,}"
    return CallError(
        grpc.StatusCode.INVALID_ARGUMENT,
        "MESSAGE_TOO_LARGE",
        f"the request {text}",
        metadata={"limit_bytes": str(bytes_max)},
        violations=[Violation("request", text)],
    )


def _malformed() -> CallError:
    text = "is no message of this method's request type"
    return CallError(
        grpc.StatusCode.INVALID_ARGUMENT,
        "MALFORMED_PAYLOAD",
        f"the request {text}",
        metadata={"field": "request"},
        violations=[Violation("request", text)],
    )
