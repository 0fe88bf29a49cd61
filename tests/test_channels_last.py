from __future__ import annotations

import numpy as np
import onnx
import pytest
from helpers import normal, ops, parse, reasons, run, same

from pwopt.passes import ChannelsLast


def eager() -> ChannelsLast:
    p = ChannelsLast()
    p.eager = True
    return p


HEAD = "(double[2,12,9] x) => (double[N] y) { r = Reshape(x, s) t = Transpose<perm=[0,2,1,3]>(r) p = Softmax<axis=1>(t) c = Conv(p, w%s) y = Reshape(c, q) }"
SHAPES = {"s": np.array([2, 3, 4, 9]), "q": np.array([2, 3, 9])}


def order(model: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in model.graph.node]


@pytest.mark.parametrize("biased", [False, True])
def test_the_distribution_head(biased: bool) -> None:
    """Reshape, Transpose, Softmax over 4 bins, their expectation."""
    model = parse(
        HEAD % (", b" if biased else ""),
        w=np.arange(4.0).reshape(1, 4, 1, 1),
        **SHAPES,
        **({"b": normal(1)} if biased else {}),
    )
    result, _, _ = run(model, eager())
    assert order(result) == [
        "Reshape",
        "Transpose",
        "Softmax",
        "MatMul",
        *(["Add"] if biased else []),
        "Transpose",
        "Reshape",
    ]
    assert list(result.graph.node[1].attribute[0].ints) == [0, 1, 3, 2]
    same(model, result, x=normal(2, 12, 9))


def test_without_a_transpose_before_it() -> None:
    model = parse(
        "(double[2,4,5,3] x) => (double[N] y) { p = Softmax<axis=-3>(x) y = Conv(p, w) }", w=normal(6, 4, 1, 1)
    )
    result, _, _ = run(model, eager())
    assert order(result) == ["Transpose", "Softmax", "MatMul", "Transpose"]
    same(model, result, x=normal(2, 4, 5, 3))


@pytest.mark.parametrize(
    "body",
    [
        "{ p = Softmax<axis=2>(x) y = Conv(p, w) }",
        "{ p = Softmax<axis=1>(x) y = Conv<pads=[1,1,1,1]>(p, k) }",
        "{ p = Softmax<axis=1>(x) y = Conv<group=2>(p, g) }",
        "{ p = Softmax<axis=1>(x) c = Conv(p, w) d = Neg(p) y = Add(c, d) }",
    ],
)
def test_refusals(body: str) -> None:
    names = {"w": normal(4, 4, 1, 1), "k": normal(4, 4, 3, 3), "g": normal(4, 2, 1, 1)}
    used = {k: v for k, v in names.items() if f" {k})" in body}
    model = parse("(double[2,4,5,3] x) => (double[N] y) " + body, **used)
    assert run(model, eager())[0] is model


def test_before_opset_13_a_softmax_takes_all_axes_from_there_on() -> None:
    model = parse(
        "(double[2,4,5,3] x) => (double[N] y) { p = Softmax<axis=1>(x) y = Conv(p, w) }", 12, w=normal(6, 4, 1, 1)
    )
    assert run(model, eager())[0] is model


def test_not_without_measuring() -> None:
    model = parse(HEAD % "", w=normal(1, 4, 1, 1), **SHAPES)
    result, outcome, _ = run(model, ChannelsLast())
    assert result is model
    assert "only measuring" in reasons(outcome)[0]
    assert ops(result) == ops(model)
