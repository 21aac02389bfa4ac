"""grpc.health.v1.Health, with a Watch that no slow watcher holds up and that ends when the server stops.

The library's own writes to watchers while it holds their lock, so that one who reads nothing stops all
changes, and forgets the others of a service when one of them leaves.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from server.interceptors import Context

SERVICE = "grpc.health.v1.Health"

_Response = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """The state of each service by its name; "" is the server as a whole."""

    def __init__(self, services: Iterable[str]) -> None:
        """Takes the services that there are; none of them can be used yet."""
        self._serving = dict.fromkeys(services, False)
        self._changed = asyncio.Event()
        self._is_over = False

    def set(self, service: str, *, serving: bool) -> None:
        """Says whether a service can be used; once the server stops, none can."""
        serving = serving and not self._is_over
        if self._serving.get(service) != serving:
            self._serving[service] = serving
            self._wake()

    def stop(self) -> None:
        """No service can be used from now on; watchers are informed, and their calls end."""
        self._is_over = True
        self._serving = dict.fromkeys(self._serving, False)
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _status(self, service: str) -> int | None:
        serving = self._serving.get(service)
        if serving is None:
            return None
        return int(_Response.SERVING if serving else _Response.NOT_SERVING)

    async def Check(  # noqa: N802 (the contract's name)
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        """The state now; NOT_FOUND where there is no such service."""
        status = self._status(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "this server has no such service")
        return _Response(status=status)

    async def Watch(  # noqa: N802 (the contract's name)
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The state now, and each later one; a watcher who is slow skips states in between."""
        sent: int | None = None
        while True:
            changed = self._changed
            status = self._status(request.service)
            status = int(_Response.SERVICE_UNKNOWN) if status is None else status
            if status != sent:
                yield _Response(status=status)
                sent = status
            elif self._is_over:
                return
            else:
                await changed.wait()
