"""What can go wrong with a call: one base, a narrow class for each kind, details as attributes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

_CUT_OFF = ("Stream removed", "Socket closed", "recvmsg:")
"""How the library says that a connection ended in the middle of an answer."""
_CLOSED = "Channel closed"
"""How it says that its own end was closed meanwhile."""
CLOSED = "the client is closed: make another one"
_DETAILS_KEY = "grpc-status-details-bin"


@dataclass(frozen=True, slots=True)
class Violation:
    """One field of a request that breaks a rule."""

    field: str
    """Path of the field, such as rows[3].amount."""
    description: str
    """What is wrong."""


class TallyError(Exception):
    """A call failed.

    Attributes:
        code: the gRPC status code.
        reason: the name of a tally.v1.ErrorReason without its prefix; empty where the failure
            came from the transport.
        metadata: what the reason's comment in the contract promises.
        violations: fields at fault.
        retry_after_ms: when to try again; None where the server did not say.
    """

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode,
        reason: str = "",
        metadata: dict[str, str] | None = None,
        violations: tuple[Violation, ...] = (),
        retry_after_ms: int | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.metadata = metadata or {}
        self.violations = violations
        self.retry_after_ms = retry_after_ms

    def __reduce__(self) -> tuple[Any, ...]:
        # So that it comes whole out of another process, such as one that loads training data.
        return _again, (type(self), str(self), vars(self))


def _again(kind: type[TallyError], message: str, attributes: dict[str, Any]) -> TallyError:
    error = kind.__new__(kind, message)
    vars(error).update(attributes)
    return error


class InvalidRequestError(TallyError):
    """The request breaks a rule of the contract; `violations` says where."""


class StaleError(TallyError):
    """The store is not complete through the instant asked for."""


class CardKeyMismatchError(TallyError):
    """A store was written under another card key."""


class UnavailableError(TallyError):
    """The server or its store cannot be reached; trying again may help."""


class OverloadedError(TallyError):
    """The server sheds load; trying again later may help."""


class UnauthenticatedError(TallyError):
    """The token is missing or wrong."""


class NotServedError(TallyError):
    """The server does not serve this call."""


class DeadlineError(TallyError):
    """No answer within the deadline."""


class CorruptedError(TallyError):
    """What arrived is not what was sent."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code=grpc.StatusCode.DATA_LOSS)


class ClientStateError(TallyError):
    """The client cannot be used: it is closed, or belongs to another event loop."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code=grpc.StatusCode.FAILED_PRECONDITION)


class CursorExpiredError(TallyError):
    """An export's snapshot is gone: begin a new export."""


class InternalError(TallyError):
    """A fault of the server's own."""


_BY_CODE: dict[grpc.StatusCode, type[TallyError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.UNIMPLEMENTED: NotServedError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.INTERNAL: InternalError,
}
_BY_REASON: dict[str, type[TallyError]] = {
    "STALE": StaleError,
    "CARD_KEY_MISMATCH": CardKeyMismatchError,
    "CURSOR_EXPIRED": CursorExpiredError,
}


def from_rpc_error(error: grpc.RpcError, proxy: str | None = None) -> TallyError:
    """The narrow error of a failed call; the caller raises it `from` the original.

    Args:
        error: the framework's.
        proxy: the variable of the environment that sends calls through a proxy; None where none does.
    """
    code: grpc.StatusCode = error.code()
    reason, metadata = "", dict[str, str]()
    violations: tuple[Violation, ...] = ()
    retry_after_ms: int | None = None
    trailing: Any = error.trailing_metadata() or ()
    for key, value in trailing:
        if key != _DETAILS_KEY:
            continue
        for detail in status_pb2.Status.FromString(value).details:
            info = error_details_pb2.ErrorInfo()
            bad = error_details_pb2.BadRequest()
            retry = error_details_pb2.RetryInfo()
            if detail.Unpack(info):
                reason, metadata = info.reason, dict(info.metadata)
            elif detail.Unpack(bad):
                violations = tuple(Violation(v.field, v.description) for v in bad.field_violations)
            elif detail.Unpack(retry):
                retry_after_ms = retry.retry_delay.ToMilliseconds()
    if not reason and (error.details() or "").startswith(_CLOSED):
        return ClientStateError(CLOSED)
    kind = _BY_REASON.get(reason) or _BY_CODE.get(code, TallyError)
    message = error.details() or code.name
    if not reason and message.startswith(_CUT_OFF):
        kind, message = UnavailableError, f"the server went away: ask again ({message})"
    if kind is UnavailableError and not reason and proxy is not None:
        message += (
            f" ({proxy} is set: the call goes through that proxy, unless no_proxy names the server)"
        )
    return kind(
        message,
        code=code,
        reason=reason,
        metadata=metadata,
        violations=violations,
        retry_after_ms=retry_after_ms,
    )
