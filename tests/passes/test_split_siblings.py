from __future__ import annotations

import numpy as np
import pytest
from helpers import build, eager, normal, ops, parse, reasons, run, same

from pwopt.passes import SplitSiblings

X = normal(2, 3, 6, 5, seed=50)
HEAD = "(double[2,3,6,5] x) => (double[N] p, double[N] q) "
CONSTANTS = {
    "w": normal(7, 3, 1, 1), "b": normal(7, seed=1), "k": normal(7, 3, 3, 3, seed=2), "n": np.array([3, 4]), "three": np.array([2, 3, 2]),
    "low": np.float64(-0.5), "high": np.float64(0.5), "slope": normal(7, 1, 1, seed=3), "g": normal(8, 3, 1, 1, seed=4), "half": np.array([4, 4]),
    "space": np.array([2, 4]), "d": normal(7, 1, 3, 3, seed=5), "up": np.array([1, 1, 2, 2], np.float32), "w2": normal(7, 3, 1, 1, seed=6),
    "w1": normal(7, 3, 1, seed=11), "image": normal(6, 5, seed=8), "one": normal(1, 3, 1, 1, seed=9), "x7": normal(1, 7, 6, 5, seed=10), "size": np.array([2, 7, 12, 10]),
    "picks": np.array([7, 6, 5, 4, 3, 2, 0]), "h": normal(8, 4, 1, 1, seed=12), "u7": normal(2, 7, 1, 1, seed=7),
}  # fmt: skip


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("{ a = Conv(x, w) p, q = Split<axis=1>(a, n) }", {"Conv": 2}),
        ("{ a = Conv<pads=[1,1,1,1],strides=[2,1]>(x, k, b) p, q = Split<axis=-3>(a, n) }", {"Conv": 2}),
        ("{ a = Conv(x, w, b) s = Sigmoid(a) m = Mul(a, s) p, q = Split<axis=1>(m, n) }", {"Conv": 2, "Sigmoid": 2, "Mul": 2}),
        ("{ a = Conv(x, w, b) r = Relu(a) m = Clip(r, low, high) p, q = Split<axis=1>(m, n) }", {"Conv": 2, "Relu": 2, "Clip": 2}),
        ("{ a = Conv(x, w) e = GlobalAveragePool(a) m = Mul(a, e) p, q = Split<axis=1>(m, n) }", {"Conv": 2, "GlobalAveragePool": 2, "Mul": 2}),
        ("{ a = Conv(x, w) m = Mul(a, slope) p, q = Split<axis=1>(m, n) }", {"Conv": 2, "Mul": 2}),
        ("{ a = Conv(x, w) m = Conv<group=7,pads=[1,1,1,1]>(a, d, b) p, q = Split<axis=1>(m, n) }", {"Conv": 4}),
        ("{ a = Conv(x, w) c = Conv<pads=[1,1,1,1]>(x, k, b) s = Add(a, c) m = Relu(s) p, q = Split<axis=1>(m, n) }", {"Conv": 4, "Add": 2, "Relu": 2}),
        ("{ a = Conv(x, w) r = Resize<mode=\"nearest\">(a, , up) e = Conv<strides=[1,1]>(x, w2) o = Resize<mode=\"nearest\">(e, , up) s = Add(r, o) p, q = Split<axis=1>(s, n) }", {"Conv": 4, "Resize": 4, "Add": 2}),
        ("{ a = Conv(x, w) o = MaxPool<kernel_shape=[2,2]>(a) t = AveragePool<kernel_shape=[2,2]>(o) p, q = Split<axis=1>(t, n) }", {"Conv": 2, "MaxPool": 2, "AveragePool": 2}),
        ("{ a = Conv(x, w, b) p, z, q = Split<axis=1>(a, three) }", {"Conv": 2}),
        ("(double[2,3] x) => (double[N] p, double[N] q) { a = Gemm(x, m, b) p, q = Split<axis=1>(a, n) }", {"Gemm": 2}),
        ("(double[2,4,3] x) => (double[N] p, double[N] q) { a = MatMul(x, m) c = Add(a, b) p, q = Split<axis=2>(c, n) }", {"MatMul": 2, "Add": 2}),
    ],
)  # fmt: skip
def test_parts_are_maps_of_their_own(body: str, found: dict[str, int]) -> None:
    text, weights = body, {k: v for k, v in CONSTANTS.items() if k in body.replace(",", " ").replace(")", " ").split()}
    weights |= {"m": normal(3, 7, seed=9)} if " m" in body and "Conv" not in body else {}
    model = parse(text if text.startswith("(") else HEAD + text, **weights)
    result, _, _ = run(model, eager(SplitSiblings))
    assert ops(result) == found
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    same(model, result, x=normal(*shape, seed=50))


def test_a_part_that_nobody_reads_is_not_computed() -> None:
    model = parse(
        "(double[2,3,6,5] x) => (double[N] p) { a = Conv(x, w) p, unread = Split<axis=1>(a, n) }",
        w=CONSTANTS["w"], n=CONSTANTS["n"],
    )  # fmt: skip
    result, _, _ = run(model, eager(SplitSiblings))
    assert ops(result) == {"Conv": 1}
    same(model, result, x=X)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("{ a = Conv(x, w) r = Relu(a) p, q = Split<axis=1>(r, n) t = Conv(x, w) u = ReduceSum(t) y = Add(p, u) }", "shared"),
        ("(double[2,3,6,5] x) => (double[N] p, double[N] q, double[N] a) { a = Conv(x, w) p, q = Split<axis=1>(a, n) }", ""),
        ("(double[2,3,6,5] x) => (double[N] p, double[N] q, double[N] a) { a = Conv(x, w) r = Relu(a) p, q = Split<axis=1>(r, n) }", ""),
        ("(double[2,3,6,5] x) => (double[N] p, double[N] q, double[N] z) { a = Conv(x, w) r = Relu(a) p, q = Split<axis=1>(r, n) s = Tanh(a) z = Abs(s) }", ""),
        ("(double[2,3,6,5] x) => (double[N] p, double[N] q, double[N] z) { a = Conv(x, w) s = Sigmoid(a) m = Mul(a, s) z = Neg(s) p, q = Split<axis=1>(m, n) }", ""),
        ("(double[2,3,6,5] x) => (double[N] p, double[N] q, double[N] z) { a = Conv(x, w) s = Sigmoid(a) m = Mul(a, s) z = Neg(a) p, q = Split<axis=1>(m, n) }", ""),
        ("(double[2,3,7,5] x) => (double[N] p, double[N] q) { a = Conv(x, w) p, q = Split<axis=2>(a, n) }", ""),
        ("(double[2,3,7,5] x, double[1,3,5] line) => (double[N] p, double[N] q) { a = Conv(x, w) o = Conv(line, w1) m = Add(a, o) p, q = Split<axis=1>(m, n) }", ""),
        ("{ a = Conv(x, w) m = Mul(a, image) p, q = Split<axis=1>(m, n) }", ""),
        ("{ a = Conv(x, w) o = Conv(x, one) m = Mul(a, o) p, q = Split<axis=1>(m, n) }", ""),
        ("{ a = Conv(x, w) m = Add(a, x7) p, q = Split<axis=1>(m, n) }", ""),
        ("{ a = Conv(x, w) m = Resize<mode=\"nearest\">(a, , , size) p, q = Split<axis=1>(m, n) }", ""),
        ("{ a = Conv(x, w) m = Transpose<perm=[0,1,3,2]>(a) p, q = Split<axis=1>(m, n) }", ""),
        ("{ a = Conv(x, w) m = Softmax<axis=1>(a) p, q = Split<axis=1>(m, n) }", ""),
        ("(double[2,3,6,5] x) => (double[N] p, double[N] q, double[N] z) { a = Conv(x, w) e = GlobalAveragePool(a) m = Mul(a, e) p, q = Split<axis=1>(m, n) z = Conv(e, u7) }", ""),
        ("{ a = Conv(x, g) s = Gather<axis=1>(a, picks) p, q = Split<axis=1>(s, n) }", ""),
        ("{ t = Conv(x, g) a = Conv<group=2>(t, h) p, q = Split<axis=1>(a, half) }", ""),
        ("(double[2,3,6,5] x) => (double[N] p, double[N] q, int64[N] i) { a = Conv(x, w) m, i = MaxPool<kernel_shape=[2,2]>(a) p, q = Split<axis=1>(m, n) }", ""),
        ("{ a = Conv<group=2>(t, g2) p, q = Split<axis=1>(a, half) t = Concat<axis=1>(x, x) }", ""),
        ("{ a = Conv(x, w) p, q = Split<axis=2>(a, space) }", ""),
    ],
)  # fmt: skip
def test_refusals(body: str, why: str) -> None:
    if "g2" in body:
        body = "{ t = Concat<axis=1>(x, x) a = Conv<group=2>(t, g) p, q = Split<axis=1>(a, half) }"
    model = build(body, CONSTANTS, HEAD)
    result, outcome, _ = run(model, eager(SplitSiblings))
    assert result is model
    assert why in " ".join(reasons(outcome))


def test_only_measuring_can_tell() -> None:
    model = build("{ a = Conv(x, w) p, q = Split<axis=1>(a, n) }", CONSTANTS, HEAD)
    result, outcome, _ = run(model, SplitSiblings())
    assert result is model
    assert "only measuring can tell" in reasons(outcome)[0]


def test_names_are_not_used_twice() -> None:
    model = build("{ a = Conv(x, w, b) s = Sigmoid(a) m = Mul(a, s) p, q = Split<axis=1>(m, n) }", CONSTANTS, HEAD)
    for i, node in enumerate(model.graph.node):
        node.name = f"node{i}"
    result, _, _ = run(model, eager(SplitSiblings))
    names = [n.name for n in result.graph.node if n.name]
    assert len(names) == len(set(names))


SLICES = {
    "zero": np.array([0]),
    "three": np.array([3]),
    "seven": np.array([7]),
    "end": np.array([99]),
    "axis": np.array([1]),
}
GATED = "{ a = Conv(x, w, b) s = Slice(a, zero, three, axis) t = Tanh(s) u = Slice(a, three, end, axis) v = Sigmoid(u) p = Neg(t) q = Neg(v) }"


def test_slices_are_a_split() -> None:
    model = build(GATED, CONSTANTS | SLICES, HEAD)
    result, outcome, _ = run(model, eager(SplitSiblings))
    assert ops(result) == {"Conv": 2, "Tanh": 1, "Sigmoid": 1, "Neg": 2}
    (rewrite,) = outcome.rewrites
    assert rewrite.macs_before == rewrite.macs_after == 2 * 30 * 7 * 3
    same(model, result, x=X)


@pytest.mark.parametrize(
    "body",
    [
        GATED.replace("Slice(a, three, end, axis)", "Slice(a, zero, end, axis)"),  # overlap
        GATED.replace("u = Slice(a, three, end, axis)", "u = Relu(a)"),
        GATED.replace("Slice(a, three, end, axis)", "Slice(a, three, end, axis2)"),
        GATED.replace("u = Slice(a, three, end, axis)", "u = Slice(a, three, end, axis, two)"),
        GATED.replace("a = Conv(x, w, b)", "c = Conv(x, w, b) a = Softmax<axis=1>(c)"),
        GATED.replace("Slice(a, three, end, axis)", "Slice(a, seven, end, axis)"),  # empty
    ],
)
def test_other_slices_stay(body: str) -> None:
    model = build(body, CONSTANTS | SLICES | {"axis2": np.array([2]), "two": np.array([2])}, HEAD)
    assert run(model, eager(SplitSiblings))[0] is model
