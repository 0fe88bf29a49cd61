from __future__ import annotations

import numpy as np
import onnx
import pytest
from helpers import build, eager, normal, ops, outside, parse, reasons, run, same

from pwopt.passes import DeclareShapes, LowerRank

X = normal(2, 4, 11)
SIDE = "(double[2,4,11] x) => (double[N] y) "


def kernels(model: onnx.ModelProto) -> list[int]:
    """Ranks of the weights of all convolutions."""
    rank = {t.name: len(t.dims) for t in model.graph.initializer}
    return [rank[n.input[1]] for n in model.graph.node if n.op_type in ("Conv", "ConvTranspose")]


def lowered(body: str, x: np.ndarray = X, opset: int = 17, **weights: np.ndarray) -> onnx.ModelProto:
    model = parse(body, opset, **weights)
    result, outcome, _ = run(model, eager(LowerRank))
    assert len(outcome.rewrites) == 1
    assert set(kernels(result)) == {4}
    same(model, result, 1e-9, x=x)
    return result


@pytest.mark.parametrize(
    "call",
    [
        "Conv<kernel_shape=[3], strides=[2], dilations=[2], pads=[1,2]>(x, w, b)",
        "Conv<group=2>(x, g)",
        'Conv<auto_pad="SAME_LOWER", strides=[2]>(x, w)',
        "ConvTranspose<strides=[3], output_padding=[2], pads=[1,0]>(x, v, b)",
    ],
)
def test_convolutions(call: str) -> None:
    names = {"w": normal(6, 4, 3), "g": normal(6, 2, 3), "v": normal(4, 6, 3), "b": normal(6)}
    result = lowered(
        SIDE + f"{{ y = {call} }}", **{k: v for k, v in names.items() if f" {k}," in call or f" {k})" in call}
    )
    assert ops(result)["Unsqueeze"] == ops(result)["Squeeze"] == 1


CARRIED = [
    "Relu(a)", "Clip(a, s, t)", "PRelu(a, slope)", "PRelu(a, one)", "BatchNormalization(a, p, p, p, p)",
    "InstanceNormalization(a, p, p)", "MaxPool<kernel_shape=[3], strides=[2], pads=[1,1]>(a)",
    "AveragePool<kernel_shape=[2], strides=[2], ceil_mode=1>(a)", "Mul(a, slope)", "Add(row, a)", "Mul(a, whole)",
    "Sub(one, a)", "Concat<axis=-2>(a, a)", "Concat<axis=2>(a, x)", "Softmax<axis=1>(a)", "Softmax<axis=-1>(a)",
    "LogSoftmax<axis=2>(a)", "ReduceMean<axes=[-1]>(a)", "ReduceMax<axes=[1,2]>(a)", "Pad(a, around)",
    'Pad<mode="reflect">(a, around)', "Slice(a, i, j, k)", 'Resize<mode="linear">(a, , scales)',
    'Resize<mode="nearest">(a, , , sizes)', "GlobalAveragePool(a)",
]  # fmt: skip


@pytest.mark.parametrize("call", CARRIED)
def test_what_is_carried_along(call: str) -> None:
    numbers = {
        "s": np.float64(-0.5), "t": np.float64(1), "slope": normal(4, 1), "one": normal(1), "p": np.abs(normal(4)),
        "row": normal(11), "whole": normal(2, 4, 11), "around": np.array([0, 0, 2, 0, 1, 3]), "i": np.array([1]),
        "j": np.array([9]), "k": np.array([-1]), "scales": np.array([1, 1, 2.5], np.float32), "sizes": np.array([2, 4, 20]),
    }  # fmt: skip
    used = {k: v for k, v in numbers.items() if any(f"{b}{k}{e}" in call for b in "( " for e in ",)")}
    body = SIDE + f"{{ a = Conv<pads=[1,1]>(x, w) b = {call} c = Abs(b) y = Neg(c) }}"
    result = lowered(body, w=normal(4, 4, 3), **used)
    assert ops(result)["Squeeze"] == 1
    assert [n.op_type for n in result.graph.node][-1] == "Squeeze"
    assert ops(result)["Unsqueeze"] == 1


@pytest.mark.parametrize(
    ("opset", "call"),
    [
        (11, "Softmax<axis=1>(a)"),
        (11, "Softmax<axis=2>(a)"),
        (11, "ReduceSum<axes=[2]>(a)"),
        (13, "ReduceSum(a, axes)"),
        (18, "ReduceMean(a, axes)"),
        (10, "Slice(a, i, j, k)"),
        (10, "Pad<pads=[0,1,0,0,0,2]>(a)"),
        (9, "Upsample(a, scales)"),
        (12, "Split<axis=1>(a)"),
    ],
)
def test_older_and_newer_spellings(opset: int, call: str) -> None:
    numbers = {
        "axes": np.array([-1]),
        "i": np.array([1]),
        "j": np.array([9]),
        "k": np.array([2]),
        "scales": np.array([1, 1, 2], np.float32),
    }
    used = {k: v for k, v in numbers.items() if f" {k})" in call or f" {k}," in call}
    ends = "b, c = " + call + " y = Add(b, c)" if "Split" in call else "b = " + call + " y = Abs(b)"
    lowered(SIDE + f"{{ a = Conv<pads=[1,1]>(x, w) {ends} }}", opset=opset, w=normal(4, 4, 3), **used)


def test_what_stays_outside() -> None:
    """Each region has one way in and one way out; what reads a result inside and outside gets both."""
    body = SIDE + (
        "{ a = Conv<pads=[1,1]>(x, w) b = Relu(a) t = Transpose<perm=[0,2,1]>(b) m = MatMul(t, v) u = Transpose<perm=[0,2,1]>(m)"
        " c = Conv<pads=[1,1]>(b, w2) y = Add(c, u) }"
    )
    result = lowered(body, w=normal(4, 4, 3), w2=normal(4, 4, 3, seed=1), v=normal(4, 4))
    assert ops(result)["Unsqueeze"] == 2
    assert ops(result)["Squeeze"] == 2


def test_outputs_inside_a_region_keep_their_names() -> None:
    model = parse("(double[2,4,11] x) => (double[N] y, double[N] a) { a = Conv(x, w) y = Relu(a) }", w=normal(4, 4, 3))
    result, _, _ = run(model, eager(LowerRank))
    assert [o.name for o in result.graph.output] == ["y", "a"]
    same(model, result, x=X)


def test_dynamic_lengths() -> None:
    model = parse(
        "(double[N,4,L] x) => (double[M] y) { a = Conv<pads=[1,1]>(x, w) r = Relu(a) y = MaxPool<kernel_shape=[2]>(r) }",
        w=normal(4, 4, 3),
    )
    result, _, _ = run(model, eager(LowerRank))
    for size in ((1, 4, 5), (3, 4, 18)):
        same(model, result, x=normal(*size))


def test_small_regions_wait_for_a_measurement() -> None:
    two = SIDE + "{ a = Conv<pads=[1,1]>(x, w) r = Relu(a) y = Conv(r, v) }"
    model = parse(two, w=normal(4, 4, 3), v=normal(5, 4, 1))
    result, outcome, _ = run(model, LowerRank())
    assert result is model
    assert "only measuring" in reasons(outcome)[0]
    three = SIDE + "{ a = Conv<pads=[1,1]>(x, w) r = Relu(a) b = Conv(r, v) y = Conv(b, u) }"
    model = parse(three, w=normal(4, 4, 3), v=normal(5, 4, 1), u=normal(3, 5, 2))
    result, _, _ = run(model, LowerRank())
    assert set(kernels(result)) == {4}
    same(model, result, x=X)


V = normal(2, 4, 5, 6, 7)
VIDEO = "(double[2,4,5,6,7] x) => (double[N] y) "


@pytest.mark.parametrize(
    "call",
    [
        "Conv(x, w)", "Conv<pads=[1,0,0,1,0,0], strides=[2,1,1]>(x, k)",
    ],
)  # fmt: skip
def test_volumes_with_flat_kernels(call: str) -> None:
    names = {"w": normal(6, 4, 1, 1, 1), "k": normal(6, 4, 3, 1, 1), "p": np.abs(normal(6)), "v": normal(4, 6, 1, 1, 1)}
    used = {k: v for k, v in names.items() if k in "pv" or f" {k})" in call}
    body = (
        VIDEO
        + f"{{ a = {call} b = BatchNormalization(a, p, p, p, p) c = Relu(b) g = GlobalAveragePool(c) h = Sigmoid(g) i = Mul(c, h) y = Conv(i, v) }}"
    )
    result = lowered(body, x=V, **used)
    assert ops(result)["Reshape"] == 2


@pytest.mark.parametrize(
    "call",
    [
        "Conv<pads=[0,1,1,0,1,1]>(x, w)",  # a kernel over the plane
        "Conv<strides=[1,2,2]>(x, f)",
    ],
)
def test_volumes_whose_plane_is_not_left_alone(call: str) -> None:
    names = {"w": normal(6, 4, 1, 3, 3), "f": normal(6, 4, 1, 1, 1)}
    model = parse(VIDEO + f"{{ y = {call} }}", **{k: v for k, v in names.items() if f" {k})" in call})
    assert run(model, eager(LowerRank))[0] is model


def test_volumes_of_unknown_plane_stay() -> None:
    model = parse("(double[2,4,5,H,7] x) => (double[N] y) { y = Conv(x, w) }", w=normal(6, 4, 1, 1, 1))
    assert run(model, eager(LowerRank))[0] is model


def test_a_depthwise_volume_between_two_maps_stays_as_it_is() -> None:
    body = (
        VIDEO + "{ a = Conv(x, w) b = Relu(a) c = Conv<group=6, pads=[1,1,1,1,1,1]>(b, d) e = Relu(c) y = Conv(e, v) }"
    )
    model = parse(body, w=normal(6, 4, 1, 1, 1), d=normal(6, 1, 3, 3, 3), v=normal(4, 6, 1, 1, 1))
    result, outcome, _ = run(model, eager(LowerRank))
    assert len(outcome.rewrites) == 2
    assert kernels(result) == [4, 5, 4]
    same(model, result, x=V)


def test_weights_that_are_inputs_stay() -> None:
    model = parse("(double[2,4,11] x, double[4,4,3] w) => (double[N] y) { y = Conv(x, w) }")
    assert run(model, eager(LowerRank))[0] is model


NUMBERS = {
    "w": normal(4, 4, 1), "k": normal(2, 4, 11, seed=1), "w5": normal(4, 4, 1, 1, 1), "w4": normal(4, 4, 1, 1),
    "k5": normal(4, 4, 3, 1, 1, seed=2), "sq": normal(4, 4, 1, 3, 3, seed=4), "w33": normal(4, 4, 3, 3, seed=5), "v4": normal(4, 4, 1, 1, seed=6),
    "half": np.float64(0.5), "zero": np.array([0]), "frames": np.array([0, 0, 2, 0, 0, 0, 0, 1, 0, 0]), "from0": np.array([1]), "to": np.array([3]), "last": np.array([4]), "deep": np.array([2, 3]), "p": np.abs(normal(4)),
    "double5": np.array([1, 1, 1, 2, 1], np.float32), "pad5": np.array([0, 0, 0, 0, 1, 0, 0, 0, 0, 1]), "row": normal(7, seed=7),
    "begins": np.array([0, 0, 0, 1, 1, 0, 0, 0, 0, 0]), "ends": np.array([0, 0, 0, 0, 0, 0, 0, 0, 1, 1]), "ones4": np.ones(4, np.float32),
    "each": np.abs(normal(4, 11, seed=8)), "thrice": np.array([1, 1, 3], np.float32),
    "grown": np.array([2, 4, 5, 12, 7]), "axis2": np.array([2]), "double4": np.array([1, 1, 2, 1], np.float32), "pad4": np.array([0, 0, 1, 0, 0, 0, 0, 0]),
}  # fmt: skip
LINE, SINGLE = SIDE + "{ c = Conv(x, w) ", "(double[2,4,1,1] x) => (double[N] y) { c = Conv(x, w4) "
BOX = VIDEO + "{ c = Conv(x, w5) "


@pytest.mark.parametrize(
    ("op", "body", "opset"),
    [
        # what is computed from constants only, though its rank fits
        ("Cast", LINE + "a = Cast<to=11>(k) y = Add(c, a) }", 17),
        ("Softmax", LINE + "a = Softmax<axis=1>(k) y = Add(c, a) }", 17),
        ("ReduceMean", LINE + "a = ReduceMean<axes=[1]>(k) y = Add(c, a) }", 17),
        ("MaxPool", LINE + "a = MaxPool<kernel_shape=[1]>(k) y = Add(c, a) }", 17),
        ("Slice", LINE + "a = Slice(k, from0, to, from0) y = Concat<axis=1>(c, a) }", 17),
        ("BatchNormalization", LINE + "a = BatchNormalization(k, p, p, p, p) y = Add(c, a) }", 17),
        # a constant that is joined to it
        ("Concat", LINE + "y = Concat<axis=1>(c, k) }", 17),
        # another rank that the model computes
        ("Add", "(double[2,4,11] x, double[11] u) => (double[N] y) { c = Conv(x, w) y = Add(c, u) }", 17),
        ("Add", "(double[2,4,11] x, double[3,2,4,11] u) => (double[N] y) { c = Conv(x, w) y = Add(c, u) }", 17),
        ("BatchNormalization", "(double[2,4,11] x, double[4] u) => (double[N] y) { c = Conv(x, w) y = BatchNormalization(c, u, p, p, p) }", 17),
        # over axes that become one
        ("Slice", BOX + "y = Slice(c, from0, to, last) }", 17),
        ("ReduceMean", BOX + "y = ReduceMean<axes=[2,3]>(c) }", 17),
        ("ReduceMean", BOX + "y = ReduceMean<axes=[3,4],keepdims=0>(c) }", 17),
        ("Softmax", BOX + "y = Softmax<axis=4>(c) }", 17),
        ("Mul", BOX + "y = Mul(c, row) }", 17),
        ("Resize", BOX + "y = Resize(c, , double5) }", 17),
        ("Resize", BOX + "y = Resize(c, , , grown) }", 17),
        ("Pad", BOX + "y = Pad(c, pad5) }", 17),
        ("AveragePool", BOX + "y = AveragePool<kernel_shape=[1,2,1]>(c) }", 17),
        ("Conv", BOX.replace("Conv(x, w5)", "Relu(x)") + "y = Conv<dilations=[1,2,2]>(c, k5) }", 17),
        ("Conv", BOX.replace("Conv(x, w5)", "Relu(x)") + 'y = Conv<auto_pad="SAME_UPPER">(c, sq) }', 17),
        ("Conv", "(double[2,4,5,1,1] x) => (double[N] y) { y = Conv<pads=[0,1,1,0,1,1]>(x, w5) }", 17),
        ("Conv", "(double[2,4,5,1,1] x) => (double[N] y) { y = Conv<pads=[0,1,1,0,0,0]>(x, w5) }", 17),
        ("Conv", "(double[2,4,5,1,1] x) => (double[N] y) { y = Conv<pads=[0,0,0,0,1,1]>(x, w5) }", 17),
        ("Pad", "(double[2,4,5,1,1] x) => (double[N] y) { c = Conv(x, w5) y = Pad(c, begins) }", 17),
        ("Pad", "(double[2,4,5,1,1] x) => (double[N] y) { c = Conv(x, w5) y = Pad(c, ends) }", 17),
        ("ReduceMax", "(double[2,4,5,1,7] x) => (double[N] y) { c = Conv(x, w5) y = ReduceMax<axes=[3]>(c) }", 17),
        ("ReduceMean", BOX + "y = ReduceMean(c) }", 17),
        ("MaxPool", BOX + "y = MaxPool<kernel_shape=[1,1,1],dilations=[1,2,2]>(c) }", 17),
        ("Conv", "(double[2,4,5,H,W] x) => (double[N] y) { y = Conv(x, w5) }", 17),
        # on single positions
        ("MaxPool", SINGLE + "y = MaxPool<kernel_shape=[1,1]>(c) }", 17),
        ("Resize", SINGLE + "y = Resize(c, , ones4) }", 17),
        ("Slice", SINGLE + "y = Slice(c, zero, from0, axis2) }", 17),
        ("GlobalAveragePool", SINGLE + "y = GlobalAveragePool(c) }", 17),
        ("ReduceMax", SINGLE + "y = ReduceMax<axes=[1,3]>(c) }", 17),
        ("Conv", "(double[2,4,1,1] x) => (double[N] y) { y = Conv<pads=[1,1,1,1]>(x, w33) }", 17),
        ("Conv", SINGLE.replace("c =", "y =") + "}", 10),
        # of another meaning
        ("MaxPool", SIDE.replace("[N] y)", "[N] y, int64[M] z)") + "{ c = Conv(x, w) y, z = MaxPool<kernel_shape=[2]>(c) }", 17),
        ("Dropout", LINE + "y = Dropout<seed=3>(c, half, yes) }", 17),
        ("BatchNormalization", LINE + "y = BatchNormalization<spatial=0>(c, each, each, each, each) }", 8),
        ("Resize", LINE + "y = Resize<axes=[2]>(c, , , last) }", 18),
        ("Resize", LINE + 'y = Resize<mode="cubic">(c, , thrice) }', 17),
        ("Pad", LINE + "y = Pad(c, deep, , axis2) }", 18),
        ("Slice", LINE + "y = Slice<axes=[1],starts=[1],ends=[3]>(c) }", 9),
    ],
)  # fmt: skip
def test_what_is_not_carried_along(op: str, body: str, opset: int) -> None:
    model = build(body, {**NUMBERS, "yes": np.array(True)}, opset=opset)
    result, _, _ = run(model, eager(LowerRank))
    assert outside(result, op, "_2d")
    sizes = [[d.dim_value or 3 for d in i.type.tensor_type.shape.dim] for i in model.graph.input]
    feeds = {i.name: np.abs(normal(*size, seed=9)) for i, size in zip(model.graph.input, sizes, strict=True)}
    if op != "Dropout" and "spatial" not in body:  # which the reference evaluator has not, or at random
        same(model, result, **feeds)


@pytest.mark.parametrize(
    "call",
    ["Mul(c, half)", "ReduceMean<axes=[3,4]>(c)", "ReduceMean<axes=[2,3,4]>(c)", 'Pad<mode="reflect">(c, frames)'],
)
def test_what_volumes_carry_along(call: str) -> None:
    model = build(BOX + f"a = {call} y = Abs(a) }}", NUMBERS)
    result, _, _ = run(model, eager(LowerRank))
    assert not outside(result, call.partition("<")[0].partition("(")[0], "_2d")
    assert ops(result)["Reshape"] == 2
    same(model, result, x=V)


def test_a_mask_of_dropout_is_carried_along() -> None:
    model = build(SIDE.replace("[N] y)", "[N] y, bool[M] z)") + "{ c = Conv(x, w) y, z = Dropout(c) }", NUMBERS)
    result, _, _ = run(model, eager(LowerRank))
    assert not outside(result, "Dropout", "_2d")
    same(model, result, x=X)


GATE = "(double[3,8,5,6] x) => (double[N] y) "


def test_maps_of_single_positions_are_matrix_products() -> None:
    """Squeeze and excitation (Hu et al., 2018)."""
    body = GATE + (
        "{ g = GlobalAveragePool(x) a = Conv(g, u, b) r = Relu(a) c = Conv(r, v) n = BatchNormalization(c, p, p, p, p)"
        " d = Mul(n, k) s = Sigmoid(d) y = Mul(x, s) }"
    )
    model = parse(body, u=normal(2, 8, 1, 1), b=normal(2), v=normal(8, 2, 1, 1), p=np.abs(normal(8)), k=normal(8, 1, 1))
    waiting, outcome, _ = run(model, LowerRank())
    assert waiting is model
    assert "only measuring" in reasons(outcome)[0]
    result, _, _ = run(model, eager(LowerRank))
    assert ops(result)["Gemm"] == 2
    assert ops(result)["Conv"] == 0
    assert ops(result)["Squeeze"] == ops(result)["Unsqueeze"] == 1
    same(model, result, x=normal(3, 8, 5, 6))


@pytest.mark.parametrize(
    "call", ["Conv<group=2>(g, w)", "Conv<pads=[1,1,1,1]>(g, k)", "ConvTranspose(g, t)", "Softmax<axis=1>(g)"]
)
def test_other_operators_on_single_positions_stay(call: str) -> None:
    names = {"w": normal(4, 4, 1, 1), "k": normal(4, 8, 3, 3), "t": normal(8, 4, 1, 1)}
    model = parse(
        GATE + f"{{ g = GlobalAveragePool(x) y = {call} }}", **{k: v for k, v in names.items() if f" {k})" in call}
    )
    assert run(model, eager(LowerRank))[0] is model


def test_what_cannot_be_said_at_another_rank_stays() -> None:
    shaped = "{ y = ConvTranspose<strides=[2], output_shape=[23]>(x, v) }"
    model = parse(SIDE + shaped, v=normal(4, 3, 3))
    assert run(model, eager(LowerRank))[0] is model
    cropped = '{ a = Conv(x, w) y = Resize<coordinate_transformation_mode="tf_crop_and_resize">(a, roi, s) }'
    model = parse(
        SIDE + cropped,
        w=normal(4, 4, 1),
        roi=np.array([0, 0, 0, 1, 1, 0.5], np.float32),
        s=np.array([1, 1, 2], np.float32),
    )
    result, _, _ = run(model, eager(LowerRank))
    assert [n.op_type for n in result.graph.node][-1] == "Resize"


def test_decisions_on_other_passes_hold_in_the_new_layout() -> None:
    """The sites that were found in 1-D name the same sums in 2-D, so both rewrites can be kept together."""
    model = parse(
        "(float[N,4,T] x) => (float[A,B,C] y) "
        "{ a = Conv<pads=[1,1]>(x, w) b = Relu(a) c = Conv<pads=[1,1]>(b, w) d = Add(c, a) y = Neg(d) }",
        w=normal(4, 4, 3, dtype=np.float32),
    )
    passes = [eager(kind) for kind in (LowerRank, DeclareShapes)]
    alone = [run(model, p)[1].rewrites for p in passes]
    allowed = {r.site for rewrites in alone for r in rewrites}
    assert [len(rewrites) for rewrites in alone] == [1, 1]
    result, outcome, _ = run(model, *passes, allowed=allowed)
    assert {r.site for r in outcome.rewrites} == allowed
    assert {v.name for v in result.graph.value_info} == {"a_2d", "c_2d", "d_2d"}
    assert "a_2d" not in {v.name for v in run(model, *passes, allowed=allowed - {alone[1][0].site})[0].graph.value_info}
