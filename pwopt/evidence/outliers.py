"""Outliers: elements beyond the tolerance, compared in number with those of the original against itself.

A step (Where, Floor, Round, TopK) turns a rounding error into a jump. A single jump in the original's own runs makes
its largest deviation large, so the largest deviation cannot tell a few jumps from a wrong result. Their number can.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pwopt.algebra import Values
from pwopt.evidence.metrics import Tolerance, finite_pieces

#: Bins of deviations are powers of two: bin b holds [2^(b − OFFSET − 1), 2^(b − OFFSET)).
OFFSET, BINS = 1100, 2200
#: Deviations are compared with those that are smaller by this power of two.
SHIFT = 2
#: Standard deviations that the number of outliers may exceed its expected value by.
DEVIATIONS = 3.0


@dataclass(frozen=True)
class Outliers:
    """Elements that deviate by more than the tolerance and more than four times `size`.

    Attributes
    ----------
    found : int
        Their number in the candidate.
    own : int
        The number of elements by which the original deviates from itself by more than `size`.
    size : float
    excess : bool
        Whether the candidate has more of them than the original explains.
    """

    found: int
    own: int
    size: float
    excess: bool


def count_outliers(
    reference: Values,
    value: Values,
    others: Sequence[Values],
    tolerance: Tolerance,
    without: Values | None,
    factor: float,
) -> Outliers:
    """Compare the number of outliers of a candidate with the original's own deviations, at every size of a deviation.

    Parameters
    ----------
    reference, value : array
        Floating-point outputs of the original and the candidate, of the same shape and type.
    others : sequence of array
        The same output in other runs of the original.
    tolerance : Tolerance
        Deviations of the candidate within it are not counted.
    without : array of bool or None
        Elements to leave out.
    factor : float
        The candidate may have this many times as many outliers, and as many more as chance explains: three standard
        deviations of a Poisson distribution.

    Returns
    -------
    Outliers
        At the size with the largest excess.
    """
    found = _count(reference, value, without, tolerance)
    own: Values = np.zeros(BINS, np.int64)
    for other in others:
        if (other.shape, other.dtype) == (reference.shape, reference.dtype):
            own = np.maximum(own, _count(reference, other, without, None))
    found, own = found[SHIFT:], own[: BINS - SHIFT]
    allowed = factor * own + DEVIATIONS * np.sqrt(factor * own)
    excess = found - allowed
    worst = int(np.flatnonzero(excess == excess.max())[-1])
    size = math.ldexp(1.0, min(max(worst - OFFSET - 1, -1074), 1021))
    return Outliers(int(found[worst]), int(own[worst]), size, bool(found[worst] > allowed[worst]))


def _count(reference: Values, value: Values, without: Values | None, tolerance: Tolerance | None) -> Values:
    """For every bin, the number of elements whose deviation lies in this bin or a higher one."""
    counts: Values = np.zeros(BINS, np.int64)
    try:
        for x, y in finite_pieces(reference, value, without):
            error = np.abs(x - y)
            wrong = error[error > (0.0 if tolerance is None else tolerance.atol + tolerance.rtol * np.abs(x))]
            exponents = np.clip(np.frexp(wrong)[1] + OFFSET, 0, BINS - 1)
            counts = counts + np.bincount(exponents, minlength=BINS)
    except ValueError:  # one of them is not finite at places where the other is
        return counts
    tails: Values = np.cumsum(counts[::-1])[::-1]
    return tails
