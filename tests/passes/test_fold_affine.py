from __future__ import annotations

import numpy as np
import onnx
import pytest
from helpers import normal, ops, parse, reasons, run, same, weight
from onnx import helper

from pwopt.passes import FoldAffine

X = normal(2, 4, 6, 6)
SIDE = "(double[2,4,6,6] x) => (double[N] y) "
W1 = normal(5, 4, 1, 1)
W3 = normal(5, 4, 3, 3)
D3 = normal(4, 1, 3, 3)
BN = {"g": normal(5), "b": normal(5, seed=1), "m": normal(5, seed=2), "v": np.abs(normal(5, seed=3)) + 0.1}
S4, T4 = normal(4, 1, 1, seed=4), normal(4, 1, 1, seed=5)
S5, T5 = normal(1, 5, 1, 1, seed=6), normal(1, 5, 1, 1, seed=7)
POSITIVE = np.abs(S4) + 0.5


def check(body: str, expected: dict[str, int], x: np.ndarray = X, **weights: np.ndarray) -> onnx.ModelProto:
    model = parse(body, **weights)
    result, outcome, _ = run(model, FoldAffine())
    assert ops(result) == expected, reasons(outcome)
    same(model, result, x=x)
    return result


def untouched(body: str, word: str, **weights: np.ndarray) -> None:
    model = parse(body, **weights)
    result, outcome, _ = run(model, FoldAffine())
    assert result is model, outcome.rewrites
    assert word in " ".join(reasons(outcome))


def test_batch_normalization_after_a_convolution() -> None:
    check(
        SIDE + "{ h = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w) y = BatchNormalization(h, g, b, m, v) }",
        {"Conv": 1},
        w=W3,
        **BN,
    )


@pytest.mark.parametrize(
    "chain", ["p = Mul(h, s) y = Add(p, t)", "p = Sub(h, t) y = Div(p, s)", "p = Neg(h) y = Sub(t, p)"]
)
def test_arithmetic_after_a_convolution(chain: str) -> None:
    used = {k: v for k, v in {"s": S5, "t": T5}.items() if f" {k})" in chain or f"({k}," in chain}
    check(SIDE + f"{{ h = Conv<pads=[1,1,1,1]>(x, w, c) {chain} }}", {"Conv": 1}, w=W3, c=normal(5), **used)


@pytest.mark.parametrize("scalar", [np.float64(0.7), np.array([0.7]), np.array([[[[0.7]]]])])
def test_scalars_of_every_shape(scalar: np.ndarray) -> None:
    """onnxruntime leaves constants of shape [] and [1] unfused; PP-OCR exports are full of them."""
    check(SIDE + "{ h = Conv(x, w) p = Mul(h, s) y = Add(s, p) }", {"Conv": 1}, w=W1, s=scalar)


def test_before_a_convolution_without_padding_scale_and_shift_fold() -> None:
    check(SIDE + "{ p = Mul(x, s) q = Add(p, t) y = Conv(q, w) }", {"Conv": 1}, w=W3, s=S4, t=T4)


def test_before_a_padded_convolution_a_scale_folds() -> None:
    check(SIDE + "{ p = Mul(x, s) y = Conv<pads=[1,1,1,1]>(p, w) }", {"Conv": 1}, w=W3, s=S4)


def test_before_a_padded_convolution_a_shift_does_not() -> None:
    untouched(SIDE + "{ p = Add(x, t) y = Conv<pads=[0,0,0,1]>(p, w) }", "padding", w=W3, t=T4)


def test_same_padding_of_unknown_size_counts_as_padding() -> None:
    body = '(double[2,4,H,W] x) => (double[N] y) { p = %s y = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(p, w) }'
    untouched(body % "Add(x, t)", "padding", w=W3, t=T4)
    check(body % "Mul(x, s)", {"Conv": 1}, w=W3, s=S4)


def test_what_stays_before_padding_is_one_batch_normalization() -> None:
    result = check(
        SIDE + "{ p = Mul(x, s) q = Add(p, t) y = Conv<pads=[1,1,1,1], group=4>(q, w) }",
        {"BatchNormalization": 1, "Conv": 1},
        w=D3,
        s=np.float64(2),
        t=np.float64(-1),
    )
    assert result.graph.node[0].output[0] == "q"


def test_a_depthwise_convolution_stays_depthwise() -> None:
    result = check(SIDE + "{ p = Mul(x, s) h = Conv<group=4>(p, w) y = Mul(h, s) }", {"Conv": 1}, w=D3, s=S4)
    assert weight(result, "w").shape == D3.shape


def test_every_reader_takes_it_over() -> None:
    body = "(double[2,4,6,6] x) => (double[N] y, double[N] z) { p = Mul(x, s) y = Conv(p, w) z = Conv<pads=[1,1,1,1]>(p, u) }"
    check(body, {"Conv": 2}, w=W1, u=W3, s=S4)


def test_or_none_does() -> None:
    body = "(double[2,4,6,6] x) => (double[N] y, double[N] z) { p = Mul(x, s) y = Conv(p, w) z = Sigmoid(p) }"
    untouched(body, "Sigmoid", w=W1, s=S4)


GAPS = {
    "Relu(p)": True,
    "LeakyRelu<alpha=0.1>(p)": True,
    "MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(p)": True,
    "AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(p)": True,
    "GlobalAveragePool(p)": True,
    "Transpose<perm=[0,1,3,2]>(p)": True,
    "Identity(p)": True,
    "Neg(p)": True,
    "Sigmoid(p)": False,
    "Clip(p)": False,
    "Exp(p)": False,
}


@pytest.mark.parametrize(("gap", "passes"), GAPS.items())
def test_a_positive_scale_travels_down(gap: str, passes: bool) -> None:
    model = parse(SIDE + f"{{ p = Mul(x, s) q = {gap} y = Conv(q, w) }}", w=W1, s=POSITIVE)
    result, _, _ = run(model, FoldAffine())
    assert ("Mul" not in ops(result)) == passes
    same(model, result, x=X)


@pytest.mark.parametrize(("gap", "passes"), GAPS.items())
def test_a_positive_scale_travels_up(gap: str, passes: bool) -> None:
    model = parse(SIDE + f"{{ p = Conv(x, w) q = {gap} r = Mul(q, s) y = Sigmoid(r) }}", w=W1, s=np.abs(S5) + 0.5)
    result, _, _ = run(model, FoldAffine())
    assert ("Mul" not in ops(result)) == passes
    same(model, result, x=X)


@pytest.mark.parametrize("gap", ["Relu(p)", "LeakyRelu<alpha=0.1>(p)", "MaxPool<kernel_shape=[2,2]>(p)"])
def test_a_negative_scale_does_not_pass_a_ramp_or_a_maximum(gap: str) -> None:
    model = parse(SIDE + f"{{ p = Mul(x, s) q = {gap} y = Conv(q, w) }}", w=W1, s=-POSITIVE)
    assert run(model, FoldAffine())[0] is model


SHIFTS = {
    "MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(p)": True,
    "AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(p)": True,
    "AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1>(p)": False,
    "GlobalAveragePool(p)": True,
    "Relu(p)": False,
    "Transpose<perm=[0,1,3,2]>(p)": True,
    'Resize<mode="linear">(p, , z)': True,
    'Resize<mode="nearest">(p, , z)': True,
    'Resize<mode="cubic">(p, , z)': True,
    'Resize<mode="linear">(p, roi, z)': True,
    'Pad<mode="edge">(p, e)': True,
    'Pad<mode="reflect">(p, e)': True,
    "Pad(p, e)": False,
    "Reshape(p, f)": True,
    "Slice(p, i, j, k)": True,
    "ReduceMean<axes=[2,3]>(p)": True,
    "ReduceSum(p, k)": False,
    "ReduceMax<axes=[3]>(p)": True,
}
EXTRA = {
    "roi": np.zeros(0, np.float32),
    "z": np.array([1, 1, 2, 2], np.float32), "e": np.array([0, 0, 1, 0, 0, 0, 0, 2]), "f": np.array([2, 4, 36, 1]),
    "i": np.array([1]), "j": np.array([4]), "k": np.array([2]),
}  # fmt: skip


@pytest.mark.parametrize(("gap", "passes"), SHIFTS.items())
def test_a_shift_passes_what_preserves_constants(gap: str, passes: bool) -> None:
    used = {k: v for k, v in EXTRA.items() if f" {k})" in gap or f" {k}," in gap}
    model = parse(SIDE + f"{{ p = Add(x, t) q = {gap} y = Conv(q, w) }}", w=W1, t=T4, **used)
    result, outcome, _ = run(model, FoldAffine())
    assert ("Add" not in ops(result)) == passes, reasons(outcome)
    same(model, result, x=X)


def test_through_concat_and_split() -> None:
    body = "(double[2,4,6,6] x, double[2,3,6,6] z) => (double[N] y) { p = Mul(x, s) q = Add(p, t) c = Concat<axis=1>(z, q) y = Conv(c, w) }"
    model = parse(body, s=S4, t=T4, w=normal(5, 7, 1, 1))
    result, _, _ = run(model, FoldAffine())
    assert ops(result) == {"Concat": 1, "Conv": 1}
    same(model, result, x=X, z=normal(2, 3, 6, 6, seed=8))
    body = "(double[2,4,6,6] x) => (double[N] y, double[N] z) { p = Mul(x, s) q = Add(p, t) a, b = Split<axis=1>(q, n) y = Conv(a, w) z = Conv(b, u) }"
    check(body, {"Split": 1, "Conv": 2}, s=S4, t=T4, n=np.array([1, 3]), w=normal(5, 1, 1, 1), u=normal(5, 3, 1, 1))


def test_up_through_concat_and_addition() -> None:
    body = "{ a = Conv(x, w) b = Conv(x, u) c = Concat<axis=1>(a, b) d = Mul(c, s) e = Add(d, t) y = Sigmoid(e) }"
    check(
        SIDE + body,
        {"Conv": 2, "Concat": 1, "Sigmoid": 1},
        w=W1,
        u=normal(4, 4, 1, 1, seed=2),
        s=normal(9, 1, 1),
        t=normal(9, 1, 1, seed=1),
    )
    body = "{ a = Conv(x, w) b = Conv(x, u) c = Add(a, b) d = BatchNormalization(c, g, b2, m, v) y = Sigmoid(d) }"
    stats = {"g": BN["g"], "b2": BN["b"], "m": BN["m"], "v": BN["v"]}
    check(SIDE + body, {"Conv": 2, "Add": 1, "Sigmoid": 1}, w=W1, u=normal(5, 4, 1, 1, seed=2), **stats)


def test_a_scale_passes_a_gate_and_a_shift_does_not() -> None:
    head = "(double[2,4,6,6] x, double[2,4,1,1] k) => (double[N] y) "
    for op, constant, expected in (("Div", S4, {"Mul": 1, "Conv": 1}), ("Add", T4, {"Add": 1, "Mul": 1, "Conv": 1})):
        model = parse(head + f"{{ p = {op}(x, s) q = Mul(p, k) y = Conv(q, w) }}", w=W1, s=constant)
        result, _, _ = run(model, FoldAffine())
        assert ops(result) == expected
        same(model, result, x=X, k=normal(2, 4, 1, 1, seed=9))


def test_gemm_and_matmul() -> None:
    flat = "(double[3,4] x) => (double[N] y) "
    x = normal(3, 4)
    check(
        flat + "{ p = Mul(x, s) h = Gemm(p, w, b) y = Add(h, t) }",
        {"Gemm": 1},
        x,
        s=normal(4),
        w=normal(4, 5),
        b=normal(5),
        t=normal(5),
    )
    check(flat + "{ h = MatMul(x, w) y = Add(h, t) }", {"MatMul": 1, "Add": 1}, x, w=normal(4, 5), t=normal(5))
    deep = "(double[2,3,4] x) => (double[N] y) "
    x = normal(2, 3, 4)
    body = "{ p = Mul(x, s) q = Add(p, u) h = MatMul(q, w) k = Add(h, t) y = Mul(k, s2) }"
    check(
        deep + body,
        {"MatMul": 1, "Add": 1},
        x,
        s=normal(4),
        u=normal(4, seed=1),
        w=normal(4, 5),
        t=normal(5),
        s2=normal(5, seed=2),
    )
    check(deep + "{ h = MatMul(w, x) y = Mul(h, s) }", {"MatMul": 1}, x, w=normal(5, 3), s=normal(5, 1))


def test_a_scale_along_another_axis_is_not_taken() -> None:
    untouched(SIDE + "{ h = Conv(x, w) y = Mul(h, s) }", "axis 1", w=W1, s=normal(6))


def test_flattening_keeps_the_channel_axis_where_it_can() -> None:
    body = SIDE + "{ p = Add(x, t) g = GlobalAveragePool(p) f = Flatten<axis=1>(g) y = Gemm(f, w) }"
    check(body, {"GlobalAveragePool": 1, "Flatten": 1, "Gemm": 1}, t=T4, w=normal(4, 5))
    body = SIDE + "{ p = Mul(x, s) f = Flatten<axis=1>(p) y = Gemm(f, w) }"
    model = parse(body, s=S4, w=normal(144, 5))
    assert run(model, FoldAffine())[0] is model  # 4 channels became 144
    check(body, {"Flatten": 1, "Gemm": 1}, s=np.float64(3), w=normal(144, 5))


def test_a_shared_weight_is_not_touched() -> None:
    body = "(double[2,4,6,6] x) => (double[N] y, double[N] z) { p = Mul(x, s) y = Conv(p, w) z = Conv(x, w) }"
    untouched(body, "shared", w=W1, s=S4)


def test_a_graph_output_is_not_touched() -> None:
    body = "(double[2,4,6,6] x) => (double[N] h, double[N] y) { h = Conv(x, w) y = Mul(h, s) }"
    untouched(body, "graph output", w=W1, s=S5)


def test_an_overridable_weight_is_not_touched() -> None:
    body = "(double[2,4,6,6] x, double[5,4,1,1] w) => (double[N] y) { h = Conv(x, w) y = Mul(h, s) }"
    model = parse(body, s=S5, w=W1)
    result, outcome, _ = run(model, FoldAffine())
    assert result is model
    assert "not a constant" in " ".join(reasons(outcome))


def test_a_captured_tensor_is_not_touched() -> None:
    inner = helper.make_graph(
        [helper.make_node("Neg", ["h"], ["r"])], "body", [], [helper.make_tensor_value_info("r", 11, None)]
    )
    model = parse(SIDE + "{ h = Conv(x, w) y = Mul(h, s) }", w=W1, s=S5)
    model.graph.node.append(helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner))
    model.graph.input.append(helper.make_tensor_value_info("c", 9, []))
    model.graph.output.append(helper.make_tensor_value_info("z", 11, [None] * 4))
    result, outcome, _ = run(model, FoldAffine())
    assert result is model
    assert "control-flow body" in " ".join(reasons(outcome))


def test_a_weight_captured_by_a_body_is_not_touched() -> None:
    inner = helper.make_graph(
        [helper.make_node("Neg", ["w"], ["r"])], "body", [], [helper.make_tensor_value_info("r", 11, None)]
    )
    model = parse(SIDE + "{ h = Conv(x, w) y = Mul(h, s) }", w=W1, s=S5)
    node = helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner)
    nodes = [node, *model.graph.node]  # the body names it before the graph does
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.input.append(helper.make_tensor_value_info("c", 9, []))
    model.graph.output.append(helper.make_tensor_value_info("z", 11, [None] * 4))
    result, outcome, _ = run(model, FoldAffine())
    assert result is model
    assert "shared" in " ".join(reasons(outcome))


LAYER_NORM = """(float[2,3,4] x) => (float[N] y) {
    m = ReduceMean<axes=[-1]>(x) d = Sub(x, m) q = Pow(d, two) v = ReduceMean<axes=[-1]>(q) e = Add(v, eps)
    r = Sqrt(e) n = Div(d, r) p = Mul(n, g) a = Add(p, b) h = MatMul(a, w) y = Add(h, t)
}"""


def test_a_layer_normalisation_is_left_whole() -> None:
    f = np.float32
    weights = {
        "two": f(2),
        "eps": f(1e-5),
        "g": normal(4, dtype=f),
        "b": normal(4, dtype=f),
        "w": normal(4, 5, dtype=f),
        "t": normal(5, dtype=f),
    }
    model = parse(LAYER_NORM, 13, **weights)
    result, outcome, _ = run(model, FoldAffine())
    assert result is model
    assert "layer normalisation" in " ".join(reasons(outcome))


def test_a_name_means_the_same_value_or_nothing() -> None:
    """Tensors between the scale and the map that took it over hold other values now, so they have other names."""
    result = check(SIDE + "{ p = Mul(x, s) q = Relu(p) y = Conv(q, w) }", {"Relu": 1, "Conv": 1}, w=W1, s=POSITIVE)
    names = {n for node in result.graph.node for n in node.output}
    assert names == {"q_unscaled", "y"}


def test_names_of_weights_and_nodes_pass_to_their_successors() -> None:
    model = parse(SIDE + "{ h = Conv(x, w, c) y = Mul(h, s) }", w=W1, c=normal(5), s=S5)
    model.graph.node[0].name = "stem"
    result, _, _ = run(model, FoldAffine())
    assert [t.name for t in result.graph.initializer] == ["w", "c"]
    assert [n.name for n in result.graph.node] == ["stem"]
    np.testing.assert_allclose(weight(result, "w"), W1 * S5.reshape(5, 1, 1, 1))


def test_half_precision_is_rounded_once_and_overflow_refused() -> None:
    h = np.float16
    body = "(float16[2,4,6,6] x) => (float16[N] y) { h = Conv(x, w) y = Mul(h, s) }"
    w, s = normal(5, 4, 1, 1, dtype=h), np.abs(normal(5, 1, 1, dtype=h))
    result, _, _ = run(parse(body, w=w, s=s), FoldAffine())
    np.testing.assert_array_equal(
        weight(result, "w"), (w.astype(np.float64) * s.astype(np.float64)[..., None]).astype(h)
    )
    untouched(body, "overflow", w=w, s=np.full((5, 1, 1), 60000, h))


def test_bfloat16() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    b = ml_dtypes.bfloat16
    body = "(bfloat16[2,4,6,6] x) => (bfloat16[N] y) { h = Conv(x, w) y = Mul(h, s) }"
    model = parse(body, 22, 10, w=normal(5, 4, 1, 1).astype(b), s=normal(5, 1, 1).astype(b))
    result, _, _ = run(model, FoldAffine())
    assert ops(result) == {"Conv": 1}
    assert weight(result, "w").dtype == b


def test_a_transposed_convolution() -> None:
    body = (
        SIDE
        + "{ p = Mul(x, s) h = ConvTranspose<strides=[2,2]>(p, w) k = Add(h, t) y = BatchNormalization(k, g, b, m, v) }"
    )
    check(body, {"ConvTranspose": 1}, s=S4, w=normal(4, 5, 2, 2), t=T5, **BN)


def test_integers_are_not_linear_maps_here() -> None:
    model = parse("(int64[2,4] x) => (int64[N] y) { a = Mul(x, c) y = Add(a, c) }", c=np.arange(4))
    assert run(model, FoldAffine())[0] is model
