"""Constant channels: the operators through which drop-dead follows them."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
from helpers import normal, ops, reasons, run, same, weight
from onnx import helper
from pruning import CONSTANTS, SIDE, TWO, V, W, X, build, dead, holding, pruned, untouched

from pwopt.passes import DropDead


def test_zero_filters_are_removed_and_their_bias_is_folded_into_the_next_map() -> None:
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


def test_a_map_without_bias_gets_one() -> None:
    result, _ = pruned(SIDE + "{ a = Conv(x, w, b) r = Relu(a) y = Conv(r, v) }", {"v": (5, 5, 1, 1)})
    np.testing.assert_allclose(
        weight(result, result.graph.node[-1].input[2]), 0.7 * V[:, [1, 4], 0, 0].sum(1), rtol=1e-15
    )


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
def test_a_constant_channel_is_followed_through_channelwise_operators(
    gap: str, passes: tuple[bool, bool], value: float
) -> None:
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


def test_a_maximum_whose_window_lies_in_the_padding() -> None:
    """Such a window gives the lowest number, not the constant."""
    body = """(double[2,4,1,1] x) => (double[N] y) {
        a = Conv(x, w, b) q = MaxPool<kernel_shape=[2,2], dilations=[2,2], pads=[1,1,1,1]>(a) r = Clip(q, low, high) y = Conv(r, v)
    }"""
    model = build(body)
    result, _, _ = run(model, DropDead())
    same(model, result, x=normal(2, 4, 1, 1))


def test_an_average_whose_window_reaches_over_the_edge() -> None:
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
def test_constant_channels_are_followed_through_changes_of_shape(nodes: str) -> None:
    words = set(re.findall(r"\w+", nodes))
    reader = {"mat": (5, 5), "flat": (5, 5), "v": (5, 5, 1, 1)}
    shapes = {"w": (5, 4, 1, 1)} | {k: v for k, v in reader.items() if k in words}
    pruned(SIDE + f"{{ a = Conv(x, w, b) {nodes} }}", shapes, **SHAPES)


def test_channels_that_merge_with_positions_are_kept() -> None:
    untouched(SIDE + "{ a = Conv(x, w, b) q = Reshape(a, two_rest) y = MatMul(q, mat) }", **SHAPES, mat=normal(252, 5))
    untouched(
        SIDE + "{ a = Conv(x, w, b) q = DepthToSpace<blocksize=2>(a) y = Conv(q, v) }",
        w=dead(normal(12, 4, 1, 1), (1, 4)),
        b=holding(0.7, 12),
        v=normal(5, 3, 1, 1),
    )


def test_a_shared_shape_constant_is_kept_for_its_other_readers() -> None:
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


def test_other_inputs_of_a_concat_are_kept() -> None:
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


def test_a_zero_channel_is_removed_through_a_gate() -> None:
    body = SIDE + f"{{ a = Conv(x, w, b) r = Relu(a) {GATE.format('Sigmoid(t)')} y = Conv(j, v) }}"
    shapes = {"w": (5, 4, 1, 1), "f": (3, 5, 1, 1), "o": (5, 3, 1, 1), "v": (5, 5, 1, 1)}
    pruned(body, shapes, **GATED, b=holding(-0.7))
    untouched(body, **GATED, b=holding(0.7))


def test_a_gate_of_zero_removes_its_channel() -> None:
    body = SIDE + f"{{ r = Conv(x, w) {GATE.format('HardSigmoid(t)').replace('(r)', '(x)')} y = Conv(j, v) }}"
    closed = {"w": normal(7, 4, 1, 1), "f": normal(3, 4, 1, 1), "o": dead(GATED["o"], (1, 4)), "i": holding(-9.0)}
    pruned(body, {"w": (5, 4, 1, 1), "o": (5, 3, 1, 1), "v": (5, 5, 1, 1)}, **{**GATED, **closed})
    untouched(body, **{**GATED, **closed, "i": holding(0.1)})


def test_a_constant_gate_on_a_constant_channel() -> None:
    body = SIDE + f"{{ a = Conv(x, w, b) r = Relu(a) {GATE.format('Sigmoid(t)')} y = Conv(j, v) }}"
    pruned(body, {"w": (5, 4, 1, 1), "o": (5, 3, 1, 1)}, **{**GATED, "o": dead(GATED["o"], (1, 4))})


@pytest.mark.parametrize("op", ["Add(a, e)", "Sub(a, e)", "Sum(a, e)", "Mul(a, e)"])
def test_both_operands_must_be_constant(op: str) -> None:
    """Channel 1 is constant in both; 3 and 4 in one each."""
    body = SIDE + f"{{ a = Conv(x, w, b) e = Conv(x, w2, b2) q = {op} y = Conv(q, v) }}"
    pruned(body, {"w": (6, 4, 1, 1), "w2": (6, 4, 1, 1), "v": (5, 6, 1, 1)})


def test_a_divisor_is_not_followed() -> None:
    untouched(SIDE + "{ a = Conv(x, w, b) e = Conv(x, w2, b2) q = Div(a, e) y = Conv(q, v) }")


def test_an_operand_of_another_rank_is_kept() -> None:
    """Its channels lie on the height of the sum, which happens to be seven."""
    body = """(double[2,4,7,6] x, double[1,4,6] k) => (double[N] y) {
        a = Conv(x, w, b) e = Conv(k, f, b2) q = Add(a, e) y = Conv(q, v)
    }"""
    untouched(body, f=W[..., 0], b2=holding(0.3))


def test_an_operand_that_is_read_twice_is_kept() -> None:
    untouched(SIDE + "{ a = Conv(x, w, b) q = Add(a, a) y = Conv(q, v) }")


def test_a_chain_of_residual_blocks() -> None:
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


def test_a_padded_convolution_keeps_constant_inputs_other_than_zero() -> None:
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


def test_a_filter_that_reads_only_constants_is_constant() -> None:
    """Filter 2 of the second map reads channels 1 and 4 only, which are constant."""
    second = dead(normal(9, 7, 1, 1))
    second[2] = 0
    second[2, [1, 4]] = 1.0
    body = SIDE + "{ a = Conv(x, w, b) r = Sigmoid(a) e = Conv(r, f) q = Sigmoid(e) y = Conv(q, o) }"
    pruned(body, {"w": (5, 4, 1, 1), "f": (8, 5, 1, 1), "o": (5, 8, 1, 1)}, f=second, o=normal(5, 9, 1, 1))


def test_a_padded_filter_that_reads_only_constants_is_not_constant() -> None:
    """At the border, the filter reads zeros as well."""
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


def test_a_depthwise_filter_of_zero_removes_its_channel() -> None:
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


def test_a_normalisation_with_scale_zero_removes_its_channel() -> None:
    """As training with a penalty on the scales leaves it (Liu et al., "Network slimming", 2017)."""
    gamma = normal(7)
    gamma[[0, 2]] = 0
    body = (
        SIDE
        + "{ a = Conv(x, f) r = Relu(a) q = BatchNormalization(r, gamma, beta, mean, var) t = Relu(q) y = Conv(t, v) }"
    )
    shapes = {"f": (5, 4, 1, 1), "v": (5, 5, 1, 1)}
    pruned(body, shapes, gamma=gamma, f=normal(7, 4, 1, 1))
