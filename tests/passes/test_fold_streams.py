from __future__ import annotations

import numpy as np
import onnx
import pytest
from helpers import build, normal, ops, reasons, run, same

from pwopt.passes import FoldStreams

HEAD = "(double[2,4,9] x) => (double[A,B,C] y) "


def stream(depth: int, scale: str = "Mul(a%d, k)", reader: str = "Conv<pads=[1,1]>(%s, c%d, d%d)") -> str:
    """A stream of blocks y′ = k(y + r(y)) with a scaled start."""
    body, y = "s0 = " + scale.replace("a%d", "x"), "s0"
    for i in range(1, depth + 1):
        body += f" h{i} = {reader % (y, i, i)} t{i} = Tanh(h{i}) r{i} = Conv(t{i}, w{i}, b{i}) a{i} = Add({y}, r{i})"
        body += f" s{i} = {scale % i if '%' in scale else scale}"
        y = f"s{i}"
    return f"{HEAD} {{ {body} y = Relu({y}) }}"


def weights(depth: int, k: float = 0.5**0.5) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {"k": np.array(k)}
    for i in range(1, depth + 1):
        found |= {f"c{i}": normal(6, 4, 3, seed=i), f"d{i}": normal(6, seed=i)}
        found |= {f"w{i}": normal(4, 6, 1, seed=-i % 97), f"b{i}": normal(4, seed=i + 50)}
    return found


X = normal(2, 4, 9)


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("scale", ["Mul(a%d, k)", "Mul(k, a%d)", "Div(a%d, k)"])
def test_one_scale_is_left(depth: int, scale: str) -> None:
    model = build(stream(depth, scale), weights(depth))
    result, outcome, _ = run(model, FoldStreams())
    assert len(outcome.rewrites) == depth
    assert ops(result)["Mul"] + ops(result)["Div"] == 1
    assert ops(result)["Conv"] == 2 * depth
    same(model, result, 1e-12, x=X)


@pytest.mark.parametrize("k", [2.0**-6, 2.0**6])
def test_deep_streams_stop_before_they_overflow(k: float) -> None:
    """2⁶ to the fourth power exceeds 2²⁰: the scale stays there, and a new run of blocks begins after it."""
    model = build(stream(8), weights(8, k))
    result, outcome, _ = run(model, FoldStreams())
    left = ops(result)["Mul"]
    assert 1 < left < 5
    assert any("times as large without its scale" in r for r in reasons(outcome))
    same(model, result, 1e-9, x=X)


@pytest.mark.parametrize("k", [0.0, np.inf, 1e-9, 1e9])
def test_extreme_scales_stay(k: float) -> None:
    model = build(stream(2), weights(2, k))
    assert run(model, FoldStreams())[0] is model


def test_float16_streams_stay() -> None:
    model = build(stream(2).replace("double", "float16"), {n: v.astype(np.float16) for n, v in weights(2).items()})
    assert run(model, FoldStreams())[0] is model


ONE = stream(1)


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (ONE.replace("s0, c1", "s0, c1").replace("y = Relu(s1)", "q = Relu(s0) y = Add(s1, q)"), ""),  # another reader
        (ONE.replace("y = Relu(s1)", "q = Relu(r1) y = Add(s1, q)"), ""),
        (ONE.replace("y = Relu(s1)", "q = Relu(a1) y = Add(s1, q)"), ""),
        (ONE.replace("r1 = Conv(t1, w1, b1)", "p1 = Conv(t1, w1, b1) r1 = Tanh(p1)"), ""),
        (ONE.replace("s1 = Mul(a1, k)", "s1 = Abs(a1)"), ""),
        (ONE.replace("y = Relu(s1)", "q = Conv(h1, w1) y = Add(s1, q)"), "shared"),
        (ONE.replace("double[A,B,C] y)", "double[A,B,C] y, double[2,4,9] s0)"), ""),
        (ONE.replace("Add(s0, r1)", "Add(s0, s0)").replace("y = Relu(s1)", "q = Relu(r1) y = Add(s1, q)"), ""),
    ],
)  # fmt: skip
def test_other_streams_stay(body: str, word: str) -> None:
    model = build(body, weights(1))
    result, outcome, _ = run(model, FoldStreams())
    assert result is model
    assert word in " ".join(reasons(outcome))


def test_weights_that_would_overflow_are_refused() -> None:
    numbers = {n: v.astype(np.float32) for n, v in weights(1, 2.0**-18).items()}
    numbers["w1"] = numbers["w1"] * np.float32(1e36)
    model: onnx.ModelProto = build(ONE.replace("double", "float"), numbers)
    result, outcome, _ = run(model, FoldStreams())
    assert result is model
    assert "overflow" in reasons(outcome)[0]
