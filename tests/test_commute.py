"""Where a scale or a shift must not pass. Each case is wrong if its one precondition is dropped."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from helpers import normal, ops, parse, run, same

from pwopt.passes import PASSES, FoldAffine

X = normal(2, 4, 6, 6)
S = np.abs(normal(4, 1, 1)) + 0.5
W = normal(5, 4, 1, 1)
HEAD = "(double[2,4,6,6] x, double[2,4,6,6] k) => (double[N] y) "
OUT = "(double[2,4,6,6] x, double[2,4,6,6] k) => (double[N] y, double[N] z) "

STAYS = {
    "a square is not linear": HEAD + "{ p = Mul(x, s) q = Mul(p, p) y = Conv(q, w) }",
    "a double shift": HEAD + "{ p = Add(x, s) q = Add(p, p) y = Conv(q, w) }",
    "a divisor": HEAD + "{ p = Mul(x, s) q = Div(k, p) y = Conv(q, w) }",
    "a scale of one operand": HEAD + "{ p = Mul(x, s) q = Add(p, k) y = Conv(q, w) }",
    "a shift of one factor": HEAD + "{ p = Add(x, s) q = Mul(p, k) y = Conv(q, w) }",
    "through a graph output": OUT + "{ p = Mul(x, s) z = Relu(p) y = Conv(z, w) }",
    "its own graph output": OUT + "{ z = Mul(x, s) y = Conv(z, w) }",
    "two ways to one map": HEAD + "{ p = Mul(x, s) q = Relu(p) c = Concat<axis=1>(p, q) y = Conv(c, v) }",
    "indices of a maximum": OUT.replace("double[N] z", "int64[N] z") + "{ p = Mul(x, s) q, z = MaxPool<kernel_shape=[2,2]>(p) y = Conv(q, w) }",
    "up past a second reader": OUT + "{ p = Conv(x, w) q = Relu(p) r = Mul(q, u) y = Sigmoid(r) z = Neg(p) }",
    "up into a square": HEAD + "{ p = Conv(x, w) q = Mul(p, p) r = Mul(q, u) y = Sigmoid(r) }",
    "padding with a constant": HEAD + "{ p = Mul(x, s) q = Pad(p, e, c) y = Conv(q, w) }",
    "extrapolation": HEAD + '{ p = Add(x, s) q = Resize<coordinate_transformation_mode="tf_crop_and_resize", extrapolation_value=9.0>(p, roi, , size) y = Conv(q, w) }',
    "division by zero": HEAD + "{ p = Conv(x, w) q = Div(p, zero) y = Sigmoid(q) }",
}  # fmt: skip
WEIGHTS = {
    "s": S, "w": W, "v": normal(5, 8, 1, 1), "u": np.abs(normal(5, 1, 1)) + 0.5, "c": np.float64(5), "zero": np.zeros((5, 1, 1)),
    "e": np.array([0, 0, 0, 1, 0, 0, 0, 0]), "roi": np.array([0, 0, 0, 0, 1, 1, 1.5, 1.5]), "size": np.array([2, 4, 6, 6]),
}  # fmt: skip


@pytest.mark.parametrize("body", STAYS.values(), ids=STAYS)
def test_it_stays(body: str) -> None:
    used = {k: v for k, v in WEIGHTS.items() if f", {k})" in body or f" {k}," in body}
    model = parse(body, **used)
    result, outcome, _ = run(model, FoldAffine())
    assert result is model, outcome.rewrites


def test_the_sign_of_a_subtrahend() -> None:
    model = parse(HEAD + "{ p = Add(x, s) q = Sub(k, p) y = Conv(q, w) }", s=S, w=W)
    result, _, _ = run(model, FoldAffine())
    assert ops(result) == {"Sub": 1, "Conv": 1}
    same(model, result, x=X, k=normal(2, 4, 6, 6, seed=3))


def test_broadcasting_to_a_higher_rank_moves_the_axis() -> None:
    """Axis 1 of the summand is axis 2 of the sum, whose axis 1 the convolution reads."""
    body = "(double[4,4,6] x, double[2,4,4,6] k) => (double[N] y) { p = Add(x, t) q = Add(p, k) y = Conv(q, w) }"
    model = parse(body, t=normal(4, 1), w=W)
    result, _, _ = run(model, FoldAffine())
    assert result is model


def test_broadcasting_over_the_channel_axis() -> None:
    body = "(double[2,1,6,6] x, double[2,4,6,6] k) => (double[N] y) { p = Add(x, t) q = Add(p, k) y = Conv(q, w) }"
    model = parse(body, t=np.full((1, 1, 1), 3.0), w=W)
    result, _, _ = run(model, FoldAffine())
    assert ops(result) == {"Add": 1, "Conv": 1}
    same(model, result, x=normal(2, 1, 6, 6), k=X)


def test_automatic_padding_of_unknown_size_does_not_compose_with_a_stencil() -> None:
    body = """(double[2,4,H,W] x) => (double[N] y) {
        h = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(x, a) y = Conv<kernel_shape=[2,2]>(h, b)
    }"""
    model = parse(body, a=normal(30, 4, 3, 3), b=normal(1, 30, 2, 2))
    result, _, _ = run(model, *(p() for p in PASSES))
    assert result is model


def test_a_constant_graph_output_is_kept() -> None:
    model = parse("(double[2] x) => (double[N] y, double[N] z) { z = Add(p, p) y = Add(x, z) }", p=np.ones(2))
    result, _, _ = run(model, *(p() for p in PASSES))
    assert result is model
    onnx.checker.check_model(result, full_check=True)
