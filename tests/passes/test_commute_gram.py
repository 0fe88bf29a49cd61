from __future__ import annotations

import numpy as np
import onnx
import pytest
from helpers import normal, ops, parse, reasons, run, same
from hypothesis import given, settings
from hypothesis import strategies as st

from pwopt.graph.files import from_proto
from pwopt.graph.view import View
from pwopt.maps.cost import measure
from pwopt.passes import CommuteGram

X = normal(2, 6, 5, 8)
HEAD = "(double[2,6,5,8] x) => (double[N] y) "
GRAM = "r = Reshape(h, s) t = Transpose<perm=[0,2,1]>(r) y = MatMul(r, t) "


def sound(out: int, inn: int) -> np.ndarray:
    """Weights of condition 2 at most."""
    u, _, v = np.linalg.svd(normal(out, inn), full_matrices=False)
    return np.asarray(u * np.linspace(1, 2, min(out, inn)) @ v)


def macs(model: onnx.ModelProto) -> int:
    return measure(View(from_proto(model).graph)).macs


def gram(body: str = "", head: str = HEAD, **weights: np.ndarray) -> onnx.ModelProto:
    given_ = {"w": sound(6, 6).reshape(6, 6, 1, 1), "s": np.array([2, 6, -1])} | weights
    return parse(f"{head}{{ {body or 'h = Conv(x, w) ' + GRAM} }}", **given_)


@pytest.mark.parametrize(("out", "shape"), [(6, [2, 6, -1]), (6, [0, 0, -1]), (8, [2, 8, 40]), (7, [-1, 7, 40])])
def test_a_map_moves_behind_its_gram_matrix(out: int, shape: list[int]) -> None:
    model = gram(w=sound(out, 6).reshape(out, 6, 1, 1), s=np.array(shape))
    result, outcome, _ = run(model, CommuteGram())
    assert ops(result) == {"Reshape": 1, "Transpose": 1, "MatMul": 3}
    (done,) = outcome.rewrites
    assert done.macs_before == macs(model) == 2 * 40 * (out * 6 + out * out)
    assert done.macs_after == macs(result) == 2 * (36 * 40 + out * 36 + out * out * 6)
    same(model, result, x=X)


def test_the_result_is_the_product_of_three_matrices() -> None:
    model = gram()
    result, *_ = run(model, CommuteGram())
    held = {t.name: onnx.numpy_helper.to_array(t) for t in result.graph.initializer}
    np.testing.assert_array_equal(held["y_left"], sound(6, 6))
    np.testing.assert_array_equal(held["y_right"], held["y_left"].T)


def test_a_product_of_matrices_without_reshape() -> None:
    """Rows of a matrix are its channels: (Wx)(Wx)ᵀ for W·x of any rank."""
    body = "h = MatMul(w, x) t = Transpose<perm=[0,1,3,2]>(h) y = MatMul(h, t)"
    model = gram(body, head="(double[2,3,4,50] x) => (double[N] y) ", w=sound(4, 4))
    result, *_ = run(model, CommuteGram())
    assert macs(result) < macs(model)
    same(model, result, x=normal(2, 3, 4, 50))


@settings(max_examples=30)
@given(n=st.integers(1, 9), m=st.integers(1, 9), places=st.integers(1, 60))
def test_never_more_multiply_adds(n: int, m: int, places: int) -> None:
    body = "h = MatMul(w, x) t = Transpose<perm=[1,0]>(h) y = MatMul(h, t)"
    model = gram(body, head=f"(double[{n},{places}] x) => (double[N] y) ", w=sound(m, n))
    result, outcome, _ = run(model, CommuteGram())
    assert macs(result) <= macs(model)
    cheaper = n * n * places + m * n * n + m * m * n < (m * n + m * m) * places
    assert bool(outcome.rewrites) == (cheaper and m >= n)
    same(model, result, x=normal(n, places))


REFUSED = {
    "has a bias": ("h = Conv(x, w, b) " + GRAM, {"b": normal(6)}),
    "read by more than": ("h = Conv(x, w) " + GRAM + "z = Relu(r)", {}),
    "2 consumers": ("h = Conv(x, w) " + GRAM + "z = Relu(h)", {}),
    "is shared": ("h = Conv(x, w) " + GRAM + "z = Conv(x, w)", {}),
    "read by more than its": ("h = Conv(x, w) " + GRAM + "z = MatMul(r, t)", {}),
    "'t' has 2 consumers": ("h = Conv(x, w) " + GRAM + "z = Relu(t)", {}),
    "condition number": ("h = Conv(x, w) " + GRAM, {"w": np.diag([1, 1, 1, 1, 1, 11.0]).reshape(6, 6, 1, 1)}),
    "a condition number of inf": ("h = Conv(x, w) " + GRAM, {"w": normal(5, 6, 1, 1), "s": np.array([2, 5, -1])}),
    "times|×": ("h = Conv(x, w) " + GRAM, {"w": normal(3, 6, 1, 1), "s": np.array([2, 3, -1])}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_refused(reason: str) -> None:
    body, weights = REFUSED[reason]
    head = HEAD.replace("(double[N] y)", "(double[N] y, double[N] z)") if "z = " in body else HEAD
    model = gram(body, head, **weights)
    result, outcome, _ = run(model, CommuteGram())
    assert result is model
    assert any(word in reasons(outcome)[0] for word in reason.split("|"))


@pytest.mark.parametrize(
    "body",
    [
        "h = Conv(x, w) r = Reshape(h, s) t = Transpose<perm=[0,2,1]>(r) y = MatMul(t, r)",  # positions, not channels
        "h = Conv(x, w) r = Reshape(h, q) t = Transpose<perm=[1,0,3,2]>(r) y = MatMul(r, t)",  # swaps other axes
        "h = Conv(x, w) t = Transpose<perm=[0,1,3,2]>(h) y = MatMul(h, t)",  # along one spatial axis
        "h = Conv(x, w) k = Relu(h) r = Reshape(k, s) t = Transpose<perm=[0,2,1]>(r) y = MatMul(r, t)",
        "h = Conv<kernel_shape=[3,3]>(x, k) " + GRAM,
        "h = Conv<group=2>(x, g) " + GRAM,
        "h = Conv(x, w) r = Reshape(h, s) o = Reshape(x, s) t = Transpose<perm=[0,2,1]>(o) y = MatMul(r, t)",
        "h = Conv(x, w) " + GRAM.replace("s)", "m)"),  # rows mix channels and positions
    ],
)
def test_what_is_something_else(body: str) -> None:
    weights = {"k": normal(6, 6, 3, 3)} if " k)" in body and "kernel" in body else {}
    weights |= {"q": np.array([2, 2, 3, -1])} if " q)" in body else {}
    weights |= {"m": np.array([2, 12, -1])} if " m)" in body else {}
    weights |= {"g": normal(6, 3, 1, 1)} if " g)" in body else {}
    model = gram(body, **weights)
    result, outcome, _ = run(model, CommuteGram())
    assert result is model
    assert not outcome.rewrites


def test_a_gram_matrix_of_lines() -> None:
    """Rows that are an axis of positions, however many columns there are."""
    body = "h = Conv(x, w) t = Transpose<perm=[0,1,3,2]>(h) y = MatMul(h, t)"
    model = gram(body, "(double[2,6,5,80] x) => (double[N] y) ")
    assert run(model, CommuteGram())[0] is model


@pytest.mark.parametrize(
    ("head", "dtype", "why"),
    [
        ("(float16[2,6,5,8] x) => (float16[N] y) ", np.float16, "overflow float16"),
        ("(double[2,6,H,W] x) => (double[N] y) ", np.float64, "positions is not known"),
        ("(double[2,6,5,8] x) => (double[N] y, double[N] r) ", np.float64, "graph output"),
    ],
)
def test_what_cannot_be_told_or_moved(head: str, dtype: type, why: str) -> None:
    model = gram(head=head, w=sound(6, 6).reshape(6, 6, 1, 1).astype(dtype))
    result, outcome, _ = run(model, CommuteGram())
    assert result is model
    assert why in reasons(outcome)[0]


def test_an_observed_map_stays() -> None:
    model = gram(head="(double[2,6,5,8] x) => (double[N] y, double[N] h) ")
    result, outcome, _ = run(model, CommuteGram())
    assert result is model
    assert "graph output" in reasons(outcome)[0]


def test_an_empty_gram_matrix() -> None:
    """Nothing is multiplied, so nothing is saved."""
    model = gram("h = Conv(x, w) " + GRAM, "(double[2,6,0,8] x) => (double[N] y) ")
    assert run(model, CommuteGram())[0] is model
