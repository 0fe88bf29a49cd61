from __future__ import annotations

import numpy as np
import onnx
import pytest
from helpers import build, eager, normal, ops, outside, parse, reasons, run, same

from pwopt.graph.files import from_proto
from pwopt.passes import ChannelsLast, CleanUp, JoinViews

HEAD = "(double[2,12,9] x) => (double[N] y) { r = Reshape(x, s) t = Transpose<perm=[0,2,1,3]>(r) p = Softmax<axis=1>(t) c = Conv(p, w%s) y = Reshape(c, q) }"
SHAPES = {"s": np.array([2, 3, 4, 9]), "q": np.array([2, 3, 9])}
SIDE = "(double[2,4,5,3] x) => (double[N] y) "
X = normal(2, 4, 5, 3)
#: A normalisation over channels as frameworks export it.
NORM = "m = ReduceMean<axes=[1]>({x}) d = Sub({x}, m) s = Pow(d, two) v = ReduceMean<axes=[1]>(s) e = Add(v, eps) r = Sqrt(e) n = Div(d, r) g = Mul(n, gamma) h = Add(g, beta)"
NORM_NUMBERS = {
    "two": np.float64(2),
    "eps": np.float64(1e-6),
    "gamma": normal(4, 1, 1),
    "beta": normal(4, 1, 1, seed=1),
}


def order(model: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in model.graph.node]


def perms(model: onnx.ModelProto) -> list[list[int]]:
    return [list(n.attribute[0].ints) for n in model.graph.node if n.op_type == "Transpose"]


@pytest.mark.parametrize("biased", [False, True])
def test_the_distribution_head(biased: bool) -> None:
    """Reshape, Transpose, Softmax over 4 bins, their expectation."""
    model = parse(
        HEAD % (", b" if biased else ""),
        w=np.arange(4.0).reshape(1, 4, 1, 1),
        **SHAPES,
        **({"b": normal(1)} if biased else {}),
    )
    result, _, _ = run(model, eager(ChannelsLast), CleanUp(), JoinViews())
    bias = ["Add"] if biased else []
    assert order(result) == ["Reshape", "Transpose", "Softmax", "MatMul", *bias, "Reshape"]
    assert perms(result)[0] == [0, 1, 3, 2]
    same(model, result, x=normal(2, 12, 9))


@pytest.mark.parametrize("sizes", [(4, 4, 4), (1, 4, 4), (4, 1, 1), (1, 4, 4, 4)])
def test_constants_of_equal_sizes_change_their_order(sizes: tuple[int, ...]) -> None:
    model = parse("(double[2,4,4,4] x) => (double[N] y) { p = Softmax<axis=1>(x) y = Add(p, c) }", c=normal(*sizes))
    result, _, _ = run(model, eager(ChannelsLast))
    assert order(result) == ["Transpose", "Softmax", "Add", "Transpose"]
    same(model, result, x=normal(2, 4, 4, 4))


def test_without_a_transpose_before_it() -> None:
    model = parse(SIDE + "{ p = Softmax<axis=-3>(x) y = Conv(p, w) }", w=normal(6, 4, 1, 1))
    result, _, _ = run(model, eager(ChannelsLast))
    assert order(result) == ["Transpose", "Softmax", "MatMul", "Transpose"]
    same(model, result, x=X)


def test_a_normalisation_over_channels_and_what_follows() -> None:
    """In the order in which providers fuse one: mean, difference, power, mean, over the last axis."""
    body = SIDE + "{ a = Relu(x) " + NORM.format(x="a") + " c = Conv(h, w, b) f = Relu(c) y = Conv(f, u) }"
    model = parse(body, w=normal(8, 4, 1, 1), b=normal(8), u=normal(4, 8, 1, 1), **NORM_NUMBERS)
    result, _, _ = run(model, eager(ChannelsLast))
    norm = ["ReduceMean", "Sub", "Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul", "Add"]
    assert order(result) == ["Relu", "Transpose", *norm, "MatMul", "Add", "Relu", "MatMul", "Transpose"]
    assert [list(n.attribute[0].ints) for n in result.graph.node if n.op_type == "ReduceMean"] == [[3], [3]]
    assert {tuple(t.dims) for t in result.graph.initializer if t.name in ("gamma", "beta")} == {(4,)}
    same(model, result, x=X)


def test_what_is_squared_first_comes_in_once() -> None:
    """x / √Σx² reads x before the sum as well as behind it."""
    body = SIDE + "{ q = Mul(x, x) s = ReduceSum(q, axis) r = Sqrt(s) y = Div(x, r) }"
    model = parse(body, axis=np.array([1]))
    result, _, _ = run(model, eager(ChannelsLast))
    assert order(result) == ["Transpose", "Mul", "ReduceSum", "Sqrt", "Div", "Transpose"]
    same(model, result, x=X)


def test_a_convolution_before_it_stays() -> None:
    model = parse(SIDE + "{ c = Conv(x, w) y = LogSoftmax<axis=1>(c) }", w=normal(6, 4, 1, 1))
    result, _, _ = run(model, eager(ChannelsLast))
    assert order(result) == ["Conv", "Transpose", "LogSoftmax", "Transpose"]
    same(model, result, x=X)


@pytest.mark.parametrize(("keepdims", "out"), [(0, "Reshape"), (1, "Transpose")])
@pytest.mark.parametrize("call", ["ArgMax<axis=1{}>(x)", "ReduceMax<axes=[1]{}>(x)"])
def test_channels_that_go(call: str, keepdims: int, out: str) -> None:
    """Without the channel axis there is no way back to make."""
    op = call.format(f", keepdims={keepdims}")
    kind = "int64" if "Arg" in call else "double"
    model = parse(f"(double[2,4,5,3] x) => ({kind}[N] y) {{ y = {op} }}")
    result, _, _ = run(model, eager(ChannelsLast))
    assert order(result) == ["Transpose", call.partition("<")[0], *(["Transpose"] if keepdims else [])]
    same(model, result, x=X)


@pytest.mark.parametrize(
    ("size", "body"),
    [
        ("2,4,5", "p = Softmax<axis=1>(x) y = Mul(p, rows)"),
        ("2,4,3,2,5", "p = Hardmax<axis=-4>(x) y = Mul(p, rows)"),
        ("2,4,3,5", "p = Softmax<axis=1>(x) a, b = Split<axis=1>(p, parts) c = Concat<axis=-2>(a, b) y = Neg(c)"),
        (
            "2,4,3,5",
            "p = Softmax<axis=1>(x) a = Slice(p, i, j, k) c = Softmax<axis=3>(a) y = ReduceMean<axes=[1,3]>(c)",
        ),
        ("2,4,3,5", "p = Softmax<axis=1>(x) a = Mul(one, p) b = Mul(a, whole) c = Add(b, x) y = Clip(c, low, high)"),
    ],
)
def test_what_is_carried_along(size: str, body: str) -> None:
    numbers = {
        "rows": normal(5), "parts": np.array([2, 2]), "i": np.array([1]), "j": np.array([4]), "k": np.array([1]),
        "one": normal(1, 1, 1), "whole": normal(4, 3, 5), "low": np.float64(-0.1), "high": np.float64(0.4),
    }  # fmt: skip
    used = {k: v for k, v in numbers.items() if any(f"{b}{k}{e}" in body for b in "( " for e in ",)")}
    model = parse(f"(double[{size}] x) => (double[N] y) {{ {body} }}", **used)
    result, _, _ = run(model, eager(ChannelsLast))
    assert order(result)[0] == order(result)[-1] == "Transpose"
    assert ops(result)["Transpose"] == 2
    same(model, result, x=normal(*map(int, size.split(","))))


def test_what_is_read_inside_and_outside() -> None:
    body = (
        SIDE
        + "{ p = Softmax<axis=1>(x) c = Conv(p, w) d = MaxPool<kernel_shape=[1,1], strides=[1,1], pads=[0,0,0,0]>(p) e = Neg(c) y = Sub(e, d) }"
    )
    model = parse(body, w=normal(4, 4, 1, 1))
    result, _, _ = run(model, eager(ChannelsLast))
    assert ops(result)["Transpose"] == 4  # x in, p out, what was pooled in, y out
    same(model, result, x=X)


def test_regions_that_share_nothing_are_judged_apart() -> None:
    body = SIDE + "{ p = Softmax<axis=1>(x) c = Conv<pads=[1,1,1,1]>(p, k) y = Softmax<axis=1>(c) }"
    result, outcome, _ = run(parse(body, k=normal(4, 4, 3, 3)), eager(ChannelsLast))
    signatures = [r.signature.partition(": ")[0] for r in outcome.rewrites]
    assert signatures == ["1 Softmax over channels"] * 2  # of one kind, which is raced as one
    assert ops(result)["Transpose"] == 4


@pytest.mark.parametrize(
    "body",
    [
        "{ p = Softmax<axis=2>(x) y = Conv(p, w) }",
        "{ p = ReduceMean<axes=[1,2]>(x) y = Neg(p) }",
        "{ p = ReduceMean<axes=[1], keepdims=0>(x) q = ReduceMean<axes=[1], keepdims=0>(p) y = Neg(q) }",
        "{ s = Slice(x, zero, one, one) p = Softmax<axis=1>(s) y = Neg(p) }",  # one channel
        "{ g = GlobalAveragePool(x) p = Softmax<axis=1>(g) y = Neg(p) }",  # one position
    ],
)
def test_refusals(body: str) -> None:
    names = {"w": normal(4, 4, 1, 1), "zero": np.array([0]), "one": np.array([1])}
    used = {k: v for k, v in names.items() if f" {k})" in body or f" {k}," in body}
    model = parse(SIDE + body, **used)
    result, _, _ = run(model, eager(ChannelsLast))
    assert "Transpose" not in order(result) or "keepdims=0" in body


@pytest.mark.parametrize(
    "call", ["Conv<pads=[1,1,1,1]>(p, k)", "Conv<group=2>(p, g)", "Conv<strides=[2,2]>(p, w)", "Conv(p, v)"]
)
def test_maps_that_stay(call: str) -> None:
    """Stencils, grouped, strided and shared maps are no products of the last axis, or not alone."""
    names = {"k": normal(4, 4, 3, 3), "g": normal(4, 2, 1, 1), "w": normal(4, 4, 1, 1), "v": normal(4, 4, 1, 1)}
    used = {k: v for k, v in names.items() if f" {k})" in call}
    twice = " b = Conv(x, v) o = ReduceMax<axes=[0,1,2,3]>(b) y = Sub(c, o) }" if " v)" in call else " y = Neg(c) }"
    model = parse(SIDE + f"{{ p = Softmax<axis=1>(x) c = {call}" + twice, **used)
    result, _, _ = run(model, eager(ChannelsLast))
    assert ops(result)["Conv"] == ops(model)["Conv"]
    same(model, result, x=X)


def test_before_opset_13_a_softmax_takes_all_axes_from_there_on() -> None:
    model = parse(SIDE + "{ p = Softmax<axis=1>(x) y = Conv(p, w) }", 12, w=normal(6, 4, 1, 1))
    assert run(model, eager(ChannelsLast))[0] is model


def test_not_without_measuring() -> None:
    model = parse(HEAD % "", w=normal(1, 4, 1, 1), **SHAPES)
    result, outcome, _ = run(model, ChannelsLast())
    assert result is model
    assert "only measuring" in reasons(outcome)[0]


def test_before_opset_7_convolutions_stay() -> None:
    """The bias of a product would need broadcasting, which was an attribute then."""
    body = (
        "(float[2,4,5,3] x, float[6,1,1,1] w) => (float[N] y) { r = ReduceMean<axes=[1],keepdims=1>(x) y = Conv(r, w) }"
    )
    model = parse(body, 6, 3, w=normal(6, 1, 1, 1, dtype=np.float32))
    result, _, _ = run(model, eager(ChannelsLast))
    assert ops(result) == {"Transpose": 2, "ReduceMean": 1, "Conv": 1}


NUMBERS = {
    "k": normal(2, 4, 5, 3), "from0": np.array([0, 0, 1]), "to": np.array([2, 1, 4]), "half": np.float64(0.5), "yes": np.array(True),
    "five": normal(5, seed=1), "flat": np.array([120]),
}  # fmt: skip
SOFT, MOST = SIDE + "{ r = Softmax<axis=1>(x) ", SIDE + "{ r = ReduceMax<axes=[1]>(x) "


@pytest.mark.parametrize(
    ("op", "body", "opset"),
    [
        # behind: another rank, constants joined, other axes
        ("Add", "(double[2,4,5,3] x, double[3] u) => (double[N] y) { r = Softmax<axis=1>(x) y = Add(r, u) }", 17),
        ("Concat", SOFT + "y = Concat<axis=1>(r, k) }", 17),
        ("ReduceMean", SOFT + "y = ReduceMean<axes=[2],keepdims=0>(r) }", 17),
        ("ReduceMean", SOFT + "y = ReduceMean(r) }", 17),
        ("Slice", SOFT + "y = Slice(r, from0, to) }", 17),
        ("Dropout", SOFT + "y = Dropout<seed=3>(r, half, yes) }", 17),
        # before: only what the region reads and that shares a way in
        ("Concat", MOST + "c = Concat<axis=1>(x, k) y = Sub(c, r) }", 17),
        ("Neg", SOFT.replace("[N] y)", "[N] y, double[M] z)") + "y = Abs(r) n = Neg(x) z = Relu(n) }", 17),
        ("Neg", SOFT.replace("[N] y)", "[N] y, double[M] z)") + "y = Abs(r) z = Neg(x) }", 17),
        ("Neg", SOFT.replace("[N] y)", "[N] y, double[M] z)").replace("x)", "x, int64[K] s)", 1)
         + "y = Abs(r) u = Reshape(x, s) v = Neg(u) z = Reshape(v, flat) }", 17),
        # spellings of old opsets
        ("Slice", "(double[2,4,5,3] x) => (double[N] y) { r = ReduceMax<axes=[1]>(x) y = Slice<axes=[2],starts=[1],ends=[4]>(r) }", 9),
        ("Add", "(double[2,4,5,3] x) => (double[N] y) { r = ReduceMax<axes=[1]>(x) y = Add<broadcast=1,axis=2>(r, five) }", 6),
    ],
)  # fmt: skip
def test_what_is_not_carried_along(op: str, body: str, opset: int) -> None:
    model = build(body, NUMBERS, opset=opset)
    result, outcome, _ = run(model, eager(ChannelsLast))
    assert len(outcome.rewrites) == 1
    assert outside(result, op, "_last")
    feeds = {"x": normal(2, 4, 5, 3), "u": normal(3, seed=2), "s": np.array([2, -1])}
    if op != "Dropout" and opset >= 7:  # the reference knows no older broadcasting
        same(model, result, **{i.name: feeds[i.name] for i in model.graph.input})


def test_what_a_region_reads_is_carried_along_with_the_way_in() -> None:
    """x and −x would come in both; −x is also an output here, which costs no more than its way in."""
    model = build(MOST.replace("[N] y)", "[N] y, double[M] n)") + "n = Neg(x) y = Sub(n, r) }", NUMBERS)
    result, _, _ = run(model, eager(ChannelsLast))
    assert not outside(result, "Neg", "_last")
    assert ops(result)["Transpose"] == 3
    same(model, result, x=normal(2, 4, 5, 3))


def test_unknown_channels_stay() -> None:
    model = parse("(double[2,C,5,3] x) => (double[N] y) { y = ReduceMax<axes=[1]>(x) }")
    assert run(model, eager(ChannelsLast))[0] is model


def test_results_of_unknown_rank_stay() -> None:
    """Inference gives up sometimes."""
    loaded = from_proto(build(SOFT + "a = Abs(r) y = Neg(a) }", NUMBERS))
    next(n for n in loaded.graph.nodes if n.op == "Abs").outputs[0].shape = None
    eager(ChannelsLast).run(loaded.graph)
    assert outside(loaded.to_proto(), "Abs", "_last")
