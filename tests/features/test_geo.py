"""The great circle agrees with libm's, and its bits are pinned."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.geo import EARTH_RADIUS_KM, distance_km
from features.positions import POSITION_MISSING, to_udeg

latitudes = st.integers(-90_000_000, 90_000_000)
longitudes = st.integers(-180_000_000, 180_000_000)


def libm_km(*udeg: int) -> float:
    lat_a, long_a, lat_b, long_b = (math.radians(u / 1e6) for u in udeg)
    h = (
        math.sin((lat_b - lat_a) / 2) ** 2
        + math.cos(lat_a) * math.cos(lat_b) * math.sin((long_b - long_a) / 2) ** 2
    )
    return 2 * EARTH_RADIUS_KM * math.asin(min(1.0, math.sqrt(h)))


@given(st.tuples(latitudes, longitudes, latitudes, longitudes))
def test_distance_is_libms_within_a_hair(udeg):
    # Near the antipode asin is steep: a last-bit difference of its argument is 0.1 m there.
    assert distance_km(*udeg) == pytest.approx(libm_km(*udeg), rel=1e-9, abs=2e-4)


@given(st.tuples(latitudes, longitudes, latitudes, longitudes))
def test_distance_is_symmetric_and_at_most_half_way_round(udeg):
    there, back = distance_km(*udeg), distance_km(*udeg[2:], *udeg[:2])
    assert there == back
    assert 0 <= there <= math.pi * EARTH_RADIUS_KM * (1 + 1e-12)


def test_bits_are_those_of_every_machine():
    # Computed once and written down: a machine that disagrees would break parity silently.
    assert distance_km(52_520_008, 13_404_954, 48_856_613, 2_352_222).hex() == BERLIN_PARIS_KM


BERLIN_PARIS_KM = "0x1.b6baddffafa49p+9"


def test_degrees_round_to_micro_degrees_and_nan_is_missing():
    assert to_udeg([39.450497999999996, -82.048315, np.nan]).tolist() == [
        39_450_498,
        -82_048_315,
        POSITION_MISSING,
    ]
