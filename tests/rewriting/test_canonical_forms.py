"""What `clean-up` rewrites in a canonical form, and where it must not."""

import ml_dtypes
import numpy as np
import onnx
import pytest
from helpers import build, evaluate, normal, open_session, ops, parse, run, same
from onnx import TensorProto, helper

import pwopt
from pwopt.passes import CleanUp, FoldAffine
from pwopt.rewriting.canonical_forms import is_lossless

TYPES = {
    "bool": 9, "uint8": 2, "int8": 3, "int16": 5, "int32": 6, "int64": 7, "float16": 10, "bfloat16": 16, "float32": 1,
    "float64": 11,
}  # fmt: skip


def dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


@pytest.mark.parametrize(
    ("source", "wide"),
    [
        ("bool", {"uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"}),
        ("uint8", {"int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"}),
        ("int8", {"int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"}),
        ("int16", {"int32", "int64", "float32", "float64"}),
        ("int32", {"int64", "float64"}),
        ("int64", set()),
        ("float16", {"float32", "float64"}),
        ("bfloat16", {"float32", "float64"}),
        ("float32", {"float64"}),
        ("float64", set()),
    ],
)
def test_what_a_cast_loses(source: str, wide: set[str]) -> None:
    assert {t for t in TYPES if t != source and is_lossless(dtype(source), dtype(t))} == wide
    assert is_lossless(dtype(source), dtype(source))


@pytest.mark.parametrize(
    ("source", "middle", "target", "left"),
    [
        ("uint8", "float32", "uint8", 0),
        ("uint8", "float32", "float16", 1),
        ("float16", "float32", "bfloat16", 1),
        ("float16", "float32", "float16", 0),
        ("int32", "int64", "uint8", 1),
        ("float32", "float16", "float32", 2),  # rounds
        ("int32", "float32", "int64", 2),  # rounds
        ("float32", "bool", "float32", 2),
        ("float16", "float32", "int32", 2),  # NaN and infinity
        ("uint8", "float32", "int32", 1),
        ("uint8", "float32", "bool", 1),
        ("int16", "float32", "int8", 2),  # 300 is no int8: integers wrap, and for float32 it is undefined
    ],
)
def test_casts_are_joined_if_the_middle_type_loses_nothing(source: str, middle: str, target: str, left: int) -> None:
    a, b, c = (TYPES[t] for t in (source, middle, target))
    nodes = [
        helper.make_node("Cast", ["x"], ["m"], to=b),
        helper.make_node("Cast", ["m"], ["c"], to=c),
        helper.make_node("Reshape", ["c", "s"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(n, t, s) for n, t, s in (("x", a, [4]), ("y", c, [2, 2]))]
    shape = helper.make_tensor("s", TensorProto.INT64, [2], [2, 2])
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [shape])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    result, _, _ = run(model, CleanUp())
    assert ops(result)["Cast"] == left


def test_a_cast_that_others_read_is_not_joined() -> None:
    body = "(float16[4] x) => (double[N] y, float[M] z) { m = Cast<to=1>(x) c = Cast<to=11>(m) y = Neg(c) z = Neg(m) }"
    model = parse(body)
    assert run(model, CleanUp())[0] is model


def test_sizes_are_not_cast_to_int32_and_back() -> None:
    body = (
        "(float[N,M] x, float[K] v) => (float[A] y) { s = Shape(x) c = Cast<to=6>(s) p = Slice(c, one, two, zero)"
        " e = Cast<to=7>(p) y = Expand(v, e) }"
    )
    model = build(body, {"zero": np.array([0]), "one": np.array([1]), "two": np.array([2])})
    result, _, _ = run(model, CleanUp())
    assert ops(result) == {"Shape": 1, "Slice": 1, "Expand": 1}
    same(model, result, x=normal(3, 4, dtype=np.float32), v=normal(1, dtype=np.float32))


def test_other_integers_may_not_fit_int32() -> None:
    body = (
        "(int64[3] s) => (int64[A] y) { c = Cast<to=6>(s) p = Slice(c, one, two, zero) e = Cast<to=7>(p) y = Neg(e) }"
    )
    model = parse(body, zero=np.array([0]), one=np.array([1]), two=np.array([2]))
    assert run(model, CleanUp())[0] is model


def test_a_negated_condition_swaps_the_branches() -> None:
    body = "(bool[4] c, float[4] a, float[4] b) => (float[N] y) { n = Not(c) y = Where(n, a, b) }"
    model = parse(body)
    result, _, _ = run(model, CleanUp())
    assert ops(result) == {"Where": 1}
    same(model, result, c=normal(4) > 0, a=normal(4, dtype=np.float32), b=normal(4, seed=1, dtype=np.float32))


def test_not_undoes_not() -> None:
    model = parse("(bool[4] c, bool[4] d) => (bool[N] y) { m = Not(c) n = Not(m) y = And(n, d) }")
    result, _, _ = run(model, CleanUp())
    assert ops(result) == {"And": 1}


@pytest.mark.parametrize(
    ("call", "left"), [("Relu(x)", {}), ("Cast<to=11>(x)", {}), ("Transpose(x)", {"Transpose": 1})]
)
def test_a_shape_is_read_before_operators_that_keep_it(call: str, left: dict[str, int]) -> None:
    model = parse(f"(float[N,M] x) => (int64[A] y) {{ h = {call} s = Shape(h) y = Neg(s) }}")
    result, _, _ = run(model, CleanUp())
    assert ops(result) == {"Shape": 1, "Neg": 1, **left}


def test_a_roll_by_zero_joins_nothing() -> None:
    """torch.roll by 0 gives the slices x[0:] and x[:0]."""
    body = "(float[2,4] x) => (float[A,B] y) { a = Slice(x, z, e, o) b = Slice(x, z, z, o) c = Concat<axis=1>(a, b) y = Neg(c) }"
    model = parse(body, z=np.array([0]), e=np.array([4]), o=np.array([1]))
    result, _, _ = run(model, CleanUp())
    assert ops(result) == {"Neg": 1}
    same(model, result, x=normal(2, 4, dtype=np.float32))


def test_parts_of_unknown_size_are_not_empty() -> None:
    model = parse("(float[2,K] x, float[2,4] z) => (float[A,B] y) { c = Concat<axis=1>(x, z) y = Neg(c) }")
    assert run(model, CleanUp())[0] is model


def test_a_split_into_one_part_goes() -> None:
    model = parse("(float[2,4] x) => (float[A,B] y) { s = Split<axis=1>(x) y = Neg(s) }")
    result, _, _ = run(model, CleanUp())
    assert ops(result) == {"Neg": 1}


@pytest.mark.parametrize(("training", "reads", "left"), [(False, "", 0), (True, "", 1), (False, ", bool[B] k", 1)])
def test_a_dropout_with_a_false_training_flag_goes(training: bool, reads: str, left: int) -> None:
    """Also if it names a mask that nothing reads."""
    mask = "k" if reads else "m"
    body = f"(float[4] x) => (float[A] y{reads}) {{ d, {mask} = Dropout(x, r, t) y = Neg(d) }}"
    model = parse(body, r=np.float32(0.5), t=np.bool_(training))
    result, _, _ = run(model, CleanUp())
    assert ops(result).get("Dropout", 0) == left


def test_weights_in_bfloat16_become_float32() -> None:
    weight = helper.make_tensor("w", TensorProto.BFLOAT16, [4], [1.0, 2.0, -0.5, 3.0])
    nodes = [helper.make_node("Cast", ["w"], ["f"], to=1), helper.make_node("Mul", ["x", "f"], ["y"])]
    ends = [helper.make_tensor_value_info(n, 1, [4]) for n in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    result, _, _ = run(model, CleanUp())
    assert ops(result) == {"Mul": 1}
    assert onnx.numpy_helper.to_array(result.graph.initializer[0]).tolist() == [1.0, 2.0, -0.5, 3.0]


@pytest.mark.parametrize("name", ["FLOAT8E4M3FN", "FLOAT8E5M2"])
def test_weights_in_float8_become_float32(name: str) -> None:
    weight = helper.make_tensor("w", getattr(TensorProto, name), [4], [1.0, 2.0, -0.5, 3.0])
    nodes = [helper.make_node("Cast", ["w"], ["f"], to=1), helper.make_node("Mul", ["x", "f"], ["y"])]
    ends = [helper.make_tensor_value_info(n, 1, [4]) for n in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    result, _, _ = run(model, CleanUp())
    assert ops(result) == {"Mul": 1}
    assert onnx.numpy_helper.to_array(result.graph.initializer[0]).tolist() == [1.0, 2.0, -0.5, 3.0]


@pytest.mark.parametrize(
    ("call", "shape", "left"),
    [
        ("MatMul(x, w)", (1, 4, 6), (4, 6)),
        ("MatMul(x, w)", (1, 1, 4, 6), (1, 1, 4, 6)),  # the result has four axes
        ("MatMul(x, w)", (2, 4, 6), (2, 4, 6)),
        ("MatMul(w, x)", (1, 6, 3), (6, 3)),
    ],
)
def test_a_weight_of_one_matrix_has_two_axes(call: str, shape: tuple[int, ...], left: tuple[int, ...]) -> None:
    model = parse(f"(float[2,3,4] x) => (float[N] y) {{ y = {call} }}", w=normal(*shape, dtype=np.float32))
    result, _, _ = run(model, CleanUp())
    assert tuple(result.graph.initializer[0].dims) == left
    same(model, result, x=normal(2, 3, 4, dtype=np.float32))


def test_a_shared_weight_keeps_its_axes() -> None:
    body = "(float[2,3,4] x, float[2,4,6] z) => (float[N] y, float[M] u) { y = MatMul(x, w) u = Mul(z, w) }"
    model = parse(body, w=normal(1, 4, 6, dtype=np.float32))
    assert run(model, CleanUp())[0] is model


def test_constants_are_written_as_tensors() -> None:
    body = (
        "(float[4] x) => (float[N,M] y) { a = Constant<value_ints=[2,2]>() b = Constant<value_float=3.0>()"
        " c = Constant<value_int=7>() d = Cast<to=1>(c) e = Mul(x, b) f = Mul(e, d) y = Reshape(f, a) }"
    )
    model = parse(body)
    result, _, _ = run(model, CleanUp(), FoldAffine())
    assert ops(result) == {"Mul": 1, "Reshape": 1}
    same(model, result, tolerance=1e-6, x=normal(4, dtype=np.float32))


def test_a_range_with_a_vector_as_its_bound_loads() -> None:
    """onnxruntime runs it, but refuses to load it once the branch of an If has shown that the bound is a constant."""
    body = (
        "(int64[2] size, int64[5] x) => (int64[N] y) { sizes = Size(size) yes = Equal(sizes, two) count = If(yes) <"
        "then_branch = a () => (int64[1] b) { b = Identity(three) }, else_branch = c () => (int64[1] d) "
        "{ d, e = Split<num_outputs=2>(size) }> r = Range(zero, count, one) y = Concat<axis=0>(r, x) }"
    )
    numbers = {"two": np.array(2), "zero": np.array(0), "one": np.array(1), "three": np.array([3])}
    model = parse(body, 18, **numbers)
    open_session(model)
    result = pwopt.optimize(model, cost="analytic", verify=False).model
    assert ops(result) == {"Concat": 1}
    x, size = np.arange(5), np.arange(2)
    session = open_session(result)
    np.testing.assert_array_equal(session.run(None, {"x": x, "size": size})[0], [0, 1, 2, *x])


def test_the_bounds_of_a_range_become_scalars() -> None:
    ends = [helper.make_tensor_value_info(n, TensorProto.INT64, [200]) for n in ("x", "y")]
    nodes = [helper.make_node("Range", ["zero", "all", "one"], ["r"]), helper.make_node("Add", ["r", "x"], ["y"])]
    numbers = {"zero": [0], "all": [200], "one": 1}
    held = [onnx.numpy_helper.from_array(np.array(v), n) for n, v in numbers.items()]
    model = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], held), ir_version=8)
    result, _, _ = run(model, CleanUp())
    assert ops(result) == {"Range": 1, "Add": 1}  # three numbers take less than the positions
    session = open_session(result)
    np.testing.assert_array_equal(session.run(None, {"x": np.arange(200)})[0], 2 * np.arange(200))


PADDED = [
    ("Conv(h, v)", {"Conv": 1}, [0, 0, 1, 0, 0, 0, 2, 1]),
    ("Conv<pads=[1,1,0,0]>(h, v)", {"Conv": 1}, [0, 0, 1, 0, 0, 0, 2, 1]),
    ("AveragePool<kernel_shape=[3,3]>(h)", {"AveragePool": 1}, [0, 0, 1, 0, 0, 0, 2, 1]),
    ("AveragePool<kernel_shape=[3,3], pads=[1,1,0,0], count_include_pad=1>(h)", {"AveragePool": 1}, [0, 0, 1, 0, 0, 0, 2, 1]),
    ("Conv(h, v)", {"Pad": 1, "Conv": 1}, [0, 0, 1, 0, 1, 0, 2, 1]),  # pads the batch
    ("Conv(h, v)", {"Pad": 1, "Conv": 1}, [0, 0, -1, 0, 0, 0, 2, 1]),  # crops
    ('Conv<auto_pad="SAME_UPPER">(h, v)', {"Pad": 1, "Conv": 1}, [0, 0, 1, 0, 0, 0, 2, 1]),
    ("MaxPool<kernel_shape=[3,3]>(h)", {"Pad": 1, "MaxPool": 1}, [0, 0, 1, 0, 0, 0, 2, 1]),
    ("AveragePool<kernel_shape=[3,3], pads=[1,1,0,0]>(h)", {"Pad": 1, "AveragePool": 1}, [0, 0, 1, 0, 0, 0, 2, 1]),
    ("AveragePool<kernel_shape=[3,3], strides=[2,2], ceil_mode=1>(h)", {"Pad": 1, "AveragePool": 1}, [0, 0, 1, 0, 0, 0, 2, 1]),
    ("AveragePool<kernel_shape=[2,2]>(h)", {"Pad": 1, "AveragePool": 1}, [0, 0, 1, 0, 0, 0, 2, 1]),  # a window of padding
]  # fmt: skip


@pytest.mark.parametrize(("call", "left", "pads"), PADDED)
def test_zero_padding_before_windows(call: str, left: dict[str, int], pads: list[int]) -> None:
    body = f"(float[1,2,6,7] x, float[2,2,3,3] v) => (float[A,B,C,D] y) {{ h = Pad(x, p) y = {call} }}"
    model = parse(body, p=np.array(pads))
    result, _, _ = run(model, CleanUp())
    assert ops(result) == left
    if "Pad" not in left:
        images, weights = normal(1, 2, 6, 7, dtype=np.float32), normal(2, 2, 3, 3, dtype=np.float32)
        same(model, result, tolerance=1e-5, x=images, v=weights)


def test_other_padding_stays() -> None:
    body = "(float[1,2,6,7] x, float[2,2,3,3] v) => (float[A,B,C,D] y) { h = Pad(x, p, c) y = Conv(h, v) }"
    for more in ({"c": np.float32(1)}, {"c": np.float32(0)}):
        model = parse(body, p=np.array([0, 0, 1, 0, 0, 0, 2, 1]), **more)
        assert ops(run(model, CleanUp())[0]).get("Pad", 0) == int(more["c"])


def requantised(
    dtype: int = TensorProto.UINT8,
    scales: tuple[object, object] = (0.02, 0.02),
    zeros: tuple[int, int] = (3, 3),
    **axes: int,
) -> onnx.ModelProto:
    """y = Q(D(x)), with a scale and a zero point for each."""
    held = [
        helper.make_tensor(f"{kind}{i}", t, np.shape(v), np.atleast_1d(v))
        for kind, t, values in (("s", TensorProto.FLOAT, scales), ("z", dtype, zeros))
        for i, value in enumerate(values)
        for v in [value if kind == "s" else np.full(np.shape(scales[i]), value)]
    ]
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "s0", "z0"], ["d"], axis=axes.get("first", 1)),
        helper.make_node("QuantizeLinear", ["d", "s1", "z1"], ["q"], axis=axes.get("second", 1)),
        helper.make_node("Transpose", ["q"], ["y"], perm=[1, 0]),
    ]
    ends = [helper.make_tensor_value_info(n, dtype, ["A", 4] if n == "x" else [4, "A"]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize("dtype", ["UINT8", "INT8", "UINT16", "INT16"])
@pytest.mark.parametrize("scale", [0.02, 1.0, 3e-30, 1e30, 0.1, 0.37, [0.1, 0.7, 3.3, 1e-9]])
def test_quantising_undoes_dequantising(dtype: str, scale: object) -> None:
    """For every number of the type, also in onnxruntime."""
    code = getattr(TensorProto, dtype)
    model = requantised(code, (scale, scale))
    result, _, _ = run(model, CleanUp())
    assert ops(result) == {"Transpose": 1}
    info = np.iinfo(helper.tensor_dtype_to_np_dtype(code))
    numbers = np.arange(info.min, info.max + 1).astype(helper.tensor_dtype_to_np_dtype(code)).reshape(-1, 4)
    session = open_session(model, optimise=False)
    np.testing.assert_array_equal(session.run(None, {"x": numbers})[0], numbers.T)


@pytest.mark.parametrize(
    "model",
    [
        requantised(scales=(0.02, 0.03)),
        requantised(zeros=(3, 4)),
        requantised(scales=(1e-38, 1e-38)),
        requantised(scales=(1e38, 1e38)),
        requantised(scales=(float("nan"), float("nan"))),
        requantised(scales=([0.1, 0.2, 0.3, 0.4],) * 2, second=0),
    ],
    ids=["scale", "zero point", "tiny", "huge", "not a number", "axis"],
)
def test_other_ways_of_quantising_stay(model: onnx.ModelProto) -> None:
    assert ops(run(model, CleanUp())[0]) == {"DequantizeLinear": 1, "QuantizeLinear": 1, "Transpose": 1}


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("a = Conv(x, w) y = Sum(a, a, a)", {"Conv": 1}),
        ("a = Conv(x, w) y = Add(a, a)", {"Conv": 1}),
        ("a = Relu(x) b = Sum(a, a, a, a) y = Conv(b, w)", {"Relu": 1, "Conv": 1}),
        ("a = Relu(x) b = Sum(a, a, a) y = Relu(b)", {"Relu": 2, "Sum": 1}),  # nothing absorbs a factor
        ("a = Conv(x, w) b = Relu(a) c = Add(a, a) y = Mul(b, c)", {"Conv": 1, "Relu": 1, "Add": 1, "Mul": 1}),
        ("a = Conv(x, w) b = Relu(a) y = Sum(a, a, b)", {"Conv": 1, "Relu": 1, "Sum": 1}),
    ],
)
def test_a_sum_of_equal_terms_is_a_factor(body: str, left: dict[str, int]) -> None:
    model = parse(f"(double[1,4,5,5] x) => (double[A,B,C,D] y) {{ {body} }}", w=normal(4, 4, 1, 1))
    result, _, _ = run(model, CleanUp(), FoldAffine())
    assert ops(result) == left
    same(model, result, x=normal(1, 4, 5, 5))


@pytest.mark.parametrize("type_", ["int32", "int64"])
def test_a_sum_of_equal_integers_stays(type_: str) -> None:
    model = parse(f"({type_}[4] x) => ({type_}[A] y) {{ a = Add(x, x) y = Mul(a, k) }}", k=np.array(3, type_))
    assert ops(run(model, CleanUp())[0]) == {"Add": 1, "Mul": 1}


@pytest.mark.parametrize(
    ("call", "bounds"),
    [
        ("Clip(r, low, high)", (0.0, 1.0)),
        ("Clip(r, half, high)", (0.5, 1.0)),
        ("Clip(r, , high)", (0.0, 1.0)),
        ("Clip(r, low)", (0.0, None)),
        ("Clip(r)", (0.0, None)),
        ("Clip(r, low, low)", None),  # the upper bound is below zero
        ("Clip(r, k, high)", None),
        ("Clip(r, low, k)", None),
    ],
)
def test_a_clip_absorbs_a_relu(call: str, bounds: tuple[float, float | None] | None) -> None:
    held = {"low": np.float64(-1), "half": np.float64(0.5), "high": np.float64(1)}
    named = {k: v for k, v in held.items() if k in call}
    model = parse(f"(double[6] x, double k) => (double[N] y) {{ r = Relu(x) y = {call} }}", **named)
    result, _, _ = run(model, CleanUp())
    assert ops(result) == ({"Clip": 1} if bounds else {"Relu": 1, "Clip": 1})
    x = np.array([-2.0, -0.5, 0.0, 0.3, 2.0, np.nan])
    expected, found = (evaluate(m, x=x, k=np.float64(0.25))[0] for m in (model, result))
    np.testing.assert_array_equal(found, expected)
    if bounds:
        np.testing.assert_array_equal(found[:5], np.clip(x[:5], *bounds))


def test_a_clip_with_attributes_absorbs_a_relu() -> None:
    model = parse("(float[4] x) => (float[N] y) { r = Relu(x) y = Clip<min=-1.0, max=2.0>(r) }")
    model.opset_import[0].version = 9
    result, _, _ = run(model, CleanUp())
    assert ops(result) == {"Clip": 1}
    attributes = {a.name: a.f for a in result.graph.node[0].attribute}
    assert attributes == {"min": 0.0, "max": 2.0}


def test_a_relu_that_others_read_stays() -> None:
    model = parse("(double[4] x) => (double[N] y, double[M] z) { r = Relu(x) y = Clip(r) z = Neg(r) }")
    assert ops(run(model, CleanUp())[0])["Relu"] == 1
