from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from helpers import build, eager, normal, ops, parse, reasons, run, same

from pwopt.passes import ChannelsFirst

F = np.float32
X = normal(2, 4, 5, 3, seed=50, dtype=F)
HEAD = "(float[2,4,5,3] x) => (float[N] y) "
TO, BACK = "t = Transpose<perm=[0,2,3,1]>(x)", "y = Transpose<perm=[0,3,1,2]>"
CONSTANTS = {
    "w": normal(4, 6, dtype=F),
    "b": normal(6, seed=1, dtype=F),
    "v": normal(6, 5, seed=2, dtype=F),
    "c": normal(5, seed=3, dtype=F),
    "low": F(0),
    "high": F(1),
    "k3": normal(6, 3, dtype=F),
    "w3": normal(3, 6, dtype=F),
}


@pytest.mark.parametrize(
    ("between", "last", "found"),
    [
        ("m = MatMul(t, w)", "m", {"Conv": 1}),
        ("p = MatMul(t, w) m = Add(p, b)", "m", {"Conv": 1}),
        ("p = MatMul(t, w) a = Add(b, p) r = Relu(a) m = MatMul(r, v)", "m", {"Conv": 2, "Relu": 1}),
        ("r = Clip(t, low, high) p = MatMul(r, w) s = Sigmoid(p) g = Mul(p, s) q = MatMul(g, v) m = Add(q, c)", "m",
         {"Clip": 1, "Conv": 2, "Sigmoid": 1, "Mul": 1}),
        ("p = MatMul(t, w) m = Tanh(p)", "m", {"Conv": 1, "Tanh": 1}),
    ],
)  # fmt: skip
def test_products_between_transposes(between: str, last: str, found: dict[str, int]) -> None:
    model = build(f"{{ {TO} {between} {BACK}({last}) }}", CONSTANTS, HEAD)
    result, _, _ = run(model, eager(ChannelsFirst))
    assert ops(result) == found
    same(model, result, 1e-5, x=X)


def test_a_transpose_that_others_read_stays() -> None:
    model = build(
        "(float[2,4,5,3] x) => (float[N] y, float[N] z) {"
        + f"{TO} m = MatMul(t, w) {BACK}(m) n = Softmax(t) z = Relu(n) }}",
        CONSTANTS,
        HEAD,
    )
    result, _, _ = run(model, eager(ChannelsFirst))
    assert result is model  # two readers: the products are not alone between the Transposes


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (f"{{ {TO} m = MatMul(t, w) o = MatMul(t, w) q = Add(m, o) {BACK}(q) }}", ""),
        (f"{{ {TO} n = Softmax(t) m = MatMul(n, w) {BACK}(m) }}", ""),
        (f"{{ {TO} m = Relu(t) {BACK}(m) }}", ""),
        (f"{{ {TO} m = MatMul(k3, t) {BACK}(m) }}", ""),
        (f"{{ t = Transpose<perm=[0,2,1,3]>(x) m = MatMul(t, w3) {BACK}(m) }}", ""),
        (f"{{ {TO} m = MatMul(t, w) y = Transpose<perm=[0,2,1,3]>(m) }}", ""),
        (f"(float[2,4,5,3] x) => (float[N] y, float[N] m) {{ {TO} m = MatMul(t, w) {BACK}(m) }}", ""),
        (f"(float[2,4,5,3] x, float[4,6] u) => (float[N] y) {{ {TO} m = MatMul(t, u) {BACK}(m) }}", ""),
        (f"(float[2,4,5,3] x, float[7,4] k) => (float[N] y, float[N] z) {{ {TO} m = MatMul(t, w) {BACK}(m) z = MatMul(k, w) }}", "the weight 'w' is shared"),
    ],
)  # fmt: skip
def test_refusals(body: str, why: str) -> None:
    model = build(body, CONSTANTS, HEAD)
    result, outcome, _ = run(model, eager(ChannelsFirst))
    assert result is model
    assert why in " ".join(reasons(outcome))


def test_only_measuring_can_tell() -> None:
    model = build(f"{{ {TO} m = MatMul(t, w) {BACK}(m) }}", CONSTANTS, HEAD)
    result, outcome, _ = run(model, ChannelsFirst())
    assert result is model
    assert reasons(outcome) == ["4→6 between Transposes could be 1×1 convolutions; only measuring can tell"]


@pytest.mark.parametrize(
    ("head", "dtype", "why"),
    [
        ("(double[2,4,5,3] x) => (double[N] y) ", np.float64, "no convolution in float64"),
        ("(bfloat16[2,4,5,3] x) => (bfloat16[N] y) ", ml_dtypes.bfloat16, "no convolution in bfloat16"),
        ("(float[2,4,0,3] x) => (float[N] y) ", F, "does not convolve empty tensors"),
    ],
)
def test_what_would_not_run_as_a_convolution(head: str, dtype: type, why: str) -> None:
    model = parse(f"{head}{{ {TO} m = MatMul(t, w) {BACK}(m) }}", w=normal(4, 6, dtype=dtype))
    result, outcome, _ = run(model, eager(ChannelsFirst))
    assert result is model
    assert why in reasons(outcome)[0]
