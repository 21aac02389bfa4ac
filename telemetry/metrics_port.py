"""A Prometheus port that slow and silent callers cannot hold up: one thread, bounded connections and time.

The library's own server takes a thread for each connection, for as long as its caller likes.

    connection ──▶ request, within REQUEST_TIMEOUT_S ──▶ metrics ──▶ closed
    (the oldest one is closed where there are CONNECTIONS_MAX)
"""

from __future__ import annotations

import asyncio
import threading
from email.utils import formatdate
from http import HTTPStatus

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

CONNECTIONS_MAX = 64
"""A new one takes the place of the oldest: a scrape lasts milliseconds, so the oldest is a slow one."""
REQUEST_TIMEOUT_S = 5.0
"""Longest time from a connection's begin to its end."""
REQUEST_BYTES_MAX = 16_384
START_TIMEOUT_S = 10.0
PATHS = ("/metrics", "/")


class MetricsPort:
    """Serves a registry's metrics by HTTP/1.1, in a thread of its own, until it is closed."""

    def __init__(self, address: str, registry: CollectorRegistry) -> None:
        """Binds and serves.

        Args:
            address: host:port.
            registry: what is served.

        Raises:
            OSError: the address cannot be bound.
        """
        host, _, port = address.rpartition(":")
        self._where = host.strip("[]"), int(port)
        self._registry = registry
        self._open: dict[asyncio.Task[None], None] = {}
        """Connections by their tasks, the oldest first."""
        self._failed: OSError | None = None
        ready = threading.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(ready)), name="metrics", daemon=True
        )
        self._thread.start()
        if not ready.wait(START_TIMEOUT_S):
            raise TimeoutError(f"{address} could not be bound within {START_TIMEOUT_S:.0f} s")
        if self._failed is not None:
            raise self._failed

    def close(self) -> None:
        """Ends it and its connections."""
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()

    async def _serve(self, ready: threading.Event) -> None:
        self._loop, self._closing = asyncio.get_running_loop(), asyncio.Event()
        try:
            server = await asyncio.start_server(
                self._take, *self._where, limit=REQUEST_BYTES_MAX, backlog=CONNECTIONS_MAX
            )
        except (OSError, ValueError) as error:  # the latter of names that are none
            self._failed = OSError(str(error)) if isinstance(error, ValueError) else error
            return
        finally:
            ready.set()
        await self._closing.wait()
        server.close()

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._open) >= CONNECTIONS_MAX:
            next(iter(self._open)).cancel()
        self._open[task] = None
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                writer.write(self._answer(await reader.readuntil(b"\r\n\r\n")))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (OSError, TimeoutError, EOFError, asyncio.LimitOverrunError, asyncio.CancelledError):
            pass  # it was slow, or is gone
        finally:
            del self._open[task]
            writer.transport.abort()

    def _answer(self, request: bytes) -> bytes:
        first, *rest = request.decode("latin-1").split("\r\n")
        method, _, target = first.partition(" ")
        path = target.partition(" ")[0].partition("?")[0]
        if method not in ("GET", "HEAD"):
            return _response(HTTPStatus.METHOD_NOT_ALLOWED, "text/plain", b"", method)
        if path not in PATHS:
            return _response(
                HTTPStatus.NOT_FOUND, "text/plain", b"metrics are at /metrics\n", method
            )
        headers = dict(line.lower().split(":", 1) for line in rest if ":" in line)
        encode, kind = choose_encoder(headers.get("accept", ""))
        try:
            body = encode(self._registry)
        except Exception as error:  # noqa: BLE001 (the scrape fails, and the port goes on)
            text = f"{type(error).__name__}\n".encode()
            return _response(HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain", text, method)
        return _response(HTTPStatus.OK, kind, body, method)


def _response(status: HTTPStatus, kind: str, body: bytes, method: str) -> bytes:
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\n"
        f"Date: {formatdate(usegmt=True)}\r\n"
        f"Content-Type: {kind}\r\n"
        f"Content-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode("latin-1") + (b"" if method == "HEAD" else body)
