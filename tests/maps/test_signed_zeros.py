"""Who tells −0 from +0: what is claimed of each operator, held against onnx's reference evaluator."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from helpers import evaluate, parse

from pwopt.graph.files import from_proto
from pwopt.graph.view import View
from pwopt.maps.signed_zeros import find_zero_sensitive, is_never_negative

HALF, MIXED = np.full(4, 0.5), np.array([0.5, -0.0, 1, 1])
WITH = {
    "half": HALF, "low": -HALF, "zero": np.zeros(4), "negative": -np.zeros(4), "mixed": MIXED, "one": np.ones(4),
    "two": np.float64(2), "three": np.float64(3), "inverse": np.float64(-1), "even": np.float64(-2),
    "eps": np.float64(1e-9), "kernel": np.ones((4, 4, 1)),
}  # fmt: skip
#: What stands between the tensor and a Reciprocal, and whether that still tells zeros apart.
CALLS: dict[str, bool] = {
    "Identity(x)": True, "Neg(x)": True, "Relu(x)": True, "Tanh(x)": True, "Sqrt(x)": True, "Mul(x, half)": True,
    "Add(x, negative)": True, "Add(x, mixed)": True, "Sub(x, zero)": True, "Sub(negative, x)": True, "Add(x, x)": True,
    "Div(x, half)": True, "Pow(x, three)": True, "Pow(x, inverse)": True, "Max(x, negative)": True,
    "Transpose<perm=[0,2,1]>(x)": True, "ReduceSum<keepdims=1>(x)": True, "Reciprocal(x)": True, "Div(half, x)": True,
    "Softsign(x)": True, "Round(x)": True, "Clip(x, low1)": True, "HardSigmoid<beta=0.0>(x)": True,
    "Conv(x, kernel)": True, "Conv(x, kernel, negative)": True,
    "Abs(x)": False, "Exp(x)": False, "Cos(x)": False, "Sigmoid(x)": False, "Softmax(x)": False, "Mul(x, x)": False,
    "Add(x, half)": False, "Add(x, zero)": False, "Sub(x, negative)": False, "Sub(zero, x)": False,
    "Sub(half, x)": False, "Pow(x, two)": False, "Pow(x, even)": False, "Pow(half, x)": False, "Max(x, half)": False,
    "Min(x, low)": False, "Clip(x, eps)": False, "HardSigmoid(x)": False, "ReduceL2<axes=[1]>(x)": False,
    "Softplus(x)": False, "Conv(x, kernel, half)": False, "Conv(x, kernel, zero)": False, "Log(x)": False,
}  # fmt: skip


@pytest.mark.parametrize(("call", "told"), CALLS.items())
def test_between_a_tensor_and_a_divisor(call: str, told: bool) -> None:
    weights = {name: value for name, value in {**WITH, "low1": np.float64(-1)}.items() if name in call}
    model = parse(f"(double[1,4,4] x) => (double[N] y) {{ h = {call} y = Reciprocal(h) }}", **weights)
    view = View(from_proto(model).graph)
    found = find_zero_sensitive(view)
    x = next(t for t in view.nodes()[0].inputs if t.name == "x")
    assert (x in found) == told
    if not told:  # the claim that matters
        with np.errstate(all="ignore"):
            plus, minus = (evaluate(model, x=np.full((1, 4, 4), z))[0] for z in (0.0, -0.0))
        assert np.array_equal(plus, minus, equal_nan=True)


def test_quantising_forgets_the_sign_of_a_zero() -> None:
    body = (
        "(float[4] x) => (float[N] y) { q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) y = Reciprocal(d) }"
    )
    view = View(from_proto(parse(body, s=np.float32(0.1), z=np.int8(0))).graph)
    told = find_zero_sensitive(view)
    assert [node.inputs[0] in told for node in view.nodes()] == [False, True, True]


def test_who_tells() -> None:
    body = """<ir_version: 8, opset_import: ["" : 17, "mine" : 1]> g (double[4] x, double[4] u, bool c) =>
    (double[4] y, double[N] z) { a = Neg(x) y = Add(a, u) b = Neg(u) d = mine.Odd(b) e = Relu(u) z = If(c)
    <then_branch = t () => (double[4] p) { p = Neg(e) }, else_branch = f () => (double[4] q) { q = Neg(e) }> }"""

    view = View(from_proto(onnx.parser.parse_model(body)).graph)
    tensors = {t.name: find_zero_sensitive(view).get(t, "") for node in view.nodes() for t in node.inputs}
    assert (tensors["x"], tensors["a"]) == ("", "")  # an output: −0 equals +0
    assert tensors["b"] == "Odd"
    assert tensors["u"] in ("Odd", "a control-flow body that reads 'e'")


NEVER_NEGATIVE: dict[str, bool] = {
    "h = Abs(x)": True, "h = Mul(x, x)": True, "h = Pow(x, two)": True, "h = Pow(x, even)": True,
    "h = ReduceL2<axes=[1]>(x)": True, "a = Abs(x) h = ReduceMean(a)": True, "a = Mul(x, x) h = Sqrt(a)": True,
    "a = Abs(x) b = Pow(x, two) h = Add(a, b)": True, "a = Abs(x) h = Mul(a, a)": True,
    "h = Neg(x)": False, "h = Pow(x, three)": False, "h = Mul(x, half)": False, "h = ReduceMean(x)": False,
    "a = Abs(x) h = Add(a, x)": False, "a = Abs(x) h = Neg(a)": False, "a = Abs(x) h = Sub(a, x)": False,
    "a = Abs(x) h = Mul(a, x)": False,
}  # fmt: skip


@pytest.mark.parametrize(("calls", "proved"), NEVER_NEGATIVE.items())
def test_what_is_never_negative(calls: str, proved: bool) -> None:
    model = parse(
        f"(double[1,4,4] x) => (double[N] y) {{ {calls} y = Reciprocal(h) }}",
        **{k: v for k, v in WITH.items() if k in calls},
    )
    view = View(from_proto(model).graph)
    last = view.nodes()[-1]
    assert is_never_negative(view, last.inputs[0]) == proved
    signs = [np.signbit(evaluate(model, x=np.full((1, 4, 4), z))[0]).any() for z in (-0.0, 0.0, -1.0, -1e-200)]
    assert not (proved and any(signs))
