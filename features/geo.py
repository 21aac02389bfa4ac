"""Great-circle distance whose bits are the same on every machine.

numpy's and libm's sine differ by a bit between versions and processors. The functions here use
only addition, subtraction, multiplication, division, comparison and square root, which IEEE 754
rounds in one way only, so that training and serving agree wherever they run.

Positions are integers in micro-degrees (11 cm at the equator), as the ledger keeps them.
"""

from __future__ import annotations

import math

from features.compiled import compiled
from features.positions import UDEG_PER_DEGREE

EARTH_RADIUS_KM = 6371.0088
"""Mean radius R1 of the Earth (IUGG, GRS 80)."""

_RADIANS_PER_UDEG = math.pi / 180.0 / UDEG_PER_DEGREE

# Taylor coefficients of sin(x)/x in x**2, through x**16: at pi/4 the next term is below 2**-60.
_SIN = tuple((-1.0) ** k / math.factorial(2 * k + 1) for k in range(9))

# asin(x) = x + x P(x**2) / Q(x**2) for |x| <= 1/2, to 2**-58. Coefficients of fdlibm's e_asin.c
# (Sun Microsystems, 1993), from the constant term upwards.
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
)


@compiled(inline=True)
def _horner(coefficients: tuple[float, ...], x: float) -> float:
    result = coefficients[-1]
    for i in range(len(coefficients) - 2, -1, -1):
        result = result * x + coefficients[i]
    return result


@compiled("float64(int64)")
def _squared_half_sine(angle_udeg: int) -> float:
    """sin(a/2)**2 for |a| <= 180 degrees, as 4 s (1 - s) with s = sin(a/4)**2."""
    x = angle_udeg * (_RADIANS_PER_UDEG * 0.25)
    sine = x * _horner(_SIN, x * x)
    square = sine * sine
    return 4.0 * square * (1.0 - square)


@compiled("float64(int64, int64, int64, int64)")
def distance_km(
    latitude_a_udeg: int, longitude_a_udeg: int, latitude_b_udeg: int, longitude_b_udeg: int
) -> float:
    """Distance on a sphere of radius EARTH_RADIUS_KM, by the haversine formula.

    Args: micro-degrees, none of them missing.

    Returns: kilometres, within 1e-8 km of the exact value but near the antipode, where it is
    within 2e-4 km.

    Source: R. W. Sinnott, "Virtues of the Haversine", Sky and Telescope 68 (2), 1984.
    """
    turn = 360 * UDEG_PER_DEGREE
    d_longitude = (longitude_b_udeg - longitude_a_udeg + turn // 2) % turn - turn // 2
    # cos(a) = 1 - 2 sin(a/2)**2
    cos_a = 1.0 - 2.0 * _squared_half_sine(latitude_a_udeg)
    cos_b = 1.0 - 2.0 * _squared_half_sine(latitude_b_udeg)
    haversine = _squared_half_sine(
        latitude_b_udeg - latitude_a_udeg
    ) + cos_a * cos_b * _squared_half_sine(d_longitude)
    x = math.sqrt(min(haversine, 1.0))
    # asin(x) = pi/2 - 2 asin(sqrt((1-x)/2)) above one half
    is_large = x > 0.5
    reduced = math.sqrt((1.0 - x) * 0.5) if is_large else x
    square = reduced * reduced
    arc = reduced + reduced * (_horner(_ASIN_P, square) / _horner(_ASIN_Q, square))
    return (2.0 * EARTH_RADIUS_KM) * (math.pi / 2 - 2.0 * arc if is_large else arc)
