from __future__ import annotations

import numpy as np
import pytest
from helpers import normal, ops, parse, run, same

from pwopt.passes import FactorGates

BODY = "(double[N,4,H,W] x, double[N,4,1,1] g) => (double[N] y) { m = Mul(%s) y = Add(%s) }"


@pytest.mark.parametrize("product", ["x, g", "g, x"])
@pytest.mark.parametrize("total", ["x, m", "m, x"])
def test_a_residual_gate(product: str, total: str) -> None:
    model = parse(BODY % (product, total))
    result, outcome, _ = run(model, FactorGates())
    assert ops(result) == {"Add": 1, "Mul": 1}
    assert [n.op_type for n in result.graph.node] == ["Add", "Mul"]
    assert len(outcome.rewrites) == 1
    same(model, result, x=normal(2, 4, 3, 5), g=normal(2, 4, 1, 1, seed=1))


INPUTS = "(double[2,4,3,5] x, double[2,4,1,1] g) => (double[N] y) "


@pytest.mark.parametrize(
    ("body", "opset"),
    [
        ("(double[2,4,3,5] x, double[2,4,3,5] g) => (double[N] y) { m = Mul(x, g) y = Add(x, m) }", 17),  # as large as x
        ("(double[2,4,1,5] x, double[2,1,3,5] g) => (double[N] y) { m = Mul(x, g) y = Add(x, m) }", 17),  # which grows
        ("(double[2,4,3,5] x, double[4,1,1] g) => (double[N] y) { m = Mul(x, g) y = Add(x, m) }", 17),
        ("(double[2,4,3,5] x, double[2,4,1,1] g) => (double[N] y, double[N] m) { m = Mul(x, g) y = Add(x, m) }", 17),
        ("(double[2,4,3,5] x, double[2,4,1,1] g, double[2,4,3,5] z) => (double[N] y) { m = Mul(x, g) y = Add(z, m) }", 17),
        ("(double[2,4,3,5] x) => (double[N] y) { m = Mul(x, x) y = Add(x, m) }", 17),
        (INPUTS + "{ m = Mul(x, g) y = Sub(x, m) }", 17),
        (INPUTS + "{ m = Mul(x, g) y = Max(x, m) }", 17),
        (INPUTS + "{ m = Div(x, g) y = Add(x, m) }", 17),
        (INPUTS + "{ m = Pow(x, g) y = Add(x, m) }", 17),
        (INPUTS + "{ m = Mul(x, g) y = Add(m, m) }", 17),
        (INPUTS + "{ m = Mul<broadcast=1>(x, g) y = Add(x, m) }", 6),
    ],
)  # fmt: skip
def test_refusals(body: str, opset: int) -> None:
    model = parse(body, opset)
    assert run(model, FactorGates())[0] is model


def test_element_type_is_kept() -> None:
    body = "(float16[2,4,3,5] x, float16[2,4,1,1] g) => (float16[N] y) { m = Mul(x, g) y = Add(x, m) }"
    model = parse(body)
    result, _, _ = run(model, FactorGates())
    same(model, result, 1e-2, x=normal(2, 4, 3, 5, dtype=np.float16), g=normal(2, 4, 1, 1, dtype=np.float16))
