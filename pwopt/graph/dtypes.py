"""The floating-point types and their precision."""

from __future__ import annotations

import math
import sys
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

from pwopt.algebra.overflow import Range

FLOATS = ("float16", "bfloat16", "float32", "float64")
#: The same as numpy types.
FLOATING = frozenset(np.dtype(getattr(ml_dtypes, name, name)) for name in FLOATS)
#: The types that are precise enough to distinguish a sum from its rounding error.
WIDE = frozenset(map(np.dtype, ("float32", "float64")))
#: The distance from 1 to the next number of each type.
EPSILONS: dict[np.dtype[Any] | None, float] = {
    t: 2.0 ** {"float16": -10, "bfloat16": -7, "float64": -52}.get(str(t), -23) for t in FLOATING
}


def epsilon(dtype: np.dtype[Any] | None) -> float:
    """The distance from 1 to the next number of a floating-point type; that of float32 if the type is unknown."""
    return EPSILONS.get(dtype, 2.0**-23)


def cancellation(dtype: np.dtype[Any] | None) -> float:
    """Below which size, relative to its terms, a sum of constants is only rounding error (`linear.compose`).

    It is 0 for half-precision types, where 4 units in the last place may be meant.
    """
    return 4 * epsilon(dtype) if dtype in WIDE else 0.0


@cache
def range_of(dtype: np.dtype[Any]) -> Range:
    """Largest number and precision of a floating-point type."""
    info: Any = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    return Range(str(dtype), float(info.max), float(info.eps))


def is_floating(dtype: np.dtype[Any]) -> bool:
    """Whether a type is a floating-point type, including those that numpy lacks (bfloat16, float8)."""
    return dtype.kind == "f" or dtype.name.startswith(("bfloat", "float"))


@cache
def overflow(dtype: np.dtype[Any]) -> float:
    """The smallest number that a floating-point type rounds to infinity: half a unit beyond its largest (IEEE 754-2019,
    section 7.4). float64's largest for float64, where nothing lies between."""
    info: Any = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    largest = float(info.max)
    return min(largest + math.ldexp(float(info.eps), math.frexp(largest)[1] - 1) / 2, sys.float_info.max)
