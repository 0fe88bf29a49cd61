from __future__ import annotations

import helpers
import numpy as np
import onnx
import pytest
from helpers import eager, normal, ops, parse, reasons, run, same
from hypothesis import given, settings
from hypothesis import strategies as st

from pwopt.passes import DropDead, FillBlocks, PadChannels
from pwopt.rewriting.driver import Pass

X = normal(2, 3, 6, 6, seed=50)
HEAD = "(double[2,3,6,6] x) => (double[N] y) "
#: A convolution that reads 18 channels asks for 20.
W, V = normal(18, 3, 1, 1), normal(5, 18, 3, 3, seed=1)
CONSTANTS = {
    "w": W, "b": normal(18, seed=2), "v": V, "w2": normal(18, 3, 1, 1, seed=3), "d": normal(18, 1, 3, 3, seed=4),
    "db": normal(18, seed=5), "gamma": normal(18, seed=6), "beta": normal(18, seed=7), "mean": normal(18, seed=8),
    "var": np.abs(normal(18, seed=9)) + 0.1, "slope": np.abs(normal(18, 1, 1, seed=10)), "half": np.float64(0.5),
    "s1": normal(4, 18, 1, 1, seed=11), "s2": normal(18, 4, 1, 1, seed=12), "w7": normal(7, 3, 1, 1, seed=13),
    "w11": normal(11, 3, 1, 1, seed=14), "u7": normal(2, 7, 1, 1, seed=15), "u11": normal(2, 11, 1, 1, seed=16),
    "parts": np.array([7, 11]), "up": np.array([1, 1, 2, 2], np.float32), "size": np.array([2, 18, 12, 12]),
    "grouped": normal(18, 9, 1, 1, seed=17), "flat": np.array([0, 18, 36]), "mat": normal(36, 4, seed=18),
    "wt": normal(3, 18, 2, 2, seed=19), "low": np.float64(0), "high": np.float64(6), "ring": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    "big": np.float64(1e30),
}  # fmt: skip


def build(body: str, /, **weights: np.ndarray) -> onnx.ModelProto:
    return helpers.build(body, {**CONSTANTS, **weights}, HEAD)


def widths(model: onnx.ModelProto) -> list[tuple[int, int]]:
    """(out, in per group) of every convolution, in order."""
    dims = {t.name: tuple(t.dims) for t in model.graph.initializer}
    return [dims[n.input[1]][:2] for n in model.graph.node if n.op_type in ("Conv", "ConvTranspose")]


def padded(body: str, expected: list[tuple[int, int]], /, kind: type[Pass] = PadChannels) -> str:
    model = build(body)
    result, outcome, _ = run(model, eager(kind))
    assert widths(result) == expected, reasons(outcome)
    assert ops(result) == ops(model)
    same(model, result, x=X)
    return " ".join(r.reason for r in outcome.rewrites)


def left(body: str, /, kind: type[Pass] = PadChannels, **weights: np.ndarray) -> str:
    model = build(body, **weights)
    result, outcome, _ = run(model, eager(kind))
    assert result is model, outcome.rewrites
    return " ".join(reasons(outcome))


@pytest.mark.parametrize(
    "between",
    [
        "Identity(a)", "Relu(a)", "Sigmoid(a)", "Mul(a, slope)", "Add(a, half)", "AveragePool<kernel_shape=[3,3],pads=[1,1,1,1]>(a)",
        "MaxPool<kernel_shape=[2,2]>(a)", "Clip(a, low, high)", "BatchNormalization(a, gamma, beta, mean, var)",
        "Conv<group=18,pads=[1,1,1,1]>(a, d, db)", "HardSwish(a)", "Softplus(a)", "Resize<mode=\"nearest\">(a, , up)",
        "Pad(a, ring)", "Transpose<perm=[1,0,2,3]>(a) t = Transpose<perm=[1,0,2,3]>(m)",
    ],
)  # fmt: skip
def test_through(between: str) -> None:
    """Channels of zeros pass everything that acts on channels one by one, and meet zeros in the end."""
    last = "t" if "t = " in between else "m"
    depthwise = [(20, 1)] if "group" in between else []
    reason = padded(f"{{ a = Conv(x, w, b) m = {between} y = Conv({last}, v) }}", [(20, 3), *depthwise, (5, 20)])
    assert "18→20" in reason


def test_a_residual_sum_and_its_branches() -> None:
    body = "{ a = Conv(x, w, b) c = Conv(x, w2) r = Relu(c) s = Add(a, r) y = Conv(s, v) }"
    padded(body, [(20, 3), (20, 3), (5, 20)])


def test_a_gate() -> None:
    """Squeeze-and-excitation: the gate's own map gets the channels too; its sigmoid of nothing is a half."""
    body = "{ a = Conv(x, w, b) p = GlobalAveragePool(a) q = Conv(p, s1) e = Conv(q, s2) g = Sigmoid(e) m = Mul(a, g) y = Conv(m, v) }"
    padded(body, [(20, 3), (4, 20), (20, 4), (5, 20)])


def test_parts_of_a_concat_are_padded_each() -> None:
    body = "{ a = Conv(x, w7) c = Conv(x, w11) k = Concat<axis=1>(a, c) y = Conv(k, v) }"
    padded(body, [(8, 3), (12, 3), (5, 20)])


def test_parts_of_a_split_are_padded_each() -> None:
    body = "{ a = Conv(x, w) r = Relu(a) p, q = Split<axis=1>(r, parts) s = Conv(p, u7) t = Conv(q, u11) h = Conv(r, v) g = GlobalAveragePool(h) z = ReduceMean<axes=[1]>(g) u = Add(s, t) y = Add(u, z) }"
    padded(body, [(20, 3), (2, 8), (2, 12), (5, 20)])


def test_a_transposed_convolution_makes_the_channels() -> None:
    padded("{ a = ConvTranspose(x, wt, b) y = Conv(a, v) }", [(3, 20), (5, 20)])


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("(double[2,3,6,6] x) => (double[N] y, double[N] a) { a = Conv(x, w) y = Conv(a, v) }", "'a' is a graph output"),
        ("{ a = Conv(x, w) m = Softmax<axis=1>(a) y = Conv(m, v) }", ""),
        ("{ a = Conv(x, w) s = Softmax<axis=1>(a) r = ReduceSum(s) m = Conv(a, v) y = Add(m, r) }", "Softmax '' holds the channels of 'a'"),
        ("{ a = Conv(x, w) c = Conv(x, w2) m = Div(a, c) y = Conv(m, v) }", "may turn zeros into large values"),
        ("{ a = Conv(x, w) m = Resize<mode=\"nearest\">(a, , , size) y = Conv(m, v) }", "cannot follow channels through Resize ''"),
        ("{ a = Conv(x, w) m = Conv<group=2>(a, grouped) y = Conv(m, v) }", "holds the channels"),
        ("{ a = Conv(x, w) c = Conv(x, w) r = Relu(c) m = Add(a, r) y = Conv(m, v) }", ""),
        ("{ a = Conv(x, w) m = Exp(a) n = Mul(m, big) r = Exp(n) y = Conv(r, v) }", "may turn zeros into large values"),
        ("{ a = Conv(x, w) m = Sigmoid(a) q = ReduceSum<keepdims=1>(m, axes) y = Conv(q, v1) }", "may turn zeros into large values"),
    ],
)  # fmt: skip
def test_refusals(body: str, why: str) -> None:
    weights = {"axes": np.array([2, 3]), "v1": normal(5, 18, 1, 1, seed=1)} if "axes)" in body else {}
    assert why in left(body, **weights)


def test_what_fits_already_is_left_alone() -> None:
    assert left("{ a = Conv(x, w8) y = Conv(a, v8) }", w8=normal(20, 3, 1, 1), v8=normal(5, 20, 1, 1)) == ""


def test_few_channels_are_read_as_they_are() -> None:
    """Below one block, the provider reads its input unblocked."""
    assert left("{ a = Conv(x, w7) y = Conv(a, u7) }") == ""


def test_whole_blocks_for_pooling_and_concat() -> None:
    body = "{ a = Conv(x, w) p = MaxPool<kernel_shape=[2,2]>(a) y = Conv(p, v) }"
    assert "18→32" in padded(body, [(32, 3), (5, 32)], FillBlocks)
    body = "{ a = Conv(x, w7) c = Conv(x, w11) k = Concat<axis=1>(a, c) y = Conv(k, v) }"
    padded(body, [(16, 3), (16, 3), (5, 32)], FillBlocks)
    assert left("{ a = Conv(x, w) r = Relu(a) y = Conv(r, v) }", FillBlocks) == ""


def test_only_measuring_can_tell() -> None:
    model = build("{ a = Conv(x, w) y = Conv(a, v) }")
    result, outcome, _ = run(model, PadChannels())
    assert result is model
    assert reasons(outcome) == ["18 channels could be padded to a multiple of 4; only measuring can tell"]


def test_pruning_does_not_undo_it() -> None:
    model = build("{ a = Conv(x, w) y = Conv(a, v) }")
    result, _, _ = run(model, DropDead(), eager(PadChannels))
    assert widths(result) == [(20, 3), (5, 20)]


def test_sites_keep_the_first_name_of_a_tensor() -> None:
    model = build("{ a = Conv(x, w) p = MaxPool<kernel_shape=[2,2]>(a) y = Conv(p, v) }")
    _, outcome, loaded = run(model, eager(PadChannels), eager(FillBlocks))
    assert [str(r.site) for r in outcome.rewrites] == ["pad-channels:a", "fill-blocks:a"]
    assert [t for n in loaded.to_proto().graph.node for t in n.output] == ["a_padded_1", "p_padded_1", "y"]


STEPS = (
    "Relu(#)", "Sigmoid(#)", "Mul(#, half)", "Add(#, half)", "Mul(#, slope)", "Tanh(#)", "Neg(#)",
    "Conv<group=18,pads=[1,1,1,1]>(#, d, db)", "AveragePool<kernel_shape=[3,3],pads=[1,1,1,1],count_include_pad=1>(#)",
    "BatchNormalization(#, gamma, beta, mean, var)", "Add(#, a)", "Mul(#, a)", "Sub(a, #)", "Softplus(#)", "LeakyRelu(#)",
    "MaxPool<kernel_shape=[3,3],pads=[1,1,1,1]>(#)", "Identity(#)", "Abs(#)", "Clip(#, low, high)",
)  # fmt: skip


@settings(max_examples=60)
@given(st.lists(st.sampled_from(STEPS), min_size=1, max_size=6), st.booleans())
def test_any_way_through(steps: list[str], blocks: bool) -> None:
    names = [f"h{i}" for i in range(len(steps) + 1)]
    nodes = " ".join(f"{b} = {s.replace('#', a)}" for a, b, s in zip(names, names[1:], steps, strict=False))
    one = HEAD.replace("2,3", "1,3")  # onnx's evaluator takes its time for each element to pool
    body = (
        f"{{ a = Conv(x, w, b) h0 = Conv(x, w2) {nodes} p = MaxPool<kernel_shape=[1,1]>({names[-1]}) y = Conv(p, v) }}"
    )
    model = helpers.build(body, CONSTANTS, one)
    result, _, _ = run(model, eager(FillBlocks if blocks else PadChannels))
    assert all(np.isfinite(v).all() for v in same(model, result, x=X[:1]))


def test_a_part_that_asks_for_nothing_stays() -> None:
    """Of two parts, the depthwise convolution's is padded, the other is not."""
    model = build(
        "{ a = Conv(x, w) p, q = Split<axis=1>(a, parts) s = Conv(p, u7) e = Conv<group=11>(q, e11) t = Conv(e, u11) y = Add(s, t) }",
        e11=normal(11, 1, 1, 1),
    )  # fmt: skip
    result, outcome, _ = run(model, eager(PadChannels))
    assert widths(result) == [(19, 3), (2, 7), (12, 1), (2, 12)], reasons(outcome)
    same(model, result, x=X)


def test_a_split_into_a_number_of_parts() -> None:
    text = (
        HEAD
        + "{ a = Conv(x, w) p, q = Split<axis=1,num_outputs=2>(a) s = Sub(p, q) c = Conv<group=9>(s, k) y = Conv(c, v) }"
    )
    model = parse(text, 18, w=W, k=normal(9, 1, 1, 1), v=normal(2, 9, 1, 1))
    result, outcome, _ = run(model, eager(PadChannels))
    assert widths(result) == [(24, 3), (12, 1), (2, 12)], reasons(outcome)
    same(model, result, x=X)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("{ a = Conv<group=3>(x, m) y = Conv(a, v) }", "a channel multiplier"),
        ("{ a = Conv(x, w) k = Concat<axis=1>(a, x) y = Conv(k, v21) }", "joins channels of which nothing is known"),
    ],
)
def test_channels_that_have_to_stay(body: str, why: str) -> None:
    assert why in left(body, m=normal(18, 1, 1, 1), v21=normal(4, 21, 1, 1))


def test_lines_and_videos_gain_only_with_another_pass() -> None:
    """The blocked layout is one of images."""
    body = "{ a = Conv(x, w1) p = Relu(a) y = Conv(p, v1) }"
    for ones in ((), (1,), (1, 1)):
        head = f"(double[2,3{',6' * (1 + len(ones))}] x) => (double[N] y) "
        constants = {"w1": normal(18, 3, 1, *ones), "v1": normal(4, 18, 1, *ones)}
        model = helpers.build(head + body, constants)
        result, outcome, _ = run(model, eager(PadChannels))
        assert widths(result) == [(20, 3), (4, 20)]
        (rewrite,) = outcome.rewrites
        assert rewrite.enabled_by == (() if len(ones) == 1 else ("unroll-frames", "frames", "lower-rank"))
        same(model, result, x=normal(2, 3, 6, *(6 for _ in ones)))


def test_poolings_of_lines_are_left_alone() -> None:
    body = "(double[2,3,6] x) => (double[N] y) { a = Conv(x, w1) p = MaxPool<kernel_shape=[2]>(a) y = Conv(p, v1) }"
    assert left(body, FillBlocks, w1=normal(18, 3, 1), v1=normal(4, 18, 1)) == ""


@pytest.mark.parametrize("scale", ["Mul(a, half)", "Add(a, half)"])
def test_one_number_for_the_only_channel_is_one_for_all(scale: str) -> None:
    """It is no scale per channel that would need more numbers."""
    body = f"{{ a = Conv(x, w1) m = {scale} p = MaxPool<kernel_shape=[2,2]>(m) y = Conv(p, u1) }}"
    model = build(body, w1=normal(1, 3, 1, 1), u1=normal(2, 1, 1, 1))
    result, outcome, _ = run(model, eager(FillBlocks))
    assert len(outcome.rewrites) == 1
    assert widths(result) == [(16, 3), (2, 16)]
    same(model, result, x=X)


def test_new_channels_have_numbers_of_their_own() -> None:
    """Zeros, in a shift for each channel, however large those of the others are."""
    model = build("{ a = Conv(x, w) m = Add(a, far) y = Conv(m, v) }", far=np.full((18, 1, 1), 1e6))
    result, _, _ = run(model, eager(PadChannels))
    assert widths(result)[0] == (20, 3)
    alike = build("{ a = Conv(x, w) m = Add(a, far) y = Conv(m, v) }", far=np.float64(1e6))
    result, outcome, _ = run(alike, eager(PadChannels))
    assert result is alike
    assert "may turn zeros into large values" in reasons(outcome)[0]


def test_one_number_is_for_new_channels_too_even_where_there_was_one_channel() -> None:
    body = "{ a = Conv(x, one) m = Add(a, far) c = Conv(x, others) q = Concat<axis=1>(m, c) y = Conv(q, v) }"
    numbers = {"one": normal(1, 3, 1, 1), "others": normal(17, 3, 1, 1), "far": np.float64(1e6)}
    model = build(body, **numbers)
    result, outcome, _ = run(model, eager(PadChannels))
    assert result is model
    assert "may turn zeros into large values" in reasons(outcome)[0]
