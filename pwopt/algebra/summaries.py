"""What rewrites ask of all numbers of an array: so often, of so few numbers, that numpy's `any` and `all` take long."""

from __future__ import annotations

import numpy as np

from pwopt.algebra import Values


def is_finite(values: Values) -> bool:
    """Whether no number is infinite or NaN."""
    return int(np.count_nonzero(np.isfinite(values))) == values.size


def has_nonzero(values: Values) -> bool:
    """Whether a number is not zero. It is for short arrays, because it does not stop at the first one."""
    return bool(np.count_nonzero(values))


def count_zeros(values: Values) -> int:
    return int(np.count_nonzero(values == 0))


def find_magnitude(values: Values) -> float:
    """The largest absolute value; 0 if there is none."""
    return float(np.abs(values).max()) if values.size else 0.0
