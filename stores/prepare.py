"""Opens both stores for writing: schema up to date, one card key, the online store complete."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext

from stores.connections import reported
from stores.errors import LockedError
from stores.postgres import ONLINE_STORE_LOCK, OfflineStore, migrate
from stores.redis_store import OnlineStore

ALONE_TIMEOUT_S, ALONE_TIMEOUT_MAX_S = 3.0, 48.0
ALONE_PAUSE_S = 2.0


@contextmanager
def opened_stores(
    redis_url: str,
    postgres_url: str,
    card_key_fingerprint: str,
    report: Callable[[str], None],
    *,
    shared: bool = True,
) -> Iterator[tuple[OfflineStore, OnlineStore]]:
    """The stores, ready to be written to; closed at the end.

    Migrates Postgres, installs the Redis functions, and rebuilds an online store that lost its
    data, since loading into it would make it look complete.

    Args:
        redis_url: the online store.
        postgres_url: the offline store.
        card_key_fingerprint: of the key that this process writes under.
        report: told in a sentence what takes long.
        shared: whether to hold the online store's lock with others who write; whoever asks for it
            alone holds none.

    Raises:
        CardKeyMismatchError: a store was written under another key.
        StoreUnavailableError: a store cannot be reached.
    """
    migrate(postgres_url)
    offline, online = OfflineStore(postgres_url), OnlineStore(redis_url)
    try:
        offline.adopt_card_key(card_key_fingerprint)
        online.check_card_key(card_key_fingerprint)
        offline.refresh_feature_view()
        online.install()
        if not online.is_initialised or not offline.has_current_records:
            report("waiting until nobody writes to the stores")
            with _alone(offline):
                # Nobody loads meanwhile: a rebuild sets whole ledgers.
                _ensure_current(offline, report)
                _ensure_complete(offline, online, card_key_fingerprint, report)
        with offline.locked(ONLINE_STORE_LOCK, shared=True) if shared else nullcontext():
            yield offline, online
    finally:
        offline.close()
        online.close()


@contextmanager
def _alone(offline: OfflineStore) -> Iterator[None]:
    """Holds the online store's lock alone, however long it takes.

    It is asked for again and again: while one waits for it alone, nobody else gets to share it, and
    the stream would stand still for as long as a load takes. Each time for longer: parts of a batch run
    follow one another, and each may take a while.
    """
    timeout_s = ALONE_TIMEOUT_S
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(
                    offline.locked(ONLINE_STORE_LOCK, shared=False, timeout_s=timeout_s)
                )
                break
            except LockedError:
                timeout_s = min(2 * timeout_s, ALONE_TIMEOUT_MAX_S)
                time.sleep(ALONE_PAUSE_S)
        yield


def _ensure_current(offline: OfflineStore, report: Callable[[str], None]) -> None:
    """Computes records of another format anew."""
    if offline.has_current_records:
        return
    if offline.has_transactions():
        report("the records beside transactions are of another format: computing them anew")
    # Imported where they are needed, which is seldom: machine code is slow to load.
    from stores.exports import end_exports
    from stores.merchants import forget_facts

    # First: nothing tells of it if it is cut off behind the records, and rows that change move.
    with reported():
        end_exports(offline.sql)
    forget_facts(offline.sql)
    offline.refresh_records()


def _ensure_complete(
    offline: OfflineStore, online: OnlineStore, fingerprint: str, report: Callable[[str], None]
) -> None:
    """Rebuilds an online store that lost its data; declares a new one complete."""
    if online.is_initialised:
        return
    if offline.has_transactions():
        report("the online store has lost its data: rebuilding it from Postgres")
        from stores.sync import Syncer

        syncer = Syncer(offline, online, card_key_fingerprint=fingerprint, alone=True)
        *_, last = syncer.everything()
        report(f"rebuilt {last.cards_done:,} cards")
    else:
        token = online.begin_rebuild()
        online.initialise(fingerprint, -1, offline.unfinished_loads(), token=token)
