"""A Redis connection for the serving path: MGET over a bare asyncio transport, parsed by hiredis.

One connection a worker, replies in the order of requests. It connects again by itself; while it is
not connected every read fails at once, so that callers hear UNAVAILABLE instead of waiting.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any, cast

import hiredis
import structlog
from redis.connection import SSLConnection, parse_url

from stores.errors import StoreUnavailableError

RECONNECT_S_MIN = 0.05
RECONNECT_S_MAX = 1.0
CONNECT_TIMEOUT_S = 2.0

log = structlog.get_logger()


class _Protocol(asyncio.Protocol):
    """One connection's life: replies resolve futures first in, first out."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.reader = hiredis.Reader()
        self.waiting: deque[asyncio.Future[Any]] = deque()
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not asyncio.Transport by inheritance.
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self.reader.feed(data)
        while (reply := self.reader.gets()) is not False:
            future = self.waiting.popleft()
            if not future.done():
                if isinstance(reply, hiredis.ReplyError):
                    future.set_exception(StoreUnavailableError("redis", str(reply)))
                else:
                    future.set_result(reply)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        error = StoreUnavailableError("redis", str(exc) if exc else "the connection was closed")
        while self.waiting:
            future = self.waiting.popleft()
            if not future.done():
                future.set_exception(error)
        if not self.lost.done():
            self.lost.set_result(None)

    def send(self, *command: Any) -> asyncio.Future[Any]:
        """Sends a command; the future has its reply."""
        future = asyncio.get_running_loop().create_future()
        if self.transport is None:
            future.set_exception(StoreUnavailableError("redis", "not connected"))
            return future
        self.waiting.append(future)
        self.transport.write(hiredis.pack_command(command))
        return future


class RedisReader:
    """Reads values by key, over one connection that keeps itself up."""

    def __init__(self, url: str, timeout_ms: int) -> None:
        """Takes redis://[user:password@]host:port/db or unix:///path?db=n."""
        self._where: dict[str, Any] = parse_url(url)  # type: ignore[no-untyped-call]
        self._is_tls = self._where.get("connection_class") is SSLConnection
        self._timeout_s = timeout_ms / 1000
        self._protocol: _Protocol | None = None
        self._keeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Connects if it can, and keeps trying if it cannot."""
        try:
            await self._connect()
        except (OSError, TimeoutError, StoreUnavailableError) as error:
            log.warning("redis is not reachable yet", error=str(error))
        self._keeper = asyncio.create_task(self._keep())

    async def stop(self) -> None:
        """Closes the connection for good."""
        if self._keeper is not None:
            self._keeper.cancel()
        if self._protocol is not None and self._protocol.transport is not None:
            self._protocol.transport.close()

    @property
    def is_connected(self) -> bool:
        """Whether a read can be tried."""
        return self._protocol is not None and self._protocol.transport is not None

    async def mget(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The values of keys, read at one instant.

        Raises:
            StoreUnavailableError: not connected, or no answer in time.
        """
        values: list[bytes | None] = await self._ask(b"MGET", *keys)
        return values

    async def hvals(self, key: bytes) -> list[bytes]:
        """The values of a hash; errors as for mget."""
        values: list[bytes] = await self._ask(b"HVALS", key)
        return values

    async def _ask(self, *command: bytes) -> Any:
        if self._protocol is None:
            raise StoreUnavailableError("redis", "not connected")
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._protocol.send(*command)
        except TimeoutError:
            # Replies come in order: whatever this one waits for, the next would wait for too.
            if self._protocol.transport is not None:
                self._protocol.transport.abort()
            raise StoreUnavailableError(
                "redis", f"no answer within {self._timeout_s * 1000:.0f} ms"
            ) from None

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            protocol: _Protocol
            if "path" in self._where:
                _, protocol = await loop.create_unix_connection(_Protocol, self._where["path"])
            else:
                _, protocol = await loop.create_connection(
                    _Protocol,
                    self._where.get("host", "127.0.0.1"),
                    self._where.get("port", 6379),
                    ssl=self._is_tls or None,
                )
            try:
                if "password" in self._where:
                    user = self._where.get("username", "default")
                    await protocol.send("AUTH", user, self._where["password"])
                if self._where.get("db"):
                    await protocol.send("SELECT", str(self._where["db"]))
            except BaseException:
                if protocol.transport is not None:
                    protocol.transport.abort()
                raise
        self._protocol = protocol

    async def _keep(self) -> None:
        """Connects again whenever the connection is gone."""
        pause_s = RECONNECT_S_MIN
        while True:
            if self.is_connected:
                assert self._protocol is not None
                pause_s = RECONNECT_S_MIN
                await asyncio.shield(self._protocol.lost)
                log.warning("lost the connection to redis")
            try:
                await self._connect()
                log.info("connected to redis")
            except (OSError, TimeoutError, StoreUnavailableError):
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, RECONNECT_S_MAX)
