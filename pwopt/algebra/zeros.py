"""Signed zeros: what an addition does to −0 and +0 (IEEE 754-2019, section 6.3).

Rounding to nearest, a sum of two zeros of one sign has that sign, and a sum of zeros of both signs is +0. Hence

    x + (−0) = x        for every x: −0 + (−0) = −0, and +0 + (−0) = +0;
    x − (+0) = x        likewise, since x − c is x + (−c);
    x + (+0), x − (−0)  are +0 for both zeros, and x otherwise;
    x + c               is c for both zeros, if c is not zero.

So adding −0 keeps every number, bit for bit. Adding any other number gives the same result for both zeros.
"""

from __future__ import annotations

import numpy as np

from pwopt.algebra import Values


def keeps(addend: Values) -> bool:
    """Whether x + addend is x for every x, the sign of a zero included."""
    return bool(np.all((addend == 0) & np.signbit(addend)))


def joins(addend: Values) -> bool:
    """Whether x + addend is the same number, bit for bit, for x = −0 and x = +0."""
    return not np.any((addend == 0) & np.signbit(addend))
