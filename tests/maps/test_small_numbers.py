"""Which operators reveal tiny numbers: the claim for each operator, compared with onnx's reference evaluator."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from helpers import evaluate, parse

from pwopt.graph.files import from_proto
from pwopt.graph.view import View
from pwopt.maps.small_numbers import find_limits

TINY = 1e-39
WITH = {
    "half": np.full(4, 0.5), "mixed": np.array([0.5, 0, 1, 1]), "large": np.float64(1e38), "small": np.float64(1e-38),
    "two": np.float64(2), "one": np.float64(1), "inverse": np.float64(-1), "eps": np.float64(1e-6), "kernel": np.full((4, 4, 1), 1e38),
    "bias": np.full(4, 1e-3), "unit": np.ones((4, 4, 1)), "zero": np.zeros(4), "k1": np.array([1], np.int64),
}  # fmt: skip
#: Expressions of x, and whether they reveal 1e-39.
CALLS: dict[str, bool] = {
    "Ceil(x)": True, "Sign(x)": True, "Log(x)": True, "Reciprocal(x)": True, "Div(half, x)": True,
    "Mod<fmod=1>(half, x)": True, "Cast<to=9>(x)": True, "ArgMax<axis=1>(x)": True, "Hardmax(x)": True,
    "Mul(x, large)": True, "Div(x, small)": True, "Pow(x, inverse)": True, "Conv(x, kernel)": True,
    "LpNormalization<axis=2>(x)": True, "Greater(x, zero)": True,
    "InstanceNormalization<epsilon=0.0>(x, half, zero)": True,
    "Relu(x)": False, "Sigmoid(x)": False, "Round(x)": False, "Exp(x)": False, "Softmax(x)": False, "Add(x, half)": False,
    "Mul(x, half)": False, "Pow(x, two)": False, "Sqrt(x)": False, "Conv(x, unit)": False, "Clip(x, eps)": False,
    "InstanceNormalization(x, half, zero)": False, "Conv(x, kernel, zero)": True,
}  # fmt: skip


def _find(model: onnx.ModelProto) -> dict[str, float]:
    return {t.name: limit.size for t, limit in find_limits(View(from_proto(model).graph)).items()}


@pytest.mark.parametrize(("call", "reveals"), CALLS.items())
def test_what_reveals_a_tiny_number(call: str, reveals: bool) -> None:
    model = parse(
        f"(double[1,4,4] x) => (double[N] y) {{ y = {call} }}", **{n: v for n, v in WITH.items() if n in call}
    )
    assert (_find(model)["x"] <= TINY) == reveals
    if not reveals:  # the claim that matters
        tiny = TINY * np.array([1, -1, 2, 0]) if "Sqrt" not in call else TINY * np.ones(4)
        zero, other = (evaluate(model, x=np.broadcast_to(x, (1, 4, 4)))[0] for x in (np.zeros(4), tiny))
        np.testing.assert_allclose(zero, other, rtol=0, atol=1e-8)


#: What lies between x and ⌈h⌉, and whether the step still matters.
BETWEEN: dict[str, bool] = {
    "Relu(x)": True, "Transpose(x)": True, "Mul(x, half)": True, "Add(x, mixed)": True, "Add(x, x)": True, "Conv(x, unit)": True,
    "Conv(x, unit, zero)": True, "MaxPool<kernel_shape=[1]>(x)": True,
    "Add(x, half)": False, "Sub(half, x)": False, "Sigmoid(x)": False, "Round(x)": False, "Conv(x, unit, bias)": False,
    "Softplus(x)": False, "Clip(x, eps)": False, "Max(x, half)": False, "HardSigmoid(x)": False,
}  # fmt: skip


@pytest.mark.parametrize(("call", "reveals"), BETWEEN.items())
def test_between_a_tensor_and_a_step(call: str, reveals: bool) -> None:
    held = {n: v for n, v in WITH.items() if n in call}
    model = parse(f"(double[1,4,4] x) => (double[N] y) {{ h = {call} y = Ceil(h) }}", **held)
    assert (_find(model)["x"] == 0) == reveals
    if not reveals:
        zero, other = (evaluate(model, x=np.full((1, 4, 4), x))[0] for x in (0.0, TINY))
        np.testing.assert_array_equal(zero, other)


def test_unknown_operators_and_bodies_reveal_everything() -> None:
    body = """<ir_version: 8, opset_import: ["" : 17, "mine" : 1]> g (double[4] x, double[4] u, bool c) =>
    (double[4] y, double[N] d, double[N] z) { y = Neg(x) b = Neg(u) d = mine.Odd(b) e = Relu(u) z = If(c)
    <then_branch = t () => (double[4] p) { p = Neg(e) }, else_branch = f () => (double[4] q) { q = Neg(e) }> }"""
    found = _find(onnx.parser.parse_model(body))
    assert found["x"] > 0
    assert found["b"] == found["e"] == found["u"] == 0
