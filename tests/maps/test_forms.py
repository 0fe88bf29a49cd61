"""Every operator is read as what onnx's reference evaluator computes, in every opset's spelling."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx.printer
import pytest
from helpers import build, evaluate, normal, open_session, parse
from hypothesis import given, note, settings
from hypothesis import strategies as st
from linear_maps import apply

from pwopt.algebra.geometry import Geometry, Refusal, RefusedError, compose_geometry, pointwise_geometry
from pwopt.algebra.linear import LinearMap
from pwopt.graph.files import from_proto
from pwopt.graph.view import View
from pwopt.maps import emit, forms, selections


def last(model: onnx.ModelProto) -> tuple[View, forms.Reading | Refusal | None]:
    graph = from_proto(model).graph
    view = View(graph)
    return view, forms.read(view, graph.nodes[-1])


def on_axis(linear: LinearMap, x: np.ndarray, axis: int | None) -> np.ndarray:
    """Evaluate a map whose channels lie on `axis`."""
    if axis is None:
        return apply(linear.broadcast(1), x.reshape(1, 1, -1)).reshape(x.shape)
    moved = np.moveaxis(x, axis, 0)
    y = apply(linear, moved.reshape(1, moved.shape[0], -1))[0]
    return np.moveaxis(y.reshape(-1, *moved.shape[1:]), 0, axis)


def check(model: onnx.ModelProto, x: np.ndarray) -> forms.Reading:
    """The reading of the last node equals the model's output."""
    _, reading = last(model)
    assert isinstance(reading, forms.Reading), reading
    linear = reading.load()
    assert linear.geometry.weights == reading.geometry.weights
    (expected,) = evaluate(model, x=x)
    found = apply(linear, x) if reading.geometry.rank else on_axis(linear, x, reading.axis)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    return reading


X4 = normal(2, 4, 7, 8)
CONV = "(double[2,4,7,8] x) => (double[N] y) { y = Conv%s(x, w%s) }"

Example = tuple[onnx.ModelProto, Sequence[int], int | None]


def example(call: str, shape: Sequence[int], opset: int, axis: int | None, **weights: np.ndarray) -> Example:
    """A model of one operator, the shape of its input, and the axis that its channels lie on."""
    body = f"(double[{','.join(map(str, shape))}] x) => (double[N] y) {{ y = {call} }}"
    return parse(body, opset, **weights), shape, axis


@st.composite
def arrays(draw: st.DrawFn, *shape: int) -> np.ndarray:
    return normal(*shape, seed=draw(st.integers(0, 99)))


@st.composite
def convolutions(draw: st.DrawFn) -> Example:
    """A Conv or an ungrouped ConvTranspose with any attributes, on sequences, images or volumes."""
    rank, transposed = draw(st.integers(1, 3)), draw(st.booleans())
    groups = 1 if transposed else draw(st.sampled_from([1, 1, 2, 4]))
    out = groups * draw(st.integers(1, 2))

    def each(values: st.SearchStrategy[int]) -> list[int]:
        return draw(st.lists(values, min_size=rank, max_size=rank))

    kernel, strides = each(st.integers(1, 3)), each(st.integers(1, 3))
    dilations = each(st.just(1) if transposed else st.integers(1, 2))
    attributes = [f"strides={strides}", f"dilations={dilations}", f"group={groups}"]
    padding = draw(st.sampled_from(["", "pads"] if transposed else ["", "pads", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    if padding == "pads":
        attributes.append(f"pads={[draw(st.integers(0, k - 1)) for k in (*kernel, *kernel)]}")
    elif padding:
        attributes.append(f'auto_pad="{padding}"')
        if padding != "VALID":
            # the reference evaluator ignores dilations here; a stride beyond the kernel would crop, and is not read
            strides = [min(pair) for pair in zip(strides, kernel, strict=True)]
            attributes[:2] = [f"strides={strides}", f"dilations={[1] * rank}"]
    op, shape = ("ConvTranspose", (4, out)) if transposed else ("Conv", (out, 4 // groups))
    weights = {"w": draw(arrays(*shape, *kernel))} | ({"b": draw(arrays(out))} if draw(st.booleans()) else {})
    call = f"{op}<{', '.join(attributes)}>(x, {', '.join(weights)})"
    return example(call, (2, 4, *each(st.integers(5, 7))), draw(st.sampled_from([1, 11, 17, 22])), 1, **weights)


@st.composite
def products(draw: st.DrawFn) -> Example:
    """A Gemm, or a MatMul with constant weights on either side."""
    kind, shape = draw(st.sampled_from(["gemm", "right", "left"])), draw(st.lists(st.integers(1, 4), max_size=2))
    w, opset = draw(arrays(4, 5)), draw(st.sampled_from([7, 9, 11, 13, 17]))
    if kind == "gemm":
        flip = draw(st.integers(0, 1))
        bias = draw(arrays(*draw(st.sampled_from([(), (5,), (1, 5), (1,)]))))
        call = f"Gemm<alpha=0.5, beta=2.0, transB={flip}>(x, w, b)"
        return example(call, (3, 4), opset, 1, w=w.T if flip else w, b=bias)
    if kind == "right":
        return example("MatMul(x, w)", (*shape, 3, 4), opset, len(shape) + 1, w=w)
    return example("MatMul(w, x)", (*shape, 4, 3), opset, len(shape), w=w.T)


@st.composite
def arithmetic(draw: st.DrawFn) -> Example:
    """A constant per position of one axis, or one number, on either side of an operator."""
    shape = tuple(draw(st.lists(st.integers(2, 5), min_size=1, max_size=4)))
    axis = draw(st.none() | st.integers(0, len(shape) - 1))
    ones = [1] * draw(st.integers(0, len(shape)))
    if axis is not None:
        ones = [1] * draw(st.integers(len(shape) - axis, len(shape)))
        ones[axis - len(shape)] = shape[axis]
    op, swap = draw(st.sampled_from(["Mul", "Div", "Add", "Sub"])), draw(st.booleans())
    call = f"{op}({'c, x' if swap and op != 'Div' else 'x, c'})"
    return example(call, shape, draw(st.sampled_from([7, 13, 17])), axis, c=np.abs(draw(arrays(*ones))) + 0.5)


@st.composite
def selections_of_channels(draw: st.DrawFn) -> Example:
    """A Slice, Gather or Pad over the channels."""
    kind, channels = draw(st.sampled_from(["Slice", "Gather", "Pad"])), draw(st.integers(2, 6))
    shape, opset = (2, channels, 3), draw(st.sampled_from([11, 13, 18]))
    if kind == "Slice":
        kept = range(channels)[:: draw(st.sampled_from([1, 2, -1, -2]))]
        kept = kept[draw(st.integers(0, len(kept) - 1)) :]
        end = kept[-1] + (1 if kept.step > 0 else -1)
        bounds = {
            "s": [kept[0]],
            "e": [end if end >= 0 else -channels - 1],
            "a": [draw(st.sampled_from([1, -2]))],
            "t": [kept.step],
        }
        return example("Slice(x, s, e, a, t)", shape, opset, 1, **{k: np.array(v) for k, v in bounds.items()})
    if kind == "Gather":
        picks = draw(st.lists(st.integers(-channels, channels - 1), min_size=1, max_size=6))
        return example("Gather<axis=1>(x, i)", shape, opset, 1, i=np.array(picks))
    before, after = draw(st.integers(0, 2)), draw(st.integers(1, 2))
    return example(
        "Pad(x, p, c)", shape, opset, 1, p=np.array([0, before, 0, 0, after, 0]), c=np.float64(draw(st.integers(-2, 2)))
    )


@st.composite
def averages(draw: st.DrawFn) -> Example:
    """An AveragePool whose windows all have one size, or a sum or mean over the channels."""
    if draw(st.booleans()):
        op, opset = draw(st.sampled_from(["ReduceSum", "ReduceMean"])), draw(st.sampled_from([11, 13, 18]))
        if opset >= (13 if op == "ReduceSum" else 18):
            return example(f"{op}(x, a)", (2, 4, 5, 6), opset, 1, a=np.array([1]))
        return example(f"{op}<axes=[1]>(x)", (2, 4, 5, 6), opset, 1)
    kernel, strides = [draw(st.lists(st.integers(1, 3), min_size=2, max_size=2)) for _ in range(2)]
    pads = [draw(st.integers(0, k - 1)) for k in (*kernel, *kernel)]
    counted = f", pads={pads}, count_include_pad=1" if draw(st.booleans()) else ""
    return example(f"AveragePool<kernel_shape={kernel}, strides={strides}{counted}>(x)", (2, 4, 5, 6), 17, 1)


@settings(max_examples=300)
@given(st.one_of(convolutions(), products(), arithmetic(), selections_of_channels(), averages()))
def test_what_is_read_computes_what_the_operator_computes(case: Example) -> None:
    model, shape, axis = case
    note(onnx.printer.to_text(model))
    assert check(model, normal(*shape, seed=1)).axis == axis


def test_grouped_conv_without_bias() -> None:
    reading = check(parse(CONV % ("<group=2>", ""), w=normal(6, 2, 3, 3)), X4)
    assert reading.geometry.groups == 2
    assert not reading.geometry.biased


def test_same_padding_of_unknown_size_stays_automatic() -> None:
    body = '(double[N,4,H,W] x) => (double[N] y) { y = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(x, w) }'
    _, reading = last(parse(body, w=normal(6, 4, 3, 3)))
    assert isinstance(reading, forms.Reading)
    assert reading.geometry.auto_pad == "SAME_UPPER"
    assert reading.geometry.padded


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize(
    ("kernel", "stride", "size", "pads"),
    [(1, 2, 4, None), (1, 2, 5, 0), (1, 4, 12, None), (2, 5, 15, None), (2, 3, 7, 1), (3, 3, 6, 0), (3, 2, 6, 1)],
)
def test_same_padding_that_crops_stays_automatic(
    mode: str, kernel: int, stride: int, size: int, pads: int | None
) -> None:
    """Runtimes differ in which side they crop more: `pads` of None for padding below zero, of so many zeros in all."""
    body = f'(double[N,4,{size}] x) => (double[N] y) {{ y = Conv<auto_pad="{mode}", strides=[{stride}]>(x, w) }}'
    _, reading = last(parse(body, w=normal(6, 4, kernel)))
    assert isinstance(reading, forms.Reading)
    assert (reading.geometry.auto_pad or None) == (mode if pads is None else None)
    if pads is not None:
        ends = (pads // 2, pads - pads // 2)
        assert reading.geometry.pads == (ends if mode == "SAME_UPPER" else ends[::-1])


def test_optional_bias_given_as_empty_name() -> None:
    model = parse(CONV % ("", ", b"), w=normal(6, 4, 1, 1))
    model.graph.node[0].input[2] = ""
    check(model, X4)


def test_grouped_conv_transpose() -> None:
    """By onnxruntime, since onnx's reference evaluator cannot group here."""
    pytest.importorskip("onnxruntime")
    body = (
        "(float[2,4,7,8] x) => (float[N] y) { y = ConvTranspose<strides=[2,2], group=2, output_padding=[1,1]>(x, w) }"
    )
    model = parse(body, w=normal(4, 3, 3, 3, dtype=np.float32))
    _, reading = last(model)
    assert isinstance(reading, forms.Reading)
    linear = reading.load()
    session = open_session(model)
    (expected,) = session.run(None, {"x": X4.astype(np.float32)})
    np.testing.assert_allclose(apply(linear, X4), expected, atol=1e-4)


@pytest.mark.parametrize("wrap", ["", "c = Identity(w) ", "c = Constant<value = double[6,4,1,1] {%s}>() "])
def test_weights_through_identity_and_constant_nodes(wrap: str) -> None:
    w = normal(6, 4, 1, 1)
    values = ", ".join(map(repr, w.reshape(-1).tolist()))
    name = "c" if wrap else "w"
    body = f"(double[2,4,7,8] x) => (double[N] y) {{ {wrap % values if '%' in wrap else wrap} y = Conv(x, {name}) }}"
    check(parse(body, w=w), X4)


@pytest.mark.parametrize("opset", [7, 9, 14, 15])
def test_batch_normalization(opset: int) -> None:
    """By the specification's formula, since the reference evaluator's older versions normalise by the batch."""
    g, b, m, v = normal(4), normal(4, seed=1), normal(4, seed=2), np.abs(normal(4, seed=3))
    body = "(double[2,4,7,8] x) => (double[N] y) { y = BatchNormalization<epsilon=0.01>(x, g, b, m, v) }"
    _, reading = last(parse(body, opset, g=g, b=b, m=m, v=v))
    assert isinstance(reading, forms.Reading)
    linear = reading.load()
    g, b, m, v = (t.reshape(4, 1, 1) for t in (g, b, m, v))
    expected = g * (X4 - m) / np.sqrt(v + np.float32(0.01)) + b
    np.testing.assert_allclose(apply(linear, X4), expected, atol=1e-9)


@pytest.mark.parametrize(
    ("opset", "attributes", "reads"),
    [
        (14, "<training_mode=1>", False),
        (6, "", False),
        (6, "<is_test=1>", True),
        (7, "<spatial=0>", False),
        (7, "", True),
    ],
)
def test_batch_normalization_only_at_inference(opset: int, attributes: str, reads: bool) -> None:
    body = f"(double[2,4,7,8] x) => (double[N] y) {{ y = BatchNormalization{attributes}(x, g, b, m, v) }}"
    _, reading = last(parse(body, opset, g=normal(4), b=normal(4), m=normal(4), v=np.ones(4)))
    assert isinstance(reading, forms.Reading) == reads


@pytest.mark.parametrize(
    ("shape", "x"),
    [
        ((1, 1, 1, 1), "double[4,7,8]"),
        ((4, 1, 1), "double[2,1,7,8]"),
        ((4, 1, 1), "double[2,C,7,8]"),
        ((4, 7, 1), "double[2,4,7,8]"),
    ],
)
def test_constants_that_could_enlarge_or_vary_along_two_axes_are_not_read(shape: tuple[int, ...], x: str) -> None:
    assert last(parse(f"({x} x) => (double[N] y) {{ y = Mul(x, c) }}", c=normal(*shape)))[1] is None


@pytest.mark.parametrize("opset", [1, 6])
def test_broadcasting_by_attribute(opset: int) -> None:
    body = "(double[2,4,7,8] x) => (double[N] y) { y = Add<broadcast=1, axis=1>(x, c) }"
    _, reading = last(parse(body, opset, c=normal(4)))
    assert isinstance(reading, forms.Reading)
    assert reading.axis == 1
    linear = reading.load()
    np.testing.assert_array_equal(linear.bias, normal(4))


def test_neg_identity_dropout() -> None:
    for opset, op in ((17, "Neg(x)"), (17, "Identity(x)"), (17, "Dropout(x)"), (10, "Dropout<ratio=0.3>(x)")):
        check(parse(f"(double[2,4,7,8] x) => (double[N] y) {{ y = {op} }}", opset), X4)


def test_dropout_in_training_is_refused() -> None:
    body = "(double[2,4] x) => (double[N] y) { y = Dropout(x, r, t) }"
    _, reading = last(parse(body, r=np.float64(0.5), t=np.array(True)))
    assert isinstance(reading, Refusal)


def test_gemm_with_a_table_is_refused() -> None:
    _, reading = last(parse("(double[3,3] x) => (double[N] y) { y = Gemm(x, w, b) }", w=normal(3, 5), b=normal(3, 5)))
    assert isinstance(reading, Refusal)


def test_a_gemm_that_transposes_is_read_by_those_who_ask() -> None:
    model = from_proto(parse("(double[4,3] x) => (double[N] y) { y = Gemm<transA=1>(x, w) }", w=normal(4, 5)))
    view, node = View(model.graph), model.graph.nodes[0]
    assert forms.linear(view, node) is None
    assert forms.weighted(view, node) is None
    reading = forms.linear(view, node, turned=True)
    assert reading is not None
    assert (reading.axis, reading.source_axis) == (1, 0)


def test_a_number_for_each_row_is_no_bias() -> None:
    """Though there are as many rows as channels."""
    _, reading = last(parse("(double[5,4] x) => (double[N] y) { y = Gemm(x, w, b) }", w=normal(4, 5), b=normal(5, 1)))
    assert isinstance(reading, Refusal)


@pytest.mark.parametrize("attrs", ["output_shape=[15,16]", 'auto_pad="SAME_UPPER"'])
def test_padding_that_follows_from_sizes_is_padding(attrs: str) -> None:
    """What comes after such a convolution composes with it; a bias before it does not."""
    _, reading = last(
        parse(
            f"(double[2,4,7,8] x) => (double[N] y) {{ y = ConvTranspose<strides=[2,2], {attrs}>(x, w) }}",
            w=normal(4, 3, 3, 3),
        )
    )
    assert isinstance(reading, forms.Reading)
    assert reading.geometry.padded
    after = pointwise_geometry(3, 3, groups=3, biased=True)
    assert isinstance(compose_geometry(after, reading.geometry), Geometry)
    before = pointwise_geometry(4, 4, groups=4, biased=True)
    assert isinstance(compose_geometry(reading.geometry, before), Refusal)


@pytest.mark.parametrize(
    ("inputs", "call", "weights"),
    [
        (", double[4,3,3,3] w", "ConvTranspose(x, w)", {}),
        (", double[3] b", "ConvTranspose(x, w, b)", {"w": normal(4, 3, 3, 3)}),
        (", double[3,4,3,3] w", "Conv(x, w)", {}),
        (", double[3] b", "Conv(x, w, b)", {"w": normal(3, 4, 3, 3)}),
        ("", "Conv<pads=[-1,0,0,0]>(x, w)", {"w": normal(3, 4, 3, 3)}),
    ],
)
def test_what_is_not_known_before_is_refused(inputs: str, call: str, weights: dict[str, np.ndarray]) -> None:
    _, reading = last(parse(f"(double[2,4,7,8] x{inputs}) => (double[N] y) {{ y = {call} }}", **weights))
    assert isinstance(reading, Refusal)


@pytest.mark.parametrize("call", ["MatMul(x, w)", "Mul(x, c)", "Add(x, c)", "Neg(x)", "Identity(x)"])
def test_integers_are_not_read(call: str) -> None:
    """Folded in float64, they would be rounded where they wrap."""
    weights = {"w": normal(4, 5).astype(np.int32), "c": np.int32(3)}
    used = {k: v for k, v in weights.items() if f" {k})" in call}
    assert last(parse(f"(int32[3,4] x) => (int32[N] y) {{ y = {call} }}", **used))[1] is None


def test_matmul_from_the_left() -> None:
    reading = check(parse("(double[2,4,6] x) => (double[N] y) { y = MatMul(w, x) }", w=normal(5, 4)), normal(2, 4, 6))
    assert (reading.kind, reading.axis) == ("left-matmul", 1)


@pytest.mark.parametrize(
    ("body", "axis"),
    [
        ("{ h = MatMul(x, w) y = Add(h, b) }", 1),  # along the rows, as many as columns
        ("{ h = MatMul(x, w) z = Neg(h) y = Add(h, c) }", 2),  # a product that others read
    ],
)
def test_an_add_that_is_no_bias(body: str, axis: int) -> None:
    constants = {"w": normal(4, 3), "b": normal(3, 1), "c": normal(3)}
    outputs = "double[N] y" + (", double[M] z" if "z =" in body else "")
    _, reading = last(build(f"(double[2,3,4] x) => ({outputs}) {body}", constants))
    assert isinstance(reading, forms.Reading)
    assert (len(reading.nodes), reading.axis) == (1, axis)


@pytest.mark.parametrize(
    "body",
    [
        '(double[2,4,H,W] x) => (double[N] y) { y = AveragePool<kernel_shape=[2,2],strides=[2,2],auto_pad="SAME_UPPER">(x) }',
        "(double[2,4,7,8] x) => (double[N] y, bool[M] m) { y, m = Dropout(x) }",
        "(double[2,C,7,8] x) => (double[N] y) { y = AveragePool<kernel_shape=[2,2]>(x) }",
    ],
)
def test_what_depends_on_more_is_refused(body: str) -> None:
    assert isinstance(last(parse(body))[1], Refusal)


def test_a_product_with_a_vector_has_no_positions() -> None:
    _, reading = last(parse("(double[4] x) => (double[N] y) { y = MatMul(w, x) }", w=normal(5, 4)))
    assert isinstance(reading, Refusal)


def test_matmul_with_its_bias() -> None:
    body = "(double[2,3,4] x) => (double[N] y) { h = MatMul(x, w) y = Add(b, h) }"
    reading = check(parse(body, w=normal(4, 5), b=normal(5)), normal(2, 3, 4))
    assert len(reading.nodes) == 2


def test_data_dependent_products_are_not_read() -> None:
    assert last(parse("(double[2,3] x, double[3,4] w) => (double[N] y) { y = MatMul(x, w) }"))[1] is None


@pytest.mark.parametrize(
    "kernel", ["kernel_shape=[3,3], pads=[1,1,1,1]", "kernel_shape=[2,2], strides=[2,2], ceil_mode=1"]
)
def test_average_pool_with_smaller_windows_is_refused(kernel: str) -> None:
    _, reading = last(parse(f"(double[2,4,7,8] x) => (double[N] y) {{ y = AveragePool<{kernel}>(x) }}"))
    assert isinstance(reading, Refusal)


@pytest.mark.parametrize(
    "call", ["ReduceSum(x, both)", "ReduceSum<keepdims=0>(x, one)", "ReduceSum(x)", "ReduceMean(x)"]
)
def test_reductions_over_more_or_less_are_not_read(call: str) -> None:
    model = build(
        f"(double[2,4,7,8] x) => (double[N] y) {{ y = {call} }}", {"both": np.array([1, 2]), "one": np.array([1])}
    )
    assert last(model)[1] is None


@pytest.mark.parametrize(
    ("opset", "body"),
    [
        (9, "{ y = Slice<starts=[1], ends=[3], axes=[1]>(x) }"),
        (10, "{ y = Pad<pads=[0,1,0,0,0,0,0,0]>(x) }"),
        (18, "{ y = Pad(x, p, , a) }"),
        (17, "{ r = Reshape(x, s) t = Transpose<perm=[0,2,1,3,4]>(r) y = Reshape(t, q) }"),
    ],
    ids=["slice by attributes", "pad by attributes", "pad of given axes", "channel shuffle"],
)
def test_other_spellings_of_selections(opset: int, body: str) -> None:
    constants = {"p": [1, 2], "a": [1], "s": [2, 2, 2, 7, 8], "q": [2, 4, 7, 8]}
    head = "(double[2,4,7,8] x) => (double[N] y) "
    model = build(head + body, {k: np.array(v) for k, v in constants.items()}, opset=opset)
    assert check(model, X4).kind == "selection"


def test_split_and_concat() -> None:
    split = parse(
        "(double[2,4,7,8] x) => (double[N] a, double[N] b) { a, b = Split<axis=1>(x, s) }", s=np.array([1, 3])
    )
    graph = from_proto(split).graph
    parts = selections.read_split(View(graph), graph.nodes[0])
    assert parts is not None
    for part, expected in zip(parts, evaluate(split, x=X4), strict=True):
        linear = part.load()
        np.testing.assert_array_equal(apply(linear, X4), expected)
    concat = parse("(double[2,4,7,8] x, double[2,3,7,8] z) => (double[N] y) { y = Concat<axis=-3>(x, z) }")
    graph = from_proto(concat).graph
    terms = selections.read_concat(View(graph), graph.nodes[0])
    assert terms is not None
    z = normal(2, 3, 7, 8, seed=5)
    total = sum(np.asarray(apply(t.load(), v)) for t, v in zip(terms, (X4, z), strict=True))  # type: ignore[union-attr]
    np.testing.assert_array_equal(total, evaluate(concat, x=X4, z=z)[0])


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        (CONV % ("", ", b"), {"w": normal(6, 4, 1, 1), "b": normal(6)}),
        (CONV % ("<group=2, pads=[1,1,1,1], strides=[2,2]>", ""), {"w": normal(6, 2, 3, 3)}),
        (
            "(double[2,4,7,8] x) => (double[N] y) { y = ConvTranspose<strides=[2,2]>(x, w) }",
            {"w": normal(4, 3, 2, 2)},
        ),
        ("(double[3,4] x) => (double[N] y) { y = Gemm<transB=1>(x, w, b) }", {"w": normal(5, 4), "b": normal(5)}),
        ("(double[3,4] x) => (double[N] y) { y = Gemm<alpha=2.0>(x, w) }", {"w": normal(4, 5)}),
        ("(double[2,3,4] x) => (double[N] y) { y = MatMul(x, w) }", {"w": normal(4, 5)}),
        ("(double[2,4,3] x) => (double[N] y) { y = MatMul(w, x) }", {"w": normal(5, 4)}),
        ("(double[2,3,4] x) => (double[N] y) { h = MatMul(x, w) y = Add(h, b) }", {"w": normal(4, 5), "b": normal(5)}),
        ("(double[2,4,7] x) => (double[N] y) { y = Mul(x, s) }", {"s": normal(4, 1)}),
        ("(double[2,4,7] x) => (double[N] y) { y = Sub(s, x) }", {"s": normal(4, 1)}),
        ("(double[2,4,7] x) => (double[N] y) { y = Add(x, s) }", {"s": np.float64(2)}),
        ("(double[2,7] x) => (double[N] y) { y = Sub(s, x) }", {"s": normal(7)}),
    ],
)
@pytest.mark.parametrize("biased", [False, True])
def test_what_is_read_is_written_back(body: str, weights: dict[str, np.ndarray], biased: bool) -> None:
    """Writing a map, with or without a bias added, gives nodes that compute it; shapes and types too."""
    model = parse(body, **weights)
    loaded = from_proto(model)
    view = View(loaded.graph)
    reading = forms.read(view, loaded.graph.nodes[-1])
    assert isinstance(reading, forms.Reading)
    linear = reading.load()
    added = normal(linear.geometry.out_channels, seed=9) if biased else np.zeros(linear.geometry.out_channels)
    changed = LinearMap.of(linear.geometry, linear.weight, linear.bias + added)
    written = emit.write(view, changed, reading, reading.source, reading.output, reading.axis)
    for node in written.nodes:
        view.add(node, at=reading.node)
    for node in reading.nodes:
        view.remove(node)
    view.close()
    result = loaded.to_proto()
    onnx.checker.check_model(result, full_check=True)
    x = normal(*[d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim])
    shape = [1] * x.ndim
    if reading.axis is not None:
        shape[reading.axis] = -1
    np.testing.assert_allclose(evaluate(result, x=x)[0], evaluate(model, x=x)[0] + added.reshape(shape), atol=1e-9)


def test_rounding_refuses_overflow_and_lost_channels() -> None:
    half = np.dtype(np.float16)
    with pytest.raises(RefusedError, match="the folded weights overflow float16"):
        emit.round_map(LinearMap.pointwise(np.full((2, 2), 1e6)), half)
    with pytest.raises(RefusedError, match="the folded weights overflow float16"):
        emit.round_map(LinearMap.pointwise(np.ones((2, 2)), [0, 1e6]), half)
    with pytest.raises(RefusedError, match="a folded channel underflows float16"):
        emit.round_map(LinearMap.pointwise([[1.0, 2.0], [1e-9, 0.0]]), half)
    low = emit.round_map(LinearMap.pointwise([[1.0, 1e-9], [0.0, 0.0]], [1e-9, 3.0]), half)
    np.testing.assert_array_equal(low.weight, [[1, 0], [0, 0]])
    np.testing.assert_array_equal(low.bias, [0, 3])
    assert low.weight.dtype == low.bias.dtype == half
    assert low.residual == pytest.approx(1e-9)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_left_alone(bad: float) -> None:
    w = normal(6, 4, 1, 1)
    w[0, 0] = bad
    _, reading = last(parse(CONV % ("", ""), w=w))
    assert isinstance(reading, forms.Reading)
    with pytest.raises(RefusedError, match="its weights are not finite"):
        reading.load()
    assert reading.try_load() is None
