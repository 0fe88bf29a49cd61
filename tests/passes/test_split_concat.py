"""split-concat and join-concat are each other's inverse."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import eager, normal, ops, parse, reasons, run, same

from pwopt.passes import JoinConcat, SplitConcat
from pwopt.rewriting.driver import Pass

A, B, C = normal(2, 3, 5, 7), normal(2, 4, 5, 7, seed=1), normal(2, 2, 5, 7, seed=2)
SIDE = "(double[2,3,5,7] a, double[2,4,5,7] b, double[2,2,5,7] c) => (double[N] y) "


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_map_of_a_concat(kernel: int) -> None:
    pads = [kernel // 2] * 4
    body = SIDE + f"{{ t = Concat<axis=1>(a, b, c) y = Conv<pads={pads}, strides=[2,2]>(t, w, z) }}"
    model = parse(body, w=normal(5, 9, kernel, kernel), z=normal(5))
    result, outcome, _ = run(model, eager(SplitConcat))
    assert ops(result) == {"Conv": 3, "Add": 2}
    assert outcome.rewrites[0].macs_before == outcome.rewrites[0].macs_after > 0
    same(model, result, a=A, b=B, c=C)


def test_along_the_last_axis() -> None:
    side = "(double[2,5,3] a, double[2,5,4] b) => (double[N] y) "
    split = parse(side + "{ t = Concat<axis=-1>(a, b) m = MatMul(t, w) y = Add(m, z) }", w=normal(7, 6), z=normal(6))
    result, _, _ = run(split, eager(SplitConcat))
    assert ops(result) == {"MatMul": 2, "Add": 2}
    feeds = {"a": normal(2, 5, 3), "b": normal(2, 5, 4, seed=1)}
    same(split, result, **feeds)
    joined = parse(side + "{ p = MatMul(a, u) q = MatMul(b, v) y = Add(p, q) }", u=normal(3, 6), v=normal(4, 6))
    result, _, _ = run(joined, eager(JoinConcat))
    assert ops(result) == {"Concat": 1, "MatMul": 1}
    same(joined, result, **feeds)


@pytest.mark.parametrize("p", [SplitConcat(), JoinConcat()])
def test_not_without_measuring(p: Pass) -> None:
    body = SIDE + "{ t = Concat<axis=1>(a, b) y = Conv(t, w) }"
    if isinstance(p, JoinConcat):
        body = SIDE + "{ p = Conv(a, u) q = Conv(b, v) y = Add(q, p) }"
    numbers = {"w": normal(5, 7, 1, 1), "u": normal(5, 3, 1, 1), "v": normal(5, 4, 1, 1)}
    model = parse(body, **{k: v for k, v in numbers.items() if f" {k})" in body})
    result, outcome, _ = run(model, p)
    assert result is model
    assert "only measuring can tell" in reasons(outcome)[0]


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        ("{ t = Concat<axis=2>(a, a2) y = Conv(t, w) }", {"w": normal(5, 3, 1, 1), "a2": normal(2, 3, 5, 7)}),
        ("{ t = Concat<axis=1>(a, b) s = Conv(t, w) r = Relu(t) q = Conv(r, v) y = Add(s, q) }",
         {"w": normal(5, 7, 1, 1), "v": normal(5, 7, 1, 1, seed=1)}),
        ("{ t = Concat<axis=1>(b) y = Conv(t, w) }", {"w": normal(5, 4, 1, 1)}),
        ("{ t = Concat<axis=1>(b, b) y = Conv(t, w) }", {"w": normal(5, 8, 1, 1)}),
        ("{ t = Concat<axis=1>(b, c) y = Conv<group=2>(t, w) }", {"w": normal(4, 3, 1, 1)}),
    ],
)  # fmt: skip
def test_refusals_to_split(body: str, weights: dict[str, np.ndarray]) -> None:
    model = parse(SIDE + body, **weights)
    assert run(model, eager(SplitConcat))[0] is model
