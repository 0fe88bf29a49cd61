from __future__ import annotations

import numpy as np
import pytest
from helpers import build, eager, normal, ops, parse, reasons, run, same

from pwopt.passes import SplitMultiplier

X = normal(2, 3, 7, 6, seed=50)
HEAD = "(double[2,3,7,6] x) => (double[N] y) "
CONSTANTS = {
    "w": normal(6, 1, 3, 3), "b": normal(6, seed=1), "w3": normal(9, 1, 3, 3, seed=2), "v": normal(4, 6, 1, 1, seed=3),
    "v9": normal(4, 9, 1, 1, seed=4), "d": normal(6, 1, 3, 3, seed=5), "slope": np.abs(normal(6, 1, 1, seed=6)),
    "w6": normal(6, 3, 1, 1, seed=7), "v12": normal(4, 12, 1, 1, seed=8), "parts": np.array([2, 4]), "u2": normal(4, 2, 1, 1, seed=9),
    "u4": normal(4, 4, 1, 1, seed=10), "wide": normal(6, 3, 1, 1, seed=11), "grouped": normal(6, 3, 1, 1, seed=12),
}  # fmt: skip


@pytest.mark.parametrize(
    ("body", "parts", "others"),
    [
        ("{ a = Conv<group=3>(x, w) y = Conv(a, v) }", 2, 1),
        ("{ a = Conv<group=3,pads=[1,1,1,1],strides=[2,2]>(x, w, b) r = Relu(a) y = Conv(r, v) }", 2, 1),
        ("{ a = Conv<group=3,dilations=[2,1]>(x, w3) y = Conv(a, v9) }", 3, 1),
        ("{ a = Conv<group=3>(x, w) m = Mul(a, slope) t = Conv<group=6>(m, d) y = Conv(t, v) }", 2, 2),
        ("{ a = Conv<group=3,pads=[1,1,1,1]>(x, w, b) c = Conv(x, w6) s = Add(a, c) y = Conv(s, v) }", 2, 2),
        ("{ a = Conv<group=3,pads=[1,1,1,1]>(x, w, b) c = Conv(x, w6) s = Concat<axis=1>(c, a) y = Conv(s, v12) }", 2, 2),
    ],
)  # fmt: skip
def test_as_many_depthwise_convolutions(body: str, parts: int, others: int) -> None:
    """The permutation of the parts goes into scales, depthwise filters, sums and the columns of the next map."""
    model = build(body, CONSTANTS, HEAD)
    result, outcome, _ = run(model, eager(SplitMultiplier))
    assert ops(result)["Conv"] == parts + others, reasons(outcome)
    assert parts in [len(n.input) for n in result.graph.node if n.op_type == "Concat"]
    same(model, result, x=X)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("(double[2,3,7,6] x) => (double[N] y, double[N] a) { a = Conv<group=3>(x, w) y = Conv(a, v) }", "'a' is a graph output"),
        ("{ y = Conv<group=3>(x, w) }", "'y' is a graph output"),
        ("{ a = Conv<group=3>(x, w) s = Softmax<axis=1>(a) y = Conv(s, v) }", "Softmax"),
        ("{ a = Conv<group=3>(x, w) p, q = Split<axis=1>(a, parts) s = Conv(p, u2) t = Conv(q, u4) y = Add(s, t) }", "they are split, or some of them are summed"),
        ("{ a = Conv<group=3>(x, w) c = Conv<group=3>(x, w) s = Add(a, c) y = Conv(s, v) }", "shared"),
        ("{ a = Conv<group=3>(x, w) y = Conv<group=2>(a, grouped) }", "holds the channels"),
    ],
)  # fmt: skip
def test_refusals(body: str, why: str) -> None:
    model = build(body, CONSTANTS, HEAD)
    result, outcome, _ = run(model, eager(SplitMultiplier))
    assert result is model
    assert why in " ".join(reasons(outcome))


def test_two_multipliers_in_one_sum_are_left_alone() -> None:
    model = build("{ a = Conv<group=3>(x, w) c = Conv<group=3>(x, d) s = Add(a, c) y = Conv(s, v) }", CONSTANTS, HEAD)
    result, outcome, _ = run(model, eager(SplitMultiplier))
    assert result is model
    assert "a channel multiplier" in reasons(outcome)[0]


def test_plain_depthwise_and_grouped_convolutions_are_not_its_business() -> None:
    model = parse(
        "(double[2,6,7,6] x) => (double[N] y) { a = Conv<group=6>(x, w) y = Conv<group=2>(a, v) }",
        w=normal(6, 1, 3, 3), v=normal(4, 3, 1, 1),
    )  # fmt: skip
    result, outcome, _ = run(model, eager(SplitMultiplier))
    assert result is model
    assert not reasons(outcome)


def test_only_measuring_can_tell() -> None:
    model = build("{ a = Conv<group=3>(x, w) y = Conv(a, v) }", CONSTANTS, HEAD)
    result, outcome, _ = run(model, SplitMultiplier())
    assert result is model
    assert "only measuring can tell" in reasons(outcome)[0]


def test_many_filters_of_a_single_channel_are_a_dense_map() -> None:
    model = parse("(double[2,1,7,6] x) => (double[N] y) { a = Conv(x, w) y = Conv(a, v) }", w=normal(6, 1, 3, 3), v=normal(4, 6, 1, 1))  # fmt: skip
    result, outcome, _ = run(model, eager(SplitMultiplier))
    assert result is model
    assert not reasons(outcome)
