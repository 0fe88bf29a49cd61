"""Signed zeros, against the machine's own arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

from pwopt.algebra import zeros

NUMBERS = np.array([-np.inf, -1.5, -5e-324, -0.0, 0.0, 5e-324, 1.5, np.inf])


def bits(x: np.ndarray) -> list[bytes]:
    return [v.tobytes() for v in np.asarray(x)]


@pytest.mark.parametrize("addend", [-0.0, 0.0, 1.0, -5e-324, np.inf])
def test_what_an_addend_does(addend: float) -> None:
    c = np.float64(addend)
    assert zeros.keeps(c) == (bits(NUMBERS + c) == bits(NUMBERS))
    assert zeros.joins(c) == (bits(np.array([0.0]) + c) == bits(np.array([-0.0]) + c))


def test_every_element_counts() -> None:
    assert zeros.keeps(np.array([-0.0, -0.0]))
    assert not zeros.keeps(np.array([-0.0, 0.0]))
    assert not zeros.joins(np.array([-0.0, 0.0]))
    assert zeros.joins(np.array([1.0, 0.0]))
