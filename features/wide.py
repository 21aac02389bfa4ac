"""Unsigned integers of 128 bits as two of 64, for sums of squares that outgrow one."""

from __future__ import annotations

import numpy as np

from features.compiled import compiled

_32 = np.uint64(32)
_LOW_32 = np.uint64(0xFFFFFFFF)
_ZERO = np.uint64(0)
_ONE = np.uint64(1)


@compiled("UniTuple(uint64, 2)(uint64, uint64)", inline=True)
def multiply(a: np.uint64, b: np.uint64) -> tuple[np.uint64, np.uint64]:
    """The product of two 64-bit integers: upper half, lower half."""
    a_high, a_low = a >> _32, a & _LOW_32
    b_high, b_low = b >> _32, b & _LOW_32
    low = a_low * b_low
    middle = a_high * b_low + (low >> _32)
    other = a_low * b_high + (middle & _LOW_32)
    high = a_high * b_high + (middle >> _32) + (other >> _32)
    return high, (other << _32) | (low & _LOW_32)


@compiled("UniTuple(uint64, 2)(uint64, uint64, uint64, uint64)", inline=True)
def add(
    a_high: np.uint64, a_low: np.uint64, b_high: np.uint64, b_low: np.uint64
) -> tuple[np.uint64, np.uint64]:
    """a + b, modulo 2**128."""
    low = a_low + b_low
    return a_high + b_high + (_ONE if low < a_low else _ZERO), low


@compiled("UniTuple(uint64, 2)(uint64, uint64, uint64, uint64)", inline=True)
def subtract(
    a_high: np.uint64, a_low: np.uint64, b_high: np.uint64, b_low: np.uint64
) -> tuple[np.uint64, np.uint64]:
    """a - b, modulo 2**128."""
    return a_high - b_high - (_ONE if a_low < b_low else _ZERO), a_low - b_low


@compiled("float64(uint64, uint64)")
def to_float(high: np.uint64, low: np.uint64) -> float:
    """The nearest float64, ties to even: rounded once."""
    if high == _ZERO:
        return np.float64(low)
    # The 64 leading bits, the last of them set if anything was cut off: then one rounding of them
    # is the rounding of the whole.
    scale = 1.0
    cut = _ZERO
    while high != _ZERO:
        cut |= low & _ONE
        low = (low >> _ONE) | (high << np.uint64(63))
        high >>= _ONE
        scale *= 2.0
    return np.float64(low | cut) * scale
