from __future__ import annotations

import numpy as np
import onnx
import pytest
from helpers import evaluate, normal, ops, parse, reasons, run, same

from pwopt.passes import NameActivations, NameHardSigmoid, NameSwish

F = np.float32
X = normal(2, 8, seed=3, dtype=np.float32) * 4
HARD_SWISH = {
    "torch": "a = Add(x, three) b = Clip(a, zero, six) c = Mul(x, b) y = Div(c, six)",
    "paddle": "a = Add(x, three) b = Clip(a, zero, six) c = Mul(b, x) y = Mul(c, sixth)",
    "gate divided first": "a = Add(three, x) b = Clip(a, zero, six) c = Div(b, six) y = Mul(x, c)",
    "factor on x": "a = Add(x, three) b = Clip(a, zero, six) s = Mul(x, sixth) y = Mul(s, b)",
    "relu and min": "a = Add(x, three) r = Relu(a) b = Min(r, six) c = Div(b, six) y = Mul(x, c)",
    "max and min": "a = Add(x, three) r = Max(zero, a) b = Min(six, r) c = Mul(x, b) y = Div(c, six)",
    "hard sigmoid": "h = HardSigmoid<alpha=0.16666667, beta=0.5>(x) y = Mul(x, h)",
    "scaled inside": "m = Mul(x, sixth) a = Add(m, half) b = Clip(a, zero, one) y = Mul(x, b)",
}
CONSTANTS = {"three": F(3), "zero": F(0), "six": F(6), "sixth": F(1 / 6), "half": F(0.5), "one": F(1)}


def naming() -> list[NameActivations]:
    return [NameActivations(), NameHardSigmoid(), NameSwish()]


def model_of(body: str, opset: int, **weights: np.ndarray) -> onnx.ModelProto:
    used = {k: v for k, v in {**CONSTANTS, **weights}.items() if f"{k})" in body or f"{k}," in body}
    return parse(f"(float[2,8] x) => (float[N] y) {{ {body} }}", opset, **used)


@pytest.mark.parametrize("body", HARD_SWISH.values(), ids=HARD_SWISH)
def test_hard_swish_in_every_spelling(body: str) -> None:
    model = model_of(body, 14)
    result, outcome, _ = run(model, *naming())
    assert ops(result) == {"HardSwish": 1}, reasons(outcome)
    assert not result.graph.initializer
    same(model, result, 1e-6, x=X)


@pytest.mark.parametrize("body", HARD_SWISH.values(), ids=HARD_SWISH)
def test_before_opset_14_it_is_a_hard_sigmoid_and_a_product(body: str) -> None:
    model = model_of(body, 13)
    result, outcome, _ = run(model, *naming())
    assert ops(result) == {"HardSigmoid": 1, "Mul": 1}
    assert "HardSwish exists from opset 14" in " ".join(reasons(outcome) + [r.reason for r in outcome.rewrites])
    same(model, result, 1e-6, x=X)


def test_clip_by_attribute() -> None:
    body = "a = Add(x, three) b = Clip<min=0.0, max=6.0>(a) c = Mul(x, b) y = Div(c, six)"
    result, _, _ = run(model_of(body, 10), *naming())
    assert ops(result) == {"HardSigmoid": 1, "Mul": 1}


def test_hard_sigmoid_with_its_own_slope() -> None:
    model = model_of("m = Mul(x, s) a = Add(m, three) b = Clip(a, zero, six) y = Div(b, six)", 12, s=F(1.2))
    result, _, _ = run(model, *naming())
    assert ops(result) == {"HardSigmoid": 1}
    attributes = {a.name: a.f for a in result.graph.node[0].attribute}
    assert attributes["alpha"] == pytest.approx(0.2)
    assert attributes["beta"] == pytest.approx(0.5)
    same(model, result, 1e-6, x=X)


@pytest.mark.parametrize(
    "body",
    [
        "a = Add(x, half) b = Clip(a, zero, six) c = Mul(x, b) y = Div(c, six)",  # another slope: still gated
        "a = Add(x, three) b = Clip(a, half, six) c = Mul(x, b) y = Div(c, six)",  # another lower bound
        "a = Add(x, three) b = Clip(a, zero, six) c = Mul(x, b) y = Div(c, three)",  # another factor
        "a = Add(x, three) b = Clip(a, zero, six) n = Neg(x) z = Abs(n) c = Mul(z, b) y = Div(c, six)",  # another x
    ],
)
def test_lookalikes_are_not_named_hard_swish(body: str) -> None:
    model = model_of(body, 17)
    result, _, _ = run(model, *naming())
    assert "HardSwish" not in ops(result)
    if result is not model:
        same(model, result, 1e-5, x=X)


@pytest.mark.parametrize(
    "body",
    [
        "b = Clip(x, zero, six) y = Div(b, three)",  # reaches 2
        "b = Clip(x, minus, six) y = Div(b, six)",
        "b = Clip(x, zero) y = Div(b, six)",
        "a = Max(x, half) b = Min(a, six) y = Div(b, six)",
        "a = Abs(x) b = Min(a, six) y = Div(b, six)",
        "a = Max(x, zero) b = Max(a, six) y = Div(b, six)",
        "a = Relu(x) b = Min(a, minus) y = Div(b, minus)",
        "a = Max(x, zero) b = Min(a, six) c = Div(b, six) k = Neg(a) y = Add(c, k)",  # read by more
        "s = HardSigmoid(x) p = Add(s, one) y = Mul(x, p)",
        "s = HardSigmoid(x) p = Mul(s, three) y = Mul(x, p)",
        "s = Sigmoid(x) p = Add(s, one) y = Mul(x, p)",
        "d = Mul(x, three) s = Sigmoid(d) y = Mul(x, s)",
        "s = Tanh(x) y = Mul(x, s)",
        "s = Sigmoid(x) y = Add(x, s)",
        "d = Div(x, three) e = Erf(d) p = Add(e, one) m = Mul(x, p) y = Mul(m, half)",
        "d = Div(x, root) e = Erf(d) p = Add(e, half) m = Mul(x, p) y = Mul(m, half)",
        "d = Div(x, root) e = Erf(d) p = Add(e, one) m = Mul(x, p) y = Mul(m, three)",
    ],
)
def test_lookalikes_stay_as_they_are(body: str) -> None:
    model = model_of(body, 24, minus=F(-1), root=F(np.sqrt(2)))
    assert run(model, *naming())[0] is model


@pytest.mark.parametrize("kept", "abc")
def test_an_intermediate_that_is_read_elsewhere_is_kept(kept: str) -> None:
    body = "(float[2,8] x) => (float[N] y, float[N] k) { a = Add(x, t) b = Clip(a, z, s) c = Mul(x, b) y = Div(c, s) k = Neg(%s) }"
    model = parse(body % kept, 17, t=F(3), z=F(0), s=F(6))
    assert run(model, *naming())[0] is model


GELU = {
    "torch": "d = Div(x, root) e = Erf(d) p = Add(e, one) m = Mul(x, p) y = Mul(m, half)",
    "half first": "d = Mul(x, inverse) e = Erf(d) p = Add(one, e) h = Mul(half, x) y = Mul(h, p)",
    "half on the gate": "d = Div(x, root) e = Erf(d) p = Add(e, one) q = Mul(p, half) y = Mul(x, q)",
}


@pytest.mark.parametrize("body", GELU.values(), ids=GELU)
def test_gelu(body: str) -> None:
    weights = {"root": F(np.sqrt(2)), "inverse": F(np.sqrt(0.5))}
    model = model_of(body, 20, **weights)
    result, _, _ = run(model, *naming())
    assert ops(result) == {"Gelu": 1}
    same(model, result, 1e-5, x=X)
    old = model_of(body, 17, **weights)
    result, outcome, _ = run(old, *naming())
    assert result is old
    assert "Gelu exists from opset 20" in reasons(outcome)[0]


def test_swish_waits_for_opset_24() -> None:
    body = "s = Sigmoid(x) y = Mul(x, s)"
    result, _, _ = run(model_of(body, 24), *naming())
    assert ops(result) == {"Swish": 1}
    np.testing.assert_allclose(evaluate(result, x=X)[0], evaluate(model_of(body, 24), x=X)[0], atol=1e-6)
    _, outcome, _ = run(model_of(body, 23), *naming())
    assert "Swish exists from opset 24" in reasons(outcome)[0]


def test_onnxruntime_has_no_hard_sigmoid_in_float64() -> None:
    body = "(double[2,8] x) => (double[N] y) { a = Add(x, t) b = Clip(a, z, s) y = Div(b, s) }"
    model = parse(body, 13, t=np.float64(3), z=np.float64(0), s=np.float64(6))
    result, outcome, _ = run(model, *naming())
    assert result is model
    assert "float64" in reasons(outcome)[0]


def test_half_precision_constants_are_recognised() -> None:
    h = np.float16
    body = "(float16[2,8] x) => (float16[N] y) { a = Add(x, t) b = Clip(a, z, s) c = Mul(x, b) y = Mul(c, q) }"
    result, _, _ = run(parse(body, 14, t=h(3), z=h(0), s=h(6), q=h(1 / 6)), *naming())
    assert ops(result) == {"HardSwish": 1}
