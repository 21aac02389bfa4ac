"""A Redis connection for the serving path: MGET over a bare asyncio transport, parsed by hiredis.

One connection a worker, replies in the order of requests. It connects again by itself; while it is
not connected every read fails at once, so that callers hear UNAVAILABLE instead of waiting.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from functools import partial
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

    def __init__(self, timeout_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._timeout_s = timeout_s
        self._overdue: asyncio.TimerHandle | None = None
        self.transport: asyncio.Transport | None = None
        self.reader = hiredis.Reader()
        self.waiting: deque[tuple[asyncio.Future[Any], float]] = deque()
        """What is to be told of each reply that has yet to come, and by when it should."""
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not asyncio.Transport by inheritance.
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self.reader.feed(data)
        while (reply := self.reader.gets()) is not False:
            future, _ = self.waiting.popleft()
            if not future.done():
                if isinstance(reply, hiredis.ReplyError):
                    future.set_exception(StoreUnavailableError("redis", str(reply)))
                else:
                    future.set_result(reply)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._fail(str(exc) if exc else "the connection was closed")
        if not self.lost.done():
            self.lost.set_result(None)

    def _fail(self, why: str) -> None:
        error = StoreUnavailableError("redis", why)
        while self.waiting:
            future, _ = self.waiting.popleft()
            if not future.done():
                future.set_exception(error)
        if self._overdue is not None:
            self._overdue.cancel()

    def send(self, *command: Any) -> asyncio.Future[Any]:
        """Sends a command; the future has its reply."""
        future = self._loop.create_future()
        if self.transport is None:
            future.set_exception(StoreUnavailableError("redis", "not connected"))
            return future
        self.waiting.append((future, self._loop.time() + self._timeout_s))
        if self._overdue is None:
            self._overdue = self._loop.call_later(self._timeout_s, self._check_overdue)
        self.transport.write(hiredis.pack_command(command))
        return future

    def _check_overdue(self) -> None:
        """Gives the connection up if the oldest reply is overdue: the others come behind it.

        One timer for all replies; one for each would cost as much as sending a command.
        """
        self._overdue = None
        if not self.waiting:
            return
        left_s = self.waiting[0][1] - self._loop.time()
        if left_s > 0:
            self._overdue = self._loop.call_later(left_s, self._check_overdue)
            return
        self._fail(f"no answer within {self._timeout_s * 1000:.0f} ms")
        if self.transport is not None:
            self.transport.abort()


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
        return await self._protocol.send(*command)

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            protocol: _Protocol
            make = partial(_Protocol, self._timeout_s)
            if "path" in self._where:
                _, protocol = await loop.create_unix_connection(make, self._where["path"])
            else:
                _, protocol = await loop.create_connection(
                    make,
                    self._where.get("host", "127.0.0.1"),
                    self._where.get("port", 6379),
                    ssl=self._is_tls or None,
                )
            try:
                if "password" in self._where:
                    user = self._where.get("username", "default")
                    await protocol.send("AUTH", user, self._where["password"])
                # The kernel connects to a server that hangs: only an answer says that it is there.
                await protocol.send("PING")
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
