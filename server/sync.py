"""Sync: brings the stores in line, and says how far it has come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing

import structlog
from tally.v1 import feature_service_pb2 as pb

from features import CardKey
from features.keys import CARD_ID_BYTES
from server.batches import parse_time_us
from server.errors import Violation, invalid
from server.interceptors import Context
from server.threads import in_thread, threaded
from stores.postgres import ONLINE_STORE_LOCK, OfflineStore
from stores.redis_store import OnlineStore
from stores.sync import Run, Syncer, SyncProgress

REPORT_INTERVAL_S = 0.8
"""How long may pass without a report: the contract says a second."""

log = structlog.get_logger()


class SyncAnswers:
    """Serves calls."""

    def __init__(self, redis_url: str, postgres_url: str, card_key: CardKey) -> None:
        self._redis_url, self._postgres_url = redis_url, postgres_url
        self._card_key = card_key

    async def serve(
        self, request: pb.SyncRequest, context: Context
    ) -> AsyncIterator[pb.SyncResponse]:
        """One run.

        Raises:
            CallError: the caller is at fault.
            StoreError: a store does not answer.
        """
        offline = await in_thread(lambda: OfflineStore(self._postgres_url))
        online = OnlineStore(self._redis_url)
        try:
            latest: SyncProgress | None = None
            async with (
                aclosing(threaded(self._run(offline, online, request))) as progress,
                aclosing(_at_least_every(progress, REPORT_INTERVAL_S)) as reports,
            ):
                async for latest in reports:
                    yield _message(latest)
            assert latest is not None  # a run that ends has said so
            log.info("synced", run_id=latest.run_id, cards=latest.cards_done)
        finally:
            await in_thread(offline.close)
            online.close()

    def _run(self, offline: OfflineStore, online: OnlineStore, request: pb.SyncRequest) -> Run:
        """The run, while nobody rebuilds the online store as a whole."""
        for store in (offline, online):
            store.check_card_key(self._card_key.fingerprint)
        with offline.locked(ONLINE_STORE_LOCK, shared=True):
            online.install()
            syncer = Syncer(
                *(offline, online),
                card_key_fingerprint=self._card_key.fingerprint,
                probe_id=self._card_key.probe_id,
                dry_run=request.dry_run,
            )
            cards = _cards(offline, request)
            if request.direction == pb.SYNC_DIRECTION_REDIS_TO_POSTGRES:
                yield from syncer.audit(cards)
            elif cards is None:
                yield from syncer.everything()
            else:
                yield from syncer.some(cards)


def _cards(offline: OfflineStore, request: pb.SyncRequest) -> Iterable[bytes] | None:
    """The cards that are asked for; None for all."""
    match request.WhichOneof("scope"):
        case "card_id":
            return [request.card_id]
        case "changed_since":
            return offline.cards_changed_since(
                parse_time_us(request.changed_since, "changed_since")
            )
        case _:
            return None


async def _at_least_every(
    items: AsyncIterator[SyncProgress], interval_s: float
) -> AsyncGenerator[SyncProgress, None]:
    """The same items; the last one again where the next one takes long."""
    latest: SyncProgress | None = None
    upcoming = asyncio.ensure_future(anext(items, None))
    try:
        while True:
            done, _ = await asyncio.wait({upcoming}, timeout=interval_s)
            if done:
                item = upcoming.result()
                if item is None:
                    return
                latest = item
                upcoming = asyncio.ensure_future(anext(items, None))
            if latest is not None:
                yield latest
    finally:
        upcoming.cancel()
        await asyncio.wait({upcoming})


def _message(progress: SyncProgress) -> pb.SyncResponse:
    return pb.SyncResponse(
        cards_done=progress.cards_done,
        cards_total=progress.cards_total,
        transactions_written=progress.transactions_written,
        cards_differing=progress.cards_differing,
        done=progress.is_done,
        run_id=progress.run_id,
    )


def validate_sync(request: pb.SyncRequest) -> pb.SyncRequest:
    """The request, which keeps the rules of the contract.

    Raises:
        CallError: INVALID_REQUEST, with every field at fault.
    """
    violations = []
    if request.direction not in (
        pb.SYNC_DIRECTION_POSTGRES_TO_REDIS,
        pb.SYNC_DIRECTION_REDIS_TO_POSTGRES,
    ):
        violations.append(Violation("direction", "must be one of the directions"))
    if request.WhichOneof("scope") == "card_id" and len(request.card_id) != CARD_ID_BYTES:
        violations.append(Violation("card_id", f"must be {CARD_ID_BYTES} bytes"))
    if violations:
        raise invalid(violations)
    if request.WhichOneof("scope") == "changed_since":
        parse_time_us(request.changed_since, "changed_since")
    return request
