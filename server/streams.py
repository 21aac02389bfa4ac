"""Bounds of calls whose answer is a stream: how many at once, how long, and how long each side may wait.

    first message ──▶ a place is taken ──▶ answers, while messages follow ──▶ the place is free
    (within a limit)   (if there is one)    (each within a limit, all within another)

A place is taken once the first message is there: callers who send nothing exclude no others. Limits are
timers, which also end a call in which nothing happens. Answers are written here and not by the
framework, so that a call can be ended with a reason while an answer waits for its caller.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, cast

import grpc

from server.errors import CallError, overloaded
from server.interceptors import Context, Layer, StreamBehaviour, StreamKind

RETRY_AFTER_MS = 1_000
WAITING_MAX = 1_024
"""Calls of a service that have sent no message yet."""


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """The bounds of a service's streams; None for none."""

    calls_max: int
    """Calls that are served at once."""
    whole_s: float | None = None
    """Longest time that one may take."""
    first_message_s: float | None = None
    """Longest wait for the caller's first message."""
    idle_s: float | None = None
    """Longest wait for each further message of the caller."""
    untaken_s: float | None = None
    """Longest wait until the caller takes an answer."""


class StreamLayer(Layer):
    """Holds streams within the limits of their services."""

    def __init__(self, limits: Mapping[str, StreamLimits]) -> None:
        """Takes the limits by the service's full name; every service with streams has some."""
        self._places = {service: _Places(found) for service, found in limits.items()}

    def wrap_stream(
        self, method: str, kind: StreamKind, behaviour: StreamBehaviour
    ) -> StreamBehaviour:
        """Wraps one method's behaviour."""
        places = self._places[method.lstrip("/").split("/", 1)[0]]
        limits = places.limits

        async def bounded(request: Any, context: Context) -> AsyncIterator[Any]:
            if kind == "bidi_stream":
                request = await places.messages_of(context)
            with places.one(), _Timer(limits) as timer:
                responses = cast("AsyncGenerator[Any, None]", behaviour(request, context))
                async with aclosing(responses):
                    async for response in responses:
                        with timer.until_taken():
                            await context.write(response)
            return
            yield  # a generator, as the other layers are

        return bounded


class _Places:
    """The places of one service."""

    def __init__(self, limits: StreamLimits) -> None:
        self.limits = limits
        self._served = self._waiting = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """Takes a place and frees it.

        Raises:
            CallError: OVERLOADED: there is none.
        """
        if self._served >= self.limits.calls_max:
            message = f"{self._served:,} such calls are being served already"
            raise overloaded(message, self.limits.calls_max, RETRY_AFTER_MS)
        self._served += 1
        try:
            yield
        finally:
            self._served -= 1

    async def messages_of(self, context: Context) -> AsyncIterator[bytes]:
        """The messages of a call, once the first one has arrived.

        Raises:
            CallError: OVERLOADED, or IDLE where none has arrived in time.
        """
        if self._waiting >= WAITING_MAX:
            message = f"{self._waiting:,} calls have sent nothing yet"
            raise overloaded(message, WAITING_MAX, RETRY_AFTER_MS)
        self._waiting += 1
        try:
            first = await _message_within(self.limits.first_message_s, context)
        finally:
            self._waiting -= 1
        return self._from(first, context)

    async def _from(self, message: Any, context: Context) -> AsyncIterator[bytes]:
        while message is not grpc.aio.EOF:
            yield message
            message = await _message_within(self.limits.idle_s, context)


async def _message_within(limit_s: float | None, context: Context) -> Any:
    """The next message, or EOF. By the call itself: the framework's iterator over messages is part of a
    cycle with its call, which would keep what it has read until the collector comes.

    Raises:
        CallError: IDLE.
    """
    try:
        async with asyncio.timeout(limit_s):
            return await context.read()
    except TimeoutError:
        assert limit_s is not None
        raise _idle(f"no message arrived for {limit_s:g} s", limit_s) from None


Reason = Literal["whole", "untaken"]


class _Timer:
    """Cancels the call's task when a limit has passed, and says which."""

    def __init__(self, limits: StreamLimits) -> None:
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._passed: Reason | None = None
        self._whole = self._after(limits.whole_s, "whole")

    def __enter__(self) -> _Timer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._whole is not None:
            self._whole.cancel()
        if self._passed is not None and isinstance(error, asyncio.CancelledError):
            raise self._error() from None

    @contextmanager
    def until_taken(self) -> Iterator[None]:
        """While an answer waits for the caller."""
        timer = self._after(self._limits.untaken_s, "untaken")
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()

    def _after(self, limit_s: float | None, reason: Reason) -> asyncio.TimerHandle | None:
        return None if limit_s is None else self._loop.call_later(limit_s, self._end, reason)

    def _end(self, reason: Reason) -> None:
        if self._passed is None and self._task is not None:
            self._passed = reason
            self._task.cancel()

    def _error(self) -> CallError:
        if self._passed == "untaken":
            limit_s = self._limits.untaken_s or 0.0
            return _idle(f"no answer was taken for {limit_s:g} s", limit_s)
        return CallError(
            grpc.StatusCode.DEADLINE_EXCEEDED,
            "DEADLINE",
            f"it took more than {self._limits.whole_s:g} s; an export is resumed by its cursor",
        )


def _idle(message: str, limit_s: float) -> CallError:
    return CallError(
        grpc.StatusCode.DEADLINE_EXCEEDED, "IDLE", message, metadata={"limit_s": f"{limit_s:g}"}
    )
