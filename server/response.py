"""Writes GetOnlineFeaturesResponse messages, many times faster than a message object would.

Columns go onto the wire as the bytes of arrays, names and fingerprint as bytes that are made once
for each set of features; a parser sees an ordinary message.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from tally.v1 import feature_service_pb2 as pb

from features import CATALOG_FINGERPRINT, Answers, Feature, Status

_FEATURES, _VALUES, _KNOWN, _COMPLETE_THROUGH, _FINGERPRINT = (
    pb.GetOnlineFeaturesResponse.DESCRIPTOR.fields_by_name[name].number
    for name in ("features", "values", "known", "complete_through_ms", "catalog_fingerprint")
)
_LENGTH_DELIMITED = 2


class ResponseWriter:
    """Writes the responses of calls that share one `as_of`."""

    def __init__(
        self, features: tuple[Feature, ...], answers: Answers, complete_through_ms: int
    ) -> None:
        """Takes the answers to all rows of these calls."""
        self._header = _header(features)
        self._values = answers.values.tobytes()
        self._row_bytes = len(features) * answers.values.itemsize
        self._known = answers.known.tobytes()
        self._statuses = answers.statuses
        exceptions = answers.statuses != Status.PRESENT
        self._exceptions = exceptions if exceptions.any() else None
        self._through = varint(complete_through_ms)

    def write(self, begin: int, time_ms: Sequence[int]) -> bytes:
        """The response to the rows from `begin` on that were asked about at these instants."""
        end = begin + len(time_ms)
        rest = pb.GetOnlineFeaturesResponse(as_of_ms=time_ms)
        if self._exceptions is not None:
            exceptions = self._exceptions[begin:end].reshape(-1).nonzero()[0]
            rest.exception_indexes.extend(exceptions.tolist())
            statuses = self._statuses[begin:end].reshape(-1)[exceptions]
            rest.exception_statuses.extend(statuses.tolist())
        values = self._values[begin * self._row_bytes : end * self._row_bytes]
        return b"".join(
            (
                self._header,
                field(_VALUES, values),
                field(_KNOWN, self._known[begin:end]),
                field(_COMPLETE_THROUGH, self._through * len(time_ms)),
                rest.SerializeToString(),
            )
        )


@lru_cache(maxsize=256)
def _header(features: tuple[Feature, ...]) -> bytes:
    """Names and fingerprint on the wire."""
    names = b"".join(field(_FEATURES, feature.name.encode()) for feature in features)
    return names + field(_FINGERPRINT, CATALOG_FINGERPRINT.encode())


def field(number: int, content: bytes) -> bytes:
    """A length-delimited field on the wire."""
    return field_head(number, len(content)) + content


def field_head(number: int, length: int) -> bytes:
    """What precedes a field's content of so many bytes."""
    return varint(number << 3 | _LENGTH_DELIMITED) + varint(length)


@lru_cache(maxsize=1024)
def varint(value: int) -> bytes:
    """A number on the wire; a negative one in two's complement of 64 bits."""
    value &= 0xFFFF_FFFF_FFFF_FFFF
    out = bytearray()
    while value > 0x7F:
        out.append((value & 0x7F) | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
