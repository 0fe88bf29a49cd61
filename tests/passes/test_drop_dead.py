from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from helpers import evaluate, normal, ops, parse, reasons, run, same, weight
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from pwopt.graph.files import from_proto
from pwopt.graph.view import View
from pwopt.maps.cost import measure
from pwopt.passes import DropDead
from pwopt.rewriting.records import Site
from pwopt.selecting.snapshot import concrete_sizes, run_pipeline

F = np.float32
X = normal(2, 4, 6, 6)
SIDE = "(double[2,4,6,6] x) => (double[N] y) "
TWO = "(double[2,4,6,6] x) => (double[N] y, double[N] z) "


def dead(values: np.ndarray, rows: Sequence[int] = (), columns: Sequence[int] = (), scale: float = 0.0) -> np.ndarray:
    """`values` with some rows (filters) and columns (input channels) scaled, to zero unless told."""
    result: np.ndarray = values.copy()
    result[np.array(rows, int)] *= scale
    result[:, np.array(columns, int)] *= scale
    return result


def holding(value: float, channels: int = 7, at: Sequence[int] = (1, 4)) -> np.ndarray:
    """A bias with one value where the filters are zero."""
    bias = normal(channels, seed=3)
    bias[np.array(at, int)] = value
    return bias


#: Filters 1 and 4 of seven are zero; so are rows 1 and 4 of the seven-channel maps that continue elsewhere.
W, V = dead(normal(7, 4, 1, 1), rows=(1, 4)), normal(5, 7, 1, 1, seed=9)
CONSTANTS = {
    "w": W, "b": holding(0.7), "v": V, "w2": dead(normal(7, 4, 1, 1, seed=1), rows=(1, 3)), "b2": holding(-0.2, at=(1, 3)),
    "mat": normal(7, 5, seed=9), "flat": normal(5, 7, seed=9), "bias5": normal(5, seed=8), "bias7": normal(7, seed=4),
    "stencil": normal(7, 1, 3, 3, seed=2), "slope": np.abs(normal(7, 1, 1, seed=5)) + 0.1, "half": np.float64(0.5),
    "low": np.float64(0), "high": np.float64(6), "map": normal(6, 6, seed=6),
    "gamma": normal(7, seed=5), "beta": normal(7, seed=6), "mean": normal(7, seed=7), "var": np.abs(normal(7, seed=8)) + 0.1,
    "up": np.array([1, 1, 2, 2], F), "size": np.array([2, 7, 12, 12]), "ring": np.array([0, 0, 1, 0, 0, 0, 0, 2]),
    "space": np.array([2, 3]), "one": np.array([1]), "five": np.array([5]), "three": np.array([3]),
}  # fmt: skip


def build(body: str, opset: int = 17, /, **weights: np.ndarray) -> onnx.ModelProto:
    """`parse` with those of CONSTANTS that occur in the nodes."""
    words = set(re.findall(r"\w+", body[body.index("{") :]))
    return parse(body, opset, 8, **{k: v for k, v in {**CONSTANTS, **weights}.items() if k in words})


def pruned(
    body: str, shapes: Mapping[str, tuple[int, ...]], opset: int = 17, /, **weights: np.ndarray
) -> tuple[onnx.ModelProto, str]:
    """Same answers (for `x`) with weights of these shapes; the result and all reasons."""
    x = weights.pop("x", X)
    model = build(body, opset, **weights)
    result, outcome, _ = run(model, DropDead())
    found = {t.name: tuple(t.dims) for t in result.graph.initializer}
    assert {k: found.get(k) for k in shapes} == shapes, reasons(outcome)
    same(model, result, x=x)
    return result, " | ".join(r.reason for r in outcome.rewrites)


def untouched(body: str, opset: int = 17, /, **weights: np.ndarray) -> str:
    model = build(body, opset, **weights)
    result, outcome, _ = run(model, DropDead())
    assert result is model, outcome.rewrites
    return " ".join(reasons(outcome))


# Constant channels


def test_filters_of_zero_go_and_what_their_bias_gives_moves_on() -> None:
    bias = holding(0.7)
    bias[4] = -0.3  # this one does not survive the Relu
    body = SIDE + "{ [one] a = Conv(x, w, b) r = Relu(a) [two] y = Conv(r, v, bias5) }"
    shapes = {"w": (5, 4, 1, 1), "b": (5,), "v": (5, 5, 1, 1), "bias5": (5,)}
    result, reason = pruned(body, shapes, b=bias)
    assert ops(result) == {"Conv": 2, "Relu": 1}
    np.testing.assert_allclose(weight(result, "bias5"), CONSTANTS["bias5"] + 0.7 * V[:, 1, 0, 0], rtol=1e-15)
    np.testing.assert_array_equal(weight(result, "w"), W[[0, 2, 3, 5, 6]])
    np.testing.assert_array_equal(weight(result, "v"), V[:, [0, 2, 3, 5, 6]])
    assert "Conv one 7 → 5" in reason
    assert "that Conv two reads, 1 are zero" in reason
    assert "that Conv two reads, 1 are constant and now part of its bias" in reason


def test_a_bias_where_there_was_none() -> None:
    result, _ = pruned(SIDE + "{ a = Conv(x, w, b) r = Relu(a) y = Conv(r, v) }", {"v": (5, 5, 1, 1)})
    np.testing.assert_allclose(
        weight(result, result.graph.node[-1].input[2]), 0.7 * V[:, [1, 4], 0, 0].sum(1), rtol=1e-15
    )


def test_what_the_record_says() -> None:
    model = build(SIDE + "{ [one] a = Conv(x, w, b) r = Relu(a) [two] y = Conv(r, v) }")
    _, outcome, _ = run(model, DropDead())
    (rewrite,) = outcome.rewrites
    assert (rewrite.pass_name, str(rewrite.site)) == ("drop-dead", "drop-dead:a")
    assert rewrite.removed == rewrite.added == ("Conv one", "Conv two")
    assert rewrite.became == (("a", "a_pruned"), ("y", "y"))
    assert rewrite.residual == 0.0


def test_multiply_adds_on_the_record() -> None:
    model = build(SIDE + "{ a = Conv(x, w, b) r = Relu(a) y = Conv(r, v) }")
    (rewrite,) = run(model, DropDead())[1].rewrites
    assert rewrite.macs_after == 2 * 36 * (4 * 5 + 5 * 5)
    assert rewrite.macs_before == 2 * 36 * (4 * 7 + 7 * 5)


def test_multiply_adds_on_the_record_for_representative_sizes() -> None:
    model = build("(double[N,4,H,W] x) => (double[N] y) { a = Conv(x, w, b) r = Relu(a) y = Conv(r, v) }")
    sizes = concrete_sizes(model, {"x": X.shape})
    (rewrite,) = run(model, DropDead(), sizes=sizes)[1].rewrites
    assert rewrite.macs_before == 2 * 36 * (4 * 7 + 7 * 5)
    assert rewrite.macs_after == 2 * 36 * (4 * 5 + 5 * 5)


@pytest.mark.parametrize("shape", ["2,4,6,6", "N,4,H,W"])
def test_the_cost_of_the_whole_is_known_afterwards(shape: str) -> None:
    model = build(f"(double[{shape}] x) => (double[N] y) {{ a = Conv(x, w, b) r = Relu(a) y = Conv(r, v) }}")
    before, _, after = run_pipeline(from_proto(model), [DropDead()], (), {"x": X.shape})
    assert (before.macs, before.unknown) == (2 * 36 * (4 * 7 + 7 * 5), 0)
    assert (after.macs, after.unknown) == (2 * 36 * (4 * 5 + 5 * 5), 0)


#: What stands between: whether a constant other than zero passes, and whether zero does.
GAPS = {
    "Relu(a)": (True, True),
    "Clip(a, low, high)": (True, True),
    "Clip(a, , high)": (True, True),
    "HardSwish(a)": (True, True),
    "HardSigmoid<alpha=0.3>(a)": (True, True),
    "Sigmoid(a)": (True, True),
    "LeakyRelu<alpha=0.1>(a)": (True, True),
    "Elu<alpha=2.0>(a)": (True, True),
    "Tanh(a)": (True, True),
    "Softplus(a)": (True, True),
    "Exp(a)": (True, True),
    "Neg(a)": (True, True),
    "Identity(a)": (True, True),
    "Dropout(a)": (True, True),
    "Mul(a, slope)": (True, True),
    "Mul(slope, a)": (True, True),
    "Add(a, slope)": (True, True),
    "Sub(a, slope)": (True, True),
    "Sub(slope, a)": (True, True),
    "Div(a, slope)": (True, True),
    "Mul(a, half)": (True, True),
    "Add(half, a)": (True, True),
    "Sub(half, a)": (True, True),
    "Div(a, half)": (True, True),
    "BatchNormalization(a, gamma, beta, mean, var)": (True, True),
    "Conv<group=7>(a, stencil, bias7)": (True, True),
    "Conv<group=7, pads=[1,1,1,1]>(a, stencil, bias7)": (False, True),
    "Conv<group=7, pads=[0,0,0,1]>(a, stencil)": (False, True),
    'Conv<group=7, auto_pad="SAME_UPPER">(a, stencil)': (False, True),
    "ConvTranspose<group=7, strides=[2,2]>(a, stencil)": (False, True),
    "MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(a)": (True, True),
    "AveragePool<kernel_shape=[3,3]>(a)": (True, True),
    "AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(a)": (True, True),
    "AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1>(a)": (False, True),
    "GlobalAveragePool(a)": (True, True),
    "GlobalMaxPool(a)": (True, True),
    "ReduceMean<axes=[2,3]>(a)": (True, True),
    "ReduceMax<axes=[3]>(a)": (True, True),
    "ReduceSum(a, space)": (False, True),
    'Resize<mode="linear">(a, , up)': (True, True),
    'Resize<mode="cubic">(a, , up)': (True, True),
    'Resize<mode="nearest">(a, , up)': (True, True),
    'Pad<mode="reflect">(a, ring)': (True, True),
    "Pad(a, ring)": (False, True),
    "Pad(a, ring, half)": (False, False),
    "Transpose<perm=[0,1,3,2]>(a)": (True, True),
    "Slice(a, one, five, three)": (True, True),
    "Softmax<axis=1>(a)": (False, False),
    "LayerNormalization<axis=1>(a, wide)": (False, False),
    "InstanceNormalization(a, gamma, beta)": (False, False),
    "PRelu(a, slope)": (False, False),
    "Mul(a, map)": (False, False),
    "Conv<group=7>(a, d7)": (False, False),
}


@pytest.mark.parametrize("value", [0.7, 0.0])
@pytest.mark.parametrize(("gap", "passes"), GAPS.items())
def test_a_constant_passes_what_acts_on_channels_one_by_one(gap: str, passes: tuple[bool, bool], value: float) -> None:
    width = 14 if "d7" in gap else 7
    extra = {"wide": normal(7, 6, 6), "d7": normal(14, 1, 1, 1), "v": normal(5, width, 1, 1, seed=9)}
    model = build(SIDE + f"{{ a = Conv(x, w, b) q = {gap} y = Conv(q, v) }}", b=holding(value), **extra)
    result, outcome, _ = run(model, DropDead())
    if passes[value == 0.0]:
        assert weight(result, "w").shape == (5, 4, 1, 1), reasons(outcome)
        assert weight(result, "v").shape == (5, 5, 1, 1)
        same(model, result, x=X)
    else:
        assert result is model, outcome.rewrites


def test_a_window_of_a_maximum_may_miss_the_input() -> None:
    """Then it gives the lowest number, not the constant."""
    body = """(double[2,4,1,1] x) => (double[N] y) {
        a = Conv(x, w, b) q = MaxPool<kernel_shape=[2,2], dilations=[2,2], pads=[1,1,1,1]>(a) r = Clip(q, low, high) y = Conv(r, v)
    }"""
    model = build(body)
    result, _, _ = run(model, DropDead())
    same(model, result, x=normal(2, 4, 1, 1))


def test_a_window_of_an_average_may_reach_over_the_edge() -> None:
    body = (
        SIDE
        + "{ a = Conv(x, w, b) q = AveragePool<kernel_shape=[4,4], strides=[3,3], ceil_mode=1%s>(a) y = Conv(q, v) }"
    )
    pruned(body % "", {"w": (5, 4, 1, 1)}, 19)
    untouched(body % ", count_include_pad=1", 19)


def test_no_warnings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for op in ("Exp", "ThresholdedRelu"):
            pruned(SIDE + f"{{ a = Conv(x, w, b) q = {op}(a) y = Conv(q, v) }}", {"w": (5, 4, 1, 1)})


CHANGES_OF_SHAPE = {
    "flatten": "p = GlobalAveragePool(a) q = Flatten(p) y = Gemm(q, mat, bias5)",
    "flatten, transposed": "p = GlobalAveragePool(a) q = Flatten(p) y = Gemm<transB=1, alpha=0.5, beta=2.0>(q, flat, bias5)",
    "explicit": "p = GlobalAveragePool(a) q = Reshape(p, two_seven) y = MatMul(q, mat)",
    "channels follow": "p = GlobalAveragePool(a) q = Reshape(p, two_rest) y = MatMul(q, mat)",
    "batch follows": "p = GlobalAveragePool(a) q = Reshape(p, rest_seven) y = MatMul(q, mat)",
    "copied": "p = Reshape(a, same_rest) q = Transpose<perm=[0,2,1]>(p) y = MatMul(q, mat)",
    "explicit and a rest": "p = Reshape(a, seven_rest) q = Transpose<perm=[0,2,1]>(p) y = MatMul(q, mat)",
    "back again": "p = GlobalAveragePool(a) q = Flatten(p) r = Reshape(q, wide) y = Conv(r, v)",
    "mean over space": "q = ReduceMean<axes=[2,3], keepdims=0>(a) y = Gemm(q, mat)",
    "squeezed": "p = GlobalAveragePool(a) q = Squeeze(p, space) y = MatMul(q, mat)",
    "unsqueezed": "p = ReduceMean<axes=[-1,-2], keepdims=0>(a) q = Unsqueeze(p, space) y = Conv(q, v)",
    "channels last": "p = Transpose<perm=[0,2,3,1]>(a) q = MatMul(p, mat) y = Add(q, bias5)",
    "channels last without a bias": "p = Transpose<perm=[0,2,3,1]>(a) r = Sigmoid(p) y = MatMul(r, mat)",
    "a product from the left": "p = Reshape(a, same_rest) y = MatMul(flat, p)",
}
SHAPES = {
    "two_seven": np.array([2, 7]), "two_rest": np.array([2, -1]), "rest_seven": np.array([-1, 7]), "same_rest": np.array([0, 0, -1]),
    "seven_rest": np.array([2, 7, -1]), "wide": np.array([0, -1, 1, 1]),
}  # fmt: skip


@pytest.mark.parametrize("nodes", CHANGES_OF_SHAPE.values(), ids=CHANGES_OF_SHAPE)
def test_channels_keep_their_place_when_the_shape_changes(nodes: str) -> None:
    words = set(re.findall(r"\w+", nodes))
    reader = {"mat": (5, 5), "flat": (5, 5), "v": (5, 5, 1, 1)}
    shapes = {"w": (5, 4, 1, 1)} | {k: v for k, v in reader.items() if k in words}
    pruned(SIDE + f"{{ a = Conv(x, w, b) {nodes} }}", shapes, **SHAPES)


def test_channels_that_merge_with_space_stay() -> None:
    untouched(SIDE + "{ a = Conv(x, w, b) q = Reshape(a, two_rest) y = MatMul(q, mat) }", **SHAPES, mat=normal(252, 5))
    untouched(
        SIDE + "{ a = Conv(x, w, b) q = DepthToSpace<blocksize=2>(a) y = Conv(q, v) }",
        w=dead(normal(12, 4, 1, 1), (1, 4)),
        b=holding(0.7, 12),
        v=normal(5, 3, 1, 1),
    )


def test_a_shape_that_is_shared_stays_for_the_others() -> None:
    body = (
        TWO
        + "{ a = Conv(x, w, b) p = Reshape(a, shape) q = Transpose<perm=[0,2,1]>(p) y = MatMul(q, mat) e = Conv(x, f) z = Reshape(e, shape) }"
    )
    pruned(body, {"w": (5, 4, 1, 1)}, shape=np.array([2, 7, 36]), f=normal(7, 4, 1, 1, seed=2))


def test_a_copied_size_that_is_not_the_channels() -> None:
    """The output's channels stand where the input's height does, and have its size."""
    body = """(double[1,4,7,6] x) => (double[N] y) {
        a = Conv(x, w, b) q = Reshape(a, shape) r = Transpose<perm=[0,2,1,3,4]>(q) p = Squeeze(r, at) y = Conv(p, v)
    }"""
    pruned(body, {}, x=normal(1, 4, 7, 6), shape=np.array([1, 1, 0, 7, 6]), at=np.array([2]))


def test_a_copied_size_that_is_the_channels_elsewhere() -> None:
    """The output's second axis copies the size of the input's channels, which go."""
    body = "(double[1,4,7,6] x) => (double[N] y) { a = Conv(x, w, b) q = Reshape(a, shape) r = Unsqueeze(q, at) y = Conv(r, v) }"
    pruned(body, {}, x=normal(1, 4, 7, 6), shape=np.array([7, 0, 6]), at=np.array([0]))


def test_a_single_channel_is_not_squeezed_away() -> None:
    body = SIDE + "{ a = Conv(x, w, b) p = GlobalAveragePool(a) q = Squeeze(p) y = Gemm(q, mat) }"
    pruned(body, {}, w=dead(normal(7, 4, 1, 1), range(1, 7)))


def test_through_concat() -> None:
    body = (
        SIDE
        + "{ a = Conv(x, w, b) r = Sigmoid(a) e = Conv(x, f) c = Concat<axis=-3>(r, e) y = Conv<pads=[0,0,0,0]>(c, v) }"
    )
    shapes = {"w": (5, 4, 1, 1), "f": (3, 4, 1, 1), "v": (5, 8, 1, 1)}
    _, reason = pruned(body, shapes, f=dead(normal(5, 4, 1, 1), (0, 2)), v=normal(5, 12, 1, 1))
    assert "2 are zero" in reason
    assert "2 are constant" in reason


def test_what_a_concat_takes_from_elsewhere_stays() -> None:
    body = SIDE + "{ a = Conv(x, w, b) c = Concat<axis=1>(x, a) y = Conv(c, v) }"
    pruned(body, {"w": (5, 4, 1, 1), "v": (5, 9, 1, 1)}, v=normal(5, 11, 1, 1))
    unread = dead(normal(5, 11, 1, 1), columns=(0, 2, 6))  # two of the input's channels, one of the map's
    pruned(body, {"w": (4, 4, 1, 1), "v": (5, 8, 1, 1)}, v=unread)
    untouched(SIDE + "{ a = Conv(x, w, b) c = Concat<axis=1>(a, a) y = Conv(c, v) }", v=normal(5, 14, 1, 1))
    untouched(SIDE + "{ a = Conv(x, w, b) c = Concat<axis=2>(a, a) y = Conv(c, v) }")


@pytest.mark.parametrize(
    ("opset", "split", "widths"),
    [
        (11, "Split<axis=1, split=[9,5]>(r)", (9, 5)),
        (13, "Split<axis=1>(r, parts)", (9, 5)),
        (18, "Split<axis=1, num_outputs=2>(r)", (7, 7)),
    ],
)
def test_through_split(opset: int, split: str, widths: tuple[int, int]) -> None:
    """Of the 14 channels, two go from the first part and one from the second; 11 would be odd where 14 is even."""
    first, second = widths
    weights = {
        "w": dead(normal(14, 4, 1, 1), (1, 4, 12)), "b": holding(0.7, 14, (1, 4, 12)), "parts": np.array(widths),
        "v": normal(5, first, 1, 1), "f": normal(5, second, 1, 1),
    }  # fmt: skip
    body = TWO + f"{{ a = Conv(x, w, b) r = Sigmoid(a) s, t = {split} y = Conv(s, v) z = Conv(t, f) }}"
    result, _ = pruned(
        body, {"w": (12, 4, 1, 1), "v": (5, first - 1, 1, 1), "f": (5, second - 1, 1, 1)}, opset, **weights
    )
    node = next(n for n in result.graph.node if n.op_type == "Split")
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    sizes = attributes["split"] if opset < 13 else weight(result, node.input[1]).tolist()
    assert sizes == [first - 1, second - 1]
    assert "num_outputs" not in attributes


def test_a_split_with_a_part_that_keeps_its_channels() -> None:
    body = TWO + "{ a = Conv(x, w, b) s, z = Split<axis=1>(a, parts) y = Conv(s, v) }"
    pruned(body, {"w": (6, 4, 1, 1), "v": (5, 2, 1, 1)}, parts=np.array([3, 4]), v=normal(5, 3, 1, 1))


GATE = "p = GlobalAveragePool(r) q = Conv(p, f, c3) s = Relu(q) t = Conv(s, o, i) e = {} j = Mul(r, e)"
GATED = {"f": normal(3, 7, 1, 1), "c3": normal(3), "o": normal(7, 3, 1, 1), "i": normal(7, seed=1)}


def test_through_a_gate_a_channel_of_zero_goes() -> None:
    body = SIDE + f"{{ a = Conv(x, w, b) r = Relu(a) {GATE.format('Sigmoid(t)')} y = Conv(j, v) }}"
    shapes = {"w": (5, 4, 1, 1), "f": (3, 5, 1, 1), "o": (5, 3, 1, 1), "v": (5, 5, 1, 1)}
    pruned(body, shapes, **GATED, b=holding(-0.7))
    untouched(body, **GATED, b=holding(0.7))


def test_a_closed_gate_takes_its_channel_along() -> None:
    body = SIDE + f"{{ r = Conv(x, w) {GATE.format('HardSigmoid(t)').replace('(r)', '(x)')} y = Conv(j, v) }}"
    closed = {"w": normal(7, 4, 1, 1), "f": normal(3, 4, 1, 1), "o": dead(GATED["o"], (1, 4)), "i": holding(-9.0)}
    pruned(body, {"w": (5, 4, 1, 1), "o": (5, 3, 1, 1), "v": (5, 5, 1, 1)}, **{**GATED, **closed})
    untouched(body, **{**GATED, **closed, "i": holding(0.1)})


def test_a_constant_gate_on_a_constant_channel() -> None:
    body = SIDE + f"{{ a = Conv(x, w, b) r = Relu(a) {GATE.format('Sigmoid(t)')} y = Conv(j, v) }}"
    pruned(body, {"w": (5, 4, 1, 1), "o": (5, 3, 1, 1)}, **{**GATED, "o": dead(GATED["o"], (1, 4))})


@pytest.mark.parametrize("op", ["Add(a, e)", "Sub(a, e)", "Sum(a, e)", "Mul(a, e)"])
def test_of_two_operands_both_must_be_constant(op: str) -> None:
    """Channel 1 is constant in both; 3 and 4 in one each."""
    body = SIDE + f"{{ a = Conv(x, w, b) e = Conv(x, w2, b2) q = {op} y = Conv(q, v) }}"
    pruned(body, {"w": (6, 4, 1, 1), "w2": (6, 4, 1, 1), "v": (5, 6, 1, 1)})


def test_a_divisor_is_not_followed() -> None:
    untouched(SIDE + "{ a = Conv(x, w, b) e = Conv(x, w2, b2) q = Div(a, e) y = Conv(q, v) }")


def test_an_operand_of_another_rank_stays() -> None:
    """Its channels lie on the height of the sum, which happens to be seven."""
    body = """(double[2,4,7,6] x, double[1,4,6] k) => (double[N] y) {
        a = Conv(x, w, b) e = Conv(k, f, b2) q = Add(a, e) y = Conv(q, v)
    }"""
    untouched(body, f=W[..., 0], b2=holding(0.3))


def test_an_operand_that_is_used_twice_stays() -> None:
    untouched(SIDE + "{ a = Conv(x, w, b) q = Add(a, a) y = Conv(q, v) }")


def test_along_a_chain_of_residual_blocks() -> None:
    body = """{
        a = Conv(x, w, b) p = Conv(a, f) q = HardSwish(p) r = Conv(q, o, i) s = Add(a, r) t = Conv(s, f2, c9) u = Relu(t)
        n = Conv(u, o2) k = Add(n, s) y = Conv(k, v)
    }"""
    weights = {
        "f": normal(9, 7, 1, 1), "o": dead(normal(7, 9, 1, 1), (1, 4)), "i": holding(-0.4), "f2": dead(normal(9, 7, 1, 1, seed=1), (8,)),
        "c9": normal(9), "o2": dead(normal(7, 9, 1, 1, seed=2), (0, 4)),
    }  # fmt: skip
    shapes = {
        "w": (6, 4, 1, 1),
        "f": (9, 6, 1, 1),
        "o": (6, 9, 1, 1),
        "f2": (8, 6, 1, 1),
        "o2": (6, 8, 1, 1),
        "v": (5, 6, 1, 1),
    }
    pruned(SIDE + body, shapes, **weights)


def test_a_constant_that_a_padded_convolution_reads_stays_unless_it_is_zero() -> None:
    body = SIDE + "{ a = Conv(x, w, b) r = Relu(a) y = Conv<pads=[1,1,1,1]>(r, v) }"
    untouched(body, v=normal(5, 7, 3, 3))
    pruned(body, {"w": (5, 4, 1, 1), "v": (5, 5, 3, 3)}, v=normal(5, 7, 3, 3), b=holding(-0.7))
    pruned(body.replace("1,1,1,1", "0,0,0,0"), {"w": (5, 4, 1, 1), "v": (5, 5, 3, 3)}, v=normal(5, 7, 3, 3))


def test_constants_in_one_dimension_and_in_three() -> None:
    for space in ((9,), (3, 4, 5)):
        ones = (1,) * len(space)
        head = f"(double[2,4,{','.join(map(str, space))}] x) => (double[N] y) "
        weights = {"w": W.reshape(7, 4, *ones), "v": normal(5, 7, *ones)}
        pruned(
            head + "{ a = Conv(x, w, b) r = Sigmoid(a) y = Conv(r, v) }",
            {"w": (5, 4, *ones)},
            x=normal(2, 4, *space),
            **weights,
        )


def test_transposed_convolutions() -> None:
    body = (
        SIDE + "{ a = ConvTranspose<strides=[2,2], output_padding=[1,1]>(x, f, b) r = Relu(a) y = ConvTranspose(r, o) }"
    )
    weights = {"f": dead(normal(4, 7, 3, 3), columns=(1, 4)), "o": normal(7, 5, 2, 2), "b": holding(-0.7)}
    pruned(body, {"f": (4, 5, 3, 3), "o": (5, 5, 2, 2)}, **weights)
    untouched(body, **{**weights, "b": holding(0.7)})


def test_a_filter_that_reads_only_constants_is_one() -> None:
    """Filter 2 of the second map reads channels 1 and 4 only, which are constant."""
    second = dead(normal(9, 7, 1, 1))
    second[2] = 0
    second[2, [1, 4]] = 1.0
    body = SIDE + "{ a = Conv(x, w, b) r = Sigmoid(a) e = Conv(r, f) q = Sigmoid(e) y = Conv(q, o) }"
    pruned(body, {"w": (5, 4, 1, 1), "f": (8, 5, 1, 1), "o": (5, 8, 1, 1)}, f=second, o=normal(5, 9, 1, 1))


def test_a_padded_filter_that_reads_only_constants_is_none() -> None:
    """At the border it reads zeros as well."""
    second = normal(9, 7, 3, 3)
    second[2] = 0
    second[2, [1, 4]] = 1.0
    body = SIDE + "{ a = Conv(x, w, b) e = Conv<pads=[1,1,1,1]>(a, f) q = Sigmoid(e) y = Conv(q, o) }"
    untouched(body, f=second, o=normal(5, 9, 1, 1))
    pruned(
        body, {"w": (5, 4, 1, 1), "f": (8, 5, 3, 3), "o": (5, 8, 1, 1)}, f=second, o=normal(5, 9, 1, 1), b=holding(0.0)
    )


@pytest.mark.parametrize(
    "rest", ["q = Mul(a, along) y = Conv(q, v)", "y = MatMul(a, mat)", "q = Conv(a, v) y = MatMul(q, mat)"]
)
def test_another_axis_of_the_same_size(rest: str) -> None:
    model = build("(double[2,4,6,7] x) => (double[N] y) { a = Conv(x, w, b) " + rest + " }", along=normal(7))
    result, _, _ = run(model, DropDead())
    assert (result is model) == ("(q, mat)" not in rest)
    same(model, result, x=normal(2, 4, 6, 7))


def test_a_dead_stencil_takes_its_channel_along() -> None:
    body = (
        SIDE
        + "{ a = Conv(x, f) r = Relu(a) q = Conv<group=7, pads=[1,1,1,1]>(r, stencil, bias7) t = HardSwish(q) y = Conv(t, v) }"
    )
    pruned(
        body,
        {"f": (6, 4, 1, 1), "stencil": (6, 1, 3, 3), "v": (5, 6, 1, 1)},
        f=normal(7, 4, 1, 1),
        stencil=dead(normal(7, 1, 3, 3), (2,)),
    )


def test_a_normalisation_by_zero_takes_its_channel_along() -> None:
    """As training with a penalty on the scales leaves it (Liu et al., "Network slimming", 2017)."""
    gamma = normal(7)
    gamma[[0, 2]] = 0
    body = (
        SIDE
        + "{ a = Conv(x, f) r = Relu(a) q = BatchNormalization(r, gamma, beta, mean, var) t = Relu(q) y = Conv(t, v) }"
    )
    shapes = {"f": (5, 4, 1, 1), "v": (5, 5, 1, 1)}
    pruned(body, shapes, gamma=gamma, f=normal(7, 4, 1, 1))


# Channels nobody reads


def test_what_all_readers_multiply_by_zero_goes() -> None:
    body = TWO + "{ [one] a = Conv(x, f) r = Softplus(a) [two] y = Conv<pads=[1,1,1,1]>(r, v) z = Conv(r, o) }"
    weights = {
        "f": normal(7, 4, 1, 1),
        "v": dead(normal(5, 7, 3, 3), columns=(0, 3, 5)),
        "o": dead(normal(2, 7, 1, 1), columns=(3, 5, 6)),
    }
    _, reason = pruned(body, {"f": (5, 4, 1, 1), "v": (5, 5, 3, 3), "o": (2, 5, 1, 1)}, **weights)
    assert "Conv one 7 → 5" in reason
    assert "that Conv two reads, 2 are multiplied by zeros only" in reason
    untouched(body, **{**weights, "o": normal(2, 7, 1, 1)})


def test_what_nobody_reads_goes_from_both_operands() -> None:
    body = SIDE + "{ a = Conv(x, f) e = Conv(x, o) q = Add(a, e) r = Exp(q) y = Conv(r, v) }"
    weights = {"f": normal(7, 4, 1, 1), "o": normal(7, 4, 1, 1, seed=1), "v": dead(V, columns=(2, 3))}
    pruned(body, {"f": (5, 4, 1, 1), "o": (5, 4, 1, 1), "v": (5, 5, 1, 1)}, **weights)


def test_a_part_that_nobody_reads_keeps_a_channel() -> None:
    body = SIDE + "{ a = Conv(x, f) s, t = Split<axis=1>(a, parts) y = Conv(s, v) }"
    weights = {
        "f": dead(normal(9, 4, 1, 1), (0,)),
        "parts": np.array([4, 5]),
        "v": dead(normal(5, 4, 1, 1), columns=(1, 2, 3)),
    }
    pruned(body, {"f": (5, 4, 1, 1)}, **weights)


OBSERVED = {
    "a graph output": TWO + "{ z = Conv(x, w, b) y = Conv(z, v) }",
    "a graph output behind an activation": TWO + "{ a = Conv(x, w, b) z = Relu(a) y = Conv(z, v) }",
    "a branch": "(double[2,4,6,6] x, bool k) => (double[N] y, double[N] z) { a = Conv(x, w, b) y = Conv(a, v) "
    "z = If (k) <then_branch = t () => (double[2,7,6,6] p) { p = Neg(a) }, else_branch = f () => (double[2,7,6,6] q) { q = Abs(a) }> }",
    "its shape": "(double[2,4,6,6] x) => (double[N] y, int64[N] z) { a = Conv(x, w, b) y = Conv(a, v) z = Shape(a) }",
    "a norm across channels": TWO + "{ a = Conv(x, w, b) y = Conv(a, v) z = ReduceL2<axes=[1]>(a) }",
    "a softmax": TWO + "{ a = Conv(x, w, b) y = Conv(a, v) z = Softmax<axis=1>(a) }",
    "a layer normalisation": TWO + "{ a = Conv(x, w, b) y = Conv(a, v) t = Transpose<perm=[0,2,3,1]>(a) z = LayerNormalization(t, gamma) }",
    "a slope per channel": TWO + "{ a = Conv(x, w, b) y = Conv(a, v) p = PRelu(a, slope) z = Conv(p, v2) }",
    "another shape": SIDE + "{ a = Conv(x, w, b) p = Resize(a, , , size) y = Conv(p, v) }",
    "a shape that is computed": SIDE + "{ a = Conv(x, w, b) e = Conv(x, f) t = Shape(e) p = Reshape(a, t) y = Conv(p, v) }",
    "beside channels of unknown number": "(double[2,4,6,6] x, double[2,C,6,6] k) => (double[N] y) { a = Conv(x, w, b) p = Concat<axis=1>(a, k) y = Conv(p, v11) }",
    "a maximum": SIDE + "{ a = Conv(x, w, b) p = Max(a, half) y = Conv(p, v) }",
    "a sum across channels": TWO + "{ a = Conv(x, w, b) y = Conv(a, v) z = ReduceSum(a, one) }",
    "a part of the channels": TWO + "{ a = Conv(x, w, b) y = Conv(a, v) z = Slice(a, one, five, one) }",
    "a bias": "(double[2,4] x) => (double[N] y) { a = Gemm(x, n) y = Gemm(a, o, a) }",
    "a bound": SIDE + "{ a = Conv(x, w, b) p = GlobalAveragePool(a) r = ReduceMean<axes=[0,1,2,3], keepdims=0>(p) q = Clip(a, r) y = Conv(q, v) }",
    "broadcasting over channels": "(double[2,4,6,6] x, double[2,7,6,6] k) => (double[N] y) { a = Conv(x, f1) p = Add(a, k) y = Conv(p, v) }",
}  # fmt: skip


@pytest.mark.parametrize("body", OBSERVED.values(), ids=OBSERVED)
def test_what_is_observed_stays(body: str) -> None:
    more = {
        "v2": normal(5, 7, 1, 1),
        "v11": normal(5, 11, 1, 1),
        "n": dead(normal(4, 7), columns=(1, 4)),
        "o": normal(7, 7),
        "f": normal(7, 4, 1, 1),
        "f1": np.zeros((1, 4, 1, 1)),
    }
    untouched(body, **more)


def test_an_unknown_operator_reads_all_channels() -> None:
    model = build(TWO + "{ a = Conv(x, w, b) y = Conv(a, v) z = Relu(a) }")
    model.graph.node[2].domain = "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    result, outcome, _ = run(model, DropDead())
    assert result is model, outcome.rewrites


def test_groups_keep_their_channels() -> None:
    wide = {"w": dead(normal(14, 4, 1, 1), (1, 4)), "b": holding(0.0, 14)}
    untouched(SIDE + "{ a = Conv(x, w, b) r = Relu(a) y = Conv<group=2>(r, v) }", **wide, v=normal(4, 7, 1, 1))
    narrow = {"w": dead(normal(14, 2, 1, 1), (1, 4)), "b": holding(0.0, 14)}
    untouched(SIDE + "{ a = Conv<group=2>(x, w, b) r = Relu(a) y = Conv(r, v) }", **narrow, v=normal(5, 14, 1, 1))


# Matrix products


def test_products_along_the_last_axis() -> None:
    body = "(double[2,3,4] x) => (double[N] y) { a = MatMul(x, n) t = Add(a, c9) r = Sigmoid(t) e = MatMul(r, o) y = Add(bias5, e) }"
    weights = {"n": dead(normal(4, 9), columns=(1, 4, 6)), "c9": normal(9), "o": dead(normal(9, 5), rows=(2,))}
    result, reason = pruned(body, {"n": (4, 5), "o": (5, 5)}, x=normal(2, 3, 4), **weights)
    assert ops(result) == {"MatMul": 2, "Add": 2, "Sigmoid": 1}
    assert "9 → 5" in reason
    assert "3 are constant" in reason
    assert "1 are multiplied by zeros only" in reason


def test_a_product_gets_the_bias_it_did_not_have() -> None:
    weights = {"n": dead(normal(4, 7), columns=(1, 4)), "o": normal(7, 5)}
    result, _ = pruned(
        "(double[2,3,4] x) => (double[N] y) { a = MatMul(x, n) r = Sigmoid(a) y = MatMul(r, o) }",
        {"o": (5, 5)},
        x=normal(2, 3, 4),
        **weights,
    )
    assert ops(result) == {"MatMul": 2, "Add": 1, "Sigmoid": 1}
    result, _ = pruned(
        "(double[3,4] x) => (double[N] y) { a = MatMul(x, n) r = Sigmoid(a) y = MatMul(r, o) }",
        {"n": (4, 5)},
        x=normal(3, 4),
        **weights,
    )
    assert ops(result) == {"MatMul": 1, "Gemm": 1, "Sigmoid": 1}


@pytest.mark.parametrize("flip", [0, 1])
def test_gemm(flip: int) -> None:
    body = f"(double[3,4] x) => (double[N] y) {{ a = Gemm<transB={flip}>(x, n, b) r = Sigmoid(a) y = Gemm<transB={flip}, alpha=2.0>(r, o) }}"
    n, o = dead(normal(4, 7), columns=(1, 4)), normal(7, 5)
    result, _ = pruned(body, {"b": (5,)}, x=normal(3, 4), n=n.T.copy() if flip else n, o=o.T.copy() if flip else o)
    assert weight(result, "n").shape == ((5, 4) if flip else (4, 5))
    assert weight(result, "o").shape == (5, 5)


def test_products_from_the_left() -> None:
    body = "(double[2,4,3] x) => (double[N] y) { a = MatMul(n, x) e = Add(a, c1) r = Sigmoid(e) y = MatMul(flat, r) }"
    weights = {"n": dead(normal(7, 4), rows=(1, 4)), "c1": normal(7, 1)}
    pruned(body, {"n": (5, 4), "flat": (5, 5)}, x=normal(2, 4, 3), **weights)


# Alignment


@pytest.mark.parametrize(
    ("channels", "idle", "left"),
    [(7, 2, 5), (7, 7, 1), (16, 9, 8), (24, 9, 16), (12, 9, 4), (12, 7, 8), (10, 3, 8), (40, 40, 8)],
)
def test_counts_stay_multiples_of_what_processors_like(channels: int, idle: int, left: int) -> None:
    """Of gcd(count, 8), so that 16 becomes 8 rather than 7; the channels that stay with the others are right as well."""
    weights = {"w": dead(normal(channels, 4, 1, 1), range(idle)), "b": normal(channels), "v": normal(5, channels, 1, 1)}
    body = SIDE + "{ a = Conv(x, w, b) r = Sigmoid(a) y = Conv(r, v) }"
    pruned(body, {"w": (left, 4, 1, 1), "b": (left,), "v": (5, left, 1, 1)}, **weights)


def test_less_than_a_block_stays() -> None:
    weights = {"w": dead(normal(16, 4, 1, 1), range(7)), "v": normal(5, 16, 1, 1)}
    untouched(SIDE + "{ a = Conv(x, w) r = Sigmoid(a) y = Conv(r, v) }", **weights)


def test_the_parts_of_a_concat_stay_multiples_and_so_does_the_whole() -> None:
    """7 + 9 channels, of which one goes each: 6 + 8 would do for the parts, 14 would not for 16."""
    weights = {"f": dead(normal(7, 4, 1, 1), (0,)), "o": dead(normal(9, 4, 1, 1), (0,)), "v": normal(5, 16, 1, 1)}
    untouched(SIDE + "{ a = Conv(x, f) e = Conv(x, o) t = Concat<axis=1>(a, e) y = Conv(t, v) }", **weights)


# Subnormal weights


def subnormal() -> np.ndarray:
    """Ordinary float32 weights (7, 4, 1, 1), three of them below the smallest normal number; no row or column is zero."""
    values = normal(7, 4, 1, 1, dtype=F)
    values[[0, 3, 5], [1, 2, 1]] = np.array([1e-40, -1e-39, 3e-45], F)[:, None, None]
    return values


def test_subnormal_weights_become_zero() -> None:
    ort = pytest.importorskip("onnxruntime")
    model = parse(
        "(float[2,4,6,6] x) => (float[N] y) { [one] a = Conv(x, w, b) y = Relu(a) }",
        w=subnormal(),
        b=normal(7, dtype=F),
    )
    result, outcome, _ = run(model, DropDead())
    (rewrite,) = outcome.rewrites
    assert str(rewrite.site) == "drop-dead:a"
    assert rewrite.reason == "3 of 28 weights are below the smallest normal float32, and become zero"
    assert rewrite.removed == rewrite.added == ("Conv one",)
    expected = np.where(np.abs(subnormal()) < np.finfo(F).tiny, F(0), subnormal())
    np.testing.assert_array_equal(weight(result, "w"), expected)
    x = normal(2, 4, 6, 6, dtype=F)
    before, after = (
        ort.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        for m in (model, result)
    )
    np.testing.assert_array_equal(before, after)


def test_a_weight_that_is_small_throughout_is_left_alone() -> None:
    model = parse("(float[2,4,6,6] x) => (float[N] y) { a = Conv(x, w) y = Relu(a) }", w=subnormal() * F(1e-37))
    assert np.any(weight(model, "w"))
    result, outcome, _ = run(model, DropDead())
    assert result is model
    assert not outcome.rewrites


def test_subnormal_float16_is_left_alone() -> None:
    half = subnormal().astype(np.float16)
    half[0, 1] = np.float16(1e-7)
    model = parse("(float16[2,4,6,6] x) => (float16[N] y) { a = Conv(x, w) y = Relu(a) }", w=half)
    result, outcome, _ = run(model, DropDead())
    assert result is model
    assert not outcome.rewrites


def test_a_filter_of_subnormal_weights_is_one_of_zeros() -> None:
    small = dead(normal(7, 4, 1, 1, dtype=F), rows=(1, 4), scale=1e-39)
    body = "(float[2,4,6,6] x) => (float[N] y) { a = Conv(x, w, b) r = Sigmoid(a) y = Conv(r, v) }"
    model = parse(body, w=small, b=normal(7, dtype=F), v=V.astype(F))
    result, outcome, _ = run(model, DropDead())
    assert weight(result, "w").shape == (5, 4, 1, 1)
    assert not any("to within" in r.reason for r in outcome.rewrites)
    same(model, result, 1e-5, x=X.astype(F))


def test_a_shared_weight_is_made_clean_for_all_maps_that_read_it() -> None:
    head = "(float[2,4,6,6] x, float[2,4,6,6] k) => (float[N] y, float[N] z) "
    model = parse(head + "{ [one] y = Conv(x, w) [two] z = Conv<pads=[1,1,1,1]>(k, w) }", w=subnormal())
    result, outcome, _ = run(model, DropDead())
    (rewrite,) = outcome.rewrites
    assert rewrite.removed == ("Conv one", "Conv two")
    assert [n.input[1] for n in result.graph.node] == ["w", "w"]
    assert np.sum(weight(result, "w") == 0) == 3


def test_what_is_no_map_reads_the_weight_as_it_was() -> None:
    """1 / w is finite for the smallest weights, and is not for zero."""
    small = normal(7, 4, 1, 1, dtype=F)
    small[0, 1] = 5e-39
    body = "(float[2,4,6,6] x) => (float[N] y, float[N] z) { a = Conv(x, u) r = Relu(a) e = Conv(r, v) q = Relu(e) y = Conv(q, w) z = Reciprocal(w) }"
    model = parse(body, w=small, u=W.astype(F), v=normal(4, 7, 1, 1, dtype=F))
    result, outcome, _ = run(model, DropDead())
    assert outcome.rewrites
    feeds = {"x": normal(2, 4, 6, 6, dtype=F)}
    np.testing.assert_array_equal(evaluate(result, **feeds)[1], evaluate(model, **feeds)[1])


def test_a_subnormal_weight_from_a_node() -> None:
    for before in (
        "{ w = Constant<value=float[2,2]{1.0,1e-40,2.0,3.0}>() y = MatMul(x, w) }",
        "{ i = Identity(w) y = MatMul(x, i) }",
    ):
        held = {"w": np.array([[1, 1e-40], [2, 3]], F)} if "Identity" in before else {}
        model = parse("(float[3,2] x) => (float[N] y) " + before, 17, 8, **held)
        result, outcome, _ = run(model, DropDead())
        assert "1 of 4 weights" in outcome.rewrites[0].reason
        assert ops(result) == {"MatMul": 1}
        np.testing.assert_array_equal(weight(result, result.graph.node[-1].input[1]), [[1, 0], [2, 3]])


def test_a_subnormal_weight_that_is_a_graph_output() -> None:
    model = parse("(float[3,2] x) => (float[N] y) { y = MatMul(x, w) }", w=np.array([[1, 1e-40], [2, 3]], F))
    model.graph.output.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [2, 2]))
    result, outcome, _ = run(model, DropDead())
    assert result is model
    assert reasons(outcome) == ["1 weights are subnormal, but 'w' is a graph output"]


def test_what_a_factor_makes_subnormal_is_not_in_the_weight() -> None:
    small = np.array([[1, 1e-30], [2, 3]], F)
    model = parse("(float[3,2] x) => (float[N] y) { y = Gemm<alpha=0.0000000001>(x, w) }", w=small)
    result, outcome, _ = run(model, DropDead())
    assert result is model, [r.reason for r in outcome.rewrites]


def test_subnormal_weights_go_even_where_channels_may_not() -> None:
    """The constant would overflow the next bias; the subnormal weight of the first map is another matter."""
    first = dead(normal(7, 4, 1, 1, dtype=F), (1,))
    first[0, 0] = 1e-40
    body = "(float[2,4,6,6] x) => (float[N] y) { a = Conv(x, w, b) y = Conv(a, v) }"
    model = parse(body, w=first, b=np.full(7, 1e38, F), v=np.full((5, 7, 1, 1), 10, F))
    result, outcome, _ = run(model, DropDead())
    assert "overflow" in " ".join(reasons(outcome))
    assert "1 of 28 weights are below" in " ".join(r.reason for r in outcome.rewrites)
    assert weight(result, "w").shape == first.shape
    assert weight(result, "w")[0, 0, 0, 0] == 0


# Filters too small to matter


def test_filters_too_small_to_matter_count_as_constant() -> None:
    """1e-30 of what stands beside them: for inputs up to 2²⁰ their sum is below the rounding of all others."""
    small = dead(normal(7, 4, 1, 1), (1, 4), scale=1e-30)
    body = SIDE + "{ a = Conv(x, w, b) r = Sigmoid(a) y = Conv(r, v) }"
    _, reason = pruned(body, {"w": (5, 4, 1, 1), "v": (5, 5, 1, 1)}, w=small)
    found = re.search(r"2 are constant \(to within (\S+) for inputs up to 1e\+06\) and now part of its bias", reason)
    assert found is not None, reason
    assert float(found[1]) == pytest.approx(0.25 * 2**20 * np.abs(small[[1, 4]]).sum((1, 2, 3)).max(), rel=0.1)


def test_filters_that_are_only_small_stay() -> None:
    untouched(
        SIDE + "{ a = Conv(x, w, b) r = Sigmoid(a) y = Conv(r, v) }", w=dead(normal(7, 4, 1, 1), (1, 4), scale=1e-15)
    )


LARGE = dead(V, columns=(1, 4), scale=1e30)
AMPLIFIED = {
    "their reader": (SIDE + "{ a = Conv(x, w) r = Relu(a) y = Conv(r, v) }", {"v": LARGE}),
    "a scale": (SIDE + "{ a = Conv(x, w) r = Mul(a, k) y = Conv(r, v) }", {"k": np.array([1, 1e30, 1, 1, 1e30, 1, 1]).reshape(7, 1, 1)}),
    "a stencil": (
        SIDE + "{ a = Conv(x, w) r = Conv<group=7>(a, stencil) y = Conv(r, v) }",
        {"stencil": dead(normal(7, 1, 3, 3), (1, 4), scale=1e30)},
    ),
    "a scale of their sum": (
        SIDE + "{ a = Conv(x, w) e = Conv(x, f) s = Add(a, e) r = Mul(s, k) y = Conv(r, v) }",
        {"f": dead(normal(7, 4, 1, 1, seed=1), (1, 4), scale=1e-30), "k": np.array([1, 1e30, 1, 1, 1e30, 1, 1]).reshape(7, 1, 1)},
    ),
    "a scale where all that their reader reads is small": (
        SIDE + "{ a = Conv(x, small) e = Conv(a, f) y = Mul(e, k) }",
        {
            "small": dead(dead(normal(7, 4, 1, 1), (1,), scale=1e-19), (2,), scale=1e-20),
            "f": np.stack([np.eye(7)[1] + np.eye(7)[2], np.eye(7)[3]])[..., None, None],
            "k": np.array([1e19, 1]).reshape(2, 1, 1),
        },
    ),
    "a scale behind their reader": (
        SIDE + "{ a = Conv(x, w) e = Conv(a, f) y = Mul(e, k) }",
        {"f": np.eye(7)[1:3, :, None, None], "k": np.array([1e30, 1]).reshape(2, 1, 1)},
    ),
    "the reader of their reader": (
        SIDE + "{ a = Conv(x, w) e = Conv(a, f) r = Relu(e) y = Conv(r, o) }",
        {"f": np.eye(7)[1:4, :, None, None], "o": np.array([1e30, 1, 1]).reshape(1, 3, 1, 1)},
    ),
    "a norm behind their reader": (
        SIDE + "{ a = Conv(x, w) e = Conv(a, f) n = ReduceMax<axes=[2,3]>(e) y = Div(e, n) }",
        {"f": np.eye(7)[1:3, :, None, None]},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("body", "weights"), AMPLIFIED.values(), ids=AMPLIFIED)
def test_what_makes_them_large_again_keeps_them(body: str, weights: dict[str, np.ndarray]) -> None:
    model = build(body, w=dead(normal(7, 4, 1, 1), (1, 4), scale=1e-30), **weights)
    result, _, _ = run(model, DropDead())
    same(model, result, x=X)


# What is left alone


def test_a_shared_weight_is_left_alone() -> None:
    untouched(TWO + "{ a = Conv(x, w, b) y = Conv(a, v) e = Conv(x, w) z = Relu(e) }")
    untouched(TWO + "{ a = Conv(x, w, b) e = Conv(x, f) y = Conv(a, v) z = Conv(e, v) }", f=normal(7, 4, 1, 1))


def test_a_shared_bias_is_no_obstacle() -> None:
    pruned(
        TWO + "{ a = Conv(x, w, b) y = Conv(a, v) z = Conv(x, f, b) }",
        {"w": (5, 4, 1, 1), "b": (7,)},
        f=normal(7, 4, 1, 1),
    )


def test_an_overridable_weight_is_left_alone() -> None:
    for name, shape in {"w": "7,4,1,1", "b": "7", "v": "5,7,1,1"}.items():
        untouched(
            f"(double[2,4,6,6] x, double[{shape}] {name}) => (double[N] y) {{ a = Conv(x, w, b) y = Conv(a, v) }}"
        )


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["w", "v", "b"])
def test_numbers_that_are_not_finite_are_left_alone(name: str, value: float) -> None:
    held = CONSTANTS[name].copy()
    held.reshape(-1)[0] = value
    untouched(SIDE + "{ a = Conv(x, w, b) y = Conv(a, v) }", **{name: held})


def test_a_bias_that_would_overflow() -> None:
    half = {"w": W.astype(np.float16), "b": np.full(7, 6e4, np.float16), "v": np.full((5, 7, 1, 1), 100, np.float16)}
    model = build("(float16[2,4,6,6] x) => (float16[N] y) { a = Conv(x, w, b) y = Conv(a, v) }", **half)
    result, outcome, loaded = run(model, DropDead())
    assert result is model
    assert reasons(outcome) == ["dead channels could be removed, but the folded weights overflow float16"]
    assert loaded.graph.nodes[0].outputs[0].shape == (2, 7, 6, 6)


def test_operators_that_do_not_broadcast() -> None:
    body = SIDE + "{ a = Conv(x, w, b) q = BatchNormalization<is_test=1>(a, gamma, beta, mean, var) y = Conv(q, v) }"
    assert "opset 6 do not broadcast; --opset converts" in untouched(body, 6)


def test_a_denied_site_is_left_alone() -> None:
    body = TWO + "{ a = Conv(x, w, b) y = Conv(a, v) e = Conv(x, w2, b2) z = Conv(e, o) }"
    model = build(body, o=normal(5, 7, 1, 1))
    _, free, _ = run(model, DropDead())
    assert [str(r.site) for r in free.rewrites] == ["drop-dead:a", "drop-dead:e"]
    result, outcome, _ = run(model, DropDead(), denied=[Site("drop-dead", "a")])
    assert [str(r.site) for r in outcome.rewrites] == ["drop-dead:e"]
    assert "denied by the user" in reasons(outcome)
    np.testing.assert_array_equal(weight(result, "w"), W)
    np.testing.assert_array_equal(weight(result, "v"), V)
    assert weight(result, "w2").shape == (5, 4, 1, 1)
    same(model, result, x=X)
    assert run(model, DropDead(), denied=[Site("drop-dead", "a"), Site("drop-dead", "e")])[0] is model


def test_a_denied_subnormal_weight_is_left_alone() -> None:
    model = parse("(float[2,4,6,6] x) => (float[N] y) { a = Conv(x, w) y = Relu(a) }", w=subnormal())
    assert run(model, DropDead(), denied=[Site("drop-dead", "a")])[0] is model


# The graph around it


def test_declared_shapes_follow() -> None:
    model = build(
        SIDE + "{ a = Conv(x, w, b) r = Sigmoid(a) p = GlobalAveragePool(r) q = Reshape(p, shape) y = MatMul(q, mat) }",
        shape=np.array([2, 7]),
    )
    model = onnx.shape_inference.infer_shapes(model)
    assert {v.name for v in model.graph.value_info} == {"a", "r", "p", "q"}
    result, _, _ = run(model, DropDead())
    named = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in result.graph.value_info}
    inferred = {v.name: v for v in onnx.shape_inference.infer_shapes(build_without_shapes(result)).graph.value_info}
    for name, shape in named.items():
        assert [d.dim_value for d in inferred[name].type.tensor_type.shape.dim] == shape
    assert not {"a", "r", "p", "q"} & {
        t for n in result.graph.node for t in n.output
    }  # a name means the original's value


def build_without_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.value_info[:]
    return bare


def test_declared_shapes_of_weights_follow() -> None:
    """Inference declares the shapes of what Constant nodes hold as well."""
    model = build(SIDE + "{ a = Conv(x, w, b) r = Relu(a) y = Conv(r, v) }")
    for name in ("w", "v"):
        held = next(t for t in model.graph.initializer if t.name == name)
        model.graph.initializer.remove(held)
        model.graph.node.insert(0, helper.make_node("Constant", [], [name], value=held))
    model = onnx.shape_inference.infer_shapes(model)
    assert "w" in {v.name for v in model.graph.value_info}
    result, outcome, _ = run(model, DropDead())
    assert len(outcome.rewrites) == 1
    same(model, result, x=X)


def test_new_names_are_new() -> None:
    model = build(TWO.replace("z", "a_pruned") + "{ a = Conv(x, w, b) r = Relu(a) y = Conv(r, v) a_pruned = Neg(x) }")
    result, outcome, _ = run(model, DropDead())
    assert outcome.rewrites
    same(model, result, x=X)


def test_one_run_is_enough() -> None:
    """Each map of a chain loses filters, and reads channels that go with another's."""
    weights = {f"w{i}": dead(normal(7, 7, 1, 1, seed=i), (i,)) for i in range(4)}
    nodes = " ".join(f"a{i} = Conv({f'r{i - 1}' if i else 'e'}, w{i}) r{i} = Relu(a{i})" for i in range(4))
    model = build(SIDE + f"{{ e = Conv(x, f) {nodes} y = Conv(r3, v) }}", **weights, f=normal(7, 4, 1, 1))
    loaded = from_proto(model)
    outcome = DropDead().run(loaded.graph, reserved=loaded.names())
    result = loaded.to_proto()
    same(model, result, x=X)
    assert [weight(result, f"w{i}").shape[:2] for i in range(4)] == [(6, 7), (6, 6), (6, 6), (6, 6)]
    assert len(outcome.rewrites) == 4


def test_a_pass_that_is_used_again_reads_weights_as_their_map_does() -> None:
    """The weight is first read as it stands and transposed; later only transposed, and is pruned then."""
    square = dead(normal(5, 5), rows=(2,))
    body = "(double[9,5] x) => (double[N] y, double[N] z) { p = MatMul(x, u) q = Relu(p) y = Gemm(q, w) z = Gemm<transB=1>(q, w) }"
    loaded = from_proto(parse(body, w=square, u=normal(5, 5, seed=1)))
    again = DropDead()
    assert not again.run(loaded.graph, reserved=loaded.names()).rewrites
    loaded.graph.outputs.pop(0)
    loaded.graph.cleanup()
    model = gs.export_onnx(loaded.graph)
    again.run(loaded.graph, reserved=loaded.names())
    same(model, gs.export_onnx(loaded.graph), x=normal(9, 5))


# Random networks

STEPS = (
    "conv", "same", "padded", "depthwise", "padded depthwise", "normalise", "relu", "clip", "hard swish", "maximum", "average",
    "padded average", "add", "residual", "concat", "gate", "scale",
)  # fmt: skip


class Net:
    """A random network in float64: every map has random dead rows and columns."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[TensorProto] = []
        self.pool: list[tuple[str, int, int]] = []  # name, channels, height and width
        self.conv(("x", 3, 5), 7)

    def const(self, values: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(values, f"c{len(self.weights)}"))
        return str(self.weights[-1].name)

    def add(self, op: str, inputs: list[str], channels: int, size: int, **attributes: Any) -> tuple[str, int, int]:
        self.pool.append((f"t{len(self.nodes)}", channels, size))
        self.nodes.append(helper.make_node(op, inputs, [self.pool[-1][0]], **attributes))
        return self.pool[-1]

    def dying(self, values: np.ndarray, axis: int) -> Any:
        gone = self.rng.random(values.shape[axis]) < self.rng.choice([0.0, 0.3, 0.7])
        return values * np.expand_dims(~gone, [a for a in range(values.ndim) if a != axis])

    def bias(self, channels: int) -> Any:
        return self.rng.normal(size=channels) * self.rng.choice([0.0, 1.0]) - self.rng.choice([0.0, 1.0])

    def conv(self, source: tuple[str, int, int], channels: int, kernel: int = 1) -> tuple[str, int, int]:
        name, inn, size = source
        values = self.rng.normal(size=(channels, inn, kernel, kernel)) / (inn**0.5 * kernel)
        values = self.dying(self.dying(values, 0), 1)
        inputs = [name, self.const(values), self.const(self.bias(channels))]
        return self.add("Conv", inputs, channels, size, pads=[kernel // 2] * 4)

    def pick(self, *like: int) -> tuple[str, int, int]:
        fitting = [p for p in self.pool if p[1:][-len(like) :] == like] if like else self.pool
        return fitting[-1] if self.rng.random() < 0.6 else fitting[self.rng.integers(len(fitting))]

    def step(self, kind: str) -> None:
        source = self.pick()
        name, channels, size = source
        fresh = int(self.rng.choice([4, 7, 8, 9]))
        if kind == "conv":
            self.conv(source, fresh)
        elif kind == "same":
            self.conv(source, self.pick()[1])
        elif kind == "padded":
            self.conv(source, fresh, 3)
        elif kind.endswith("depthwise") and (size > 2 or kind.startswith("padded")):
            pad = int(kind.startswith("padded"))
            values = self.dying(self.rng.normal(size=(channels, 1, 3, 3)) / 3, 0)
            inputs = [name, self.const(values), self.const(self.bias(channels))]
            self.add("Conv", inputs, channels, size + 2 * pad - 2, group=channels, pads=[pad] * 4)
        elif kind == "normalise":
            parts = [
                self.dying(self.bias(channels) + 0.1, 0),
                self.bias(channels),
                self.bias(channels),
                np.ones(channels),
            ]
            self.add("BatchNormalization", [name, *map(self.const, parts)], channels, size)
        elif kind in ("relu", "hard swish"):
            self.add("Relu" if kind == "relu" else "HardSwish", [name], channels, size)
        elif kind == "clip":
            self.add("Clip", [name, self.const(np.array(-0.5)), self.const(np.array(1.5))], channels, size)
        elif kind == "maximum":
            self.add("MaxPool", [name], channels, size, kernel_shape=[3, 3], pads=[1] * 4)
        elif kind.endswith("average"):
            pads = int(kind.startswith("padded"))
            self.add("AveragePool", [name], channels, size, kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=pads)
        elif kind == "add":
            self.add("Add", [name, self.pick(channels, size)[0]], channels, size)
        elif kind == "residual":
            inner = self.conv(source, fresh)
            inner = self.add("Relu", [inner[0]], *inner[1:])
            self.add("Add", [name, self.conv(inner, channels)[0]], channels, size)
        elif kind == "concat":
            other = self.pick(size)
            if channels + other[1] <= 24:
                self.add("Concat", [name, other[0]], channels + other[1], size, axis=1)
        elif kind == "gate":
            pooled = self.add("GlobalAveragePool", [name], channels, 1)
            squeezed = self.conv(pooled, 3)
            squeezed = self.add("Relu", [squeezed[0]], *squeezed[1:])
            gate = self.conv(squeezed, channels)
            gate = self.add(str(self.rng.choice(["Sigmoid", "HardSigmoid"])), [gate[0]], *gate[1:])
            self.add("Mul", [name, gate[0]], channels, size)
        elif kind == "scale":
            values = self.dying(self.rng.normal(size=(channels, 1, 1)), 0)
            self.add(str(self.rng.choice(["Mul", "Add", "Sub"])), [self.const(values), name], channels, size)

    def model(self) -> onnx.ModelProto:
        read = {i for n in self.nodes for i in n.input}
        outputs = [p if self.rng.random() < 0.2 else self.conv(p, 2) for p in list(self.pool) if p[0] not in read]
        if self.rng.random() < 0.3:
            outputs.append(self.pick())
        declared = [
            helper.make_tensor_value_info(n, TensorProto.DOUBLE, [1, c, s, s]) for n, c, s in dict.fromkeys(outputs)
        ]
        x = helper.make_tensor_value_info("x", TensorProto.DOUBLE, [1, 3, 5, 5])
        graph = helper.make_graph(self.nodes, "random", [x], declared, self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.lists(st.sampled_from(STEPS), min_size=1, max_size=10))
def test_random_networks(seed: int, steps: list[str]) -> None:
    net = Net(seed)
    for kind in steps:
        net.step(kind)
    model = net.model()
    onnx.checker.check_model(model, full_check=True)
    result, _, _ = run(model, DropDead())
    same(model, result, 1e-8, x=normal(1, 3, 5, 5, seed=seed % 1000))
    before, after = (measure(View(from_proto(m).graph)).macs for m in (model, result))
    assert after <= before
    assert run(result, DropDead())[0] is result


def test_every_dead_channel_goes_if_that_is_asked_for() -> None:
    body = "(double[2,4,6,6] x) => (double[N] y) { a = Conv(x, w, b) r = Relu(a) y = Conv(r, v) }"
    first = dead(normal(16, 4, 1, 1), range(5))
    model = parse(body, w=first, b=normal(16), v=normal(5, 16, 1, 1, seed=1))
    for eager, kept in ((False, 16), (True, 11)):
        p = DropDead()
        p.scope = "exact" if eager else "profitable"
        result, _, _ = run(model, p)
        assert weight(result, "w").shape[0] == kept
        same(model, result, x=X)


def test_subnormal_weights_that_are_more_than_weights_stay() -> None:
    """What else reads them is not known to let them go."""
    weight = normal(4, 4, 1, 1, dtype=np.float32)
    weight[0, 0] = 1e-40
    model = parse("(float[1,4,3,3] x) => (float[N] y) { c = Conv(x, w) s = ReduceMax(w) y = Add(c, s) }", w=weight)
    result, outcome, _ = run(model, DropDead())
    assert result is model
    assert "other operators read 'w' too" in reasons(outcome)[0]
