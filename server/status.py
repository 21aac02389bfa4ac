"""What GetStatus says of Postgres: one look a second, over one connection, shared by all calls.

    calls ──▶ the last look, where it is younger than LOOK_INTERVAL_S
          └──▶ the look under way, or a new one, for ANSWER_WITHIN_S at the most ──▶ thread, connection

A look has a thread, since it may hang for as long as Postgres does. There is never more than one; it is
cut off after GIVE_UP_S, for a network may drop what would end it.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from contextlib import suppress

from tally.v1 import admin_service_pb2 as pb

from stores.connections import Connected, reported
from stores.errors import NotReadyError, StoreError

LOOK_INTERVAL_S = 1.0
ANSWER_WITHIN_S = 0.85
GIVE_UP_S = 5.0


class OfflineLook:
    """The state of Postgres, on one event loop."""

    def __init__(self, url: str, card_key_fingerprint: str) -> None:
        """Takes where it is, and the card key that it should be written under."""
        self._url = url
        self._card_key = card_key_fingerprint
        self._connection: Connected | None = None
        """Of the thread that looks; between looks, of nobody."""
        self._last: tuple[float, pb.StoreStatus] | None = None
        """When the last look began, by the loop's clock, and what it saw."""
        self._under_way: asyncio.Future[pb.StoreStatus] | None = None

    async def status(self) -> pb.StoreStatus:
        """The state, at most LOOK_INTERVAL_S old; within ANSWER_WITHIN_S, whatever Postgres does."""
        now = asyncio.get_running_loop().time()
        if self._last is not None and now - self._last[0] < LOOK_INTERVAL_S:
            return self._last[1]
        look = self._under_way or self._begin(now)
        done, _ = await asyncio.wait({look}, timeout=ANSWER_WITHIN_S)
        return look.result() if done else _unreachable(_LATE)

    def _begin(self, now: float) -> asyncio.Future[pb.StoreStatus]:
        loop = asyncio.get_running_loop()
        look: asyncio.Future[pb.StoreStatus] = loop.create_future()
        self._under_way = look

        def end(status: pb.StoreStatus) -> None:
            overdue.cancel()
            self._under_way, self._last = None, (now, status)
            look.set_result(status)

        def work() -> None:
            status = self._look()
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(end, status)

        overdue = loop.call_later(GIVE_UP_S, self._cut_off)
        threading.Thread(target=work, name="status", daemon=True).start()
        return look

    def _look(self) -> pb.StoreStatus:
        """Blocks for as long as Postgres does."""
        try:
            if self._connection is None:
                self._connection = Connected(self._url)
            with reported():
                row = self._connection.sql.execute(
                    "SELECT card_key_fingerprint FROM installation"
                ).fetchone()
        except NotReadyError:
            detail = "it has no schema yet: `tally load` makes it"
            return pb.StoreStatus(state=pb.STORE_STATE_INCOMPLETE, detail=detail)
        except StoreError as error:
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.close()
            return _unreachable(str(error))
        if row is None:
            return pb.StoreStatus(state=pb.STORE_STATE_INCOMPLETE)
        if row[0] != self._card_key:
            return pb.StoreStatus(state=pb.STORE_STATE_KEY_MISMATCH)
        return pb.StoreStatus(state=pb.STORE_STATE_SERVING)

    def _cut_off(self) -> None:
        """Ends the connection of a look that hangs, which ends the look; one that still connects ends by
        itself."""
        connection = self._connection
        if connection is None:
            return
        with suppress(OSError), socket.socket(fileno=os.dup(connection.sql.fileno())) as line:
            line.shutdown(socket.SHUT_RDWR)


_LATE = f"no answer within {ANSWER_WITHIN_S * 1000:.0f} ms"


def _unreachable(detail: str) -> pb.StoreStatus:
    return pb.StoreStatus(state=pb.STORE_STATE_UNREACHABLE, detail=detail)
