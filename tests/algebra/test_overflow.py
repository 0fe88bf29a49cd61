"""What `pwopt.algebra.overflow` promises: a fold gives no infinity where the original gives numbers."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest

from pwopt.algebra.geometry import RefusedError
from pwopt.algebra.linear import LinearMap, compose, hcat, split_inputs, stack
from pwopt.algebra.overflow import Range
from pwopt.algebra.ranks import factor
from pwopt.graph.dtypes import FLOATS, range_of

HALF, SINGLE = (range_of(np.dtype(t)) for t in (np.float16, np.float32))


def scale(*factors: float) -> LinearMap:
    return LinearMap.diagonal(factors)


def shift(*terms: float) -> LinearMap:
    return LinearMap.diagonal(np.ones(len(terms)), terms)


@pytest.mark.parametrize("name", FLOATS)
def test_the_range_of_a_type(name: str) -> None:
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    found = range_of(dtype)
    assert found.name == name
    with np.errstate(over="ignore"):
        assert np.isfinite(np.array(found.largest).astype(dtype).astype(np.float64))
        assert np.array(found.largest).astype(dtype) * dtype.type(1 + found.epsilon) > found.largest


@pytest.mark.parametrize(
    ("combine", "moved"),
    [
        (lambda: scale(3) @ shift(5), 15),
        (lambda: shift(5) @ scale(3), 0),
        (lambda: shift(7) @ (scale(3) @ shift(5)), 15),
        (lambda: (scale(2) @ shift(1)) @ shift(3), 2 + 6),
        (lambda: scale(2) @ (scale(3) @ shift(5)), 30),
        (lambda: shift(5) + shift(-7), 2),
        (lambda: -(scale(3) @ shift(5)), 15),
        (lambda: (scale(3) @ shift(5)).at_rank(2), 15),
        (lambda: compose(scale(3), shift(5), 2.0**-22), 15),
        (lambda: hcat(shift(5), shift(2)), 7),
        (lambda: (scale(3) @ shift(5)).broadcast(1), 15),
    ],
)
def test_what_is_moved(combine: Callable[[], LinearMap], moved: float) -> None:
    np.testing.assert_array_equal(combine().moved, [moved])


def test_what_is_moved_through_a_dense_map() -> None:
    dense = LinearMap.pointwise([[1.0, -2.0], [3.0, 4.0]], [100.0, 200.0])
    np.testing.assert_array_equal((dense @ shift(10, 20)).moved, [30, 110])
    np.testing.assert_array_equal((dense @ shift(10, 20)).regroup(1).moved, [30, 110])
    np.testing.assert_array_equal(stack(dense @ shift(10, 20), dense).moved, [30, 110, 0, 0])
    assert stack(dense, dense).moved is None
    assert all(part.moved is None for part in split_inputs(dense, [1, 1]))
    wide = LinearMap.pointwise(np.outer(np.arange(1.0, 7), np.arange(1.0, 7))) @ shift(1, 0, 0, 0, 0, 0)
    first, second = factor(wide, 1e-9)
    np.testing.assert_array_equal(first.moved, [0])
    np.testing.assert_array_equal(second.moved, np.arange(1.0, 7))


@pytest.mark.parametrize("numbers", [HALF, SINGLE, range_of(np.dtype(ml_dtypes.bfloat16)), range_of(np.dtype(float))])
def test_constants_near_the_largest_number_stay_behind_what_they_shift(numbers: Range) -> None:
    limit = numbers.epsilon * numbers.largest
    numbers.check(scale(2) @ shift(limit / 2))
    with pytest.raises(RefusedError, match=f"could overflow {numbers.name} where the original does not"):
        numbers.check(scale(2) @ shift(limit))
    numbers.check(scale(1) @ shift(limit * 2))  # no product is larger than x
    numbers.check(scale(-0.5, 2) @ shift(limit * 4, 0))
    numbers.check(shift(limit * 2) @ scale(2))  # the product of the original
    numbers.check(LinearMap.diagonal([2.0], [limit * 2]))  # as it was read
    with pytest.raises(RefusedError):
        numbers.check(LinearMap.diagonal([2.0], [limit]) + LinearMap.diagonal([2.0], [limit]))
    numbers.check(LinearMap.diagonal([2.0], [limit * 2]) + LinearMap.diagonal([2.0], [-limit * 2]))


def test_weights_that_leave_no_room_for_a_sum() -> None:
    dense = LinearMap.pointwise([[1.0, -1.0]])
    SINGLE.check(scale(1e19) @ dense)
    with pytest.raises(RefusedError):
        SINGLE.check(scale(1e20) @ dense)  # 1e20·(3e19 − 2e19) is finite, 1e20·3e19 is not
    SINGLE.check(scale(1e20) @ LinearMap.pointwise([[1.0, 0.0]]))
    SINGLE.check(LinearMap.pointwise([[1e20, -1e20]]))


@pytest.mark.parametrize("numbers", [HALF, SINGLE])
def test_which_scales_and_shifts_may_move_past_sums(numbers: Range) -> None:
    assert numbers.allows_scale(np.array([1.0, -1.0, 0.0]))
    assert numbers.allows_scale(np.array([1e10, 1e-10])) == (numbers is SINGLE)
    assert not numbers.allows_scale(np.array([1e20]))
    assert not numbers.allows_scale(np.array([1e-20]))
    assert numbers.allows_shift(np.array([60.0, -60.0]))
    assert numbers.allows_shift(np.array([70.0])) == (numbers is SINGLE)
    assert not numbers.allows_shift(np.array([-1e32]))
