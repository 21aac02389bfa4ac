"""128-bit integers against Python's own."""

from __future__ import annotations

from typing import SupportsInt

from hypothesis import example, given
from hypothesis import strategies as st

from features import wide

halves = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 2**32, 2**63, 2**64 - 1]))
MODULUS = 2**128


def joined(pair: tuple[SupportsInt, SupportsInt]) -> int:
    return int(pair[0]) << 64 | int(pair[1])


@given(halves, halves)
def test_products(a, b):
    assert joined(wide.multiply(a, b)) == a * b


@given(halves, halves, halves, halves)
def test_sums_and_differences(a, b, c, d):
    one, other = joined((a, b)), joined((c, d))
    assert joined(wide.add(a, b, c, d)) == (one + other) % MODULUS
    assert joined(wide.subtract(a, b, c, d)) == (one - other) % MODULUS


@given(halves, halves)
@example(1, (1 << 11))  # half a unit in the last place, to even
@example(1, (1 << 11) + 1)
@example(3, 1 << 12)
@example(0, 2**53 + 1)
def test_rounded_to_the_nearest_float_once(high, low):
    assert wide.to_float(high, low) == float(joined((high, low)))
