from __future__ import annotations

import numpy as np
import pytest
from helpers import eager, evaluate, normal, open_session, ops, parse, reasons, run, same

from pwopt.passes import KeepLayout

F = np.float32
X, G = normal(2, 4, 5, 3).astype(F), normal(2, 4, 1, 1, seed=1).astype(F)
TWO = "(float[2,4,5,3] x, float[2,4,1,1] g) => (float[N] y) "


@pytest.mark.parametrize("opset", [11, 13, 19])
@pytest.mark.parametrize("body", ["{ y = Mul(x, g) }", "{ y = Mul(g, x) }", "{ y = Add(g, x) }"])
def test_a_gate_is_spread(body: str, opset: int) -> None:
    model = parse(TWO + body, opset=opset)
    result, _, _ = run(model, eager(KeepLayout))
    assert [n.op_type for n in result.graph.node] == ["Resize", body.split()[3].split("(")[0]]
    for a, b in zip(evaluate(model, x=X, g=G), evaluate(result, x=X, g=G), strict=True):
        np.testing.assert_array_equal(a, b)
    open_session(result)


@pytest.mark.parametrize(
    ("signature", "why"),
    [
        ("(float[2,4,H,3] x, float[2,4,1,1] g)", "--static"),
        ("(float[2,4,5,3] x, float[1,4,1,1] g)", ""),
        ("(float[2,4,5,3] x, float[2,1,1,1] g)", ""),
        ("(float[2,4,1,1] x, float[2,4,1,1] g)", ""),
        ("(float[2,4,5,3] x, float[2,4,5,1] g)", ""),
        ("(double[2,4,5,3] x, double[2,4,1,1] g)", ""),
        ("(float[2,4,0,3] x, float[2,4,1,1] g)", ""),
        ("(float[4,4,3] x, float[4,4,1,1] g)", ""),
    ],
)
def test_other_products_are_left_alone(signature: str, why: str) -> None:
    kind = signature[1:].split("[")[0]
    model = parse(f"{signature} => ({kind}[N] y) {{ y = Mul(x, g) }}")
    result, outcome, _ = run(model, eager(KeepLayout))
    assert result is model
    assert why in " ".join(reasons(outcome))


def test_before_opset_11() -> None:
    model = parse(TWO + "{ y = Mul(x, g) }", opset=10)
    result, outcome, _ = run(model, eager(KeepLayout))
    assert result is model
    assert "--opset" in reasons(outcome)[0]


@pytest.mark.parametrize(
    ("attrs", "found"),
    [
        ("axes=[2,3]", ["GlobalAveragePool"]),
        ("axes=[-1,-2],keepdims=1", ["GlobalAveragePool"]),
        ("axes=[2,3],keepdims=0", ["GlobalAveragePool", "Flatten"]),
        ("axes=[1]", ["ReduceMean"]),
        ("axes=[2]", ["ReduceMean"]),
    ],
)
def test_means_over_space(attrs: str, found: list[str]) -> None:
    model = parse(f"(float[2,4,5,3] x) => (float[N] y) {{ y = ReduceMean<{attrs}>(x) }}", opset=13)
    result, _, _ = run(model, eager(KeepLayout))
    assert [n.op_type for n in result.graph.node] == found
    same(model, result, 1e-6, x=X)


@pytest.mark.parametrize("signature", ["double[2,4,5,3]", "float[2,4,0,3]", "float[2,0,5,3]", "float[2,4,5,3,2]"])
def test_means_that_no_pooling_takes_are_left_alone(signature: str) -> None:
    kind = signature.partition("[")[0]
    model = parse(f"({signature} x) => ({kind}[N] y) {{ y = ReduceMean<axes=[2,3]>(x) }}", opset=13)
    assert run(model, eager(KeepLayout))[0] is model


@pytest.mark.parametrize(
    ("attrs", "split"),
    [
        ("strides=[2,2]", True),
        ("strides=[1,3]", True),
        ("strides=[1,1]", False),
        ("strides=[2,2],pads=[1,1,0,0]", False),
        ("strides=[2,2],group=2", False),
    ],
)
def test_strided_maps(attrs: str, split: bool) -> None:
    w = normal(6, 2 if "group" in attrs else 4, 1, 1, seed=2).astype(F)
    model = parse(f"(float[2,4,5,3] x) => (float[N] y) {{ y = Conv<{attrs}>(x, w) }}", w=w)
    result, _, _ = run(model, eager(KeepLayout))
    assert ops(result) == ({"MaxPool": 1, "Conv": 1} if split else {"Conv": 1})
    for a, b in zip(evaluate(model, x=X), evaluate(result, x=X), strict=True):
        np.testing.assert_array_equal(a, b)


def test_only_measuring_can_tell() -> None:
    model = parse(TWO + "{ y = Mul(x, g) }")
    result, outcome, _ = run(model, KeepLayout())
    assert result is model
    assert "only measuring can tell" in reasons(outcome)[0]


@pytest.mark.parametrize(("space", "kernel"), [("5,3", (3, 3)), ("5,3", (1, 2)), ("5", (1,)), ("5,3,2", (1, 1, 1))])
def test_other_strided_maps_are_left_alone(space: str, kernel: tuple[int, ...]) -> None:
    strides = ",".join("2" for _ in kernel)
    w = normal(6, 4, *kernel).astype(F)
    model = parse(f"(float[2,4,{space}] x) => (float[N] y) {{ y = Conv<strides=[{strides}]>(x, w) }}", w=w)
    assert run(model, eager(KeepLayout))[0] is model


def test_a_constant_scale_is_no_gate() -> None:
    model = parse("(float[2,4,5,3] x) => (float[N] y) { y = Mul(x, g) }", g=G)
    assert run(model, eager(KeepLayout))[0] is model
