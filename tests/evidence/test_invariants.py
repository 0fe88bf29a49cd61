"""Each law holds to rounding for a function made to obey it, and is broken visibly by one that does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import normal, parse

from pwopt.errors import UsageError
from pwopt.invariants import INVARIANTS, ArrayFunction, function_of

ORTHOGONAL = np.linalg.qr(normal(12, 8))[0]  # columns are orthonormal: an isometry from 8 to 12 channels
LAWS = normal(2, 8, seed=1)
CONSERVING = np.eye(8) + (np.eye(8) - np.linalg.pinv(LAWS) @ LAWS) @ normal(8, 8, seed=2)


def pointwise(matrix: np.ndarray) -> ArrayFunction:
    return lambda x: np.einsum("oi,ni...->no...", matrix, x)


def blurred(x: np.ndarray) -> np.ndarray:
    return x + np.roll(x, 1, -1) + np.roll(x, 1, -2)


def strided(f: ArrayFunction) -> ArrayFunction:
    return lambda x: f(x)[:, :, ::2, ::2]


def positional(x: np.ndarray) -> np.ndarray:
    return np.asarray(x * np.arange(1, x.shape[-1] + 1))


def symmetrised(x: np.ndarray) -> np.ndarray:
    return np.asarray(x + np.swapaxes(x, 2, 3))


def neighbourly(x: np.ndarray) -> np.ndarray:
    return np.asarray(x + np.roll(x, 1, 1))


CASES: list[tuple[str, dict[str, Any], ArrayFunction, ArrayFunction]] = [
    ("conservation", {"matrix": LAWS}, pointwise(CONSERVING), pointwise(CONSERVING + 1e-3 * normal(8, 8, seed=3))),
    ("isometry", {}, pointwise(ORTHOGONAL), pointwise(1.01 * ORTHOGONAL)),
    ("isometry", {"stride": 2}, strided(pointwise(ORTHOGONAL)), strided(pointwise(1.01 * ORTHOGONAL))),
    ("gram", {"matrix": ORTHOGONAL}, pointwise(ORTHOGONAL), lambda x: pointwise(ORTHOGONAL)(x) + 0.1),
    ("translation", {"shift": 2}, blurred, positional),
    ("translation", {"shift": 2, "stride": 2}, strided(blurred), strided(positional)),
    ("permutation", {"axis": 1}, lambda x: x - x.mean(1, keepdims=True), neighbourly),
    ("locality", {"axis": 1, "index": 3}, np.tanh, neighbourly),
    ("symmetry", {}, symmetrised, blurred),
]


@pytest.mark.parametrize(("name", "parameters", "lawful", "lawless"), CASES)
def test_the_residual_tells_who_obeys(
    name: str, parameters: dict[str, Any], lawful: ArrayFunction, lawless: ArrayFunction
) -> None:
    x = normal(2, 8, 6, 6, seed=4)
    residual = INVARIANTS[name].residual
    assert residual(lawful, x, **parameters) < 1e-13
    assert residual(lawless, x, **parameters) > 1e-4


def test_every_law_has_a_case_and_a_formula() -> None:
    assert {name for name, *_ in CASES} == set(INVARIANTS)
    assert INVARIANTS["conservation"].formula == "A·f(x) = A·x"
    assert INVARIANTS["isometry"].formula == "‖f(x)‖ = ‖x‖ at every position, as for y = Wx with WᵀW = I"
    assert not any("\n" in i.formula or "Parameters" in i.formula for i in INVARIANTS.values())
    assert all("=" in i.formula or "only" in i.formula for i in INVARIANTS.values())


def test_residuals_are_exact_numbers() -> None:
    x = np.ones((1, 2, 1, 1))
    measure: Callable[..., float] = INVARIANTS["conservation"].residual
    assert measure(lambda v: v * [[[[1.0]], [[1.5]]]], x, matrix=[1, 1]) == 0.25
    assert INVARIANTS["isometry"].residual(lambda v: 3 * v, x) == pytest.approx(2.0)
    assert INVARIANTS["symmetry"].residual(lambda _: np.array([[0.0, 4.0], [1.0, 0.0]]), x) == 0.75


def test_a_law_per_row_is_relative_to_its_own_size() -> None:
    """A small quantity that is lost is not hidden by a large one that is kept."""
    x = np.ones((1, 2, 1, 1))
    assert INVARIANTS["conservation"].residual(lambda v: v * [[[[1.0]], [[2.0]]]], x, matrix=[[1e6, 0], [0, 1]]) == 1.0


def test_outputs_that_are_not_finite_obey_nothing() -> None:
    x = normal(1, 8, 4, 4)
    for name, parameters, *_ in CASES:
        assert INVARIANTS[name].residual(lambda v: v * np.nan, x, **_square(parameters)) == float("inf")


def _square(parameters: dict[str, Any]) -> dict[str, Any]:
    """For functions that keep the shape."""
    kept = {k: v for k, v in parameters.items() if k != "stride"}
    return kept | ({"matrix": kept["matrix"][:8]} if "matrix" in kept else {})


def test_zero_equals_zero() -> None:
    assert INVARIANTS["translation"].residual(np.zeros_like, normal(1, 2, 4, 4)) == 0.0


@pytest.mark.parametrize(
    ("name", "parameters", "says"),
    [
        ("conservation", {"matrix": np.ones((1, 3))}, "3 columns"),
        ("translation", {"shift": 1, "stride": 2}, "not a multiple"),
        ("isometry", {"stride": 2}, "which the invariant compares, differ"),
    ],
)
def test_what_does_not_fit_is_said(name: str, parameters: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        INVARIANTS[name].residual(lambda v: v, normal(1, 8, 4, 4), **parameters)


def test_a_function_from_a_model() -> None:
    pytest.importorskip("onnxruntime")
    model = parse(
        """(float[1, "c", 2, 2] a, float[1] b) => (float[1, "c", 2, 2] y, float[1, "c", 2, 2] z)
        { y = Add(a, b) z = Mul(y, b) }"""
    )
    x, two = np.ones((1, 3, 2, 2), np.float32), np.array([2], np.float32)
    np.testing.assert_array_equal(function_of(model, others={"b": two})(x), 3 * x)
    np.testing.assert_array_equal(function_of(model, "a", "z", {"b": two})(x), 6 * x)
    np.testing.assert_array_equal(function_of(model, "b", "z", {"a": x})(two), 6 * x)
    for wrong in ({"input": "c"}, {"output": "c"}):
        with pytest.raises(UsageError, match=r"is not an (input|output) of the model"):
            function_of(model, **wrong)
