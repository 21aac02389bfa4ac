"""What is not taken in, whoever brings it: the past of erased cards, and what is older than what is kept.

Nothing of it is kept but how much it was: no reject, no dead letter.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features import CardKey
from stores.arrow import to_ms
from stores.erasure import Tombstones
from stores.postgres import OfflineStore


class KeptOut:
    """Says which events stay out. Holds for as long as nobody erases or drops anything."""

    def __init__(self, offline: OfflineStore, card_key: CardKey) -> None:
        """Looks at what was erased and dropped so far."""
        self._from_ms, has_erasures = offline.stays_out()
        self._tombstones = Tombstones(offline, card_key) if has_erasures else None

    def transactions(self, transactions: pa.Table) -> npt.NDArray[np.bool_] | None:
        """Which of TRANSACTIONS (n,) stay out; None for none."""
        if not len(transactions) or (self._tombstones is None and self._from_ms is None):
            return None
        stays_out = np.zeros(len(transactions), dtype=bool)
        if self._from_ms is not None:
            stays_out |= to_ms(transactions["event_time"]) < self._from_ms
        if self._tombstones is not None:
            stays_out |= self._tombstones.erased(transactions)
        return stays_out if stays_out.any() else None

    def labels(self, transaction_ids: Sequence[str]) -> npt.NDArray[np.bool_] | None:
        """Which labels, of these transactions (n,), stay out; None for none."""
        if self._tombstones is None or not transaction_ids:
            return None
        stays_out = self._tombstones.erased_labels(transaction_ids)
        return stays_out if stays_out.any() else None
