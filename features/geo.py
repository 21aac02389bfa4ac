"""Great-circle distance whose bits are the same on every machine.

numpy's and libm's sine differ by a bit between versions and processors. The functions here use
only addition, subtraction, multiplication, division, comparison and square root, which IEEE 754
rounds in one way only, so that training and serving agree wherever they run.

Positions are integers in micro-degrees (11 cm at the equator), as the ledger keeps them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

EARTH_RADIUS_KM = 6371.0088
"""Mean radius R1 of the Earth (IUGG, GRS 80)."""

UDEG_PER_DEGREE = 1_000_000
POSITION_MISSING = -(2**31)
"""An int32 micro-degree that stands for 'not recorded'."""

_RADIANS_PER_UDEG = math.pi / 180.0 / UDEG_PER_DEGREE

# Taylor coefficients of sin(x)/x in x**2, through x**16: at pi/4 the next term is below 2**-60.
_SIN = tuple((-1.0) ** k / math.factorial(2 * k + 1) for k in range(9))

# asin(x) = x + x P(x**2) / Q(x**2) for |x| <= 1/2, to 2**-58. Coefficients of fdlibm's e_asin.c
# (Sun Microsystems, 1993), from the constant term upwards; one more for Q to be as long as P.
_ASIN_P = (
    0.0,
    1.66666666666666657415e-01,
    -3.25565818622400915405e-01,
    2.01212532134862925881e-01,
    -4.00555345006794114027e-02,
    7.91534994289814532176e-04,
    3.47933107596021167570e-05,
)
_ASIN_Q = (
    1.0,
    -2.40339491173441421878e00,
    2.02094576023350569471e00,
    -6.88283971605453293030e-01,
    7.70381505559019352791e-02,
    0.0,
    0.0,
)
_ASIN = tuple(np.array(pair).reshape(2, 1) for pair in zip(_ASIN_P, _ASIN_Q, strict=True))

FloatArray = npt.NDArray[np.float64]


def to_udeg(degrees: npt.ArrayLike) -> npt.NDArray[np.int32]:
    """Rounds degrees to micro-degrees; NaN becomes POSITION_MISSING."""
    values = np.asarray(degrees, dtype=np.float64)
    missing = np.isnan(values)
    rounded = np.rint(np.where(missing, 0.0, values) * UDEG_PER_DEGREE)
    return np.where(missing, POSITION_MISSING, rounded).astype(np.int32)


def _polynomial(coefficients: Sequence[float | FloatArray], x: FloatArray) -> FloatArray:
    """Horner's rule, in place; for coefficients (m, 1) one row each, with x (m, n)."""
    result = np.empty_like(x)
    result[:] = coefficients[-1]
    for coefficient in coefficients[-2::-1]:
        result *= x
        result += coefficient
    return result


def _squared_sine(x: FloatArray) -> FloatArray:
    """sin(2 x)**2 for |x| <= pi/4, as 4 s (1 - s) with s = sin(x)**2."""
    square = x * _polynomial(_SIN, x * x)
    square *= square
    result: FloatArray = 4.0 * square * (1.0 - square)
    return result


def _asin(x: FloatArray) -> FloatArray:
    """Arc sine for 0 <= x <= 1, by asin(x) = pi/2 - 2 asin(sqrt((1-x)/2)) above one half."""
    large = x > 0.5
    reduced = np.where(large, np.sqrt((1.0 - x) * 0.5), x)
    p, q = _polynomial(_ASIN, np.tile(reduced * reduced, (2, 1)))
    small = reduced + reduced * (p / q)
    result: FloatArray = np.where(large, math.pi / 2 - 2.0 * small, small)
    return result


def great_circle_km(
    latitude_a_udeg: npt.NDArray[np.int32],
    longitude_a_udeg: npt.NDArray[np.int32],
    latitude_b_udeg: npt.NDArray[np.int32],
    longitude_b_udeg: npt.NDArray[np.int32],
) -> FloatArray:
    """Distance on a sphere of radius EARTH_RADIUS_KM, by the haversine formula.

    Args: four arrays (n,) of micro-degrees, none of them missing.

    Returns: (n,) float64 kilometres, within 1e-8 km of the exact value but near the
    antipode, where it is within 2e-4 km.

    Source: R. W. Sinnott, "Virtues of the Haversine", Sky and Telescope 68 (2), 1984.
    """
    turn = 360 * UDEG_PER_DEGREE
    d_longitude = longitude_b_udeg.astype(np.int64) - longitude_a_udeg
    d_longitude = (d_longitude + turn // 2) % turn - turn // 2
    d_latitude = latitude_b_udeg.astype(np.int64) - latitude_a_udeg
    angles = np.empty((4, len(latitude_a_udeg)))
    angles[0], angles[1] = d_latitude, d_longitude
    angles[2], angles[3] = latitude_a_udeg, latitude_b_udeg
    # Four sines in one pass: cos(a) = 1 - 2 sin(a/2)**2.
    squares = _squared_sine(angles * (_RADIANS_PER_UDEG * 0.25))
    cos_a = 1.0 - 2.0 * squares[2]
    cos_b = 1.0 - 2.0 * squares[3]
    haversine = squares[0] + cos_a * cos_b * squares[1]
    distance: FloatArray = (2.0 * EARTH_RADIUS_KM) * _asin(np.sqrt(np.minimum(haversine, 1.0)))
    return distance


def distance_km(lat_a: int, long_a: int, lat_b: int, long_b: int) -> float:
    """One distance, of micro-degrees: great_circle_km's operations in its order, hence its bits."""
    turn = 360 * UDEG_PER_DEGREE
    d_longitude = (long_b - long_a + turn // 2) % turn - turn // 2
    squares = []
    for angle in (lat_b - lat_a, d_longitude, lat_a, lat_b):
        x = angle * (_RADIANS_PER_UDEG * 0.25)
        sine = x * _horner(_SIN, x * x)
        square = sine * sine
        squares.append(4.0 * square * (1.0 - square))
    cos_a = 1.0 - 2.0 * squares[2]
    cos_b = 1.0 - 2.0 * squares[3]
    x = math.sqrt(min(squares[0] + cos_a * cos_b * squares[1], 1.0))
    is_large = x > 0.5
    reduced = math.sqrt((1.0 - x) * 0.5) if is_large else x
    square = reduced * reduced
    arc = reduced + reduced * (_horner(_ASIN_P, square) / _horner(_ASIN_Q, square))
    return (2.0 * EARTH_RADIUS_KM) * (math.pi / 2 - 2.0 * arc if is_large else arc)


def _horner(coefficients: tuple[float, ...], x: float) -> float:
    result = coefficients[-1]
    for coefficient in coefficients[-2::-1]:
        result = result * x + coefficient
    return result
