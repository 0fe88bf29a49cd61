from __future__ import annotations

import numpy as np
import onnx
import pytest
from helpers import build, normal, open_session, ops, parse, reasons, run, same, weight
from onnx import helper

import pwopt
from pwopt.graph.files import from_proto
from pwopt.graph.storage import count_bytes
from pwopt.passes import CleanUp, FoldAffine, JoinViews

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


LEVIT = {f"{k}": normal(5, seed=i) ** 2 + 0.1 for i, k in enumerate("gbmv")}


@pytest.mark.parametrize(
    "body",
    [
        "h = MatMul(x, w) f = Flatten<axis=2>(h) n = BatchNormalization(f, g, b, m, v) r = Reshape(n, u) y = Exp(r)",
        "h = MatMul(x, w) f = Reshape(h, t) n = BatchNormalization(f, g, b, m, v) r = Reshape(n, u) y = Exp(r)",
        "h = MatMul(x, w) f = Flatten<axis=2>(h) n = BatchNormalization(f, g, b, m, v) s = Shape(h) r = Reshape(n, s) y = Exp(r)",
        "h = MatMul(x, w) a = Add(h, c) f = Flatten<axis=2>(a) n = BatchNormalization(f, g, b, m, v) r = Reshape(n, u) y = Exp(r)",
    ],
)
@pytest.mark.parametrize("inputs", ["double[N,7,6] x", "double[N,L,6] x"])
def test_a_normalisation_behind_a_change_of_view(body: str, inputs: str) -> None:
    shapes = {"t": np.array([-1, 5]), "u": np.array([-1, 7, 5]), "c": normal(5)}
    used = {k: v for k, v in shapes.items() if f", {k})" in body}
    model = parse(f"({inputs}) => (double[A,B,C] y) {{ {body} }}", w=normal(6, 5), **LEVIT, **used)
    result, _, _ = run(model, FoldAffine(), JoinViews(), CleanUp())
    left = {"MatMul": 1, "Add": 1, "Exp": 1}
    if inputs == "double[N,L,6] x" and "Shape" not in body:  # seven may be another number of rows than before
        left["Reshape"] = 1
    assert ops(result) == left
    same(model, result, x=normal(2, 7, 6))


@pytest.mark.parametrize(
    "body",
    [
        "h = MatMul(x, w) f = Reshape(h, t) y = BatchNormalization(f, g, b, m, v)",  # no second view to meet the first
        "h = MatMul(x, w) f = Reshape(h, q) n = BatchNormalization(f, g, b, m, v) r = Reshape(n, u) y = Exp(r)",  # other channels
    ],
)
def test_a_normalisation_that_would_only_become_an_addition_stays(body: str) -> None:
    shapes = {"t": np.array([-1, 5]), "u": np.array([-1, 7, 5]), "q": np.array([-1, 7])}
    used = {k: v for k, v in shapes.items() if f", {k})" in body}
    norm = {k: np.resize(v, 7) for k, v in LEVIT.items()} if "q" in used else LEVIT
    model = parse(f"(double[N,7,6] x) => (double[A,B,C] y) {{ {body} }}", w=normal(6, 5), **norm, **used)
    assert ops(run(model, FoldAffine(), JoinViews())[0])["BatchNormalization"] == 1


@pytest.mark.parametrize(
    "attrs",
    [
        'auto_pad="SAME_UPPER", strides=[2,2]',
        'auto_pad="SAME_LOWER", strides=[2,2]',
        "output_shape=[12,12], strides=[2,2]",
        "output_shape=[13,12], strides=[2,2], output_padding=[1,0]",
        'auto_pad="VALID", strides=[2,2]',
    ],
)
def test_a_transposed_convolution_whose_padding_follows_from_sizes(attrs: str) -> None:
    pytest.importorskip("onnxruntime")
    norm = {k: (normal(5, seed=i) ** 2 + 0.1).astype(np.float32) for i, k in enumerate("gbmv")}
    body = f"(float[2,4,6,6] x) => (float[A,B,C,D] y) {{ h = ConvTranspose<{attrs}>(x, w) y = BatchNormalization(h, g, b, m, v) }}"
    model = parse(body, w=normal(4, 5, 3, 3, dtype=np.float32), **norm)
    result, outcome, _ = run(model, FoldAffine())
    assert ops(result) == {"ConvTranspose": 1}, reasons(outcome)
    x = X.astype(np.float32)
    before, after = (open_session(m).run(None, {"x": x})[0] for m in (model, result))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)


def test_a_bias_written_out_for_every_row() -> None:
    body = "(double[3,4] x) => (double[M,N] y) { h = Gemm(x, w, c) y = Mul(h, s) }"
    row = normal(5, seed=3)
    model = parse(body, w=normal(4, 5), c=np.tile(row, (3, 1)), s=normal(5))
    result, _, _ = run(model, FoldAffine())
    assert ops(result) == {"Gemm": 1}
    same(model, result, x=normal(3, 4))


TABLE = normal(3, 5, seed=8)
GEMMS = {
    "its input transposed": ("(double[4,3] x)", "Gemm<transA=1>(x, w, c)", {"c": normal(5)}),
    "both transposed": ("(double[4,3] x)", "Gemm<transA=1, transB=1, alpha=0.5>(x, wt)", {}),
    "a number for each row and column": ("(double[3,4] x)", "Gemm(x, w, c)", {"c": TABLE}),
    "all of that": ("(double[4,3] x)", "Gemm<transA=1, transB=1, alpha=0.5, beta=2.0>(x, wt, c)", {"c": TABLE}),
    "a table that is added by itself": ("(double[3,4] x)", "q = MatMul(x, w) k = Add(c, q)", {"c": TABLE}),
}
AFTER_GEMM = {
    "h = Mul(k, s)": {"s": normal(5)},
    "h = Div(k, s)": {"s": normal(1, 5)},
    "h = Add(k, s)": {"s": normal(5)},
    "p = Sub(s, k) h = Neg(p)": {"s": normal(1, 5)},
    "h = BatchNormalization(k, g, b, m, v)": BN,
    "h = Mul(k, s) ": {"s": np.float64(0.3)},
}


@pytest.mark.parametrize("after", AFTER_GEMM)
@pytest.mark.parametrize("gemm", GEMMS)
def test_what_follows_a_gemm_in_every_spelling(gemm: str, after: str) -> None:
    """(αAB + βC)s + t = αA(Bs) + β(Cs + t/β), also where C is a whole table."""
    inputs, call, own = GEMMS[gemm]
    given = {"w": normal(4, 5), "wt": normal(5, 4), **own, **AFTER_GEMM[after]}
    alone = "k = Add" in call
    model = build(f"{inputs} => (double[M,N] y) {{ {call if alone else f'k = {call}'} {after} y = Relu(h) }}", given)
    result, outcome, _ = run(model, FoldAffine())
    assert ops(result) == ({"MatMul": 1, "Add": 1, "Relu": 1} if alone else {"Gemm": 1, "Relu": 1}), reasons(outcome)
    same(model, result, x=normal(*((4, 3) if "[4,3]" in inputs else (3, 4))))


def test_a_scale_before_a_gemm_that_transposes() -> None:
    """Its channels lie along the first axis there."""
    body = "(double[4,3] x) => (double[M,N] y) { h = Mul(x, s) y = Gemm<transA=1>(h, w) }"
    check(body, {"Gemm": 1}, normal(4, 3), w=normal(4, 5), s=normal(4, 1))
    square = body.replace("[4,3]", "[4,4]")
    untouched(square, "acts on axis 0, not 1", w=normal(4, 5), s=normal(1, 4))


def test_a_gemm_that_transposes_one_channel_is_no_scale() -> None:
    """Of 1×1 weights, but it turns a row into a column."""
    body = "(double[1,3] x) => (double[M,N] y) { h = Gemm<transA=1>(x, w) k = Relu(h) y = Mul(k, s) }"
    result, _, _ = run(model := parse(body, w=normal(1, 1), s=np.float64(2)), FoldAffine())
    assert ops(result)["Gemm"] == 1
    same(model, result, x=normal(1, 3))


CONSTANTS = {
    "positions": ("h = Conv(x, w) k = Add(h, p) y = BatchNormalization(k, g, b, m, v)", {"Conv": 1, "Add": 1}),
    "positions that are subtracted from": ("h = Conv(x, w) k = Sub(p, h) y = Mul(k, s)", {"Conv": 1, "Sub": 1}),
    "a mask": ("h = Relu(x) k = Mul(q, h) y = Mul(k, t)", {"Relu": 1, "Mul": 1}),
    "a dividend": ("h = Exp(x) k = Div(q, h) y = Mul(k, t)", {"Exp": 1, "Div": 1}),
    "a part": ("h = Conv(x, w) k = Concat<axis=1>(h, p) y = Mul(k, u)", {"Conv": 1, "Concat": 1}),
    "by way of Identity": ("h = Conv(x, w) i = Identity(p) k = Add(h, i) y = Mul(k, s)", {"Conv": 1, "Add": 1}),
}
HELD = {
    "w": W1, "p": normal(2, 5, 6, 6), "q": normal(2, 4, 6, 6), "s": S5, "t": S4, "u": normal(10, 1, 1), **BN,
}  # fmt: skip


@pytest.mark.parametrize("case", CONSTANTS)
def test_constants_take_scales_and_shifts_over(case: str) -> None:
    body, left = CONSTANTS[case]
    model = build(SIDE + f"{{ {body} }}", HELD)
    result, outcome, _ = run(model, FoldAffine(), CleanUp())
    assert ops(result) == left, reasons(outcome)
    same(model, result, x=X)


def test_a_constant_that_an_operator_makes_gets_another_name() -> None:
    """That operator is there until `clean-up` comes."""
    model = build(SIDE + f"{{ {CONSTANTS['by way of Identity'][0]} }}", HELD)
    result, _, _ = run(model, FoldAffine())
    onnx.checker.check_model(result, full_check=True)
    assert "Mul" not in ops(result)
    same(model, result, x=X)


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ("h = Conv(x, w) k = Add(h, p) z = BatchNormalization(k, g, b, m, v) y = Add(z, p)", "2 consumers"),
        (
            "h = Conv(x, w) i = Identity(p) k = Add(h, i) z = BatchNormalization(k, g, b, m, v) y = Add(z, p)",
            "is shared",
        ),
        ("h = Conv(x, w) k = Add(h, r) y = BatchNormalization(k, g, b, m, v)", "broadcasts"),
        ("h = Conv(x, w) k = Add(h, e) y = BatchNormalization(k, g, b, m, v)", "not finite"),
    ],
)
def test_constants_that_cannot_take_them(body: str, word: str) -> None:
    infinite = np.full((2, 5, 6, 6), -np.inf)
    more = {"r": normal(2, 1, 6, 6), "e": infinite}
    model = build(SIDE + f"{{ {body} }}", {**HELD, **more})
    result, outcome, _ = run(model, FoldAffine())
    assert result is model
    assert word in " ".join(reasons(outcome))


def test_what_a_constant_alone_is_normalised_to_is_no_fold() -> None:
    """Nobody is left to take the place of the operator, whose result is read here and is an output."""
    body = "(double[2,4,6,6] x) => (double[N] y, double[M] z) { h = BatchNormalization(k, g, b, m, v) y = Add(x, h) z = Relu(h) }"
    given = {"k": normal(2, 4, 6, 6), **{name: normal(4, seed=i) ** 2 + 0.1 for i, name in enumerate("gbmv")}}
    model = parse(body, **given)
    result, _, _ = run(model, FoldAffine())
    assert result is model


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ("h = Gemm(x, w, c) y = Mul(h, s)", "broadcasts"),
        ("h = Gemm<transA=1>(x, z) y = Add(h, s)", "adds nothing"),
        ("h = Gemm<beta=0.0>(x, w, e) y = Add(h, s)", "adds nothing"),
        ("h = Gemm(x, w, e) y = Mul(h, r)", "per column"),
        ("h = Gemm(x, e, e) y = Mul(h, s)", "reads one tensor twice"),
        ("k = Gemm(x, w) h = Gemm(k, k) y = Mul(h, s)", "reads one tensor twice"),
        ("h = Mul(x, s) y = Gemm(h, w, e)", "does not pass through Gemm"),
    ],
)
def test_gemms_that_take_nothing_over(body: str, word: str) -> None:
    given = {"w": normal(3, 3), "c": normal(3, 1), "e": normal(3, 3), "s": normal(3), "r": normal(3, 1)}
    model = build(f"(double[3,3] x, double[3,3] z) => (double[M,N] y) {{ {body} }}", given)
    result, outcome, _ = run(model, FoldAffine())
    assert result is model
    assert word in " ".join(reasons(outcome))


def levels(spare: int, size: str) -> onnx.ModelProto:
    """A convolution that two levels share, with a normalisation of its own for each; `spare` numbers beside that."""
    norms = {f"{k}{i}": normal(8, seed=7 * i + j) ** 2 + 0.5 for i in (0, 1) for j, k in enumerate("gbmv")}
    body = (
        f"(double[1,8,2,{size}] x, double[1,8,1,{size}] u, double[{spare}] t) => (double[N] y, double[M] z, double[K] s) {{"
        " a = Conv(x, w) c = BatchNormalization(a, g0, b0, m0, v0) y = Relu(c)"
        " d = Conv(u, w) e = BatchNormalization(d, g1, b1, m1, v1) z = Relu(e) s = Mul(t, r) }"
    )
    return parse(body, w=normal(8, 8, 1, 1), r=normal(spare), **norms)


@pytest.mark.parametrize(
    ("spare", "size", "left", "word"),
    [
        (4000, "4", 0, ""),  # a copy for one level; what is left is the other's own
        (1000, "4", 2, "grow by more than 5%"),
        (4000, "1", 2, "would cost more than it saves"),
        (4000, "W", 2, "would cost more than it saves"),
    ],
)
def test_a_shared_weight_is_copied_where_that_costs_less(spare: int, size: str, left: int, word: str) -> None:
    model = levels(spare, size)
    result, outcome, _ = run(model, FoldAffine())
    assert ops(result).get("BatchNormalization", 0) == left
    assert word in " ".join(reasons(outcome))
    assert [r.growth for r in outcome.rewrites] == ([] if left else [8 * (64 - 24), 8 * -24])
    width = 4 if size == "W" else int(size)
    same(model, result, x=normal(1, 8, 2, width), u=normal(1, 8, 1, width), t=normal(spare))


def test_no_copy_where_the_model_must_not_grow() -> None:
    model = levels(4000, "4")
    free, bound = (
        pwopt.optimize(model, cost="analytic", verify=False, limits=pwopt.Limits(max_growth=g)).model
        for g in (None, 0.0)
    )
    assert [ops(m).get("BatchNormalization", 0) for m in (free, bound)] == [0, 2]
    assert count_bytes(bound) <= count_bytes(model)


@pytest.mark.parametrize(
    ("out", "sizes", "left"),
    [
        (5, (1, 1, 1, 1), 0),  # one number for all channels
        (5, (5, 5, 5, 1), 1),
        (5, (1, 5, 5, 5), 1),
        (1, (5, 5, 5, 5), 1),  # it would make five channels of one
    ],
)
def test_normalisations_whose_sizes_broadcast(out: int, sizes: tuple[int, ...], left: int) -> None:
    """onnx's inference and onnxruntime refuse them, its reference broadcasts: what is folded gives its answers."""
    numbers = {name: normal(size, seed=i) ** 2 + 0.5 for i, (name, size) in enumerate(zip("gbmv", sizes, strict=True))}
    body = SIDE + "{ h = Conv(x, w) y = BatchNormalization(h, g, b, m, v) }"
    model = parse(body, w=normal(out, 4, 1, 1), **numbers)
    loaded = from_proto(model)
    FoldAffine().run(loaded.graph)
    result = loaded.to_proto()
    assert ops(result).get("BatchNormalization", 0) == left
    same(model, result, x=X)


# Sums that may cancel

RISEN = "(float[1,8,4,4] x, float[1,8,4,4] u) => (float[1,8,4,4] y) { e = Erf(x) a = Add(e, one) s = Mul(a, k) "


@pytest.mark.parametrize(
    "rest", ["y = Div(u, s)", "r = Relu(s) t = Mul(r, u) y = Reciprocal(t)", "y = Log(s)", "y = Sqrt(s)"]
)
def test_a_sum_that_may_cancel_stays_before_a_division(rest: str) -> None:
    """1 + erf x is exact close to erf x = −1, but 6·erf x + 6 is not."""
    one, six = np.float32(1), np.float32(6)
    result, outcome, _ = run(parse(RISEN + rest + " }", one=one, k=six), FoldAffine())
    assert not outcome.rewrites
    assert ops(result)["Mul"] >= 1


@pytest.mark.parametrize(
    ("rest", "scale"),
    [("y = Mul(u, s)", 6), ("y = Div(s, u)", 6), ("t = Add(s, k) y = Div(u, t)", 6), ("y = Div(u, s)", 4)],
)
def test_a_sum_that_may_cancel_folds_elsewhere(rest: str, scale: float) -> None:
    """Powers of two are exact, and only a divisor depends on the relative error."""
    model = parse(RISEN + rest + " }", one=np.float32(1), k=np.float32(scale))
    _, outcome, _ = run(model, FoldAffine())
    assert outcome.rewrites


NORMALISATIONS = [
    ("LayerNormalization(x, g, t)", "double[2,3,4] x", (4,)),
    ("LayerNormalization<axis=2>(x, g)", "double[2,3,4] x", (4,)),
    ("InstanceNormalization(x, g, t)", "double[2,4,5] x", (4, 1)),
]


@pytest.mark.parametrize(("call", "ends", "shape"), NORMALISATIONS)
@pytest.mark.parametrize("single", [False, True])
def test_a_normalisation_absorbs_the_scale_and_shift_after_it(
    call: str, ends: str, shape: tuple[int, ...], single: bool
) -> None:
    numbers = {"g": normal(4), "t": normal(4, seed=1), "s": normal(*shape, seed=2), "b": normal(*shape, seed=3)}
    numbers |= {"s": np.float64(1.5), "b": np.float64(-0.25)} if single else {}
    model = build(f"({ends}) => (double[A,B,C] y) {{ n = {call} h = Mul(n, s) k = Add(h, b) y = Sigmoid(k) }}", numbers)
    result, outcome, _ = run(model, FoldAffine())
    assert ops(result) == {call.split("(")[0].split("<")[0]: 1, "Sigmoid": 1}
    assert all(r.certificate is not None and r.certificate.status != "failed" for r in outcome.rewrites)
    same(model, result, x=normal(*(int(d) for d in ends[7:-3].split(",")), seed=4))


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        ("n = LayerNormalization(x, g) y = Mul(n, s)", (3, 1)),  # another axis
        ("n = LayerNormalization<axis=1>(x, gg) y = Mul(n, s)", (4,)),  # the scale has two axes
        ("n = LayerNormalization(x, g) h = Mul(n, s) y = Add(h, n)", (4,)),  # read twice
        ("n, m = LayerNormalization(x, g) c = Cast<to=11>(m) h = Mul(n, s) y = Add(h, c)", (4,)),
        ("n = LayerNormalization(x, v) y = Mul(n, s)", (4,)),  # its scale is computed
    ],
)
def test_what_a_normalisation_does_not_absorb(body: str, shape: tuple[int, ...]) -> None:
    numbers = {"g": normal(4), "gg": normal(3, 4), "s": normal(*shape)}
    model = build(f"(double[2,3,4] x, double[4] v) => (double[A,B,C] y) {{ {body} }}", numbers)
    result, _, _ = run(model, FoldAffine())
    assert ops(result) == ops(model)
