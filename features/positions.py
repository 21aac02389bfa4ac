"""Positions as integers in micro-degrees (11 cm at the equator), as the ledger keeps them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

UDEG_PER_DEGREE = 1_000_000
POSITION_MISSING = -(2**31)
"""An int32 micro-degree that stands for 'not recorded'."""


def to_udeg(degrees: npt.ArrayLike) -> npt.NDArray[np.int32]:
    """Rounds degrees to micro-degrees; NaN becomes POSITION_MISSING."""
    values = np.asarray(degrees, dtype=np.float64)
    missing = np.isnan(values)
    rounded = np.rint(np.where(missing, 0.0, values) * UDEG_PER_DEGREE)
    return np.where(missing, POSITION_MISSING, rounded).astype(np.int32)
