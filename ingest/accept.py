"""Has Postgres accept batches, two at a time.

The index of all transaction ids takes most of a load, and one connection is one core there. Two
batches under way at once must not share an id, or which of two contents is the first would be left
to chance: the later one waits.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stores.closing import Closing
from stores.postgres import OfflineStore

WRITERS = 2


@dataclass(frozen=True, slots=True)
class Acceptance:
    """What Postgres made of a batch."""

    written: int
    """Rows that were new."""
    conflicts: npt.NDArray[np.int64]
    """Positions of rows whose id is known with another content; they were not applied."""


class Acceptors(Closing):
    """Some connections that accept batches; closed at the end of the with statement."""

    def __init__(self, url: str) -> None:
        """Connects.

        Raises:
            StoreUnavailableError: Postgres cannot be reached.
        """
        self._stores = [OfflineStore(url) for _ in range(WRITERS)]
        self._idle: SimpleQueue[OfflineStore] = SimpleQueue()
        for store in self._stores:
            self._idle.put(store)
        self._pool = ThreadPoolExecutor(WRITERS, "postgres")
        self._under_way: list[tuple[pa.Array, Future[Acceptance]]] = []

    def close(self) -> None:
        """Waits for what is under way, and gives the connections back."""
        self._pool.shutdown()
        for store in self._stores:
            store.close()

    def submit(self, transactions: pa.Table) -> Future[Acceptance]:
        """Has a batch accepted: of TRANSACTIONS and LABELS, ids may repeat.

        Raises:
            StoreError: a batch failed that this one had to wait for.
        """
        ids = transactions["transaction_id"].combine_chunks()
        self._under_way = [entry for entry in self._under_way if not entry[1].done()]
        for other, future in self._under_way:
            if pc.any(pc.is_in(ids, value_set=other)).as_py():
                future.result()
        future = self._pool.submit(self._accept, transactions)
        self._under_way.append((ids, future))
        return future

    def _accept(self, transactions: pa.Table) -> Acceptance:
        store = self._idle.get()
        try:
            return accept_once_each(store, transactions)
        finally:
            self._idle.put(store)


def accept_once_each(offline: OfflineStore, transactions: pa.Table) -> Acceptance:
    """Accepts a batch in which ids may repeat: the first of each, then the rest, and so on."""
    rows = np.arange(len(transactions), dtype=np.int64)
    written = 0
    conflicts = [np.empty(0, dtype=np.int64)]
    while len(rows):
        part = transactions if len(rows) == len(transactions) else transactions.take(rows)
        ids = pc.dictionary_encode(part["transaction_id"].combine_chunks())
        again = np.ones(len(rows), dtype=bool)
        again[np.unique(ids.indices.to_numpy(), return_index=True)[1]] = False
        if again.any():
            part = part.filter(pa.array(~again))
        accepted = offline.accept(part)
        written += accepted.written
        conflicts.append(rows[~again][accepted.conflicts])
        rows = rows[again]
    return Acceptance(written, np.sort(np.concatenate(conflicts)))
