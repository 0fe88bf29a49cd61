from __future__ import annotations

import numpy as np
import onnx
import pytest
from helpers import build, eager, normal, ops, parse, reasons, run, same

from pwopt.graph.files import from_proto
from pwopt.graph.view import View
from pwopt.maps.cost import measure
from pwopt.passes import CleanUp, MergeSiblings

X = normal(2, 6, 5, 7)
SIDE = "(double[2,6,5,7] x) => (double[N] a, double[N] b, double[N] c) "
W3 = {"u": normal(3, 6, 1, 1), "v": normal(4, 6, 1, 1, seed=1), "w": normal(2, 6, 1, 1, seed=2), "z": normal(4, seed=3)}
THREE = "a = Conv(x, u) b = Conv(x, v, z) c = Conv(x, w)"


def macs(model: onnx.ModelProto) -> int:
    return measure(View(from_proto(model).graph)).macs


def test_three_maps_are_one_and_a_split() -> None:
    model = parse(SIDE + "{" + THREE + "}", **W3)
    result, outcome, _ = run(model, MergeSiblings())
    assert ops(result) == {"Conv": 1, "Split": 1}
    assert [o.name for o in result.graph.output] == ["a", "b", "c"]
    assert "6→(3, 4, 2)" in outcome.rewrites[0].reason
    assert outcome.rewrites[0].signature
    assert macs(result) == macs(model)
    same(model, result, x=X)


@pytest.mark.parametrize("opset", [11, 12, 13, 18])
def test_split_in_every_opset(opset: int) -> None:
    model = parse(SIDE + "{" + THREE + "}", opset, **W3)
    same(model, run(model, MergeSiblings())[0], x=X)


def test_readers_may_come_before_later_siblings() -> None:
    body = "(double[2,6,5,7] x) => (double[N] y) { a = Conv(x, u) r = Relu(a) b = Conv(x, u2) c = Conv(x, w) y = Concat<axis=1>(r, b, c) }"
    model = parse(body, u=W3["u"], u2=W3["v"], w=W3["w"])
    result, _, _ = run(model, MergeSiblings())
    assert ops(result) == {"Conv": 1, "Split": 1, "Relu": 1, "Concat": 1}
    same(model, result, x=X)


def test_two_maps_merge_only_where_asked_or_measured() -> None:
    body = "(double[2,6,5,7] x) => (double[N] a, double[N] b) { a = Conv(x, u) b = Conv(x, v) }"
    model = parse(body, u=W3["u"], v=W3["v"])
    result, outcome, _ = run(model, MergeSiblings())
    assert result is model
    assert "would not save an operator" in reasons(outcome)[0]
    result, _, _ = run(model, eager(MergeSiblings))
    assert ops(result) == {"Conv": 1, "Split": 1}
    same(model, result, x=X)


@pytest.mark.parametrize(
    ("activation", "kept"),
    [
        ("Relu(%s)", {"Conv": 1, "Relu": 1, "Split": 1}),
        ("LeakyRelu<alpha=0.3>(%s)", {"Conv": 1, "LeakyRelu": 1, "Split": 1}),
        ("Clip(%s, lo, hi)", {"Conv": 1, "Clip": 1, "Split": 1}),
    ],
)
def test_through_equal_activations(activation: str, kept: dict[str, int]) -> None:
    calls = [f"{y} = {activation % t}" for y, t in (("a", "p"), ("b", "q"))]
    body = "(double[2,6,5,7] x) => (double[N] a, double[N] b) { p = Conv(x, u) q = Conv(x, v) " + " ".join(calls) + "}"
    extra = {"lo": np.float64(-0.5), "hi": np.float64(1)} if "lo" in activation else {}
    model = parse(body, u=W3["u"], v=W3["v"], **extra)
    result, _, _ = run(model, MergeSiblings())
    assert ops(result) == kept
    same(model, result, x=X)


def test_through_a_gated_activation() -> None:
    body = (
        "(double[2,6,5,7] x) => (double[N] a, double[N] b) { p = Conv(x, u) q = Conv(x, v)"
        " s = Sigmoid(p) a = Mul(p, s) t = Sigmoid(q) b = Mul(t, q) }"
    )
    model = parse(body, u=W3["u"], v=W3["v"])
    result, _, _ = run(model, MergeSiblings())
    assert ops(result) == {"Conv": 1, "Sigmoid": 1, "Mul": 1, "Split": 1}
    same(model, result, x=X)


def test_different_activations_stay_behind_the_split() -> None:
    body = (
        "(double[2,6,5,7] x) => (double[N] a, double[N] b) { p = Conv(x, u) q = Conv(x, v)"
        " a = LeakyRelu<alpha=0.1>(p) b = LeakyRelu<alpha=0.2>(q) }"
    )
    model = parse(body, u=W3["u"], v=W3["v"])
    result, _, _ = run(model, eager(MergeSiblings))
    assert ops(result) == {"Conv": 1, "Split": 1, "LeakyRelu": 2}
    same(model, result, x=X)


@pytest.mark.parametrize("order", ["a, b", "b, a", "x, b, a", "a, b, x"])
def test_into_a_concat(order: str) -> None:
    body = "(double[2,6,5,7] x) => (double[N] y) { p = Conv(x, u) q = Conv(x, v) a = Relu(p) b = Relu(q) y = Concat<axis=1>(%s) }"
    model = parse(body % order, u=W3["u"], v=W3["v"])
    result, outcome, _ = run(model, MergeSiblings(), CleanUp())
    assert ops(result) == {"Conv": 1, "Relu": 1} | ({"Concat": 1} if "x" in order else {})
    assert "Concat" in outcome.rewrites[0].reason
    same(model, result, x=X)


@pytest.mark.parametrize("order", ["a, x, b", "a, b, a"])
def test_a_concat_with_others_between_needs_the_split(order: str) -> None:
    body = "(double[2,6,5,7] x) => (double[N] y) { p = Conv(x, u) q = Conv(x, v) a = Relu(p) b = Relu(q) y = Concat<axis=1>(%s) }"
    model = parse(body % order, u=W3["u"], v=W3["v"])
    result, _, _ = run(model, MergeSiblings(), CleanUp())
    assert ops(result) == {"Conv": 1, "Relu": 1, "Split": 1, "Concat": 1}
    same(model, result, x=X)


def test_a_concat_on_another_axis_needs_the_split() -> None:
    body = "(double[2,6,5,7] x) => (double[N] y) { p = Conv(x, u) q = Conv(x, v) a = Relu(p) b = Relu(q) y = Concat<axis=2>(a, b) }"
    model = parse(body, u=W3["u"], v=normal(3, 6, 1, 1, seed=9))
    result, _, _ = run(model, MergeSiblings(), CleanUp())
    assert ops(result) == {"Conv": 1, "Relu": 1, "Split": 1, "Concat": 1}
    same(model, result, x=X)


def test_kernels_and_strides_must_agree() -> None:
    body = (
        SIDE
        + "{ a = Conv<pads=[1,1,1,1], strides=[2,2]>(x, u) b = Conv<pads=[1,1,1,1], strides=[2,2]>(x, v) c = Conv(x, w) }"
    )
    model = parse(body, u=normal(3, 6, 3, 3), v=normal(2, 6, 3, 3, seed=1), w=W3["w"])
    result, _, _ = run(model, eager(MergeSiblings))
    assert ops(result) == {"Conv": 2, "Split": 1}
    same(model, result, x=X)


@pytest.mark.parametrize("form", ["matmul", "gemm"])
def test_query_key_value(form: str) -> None:
    weights = {f"w{i}": normal(6, 4 + i, seed=i) for i in range(3)} | {
        f"b{i}": normal(4 + i, seed=9 + i) for i in range(3)
    }
    if form == "gemm":
        body = "(double[5,6] x) => (double[N] a, double[N] b, double[N] c) { a = Gemm(x, w0, b0) b = Gemm(x, w1, b1) c = Gemm(x, w2) }"
        kept, x = {"Gemm": 1, "Split": 1}, normal(5, 6)
    else:
        body = (
            "(double[2,5,6] x) => (double[N] a, double[N] b, double[N] c) { p = MatMul(x, w0) a = Add(p, b0)"
            " q = MatMul(x, w1) b = Add(b1, q) c = MatMul(x, w2) }"
        )
        kept, x = {"MatMul": 1, "Add": 1, "Split": 1}, normal(2, 5, 6)
    model = parse(body, **weights)
    result, _, _ = run(model, MergeSiblings())
    assert ops(result) == kept
    same(model, result, x=x)


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        ("{ a = Conv(x, u) b = Conv(x, u) c = Conv(x, w) }", {"u": W3["u"], "w": W3["w"]}),  # a shared weight
        ("{ a = Conv<group=2>(x, u) b = Conv<group=2>(x, v) c = Conv(x, w) }",
         {"u": normal(4, 3, 1, 1), "v": normal(2, 3, 1, 1), "w": W3["w"]}),
        ("{ a = Conv<dilations=[2,2]>(x, u) b = Conv(x, v) c = Conv(x, w) }",
         {"u": normal(4, 6, 3, 3), "v": normal(2, 6, 3, 3), "w": W3["w"]}),
    ],
)  # fmt: skip
def test_refusals(body: str, weights: dict[str, np.ndarray]) -> None:
    model = parse(SIDE + body, **weights)
    assert run(model, eager(MergeSiblings))[0] is model


def test_an_output_between_map_and_activation_stays() -> None:
    body = "(double[2,6,5,7] x) => (double[N] a, double[N] b, double[N] p) { p = Conv(x, u) q = Conv(x, v) a = Relu(p) b = Relu(q) }"
    model = parse(body, u=W3["u"], v=W3["v"])
    result, _, _ = run(model, eager(MergeSiblings))
    assert ops(result) == {"Conv": 1, "Split": 1, "Relu": 2}
    same(model, result, x=X)


def test_a_result_that_others_read_needs_the_split() -> None:
    body = "(double[2,6,5,7] x) => (double[N] y, double[M] z) { p = Conv(x, u) q = Conv(x, v) y = Concat<axis=1>(p, q) z = Abs(q) }"
    model = parse(body, u=W3["u"], v=W3["v"])
    result, _, _ = run(model, eager(MergeSiblings))
    assert ops(result) == {"Conv": 1, "Split": 1, "Concat": 1, "Abs": 1}
    same(model, result, x=X)


@pytest.mark.parametrize(
    ("call", "why"),
    [("ConvTranspose(x, %s)", "transposed"), ('Conv<auto_pad="SAME_UPPER",strides=[2,2]>(x, %s)', "automatic padding")],
)
def test_what_does_not_stack_says_so(call: str, why: str) -> None:
    body = f"(double[2,6,H,W] x) => (double[N] a, double[N] b) {{ a = {call % 'u'} b = {call % 'v'} }}"
    model = parse(body, u=normal(6, 6, 3, 3), v=normal(6, 6, 3, 3, seed=1))
    result, outcome, _ = run(model, eager(MergeSiblings))
    assert result is model
    assert why in reasons(outcome)[0]


TWO = "{ p = Conv(x, u) q = Conv(x, v) "


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        (TWO + "a = Softmax<axis=1>(p) b = Softmax<axis=1>(q) }", {"Softmax": 2}),  # across channels
        (TWO + "a = PRelu(p, each) b = PRelu(q, each) }", {"PRelu": 2}),  # with a number for each of them
        (TWO + "a = PRelu(x4, p) b = PRelu(x4, q) }", {"PRelu": 2}),  # where they are not the data
        (TWO + "a = Mul(p, x4) b = Mul(q, x4) }", {"Mul": 2}),  # with what is no number
        (TWO + "s = Softmax<axis=1>(p) a = Mul(p, s) t = Softmax<axis=1>(q) b = Mul(q, t) }", {"Softmax": 2, "Mul": 2}),
        (TWO + "s = Sigmoid(p) a = Add(p, s) t = Sigmoid(q) b = Add(q, t) }", {"Sigmoid": 2, "Add": 2}),
        (TWO + "s = Sigmoid(p) r = Abs(s) a = Mul(p, r) t = Sigmoid(q) o = Abs(t) b = Mul(q, o) }",
         {"Sigmoid": 2, "Mul": 2, "Abs": 2}),
        (TWO + "s = Sigmoid(p) m = Mul(p, s) a = Sub(m, s) t = Sigmoid(q) n = Mul(q, t) b = Sub(n, t) }",
         {"Sigmoid": 2, "Mul": 2, "Sub": 2}),
        (TWO + "s = Sigmoid(p) m = Mul(p, s) a = Sub(m, p) t = Sigmoid(q) n = Mul(q, t) b = Sub(n, q) }",
         {"Sigmoid": 2, "Mul": 2, "Sub": 2}),
    ],
)  # fmt: skip
def test_what_follows_and_is_no_activation_stays_behind_the_split(body: str, kept: dict[str, int]) -> None:
    constants = {"u": normal(4, 6, 1, 1), "v": normal(4, 6, 1, 1, seed=1), "each": np.abs(normal(4, 1, 1))}
    inputs = "double[2,6,5,7] x" + (", double[2,4,5,7] x4" if "x4" in body else "")
    model = build(f"({inputs}) => (double[N] a, double[N] b) {body}", constants)
    result, _, _ = run(model, eager(MergeSiblings))
    assert ops(result) == {"Conv": 1, "Split": 1} | kept
    feeds = {"x": X, "x4": normal(2, 4, 5, 7, seed=2)}
    same(model, result, **{i.name: feeds[i.name] for i in model.graph.input})
