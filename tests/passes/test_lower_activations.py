from __future__ import annotations

import numpy as np
import onnx
import pytest
from helpers import eager, evaluate, normal, open_session, ops, parse, run, same

from pwopt.passes import LowerMish, LowerPRelu, LowerPReluByChannel, LowerSwish

F = np.float32
EXTREMES = np.array([0, 1e-30, -1e-30, 0.5, -0.5, 19.9, 20.1, -20.1, -87, -104, 88, 1e4, -1e4, 3e38, -3e38], F)


def on_onnxruntime(model: onnx.ModelProto, **feeds: np.ndarray) -> np.ndarray:
    session = open_session(model)
    return np.asarray(session.run(None, feeds)[0])


def prelu(slope: np.ndarray, kind: str = "float", shape: str = "2,8,5,5", opset: int = 17) -> onnx.ModelProto:
    body = f"({kind}[{shape}] x) => ({kind}[N] y) {{ c = Conv(x, w) p = PRelu(c, s) y = Relu(p) }}"
    channels = int(shape.split(",")[1])
    weight = normal(channels, channels, *[1] * (shape.count(",") - 1)).astype(slope.dtype)
    return parse(body, opset, w=weight, s=slope)


@pytest.mark.parametrize("slope", [np.array(F(0.25)), np.full((1,), F(-0.5)), np.full((8, 1, 1), F(0.1))])
def test_equal_slopes_are_a_leaky_relu(slope: np.ndarray) -> None:
    model = prelu(slope)
    result, outcome, _ = run(model, LowerPRelu())
    assert ops(result) == {"Conv": 1, "LeakyRelu": 1, "Relu": 1}
    assert [r.site.pass_name for r in outcome.rewrites] == ["lower-prelu"]
    x = normal(2, 8, 5, 5, dtype=F)
    assert np.array_equal(on_onnxruntime(model, x=x), on_onnxruntime(result, x=x))


def test_float16_slopes() -> None:
    result, _, _ = run(prelu(np.full((8, 1, 1), 0.3, np.float16), "float16"), LowerPRelu())
    assert ops(result)["LeakyRelu"] == 1
    (alpha,) = [a.f for n in result.graph.node for a in n.attribute if a.name == "alpha"]
    assert alpha == np.float16(0.3)


@pytest.mark.parametrize("slope", [np.array([0.25, 0.5] * 4, F).reshape(8, 1, 1), np.array([np.nan], F)])
def test_other_slopes_stay(slope: np.ndarray) -> None:
    model = prelu(slope)
    assert run(model, LowerPRelu())[0] is model


def test_computed_slopes_stay() -> None:
    model = parse("(float[2,8] x, float[8] s) => (float[N] y) { y = PRelu(x, s) }")
    assert run(model, LowerPRelu())[0] is model


SLOPES = np.linspace(-0.5, 1, 8, dtype=F)


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1, 1)])
def test_slopes_per_channel(shape: tuple[int, ...]) -> None:
    model = prelu(SLOPES.reshape(shape))
    result, outcome, _ = run(model, eager(LowerPReluByChannel))
    assert ops(result) == {"Conv": 3, "Relu": 3, "Add": 1}
    assert outcome.rewrites[0].signature == "lower-prelu-by-channel: 2×8×5×5"
    x = normal(2, 8, 5, 5, dtype=F)
    x.flat[: EXTREMES.size - 2] = EXTREMES[:-2]
    same(model, result, 0, x=x)


@pytest.mark.parametrize(
    ("slope", "kind", "shape"),
    [
        (SLOPES[:6].reshape(6, 1, 1), "float", "2,6,5,5"),  # leaves the blocked layout
        (SLOPES.reshape(8, 1, 1).astype(np.float64), "double", "2,8,5,5"),
        (SLOPES.reshape(8, 1), "float", "2,8,5"),
        (np.tile(SLOPES.reshape(8, 1, 1), (1, 5, 5)), "float", "2,8,5,5"),
        (SLOPES[:5], "float", "2,8,5,5"),  # per column
    ],
)
def test_slopes_for_which_the_form_does_not_pay(slope: np.ndarray, kind: str, shape: str) -> None:
    model = prelu(slope, kind, shape)
    assert run(model, eager(LowerPReluByChannel))[0] is model


def test_only_behind_a_convolution() -> None:
    model = parse("(float[2,8,5,5] x) => (float[N] y) { y = PRelu(x, s) }", s=SLOPES.reshape(8, 1, 1))
    assert run(model, eager(LowerPReluByChannel))[0] is model


def test_swish_is_written_out() -> None:
    model = parse("(float[2,8] x) => (float[N] y) { y = Swish(x) }", 24, 10)
    result, _, _ = run(model, LowerSwish())
    assert ops(result) == {"Sigmoid": 1, "Mul": 1}
    same(model, result, 1e-6, x=normal(2, 8, dtype=F))


def test_a_swish_with_a_factor_stays() -> None:
    model = parse("(float[2,8] x) => (float[N] y) { y = Swish<alpha=1.5>(x) }", 24, 10)
    assert run(model, LowerSwish())[0] is model


MISH = {
    "Mish": "y = Mish(x)",
    "spelled": "p = Softplus(x) t = Tanh(p) y = Mul(x, t)",
    "turned": "p = Softplus(x) t = Tanh(p) y = Mul(t, x)",
}


@pytest.mark.parametrize("body", MISH.values(), ids=MISH)
def test_mish(body: str) -> None:
    model = parse(f"(float[N] x) => (float[N] y) {{ {body} }}", 18)
    result, _, _ = run(model, LowerMish())
    assert ops(result) == {"Min": 1, "Exp": 1, "Add": 2, "Mul": 2, "Div": 1}
    x = np.concatenate([EXTREMES, normal(1000, dtype=F) * 10])
    wide = x.astype(np.float64)
    exact = wide * np.tanh(np.logaddexp(0, wide))
    np.testing.assert_allclose(on_onnxruntime(result, x=x), exact, rtol=2e-6, atol=1e-37)
    assert np.isposinf(evaluate(result, x=np.array([np.inf], F))[0])


@pytest.mark.parametrize(
    "body",
    [
        "p = Softplus(x) t = Tanh(p) y = Mul(x, t) k = Neg(t)",
        "p = Softplus(x) t = Tanh(p) y = Mul(x, t) k = Neg(p)",
        "k = Neg(x) p = Softplus(k) t = Tanh(p) y = Mul(x, t)",
        "k = Softplus(x) t = Sigmoid(x) y = Mul(x, t)",
        "k = Neg(x) t = Tanh(x) y = Mul(x, t)",
    ],
)
def test_what_is_not_mish_alone_stays(body: str) -> None:
    model = parse(f"(float[N] x) => (float[N] y, float[N] k) {{ {body} }}", 18)
    assert run(model, LowerMish())[0] is model


def test_mish_in_float16_stays() -> None:
    """exp(20) overflows there."""
    model = parse("(float16[N] x) => (float16[N] y) { y = Mish(x) }", 18)
    assert run(model, LowerMish())[0] is model
