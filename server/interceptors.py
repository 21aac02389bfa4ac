"""What happens around every call, from the outside in: metrics, errors, auth, deadline, streams.

Each is a layer around a method's behaviour, put there once, when the method is registered. The
framework's own interceptors are asked about every call, which costs it 15 us.

Requests pass through the layers as the bytes that arrived, and become messages behind the last one:
a caller without a token costs the server no message objects.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import aclosing, contextmanager
from typing import Any, Literal, cast

import grpc
import structlog

from server.errors import STATUS_DETAILS_KEY, CallError, card_key_mismatch, unavailable
from server.metrics import CallMetrics, Metrics
from stores.errors import CardKeyMismatchError, LockedError, NotReadyError, StoreUnavailableError

Context = grpc.aio.ServicerContext[Any, Any]
Behaviour = Callable[[Any, Context], Awaitable[Any]]
StreamBehaviour = Callable[[Any, Context], AsyncIterator[Any]]
Parser = Callable[[bytes], Any]
"""Makes a request, as a behaviour takes it, of the bytes of a message; raises CallError."""
ParserOf = Callable[[str, Parser], Parser]
"""Given a method and what parses its messages: what checks and parses them."""
StreamKind = Literal["server_stream", "bidi_stream"]

log = structlog.get_logger()

DEADLINE_CHECK_INTERVAL_S = 0.005


class Layer:
    """Something that happens around every call; by default nothing."""

    def wrap(self, method: str, behaviour: Behaviour) -> Behaviour:
        """Returns what is to be called instead of a method's behaviour."""
        return behaviour

    def wrap_stream(
        self, method: str, kind: StreamKind, behaviour: StreamBehaviour
    ) -> StreamBehaviour:
        """The same of a method whose answer is a stream; `kind` as metrics have it."""
        return behaviour


class LayeredServer:
    """Puts layers around the methods that are registered through it.

    It takes the place of the framework's server where generated code registers a service.
    """

    def __init__(
        self, server: grpc.aio.Server, layers: Sequence[Layer], parser_of: ParserOf
    ) -> None:
        """Takes the server, the layers, the first outermost, and what parses a method's requests."""
        self._server: Any = server
        self._layers = layers
        self._parser_of = parser_of

    def add_registered_method_handlers(
        self, service: str, handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None:
        """Registers the methods of a service, by name."""
        wrapped = {
            name: self._wrap(f"/{service}/{name}", handler) for name, handler in handlers.items()
        }
        self._server.add_registered_method_handlers(service, wrapped)

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Generated code calls it for the same methods once more; they are registered by name."""

    def _wrap(
        self, method: str, handler: grpc.RpcMethodHandler[Any, Any]
    ) -> grpc.RpcMethodHandler[Any, Any]:
        parse = self._parser_of(method, cast("Parser", handler.request_deserializer))
        if handler.unary_unary is None:
            return self._wrap_stream(method, handler, parse)
        behaviour = _parsed(cast("Behaviour", handler.unary_unary), parse)
        for layer in reversed(self._layers):
            behaviour = layer.wrap(method, behaviour)
        return grpc.unary_unary_rpc_method_handler(
            behaviour, response_serializer=handler.response_serializer
        )

    def _wrap_stream(
        self, method: str, handler: grpc.RpcMethodHandler[Any, Any], parse: Parser
    ) -> grpc.RpcMethodHandler[Any, Any]:
        if handler.stream_unary is not None:
            raise NotImplementedError("no method of ours takes a stream and gives one answer")
        kind: StreamKind = "server_stream" if handler.unary_stream else "bidi_stream"
        streams: Any = handler.unary_stream or handler.stream_stream
        parsed = _parsed_first if kind == "server_stream" else _parsed_each
        behaviour: StreamBehaviour = parsed(streams, parse)
        for layer in reversed(self._layers):
            behaviour = layer.wrap_stream(method, kind, behaviour)
        make: Any = (
            grpc.unary_stream_rpc_method_handler
            if handler.unary_stream
            else grpc.stream_stream_rpc_method_handler
        )
        return make(  # type: ignore[no-any-return]
            behaviour, response_serializer=handler.response_serializer
        )


def _parsed(behaviour: Behaviour, parse: Parser) -> Behaviour:
    """A behaviour that takes bytes, of one that takes a request."""

    async def parsed(data: bytes, context: Context) -> Any:
        return await behaviour(parse(data), context)

    return parsed


def _parsed_first(behaviour: StreamBehaviour, parse: Parser) -> StreamBehaviour:
    """The same where the answer is a stream."""

    async def parsed(data: bytes, context: Context) -> AsyncIterator[Any]:
        responses = cast("AsyncGenerator[Any, None]", behaviour(parse(data), context))
        async with aclosing(responses):
            async for response in responses:
                yield response

    return parsed


def _parsed_each(behaviour: StreamBehaviour, parse: Parser) -> StreamBehaviour:
    """The same where requests are a stream, too. An error of one is raised in its place."""

    async def messages(arriving: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        async for data in arriving:
            yield parse(data)

    async def parsed(arriving: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
        responses = cast("AsyncGenerator[Any, None]", behaviour(messages(arriving), context))
        async with aclosing(responses):
            async for response in responses:
                yield response

    return parsed


class MetricsLayer(Layer):
    """Counts and times calls."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def wrap(self, method: str, behaviour: Behaviour) -> Behaviour:
        """Wraps one method's behaviour."""
        service, name = method.lstrip("/").split("/", 1)
        calls = self._metrics.calls_of("unary", service, name)

        async def measured(request: Any, context: Context) -> Any:
            with _measured(calls, context):
                return await behaviour(request, context)

        return measured

    def wrap_stream(
        self, method: str, kind: StreamKind, behaviour: StreamBehaviour
    ) -> StreamBehaviour:
        """Wraps one method's behaviour."""
        service, name = method.lstrip("/").split("/", 1)
        calls = self._metrics.calls_of(kind, service, name)

        async def measured(requests: Any, context: Context) -> AsyncIterator[Any]:
            with _measured(calls, context):
                async for response in behaviour(requests, context):
                    yield response

        return measured


@contextmanager
def _measured(calls: CallMetrics, context: Context) -> Iterator[None]:
    calls.begin()
    begin = time.perf_counter()
    code: Any = grpc.StatusCode.UNKNOWN.value[0]
    try:
        yield
        code = 0
    except (asyncio.CancelledError, GeneratorExit):
        code = grpc.StatusCode.CANCELLED.value[0]
        raise
    except BaseException:
        set_code = context.code()
        code = getattr(set_code, "value", (set_code,))[0] or code
        raise
    finally:
        calls.end(code, time.perf_counter() - begin)


class ErrorLayer(Layer):
    """Turns every error into a google.rpc.Status with an ErrorInfo."""

    def wrap(self, method: str, behaviour: Behaviour) -> Behaviour:
        """Wraps one method's behaviour."""

        async def reported(request: Any, context: Context) -> Any:
            try:
                return await behaviour(request, context)
            except Exception as error:  # noqa: BLE001 (every error has its status)
                await abort(context, _call_error(error, method))

        return reported

    def wrap_stream(
        self, method: str, kind: StreamKind, behaviour: StreamBehaviour
    ) -> StreamBehaviour:
        """Wraps one method's behaviour."""

        async def reported(requests: Any, context: Context) -> AsyncIterator[Any]:
            try:
                async for response in behaviour(requests, context):
                    yield response
            except Exception as error:  # noqa: BLE001 (every error has its status)
                await abort(context, _call_error(error, method))

        return reported


def _call_error(error: Exception, method: str) -> CallError:
    """What the caller is told of an error."""
    match error:
        case CallError():
            return error
        case StoreUnavailableError() | NotReadyError():
            return unavailable(error.store, str(error))
        case CardKeyMismatchError():
            return card_key_mismatch(error.store)
        case LockedError():
            return unavailable("postgres", f"{error}: ask again later")
        case grpc.aio.AbortError():
            raise error  # it is told already
    error_id = secrets.token_hex(6)
    log.error("a call failed", method=method, error_id=error_id, exc_info=error)
    return CallError(
        grpc.StatusCode.INTERNAL,
        "INTERNAL",
        f"a fault of the server's own; its log has the trace under {error_id}",
        metadata={"error_id": error_id},
    )


async def abort(context: Context, error: CallError) -> None:
    """Ends a call with an error and its details."""
    status = error.to_status().SerializeToString()
    try:
        await context.abort(error.code, error.message, ((STATUS_DETAILS_KEY, status),))
    except grpc.aio.AbortError as aborted:
        # The framework keeps this one with the call, and by its trace it keeps the call and all that the
        # request was: a cycle of megabytes that waits for the collector. So another one is raised.
        aborted.__traceback__ = aborted.__context__ = None
        raise grpc.aio.AbortError from None


def expected_header(token: str) -> bytes:
    """What a call with this token carries."""
    return f"Bearer {token}".encode()


def is_open(method: str) -> bool:
    """Whether a method is served without a token: health checks are."""
    return method.startswith("/grpc.health.")


def check_token(context: Context, expected: bytes) -> None:
    """Raises CallError where a call does not carry the header expected."""
    for key, value in context.invocation_metadata() or ():
        if key == "authorization":
            given = value.encode() if isinstance(value, str) else value
            if hmac.compare_digest(given, expected):
                return
    raise CallError(
        grpc.StatusCode.UNAUTHENTICATED,
        "BAD_TOKEN",
        "this server asks for `authorization: Bearer <token>`",
    )


class AuthLayer(Layer):
    """Asks for a bearer token, except from health checks."""

    def __init__(self, token: str) -> None:
        self._expected = expected_header(token)

    def wrap(self, method: str, behaviour: Behaviour) -> Behaviour:
        """Wraps one method's behaviour."""
        if is_open(method):
            return behaviour

        async def authorised(request: Any, context: Context) -> Any:
            check_token(context, self._expected)
            return await behaviour(request, context)

        return authorised

    def wrap_stream(
        self, method: str, kind: StreamKind, behaviour: StreamBehaviour
    ) -> StreamBehaviour:
        """Wraps one method's behaviour."""
        if is_open(method):
            return behaviour

        async def authorised(requests: Any, context: Context) -> AsyncIterator[Any]:
            check_token(context, self._expected)
            async for response in behaviour(requests, context):
                yield response

        return authorised


class DeadlineLayer(Layer):
    """Bounds every call by the caller's deadline or the server's limit, whichever is sooner.

    One timer looks after all calls, some milliseconds late at the most: a timer for each would cost
    a call as much as its arithmetic.
    """

    def __init__(self, limit_ms: int) -> None:
        self._limit_s = limit_ms / 1000
        self._due: dict[asyncio.Task[Any], float] = {}
        """Calls under way and the loop's time at which each is overdue."""
        self._overdue: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None

    def wrap(self, method: str, behaviour: Behaviour) -> Behaviour:
        """Wraps one method's behaviour."""

        async def bounded(request: Any, context: Context) -> Any:
            remaining_s = context.time_remaining()
            if remaining_s is None or remaining_s > self._limit_s:
                remaining_s = self._limit_s
            elif remaining_s <= 0:  # it waited to be handed over for as long as its caller waits
                raise _late(0)
            task = self._watch(remaining_s)
            try:
                return await behaviour(request, context)
            except asyncio.CancelledError:
                if task not in self._overdue:
                    raise
                raise _late(remaining_s) from None
            finally:
                del self._due[task]
                self._overdue.discard(task)

        return bounded

    def _watch(self, remaining_s: float) -> asyncio.Task[Any]:
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        self._due[task] = loop.time() + remaining_s
        if self._timer is None:
            self._timer = loop.call_later(DEADLINE_CHECK_INTERVAL_S, self._cancel_overdue)
        return task

    def _cancel_overdue(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        for task, due in self._due.items():
            if due <= now and task not in self._overdue:
                self._overdue.add(task)
                task.cancel()
        self._timer = None
        if self._due:
            self._timer = loop.call_later(DEADLINE_CHECK_INTERVAL_S, self._cancel_overdue)


def _late(limit_s: float) -> CallError:
    return CallError(
        grpc.StatusCode.DEADLINE_EXCEEDED,
        "DEADLINE",
        f"not answered within {limit_s * 1000:.0f} ms",
    )
