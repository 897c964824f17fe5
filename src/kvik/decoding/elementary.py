"""Exponential and logarithm from IEEE additions, multiplications and divisions only.

Libraries differ in the last bit of exp and log, by version and by instruction set. What decides which token is kept or
drawn is computed with these two instead; `native/sampler_math.h` does the same operations in the same order, so that
Python and native code agree in every bit on every machine.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

__all__ = ["exact_exp", "exact_log"]

Float64 = npt.NDArray[np.float64]

# ln 2 = LN2_HIGH + LN2_LOW; the high part has 32 bits, so its product with an exponent is exact
LN2_HIGH = float.fromhex("0x1.62e42feep-1")
LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")
LOG2_E = float.fromhex("0x1.71547652b82fep+0")
SQRT_HALF = float.fromhex("0x1.6a09e667f3bcdp-1")
EXP_FLOOR = -700.0
EXP_DEGREE = 11
LOG_TERMS = 10


def exact_exp(x: npt.ArrayLike) -> Float64:
    """e^x for x <= 0, any shape, relative error below 1e-14; x below -700, -inf included, gives e^-700 (1e-304).

    x = n ln 2 + r with |r| <= ln(2)/2, then the Taylor polynomial of degree 11 in r.
    """
    bounded = np.maximum(np.asarray(x, np.float64), EXP_FLOOR)
    n = np.rint(bounded * LOG2_E)
    r = (bounded - n * LN2_HIGH) - n * LN2_LOW
    p = np.full_like(r, 1.0 / math.factorial(EXP_DEGREE))
    for k in range(EXP_DEGREE - 1, -1, -1):
        p = p * r + 1.0 / math.factorial(k)
    return np.ldexp(p, n.astype(np.int32))


def exact_log(x: npt.ArrayLike) -> Float64:
    """ln x for finite x > 0, any shape, relative error below 1e-15.

    x = 2^e m with m in [sqrt(1/2), sqrt(2)); ln m = 2 artanh(s) with s = (m - 1) / (m + 1), |s| < 0.172, by its series.
    """
    mantissa, exponent = np.frexp(np.asarray(x, np.float64))
    small = mantissa < SQRT_HALF
    m = np.where(small, mantissa * 2.0, mantissa)
    e = np.where(small, exponent - 1, exponent).astype(np.float64)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    p = np.full_like(z, 1.0 / (2 * LOG_TERMS + 1))
    for k in range(LOG_TERMS - 1, 0, -1):
        p = p * z + 1.0 / (2 * k + 1)
    twice = s + s
    result: Float64 = e * LN2_HIGH + (twice + (twice * (z * p) + e * LN2_LOW))
    return result
