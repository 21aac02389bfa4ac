"""Sorts records that come almost in order. For features/ledger.py alone."""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from features.compiled import array_type, compiled
from features.ledger import CATEGORY_BITS, RECORD, Records


@compiled(
    numba.boolean(
        *(array_type(RECORD), array_type(np.int64), array_type(np.int64)),
        *(array_type(np.int64, readonly=False), numba.int64),
    )
)
def insert(
    records: Records,
    card_index: npt.NDArray[np.int64],
    offsets: npt.NDArray[np.int64],
    order: npt.NDArray[np.int64],
    moves_max: int,
) -> bool:
    """Puts each record behind those of its card that do not come after it.

    Records mostly come in the order of their times: then this takes one pass. False where they do not.

    Args:
        offsets: (n_cards + 1,) where each card's records begin in the end.
        order: (n,), filled in.
    """
    ends = offsets[:-1].copy()
    for i in range(len(records)):
        card = card_index[i]
        place = ends[card]
        ends[card] += 1
        stamp = records[i].stamp >> np.uint64(CATEGORY_BITS)
        while place > offsets[card]:
            j = order[place - 1]
            other = records[j].stamp >> np.uint64(CATEGORY_BITS)
            if other < stamp or (
                other == stamp and records[j].transaction <= records[i].transaction
            ):
                break
            order[place] = j
            place -= 1
            moves_max -= 1
        order[place] = i
        if moves_max < 0:
            return False
    return True
