"""Errors of calls, as google.rpc.Status with details."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "tally.fraud"
VIOLATIONS_MAX = 32
"""Violations listed in one answer; their whole number is in the metadata."""
MESSAGE_CHARS_MAX = 300
RETRY_AFTER_MS = 500

STATUS_DETAILS_KEY = "grpc-status-details-bin"


@dataclass(frozen=True, slots=True)
class Violation:
    """One field that breaks a rule."""

    field: str
    """Path of the field, such as rows[3].amount."""
    description: str
    """What is wrong and what would be right; never the value of a card number."""
    row: int = -1
    """The row it is in; -1 for the request as a whole."""


class CallError(Exception):
    """Ends a call with a code, a documented reason and details."""

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: str,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[Violation] = (),
        retry_after_ms: int | None = None,
    ) -> None:
        """Makes the error.

        Args:
            code: the gRPC code.
            reason: the name of an ErrorReason without its prefix.
            message: for a person.
            metadata: as the reason's comment in the contract says.
            violations: fields at fault, for INVALID_ARGUMENT.
            retry_after_ms: when to try again, where trying again can help.
        """
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata or {})
        self.violations = violations
        self.retry_after_ms = retry_after_ms

    def to_status(self) -> status_pb2.Status:
        """The status that goes out."""
        details = [
            error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=self.metadata)
        ]  # type: list[object]
        if self.violations:
            details.append(
                error_details_pb2.BadRequest(
                    field_violations=[
                        error_details_pb2.BadRequest.FieldViolation(
                            field=violation.field, description=violation.description
                        )
                        for violation in self.violations[:VIOLATIONS_MAX]
                    ]
                )
            )
        if self.retry_after_ms is not None:
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromMilliseconds(self.retry_after_ms)
            details.append(retry)
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        for detail in details:
            packed = any_pb2.Any()
            packed.Pack(detail)  # type: ignore[arg-type]
            status.details.append(packed)
        return status


def invalid(violations: Sequence[Violation]) -> CallError:
    """The request breaks rules of the contract."""
    first = violations[0]
    more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
    return CallError(
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_REQUEST",
        f"{first.field}: {first.description}{more}",
        metadata={"violations": str(len(violations))},
        violations=violations,
    )


def unavailable(store: str, message: str) -> CallError:
    """A store cannot be reached; trying again may help."""
    reason = "ONLINE_STORE_UNAVAILABLE" if store == "redis" else "OFFLINE_STORE_UNAVAILABLE"
    return CallError(
        grpc.StatusCode.UNAVAILABLE,
        reason,
        message[:MESSAGE_CHARS_MAX],  # a driver's may quote a query, and trailers are bounded
        metadata={"store": store},
        retry_after_ms=RETRY_AFTER_MS,
    )


def overloaded(message: str, limit: int, retry_after_ms: int) -> CallError:
    """As much is being done as the server is set to do at once; trying again later may help."""
    return CallError(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "OVERLOADED",
        message,
        metadata={"limit_calls": str(limit)},
        retry_after_ms=retry_after_ms,
    )


def card_key_mismatch(store: str) -> CallError:
    """A store was written under another card key: every card would look unknown."""
    return CallError(
        grpc.StatusCode.FAILED_PRECONDITION,
        "CARD_KEY_MISMATCH",
        f"{store} was written under another card key",
        metadata={"store": store},
    )
